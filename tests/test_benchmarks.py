"""Every benchmark runs in its smallest form and writes what its readers expect. Their figures decide nothing here."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# What a machine with only torch, transformers and this checkout does not have.
ABSENT = ("omegaconf", "rapidfuzz", "rich", "pyarrow", "peft", "deepspeed", "trl", "vllm", "datasets", "starlette", "PIL",
          "torchvision", "accelerate", "pandas", "sklearn", "matplotlib")  # fmt: skip


def bench(script, *arguments, without=()):
    """Run a benchmark in its own process, with the named packages made impossible to import."""
    code = (
        f"import runpy, sys\nfor name in {without!r}: sys.modules[name] = None\n"
        f"sys.argv = [{script!r}, *{list(map(str, arguments))!r}]\nsys.path.insert(0, 'benchmarks')\n"
        f"runpy.run_path('benchmarks/{script}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_gpu_check_needs_nothing_but_torch_and_transformers(tmp_path):
    out = tmp_path / "gpu.json"
    bench("gpu_check.py", "--device", "cpu", "--tiny", "--repeats", 1, "--only", "speed", "--out", out, without=ABSENT)
    found = json.loads(out.read_text())
    (point,) = found["speed"]
    assert not found["errors"] and point["speedup"] > 0 and point["token_ratio"] > 2
    ways = point["ways"]
    assert set(ways) == {"shared_sdpa", "dense_rows", "batch_of_4"}
    losses = [way["loss"] for way in ways.values()]
    assert max(losses) - min(losses) < 1e-2 and ways["shared_sdpa"]["gradient_gap_to_dense_rows"] < 0.05


@pytest.mark.slow
def test_the_gpu_check_finds_every_family_exact(tmp_path):
    out = tmp_path / "gpu.json"
    bench("gpu_check.py", "--device", "cpu", "--tiny", "--only", "exactness", "--out", out)
    found = json.loads(out.read_text())
    assert not found["errors"] and len(found["exactness"]) == 2 * 13
