"""Every benchmark runs in its smallest form and writes what its readers expect. Their figures decide nothing here."""

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time

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
    only = ("--device", "cpu", "--repeats", 1, "--only", "speed", "colocated", "--out", out)
    bench("gpu_check.py", *only, without=ABSENT)
    parts = json.loads(out.read_text())["parts"]
    (point,) = parts["speed"]["points"]
    assert point["speedup"] > 0 and point["token_ratio"] > 2 and point["row_tokens"] <= point["budget"]
    ways = point["ways"]
    assert set(ways) == {"shared_sdpa", "dense_rows", "padded_4", "padded_1"}
    losses = [way["loss"] for way in ways.values()]
    assert max(losses) - min(losses) < 1e-2 and all(way["gradient_gap"] < 0.05 for way in ways.values())
    assert ways["shared_sdpa"]["tflop"] < ways["padded_4"]["tflop"] / 2
    assert parts["colocated"]["skipped"] == "needs CUDA"


@pytest.mark.slow
def test_the_gpu_check_runs_to_its_end_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    bench("gpu_check.py", "--device", "cpu", "--repeats", 1, "--out", out)
    parts = json.loads(out.read_text())["parts"]
    skipped = {name: part["skipped"] for name, part in parts.items() if "skipped" in part}
    assert set(skipped) == {"colocated", "nccl", "flex", "lengths", "sleep"} and all(skipped.values())
    exact = parts["exactness"]["points"]
    families = {point["family"] for point in exact}
    assert len(exact) == 2 * len(families) and {"qwen2_5_vl", "qwen3_vl", "gemma3", "llama"} <= families
    assert all(point["ok"] for point in exact)
    (rounding,) = parts["rounding"]["points"]
    assert rounding["ok"] and 0 < rounding["engine"]["mean"] < rounding["changed weights"]["mean"]


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    return importlib.import_module("gpu_check")


def one_point(then):
    def work(options):
        yield {"n": 1}
        then()

    return work


def never_ends():
    while True:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("then", "key", "value"),
    [
        (never_ends, "cut_off_after_s", 2.0),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "error", "the process ended with status -11"),
        (lambda: 1 / 0, "error", "ZeroDivisionError"),
    ],
)
def test_a_part_of_the_gpu_check_that_hangs_or_dies_keeps_its_points(gpu_check, then, key, value):
    kept = []
    limit_s = 2.0 if then is never_ends else 60.0  # a busy machine may take seconds to see a process die
    options = gpu_check.Options("cpu", tiny=True, repeats=1, seconds=limit_s)
    gpu_check.run_part(gpu_check.Part(one_point(then), limit_s), options, lambda entry: kept.append(json.dumps(entry)))
    assert json.loads(kept[0])["points"] == [{"n": 1}]
    last = json.loads(kept[-1])
    assert last["points"] == [{"n": 1}] and (value == last[key] or value in last[key])
    assert gpu_check.failed(last) == (key == "error") and gpu_check.failed({"points": [{"ok": False}]})


def test_parts_of_the_gpu_check_that_no_time_is_left_for_say_so(gpu_check, tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--minutes", "0", "--out", str(out)])
    assert gpu_check.main() == 0
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == set(gpu_check.PARTS) and all("no time is left" in part["skipped"] for part in parts.values())


def test_the_gpu_check_starts_runs_whose_settings_exist(gpu_check):
    """Contract: those runs need CUDA, so here only their settings are read."""
    from lingshu_rl.planning.given import load_config

    assert load_config(None, gpu_check.COLOCATED).rollout.placement == "colocate"
    assert load_config(None, gpu_check.NCCL).rollout.weight_transfer == "nccl"


@pytest.mark.slow
def test_the_engine_has_what_the_gpu_check_asks_of_it():
    """Contract with vLLM for the part that needs CUDA: sleeping and waking."""
    import dataclasses

    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    assert "level" in inspect.signature(LLM.sleep).parameters and callable(LLM.wake_up)
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {"enable_sleep_mode", "enforce_eager", "max_model_len", "gpu_memory_utilization"} <= fields


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
def test_the_update_of_a_hybrid_and_of_families_that_cannot_share_against_trl(tmp_path):
    bench("update_vs_trl.py", "--families", "--quick", "--out", tmp_path / "families.json")
    hybrid, *padded = json.loads((tmp_path / "families.json").read_text())["points"]
    assert all(set(p) >= POINT and p["gradient_gap_norm"] < 1e-4 for p in (hybrid, *padded))
    assert hybrid["token_ratio"] > 2 and padded and all(0.8 < p["token_ratio"] <= 1 for p in padded)


@pytest.mark.endurance
def test_the_update_of_many_slices_against_trl(tmp_path):
    bench("update_vs_trl.py", "--slices", "--quick", "--out", tmp_path / "slices.json")
    few, many = json.loads((tmp_path / "slices.json").read_text())["points"]
    assert all(set(p) >= POINT and p["gradient_gap_norm"] < 1e-4 for p in (few, many))
    assert (few["images"], few["image_tokens"], many["image_tokens"]) == (3, 3 * 4, 6 * 4)


@pytest.mark.endurance
def test_scaling(tmp_path):
    bench("scaling.py", "--quick", "--out", tmp_path / "scaling.json")
    points = read(tmp_path / "scaling.json")
    assert [p["axis"] for p in points] == ["group_size"] * 2 + ["parameters"] * 2
    assert all(set(p) >= POINT and 0 < p["peak_share"] < 1.2 and p["trl_s"] is None for p in points)


def test_the_parts_of_a_profiled_update_add_up_to_it(tmp_path):
    bench("profile_step.py", "--quick", "--out", tmp_path / "profile.json")
    (point,) = read(tmp_path / "profile.json")
    took = {part: times["cpu_s"] for part, times in point["parts"].items()}
    assert sum(took.values()) == pytest.approx(point["profiled_s"], rel=0.1)
    small = {"loss", "packing", "log-softmax, gather", "head"}
    assert min(took.values()) > 0 and all(took[part] < took["vision tower"] for part in small)
    assert 0 < point["peak_share"] < 1.2 and point["update_s"] > 0


@pytest.mark.endurance
def test_the_whole_step_against_trl(tmp_path):
    bench("step_vs_trl.py", "--quick", "--out", tmp_path / "step.json")
    (point,) = read(tmp_path / "step.json")
    phases = point["seconds_by_phase"]
    assert {"rollout", "reward", "reference", "update"} <= set(phases["ours"]) & set(phases["trl"])


def test_loading_is_measured_with_and_without_counting():
    found = json.loads(bench("loading.py", "--images", 120, "--texts", 120))
    assert len(found) == 8 and all(point["rows"] == 120 for point in found.values())
    for name, point in found.items():
        assert ("longest" in point) == name.endswith("counted")


@pytest.mark.slow
def test_what_a_step_costs_the_trainer_is_measured_at_several_sizes(tmp_path):
    out = tmp_path / "scale.json"
    said = bench("scale.py", "--quick", "--out", out)
    points = json.loads(out.read_text())["points"]
    assert [(p["prompts"], p["slices"], p["group_size"]) for p in points] == [
        (4, 1, 4), (8, 1, 4), (8, 1, 2), (8, 1, 4), (2, 8, 4), (2, 64, 4)
    ]  # fmt: skip
    assert all(p["cpu_s"] > 0 and p["rows"] > 0 and p["out_mb"] < 2 for p in points)
    assert "x2 prompts: processor" in said and "x2 samples: processor" in said and "x8 slices" in said
