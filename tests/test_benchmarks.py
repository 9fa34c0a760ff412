"""Every benchmark runs in its smallest form and writes what its readers expect. Their figures decide nothing here."""

import json
import os
import subprocess
import sys

import pytest
from launching import ROOT

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
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)  # fmt: skip
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


POINT = {"prompt_tokens", "completion_tokens", "group_size", "parameters", "ours_s", "trl_s", "speedup", "token_ratio",
         "ours_peak_mb", "trl_peak_mb"}  # fmt: skip


def read(out):
    found = json.loads(out.read_text())
    assert {"cpu", "cores", "threads", "load_average", "torch", "transformers"} <= set(found["machine"])
    assert out.with_suffix(".png").stat().st_size > 5000
    return found["points"]


@pytest.mark.endurance
def test_the_update_against_trl(tmp_path):
    bench("update_vs_trl.py", "--quick", "--out", tmp_path / "x" / "update.json")
    points = read(tmp_path / "x" / "update.json")
    assert len(points) == 2 and all(set(p) >= POINT and p["gradient_gap"] < 1e-4 for p in points)
    first = points[0]
    assert first["speedup"] == pytest.approx(first["trl_s"] / first["ours_s"])
    # 16 image + 60 text tokens, 6 completion tokens, 4 of them: read 4 times in full, or once with 4 x 5 more.
    assert first["token_ratio"] == pytest.approx(4 * (76 + 6) / (76 + 4 * 5))


@pytest.mark.endurance
def test_scaling(tmp_path):
    bench("scaling.py", "--quick", "--out", tmp_path / "scaling.json")
    points = read(tmp_path / "scaling.json")
    assert [p["axis"] for p in points] == ["group_size"] * 2 + ["parameters"] * 2
    assert all(set(p) >= POINT and 0 < p["peak_share"] < 1.2 and p["trl_s"] is None for p in points)


@pytest.mark.endurance
def test_the_whole_step_against_trl(tmp_path):
    bench("step_vs_trl.py", "--quick", "--out", tmp_path / "step.json")
    (point,) = read(tmp_path / "step.json")
    phases = point["seconds_by_phase"]
    assert {"rollout", "reward", "reference", "update"} <= set(phases["ours"]) & set(phases["trl"])
