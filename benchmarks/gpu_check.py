"""The one script to run when a GPU is at hand: is everything right on this machine, and how fast is it?

    python benchmarks/gpu_check.py --out gpu_check.json       # every part, at most 6 minutes
    python benchmarks/gpu_check.py --only speed --minutes 10  # one part
    python benchmarks/gpu_check.py                            # without a GPU: tiny sizes; what needs CUDA is skipped

The parts, in the order of what matters most, are the table PARTS. Each runs in a process of its own with a limit of time, so
one that crashes the device, hangs or runs out of memory leaves the others alone. The JSON is written after every point: a
run that is cut off keeps what it has. A part that cannot run here says why under `skipped`. Exit status 1: a part failed,
or a point is not `ok`. `exactness`, `rounding`, `speed` and `lengths` need torch, transformers and this checkout alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from engine_stand_in import Trainer, nudged, sampled
from gpu_speed import SHAPES, TINY, distance, qwen, seconds, workload
from gpu_speed import speed as speed_points
from tiny_models import TEXT_FAMILIES, VISION_FAMILIES, build, group, redraw
from torch import Tensor
from workload import as_loaded

from lingshu_rl.checks.gap import Gap
from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import PackedRow, pack
from lingshu_rl.types import TokenGroup

Points = Iterator[dict[str, Any]]
ROOT = Path(__file__).resolve().parent.parent
START = time.perf_counter()
EXACT = 1e-4  # float32: nats, and relative for gradients
FLEX_FAMILIES = ("qwen2_5_vl", "gemma3")  # each is compiled: a plain causal one, and one with windows and image blocks


@dataclass(frozen=True)
class Options:
    """cuda: device "cuda", else "cpu". tiny: sizes that a CPU runs in seconds. seconds: of the part."""

    device: str
    tiny: bool
    repeats: int
    seconds: float

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


class Skip(Exception):
    """The part cannot run here; the message says why."""


def need(condition: bool, reason: str) -> None:
    if not condition:
        raise Skip(reason)


def log(message: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {message}", file=sys.stderr, flush=True)


# Exactness: shared rows of small models of every family against unshared ones -------------------------------------------


def ragged_groups(family: str) -> list[TokenGroup]:
    """Ragged prompts and completions, one image, two images, and a prompt without any."""
    images = family in VISION_FAMILIES
    return [
        group(family, "one image", [7, 1, 12, 30], images=1 if images else 0),
        group(family, "two images", [5, 9, 40], images=2 if images else 0, text=90),
        group(family, "text", [4, 4], text=5),
    ]


def scored(model: Any, rows: list[PackedRow], weights: list[list[Tensor]], attention: str) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """All log-probs in the order of the groups, and the gradients of their weighted sum."""
    model.zero_grad()
    found: dict[tuple[int, int], Tensor] = {}
    for row in rows:
        logprobs_T = completion_logprobs(model, row, attention=attention, entropy=True).logprobs_T
        parts = logprobs_T.split([n for *_, n in row.members])
        total = torch.zeros((), device=logprobs_T.device)
        for (g, m, _), part in zip(row.members, parts, strict=True):
            found[g, m] = part.detach().float().cpu()
            total = total + (part * weights[g][m].to(part.device)).sum()
        total.backward()
    gradients = {name: p.grad.detach().float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat([found[key] for key in sorted(found)]), gradients


def exact_points(family: str, device: str, backend: str) -> Points:
    """Shared rows in float32 and bfloat16 against unshared rows of the same dtype, and those against float32."""
    torch.manual_seed(0)
    model = build(family).to(device)
    groups = ragged_groups(family)
    weights = [[torch.randn(len(c)) for c in g.completions] for g in groups]
    truth, true_gradients = scored(model, pack(groups, model, 1, "dense"), weights, "sdpa")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        name = str(dtype).removeprefix("torch.")
        own, own_gradients = scored(as_loaded(model), pack(groups, model, 1, "dense"), weights, "sdpa")
        cost = (own - truth).abs()
        logprobs, gradients = scored(model, pack(groups, model, 1024), weights, backend)
        gap = (logprobs - own).abs()
        point = {
            "family": family, "dtype": name, "attention": backend,
            "logprob_gap_max": float(gap.max()), "logprob_gap_mean": float(gap.mean()),
            "gradient_gap": distance(gradients, own_gradients),
            "dtype_gap_mean": float(cost.mean()), "dtype_gradient_gap": distance(own_gradients, true_gradients),
        }  # fmt: skip
        if name == "float32":
            point["ok"] = max(point["logprob_gap_max"], point["gradient_gap"]) < EXACT
        else:  # sharing may not cost more than rounding does
            near = point["logprob_gap_mean"] < max(point["dtype_gap_mean"], 0.005)
            point["ok"] = near and point["gradient_gap"] < max(2 * point["dtype_gradient_gap"], 0.05)
        yield point


def exactness(options: Options) -> Points:
    for family in (*VISION_FAMILIES, *TEXT_FAMILIES):
        yield from exact_points(family, options.device, "sdpa")


def flex(options: Options) -> Points:
    need(options.cuda, "flex attention has no backward on a CPU")
    for family in FLEX_FAMILIES:
        yield from exact_points(family, options.device, "flex")


# Rounding: what the checks on the first batch see in bfloat16 -----------------------------------------------------------


def rounding(options: Options) -> Points:
    """Gaps, in nats, of a trainer in shared rows: to dense rows, to samples drawn token by token with a cache, which is what
    an engine does, and to those samples after a small change of its weights. The limits in CheckConfig stand between."""
    shape = TINY if options.tiny else SHAPES["0.75B"]
    model, image = qwen(shape, options.device)
    redraw(model)
    model.eval()
    prompts = [(g.prompt_ids, g.vision) for g in (workload(shape, 1, image, seed) for seed in range(4))]
    groups = sampled(model, prompts, (image, image - 1), max_tokens=min(shape.completion, 64))
    tokens, engine = [g.tokens for g in groups], [g.rollout_logprobs for g in groups]
    trainer = Trainer(model, (image, image - 1))
    own = trainer.logprobs(tokens)
    gaps = {"engine": Gap.of(own, engine), "dense": Gap.of(own, trainer.logprobs(tokens, "dense"))}
    gaps["changed weights"] = Gap.of(Trainer(nudged(model, 0.5), (image, image - 1)).logprobs(tokens), engine)
    ok = gaps["engine"].mean < 0.5 * gaps["changed weights"].mean
    yield {
        "tokens": sum(map(len, engine[0])) * len(engine),
        "ok": ok,
        **{name: asdict(gap) for name, gap in gaps.items()},
    }


# Runs: three steps of the recipe, with the real engine ------------------------------------------------------------------


RUN = ["train.steps=3", "train.prompts_per_step=16", "train.warmup_steps=0", "eval.limit=16", "eval.controls=[]",
       "loss.kl_coef=0", "rollout.vllm.enforce_eager=true"]  # fmt: skip
COLOCATED = [*RUN, "rollout.placement=colocate"]  # the engine sleeps during the update and wakes with the new weights
NCCL = [*RUN, "rollout.weight_transfer=nccl", "devices.policy=[0]", "devices.rollout=[1]"]


def colocated(options: Options) -> Points:
    need(options.cuda, "needs CUDA")
    yield short_run(COLOCATED, options.seconds)


def nccl(options: Options) -> Points:
    need(options.cuda, "needs CUDA")
    need(torch.cuda.device_count() > 1, "needs two GPUs: NCCL takes no two ranks on one")
    yield short_run(NCCL, options.seconds)


def short_run(settings: list[str], limit_s: float) -> dict[str, Any]:
    """The figures of the first batch, whose checks stop a run that is wrong, and the gap of every step: weights that did not
    arrive would open it from the second on."""
    need_packages("vllm", "deepspeed", "omegaconf")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "recipes/grpo_medvqa.py", *settings, f"run.dir={run}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            # Told to end while there is time left, the run stops its own servers.
            signal.signal(signal.SIGALRM, lambda *_: process.terminate())
            signal.alarm(max(1, int(limit_s - 15)))
            output, _ = process.communicate()
            signal.alarm(0)
        if process.returncode:
            raise RuntimeError(f"the run ended with status {process.returncode}:\n{output[-3000:]}")
        summary = json.loads((run / "summary.json").read_text())
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gaps = [step["policy/rollout_gap"] for step in steps]
    return {
        "ok": max(gaps) < 0.1, "gap_by_step": gaps, "weight_sync_s": [step["time/weight_sync"] for step in steps],
        "seconds_by_phase": summary["seconds_by_phase"],
        **{key: value for key, value in summary.items() if key.endswith("_first_step")},
    }  # fmt: skip


def need_packages(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    need(not missing, f"not installed: {', '.join(missing)}")


def sleep(options: Options) -> Points:
    """An engine that sleeps gives its memory back, and says the same when it wakes."""
    need(options.cuda, "needs CUDA")
    need_packages("vllm", "omegaconf")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from lingshu_rl.model.loading import model_path

    free = [torch.cuda.mem_get_info()[0]]
    llm = LLM(str(model_path("demo")), enable_sleep_mode=True, enforce_eager=True, max_model_len=512,
              gpu_memory_utilization=0.5)  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=16)
    prompts = [{"prompt_token_ids": list(range(20, 60))}]
    before = llm.generate(prompts, greedy)[0].outputs[0].token_ids
    free.append(torch.cuda.mem_get_info()[0])
    llm.sleep(level=1)
    free.append(torch.cuda.mem_get_info()[0])
    llm.wake_up()
    same = llm.generate(prompts, greedy)[0].outputs[0].token_ids == before
    given_back = (free[2] - free[1]) / (free[0] - free[1])
    yield {"free_gb": [x / 2**30 for x in free], "share_given_back": given_back, "ok": same and given_back > 0.5}


def speed(options: Options) -> Points:
    yield from speed_points(options.device, options.tiny, options.repeats)


# Lengths: flex attention over rows that are all different ---------------------------------------------------------------


def lengths(options: Options) -> Points:
    """A run has a new length in every row; after the first few, none may compile again."""
    need(options.cuda, "flex attention has no backward on a CPU")
    model = build("qwen2_5_vl").to(options.device, torch.bfloat16)
    for number, text in enumerate((40, 300, 77, 513, 129, 1000, 256, 640)):
        (row,) = pack([group("qwen2_5_vl", "a", [9, 30, 17], images=1, text=text)], model, 1 << 20)
        graphs = compiled_graphs()
        spent = seconds(
            model, lambda row=row: completion_logprobs(model, row, attention="flex").logprobs_T.sum().backward()
        )
        again = compiled_graphs() - graphs
        yield {"tokens": row.tokens, "seconds": spent, "compiled": again, "ok": number < 4 or not again}


def compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


# The parts, and what runs them ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    work: Callable[[Options], Points]
    seconds: float  # at most


PARTS = {
    "exactness": Part(exactness, 60),
    "rounding": Part(rounding, 60),
    "colocated": Part(colocated, 150),
    "speed": Part(speed, 240),
    "nccl": Part(nccl, 150),
    "flex": Part(flex, 120),
    "lengths": Part(lengths, 60),
    "sleep": Part(sleep, 90),
}


def child(work: Callable[[Options], Points], options: Options, pipe: Connection) -> None:
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 gaps must show float32 arithmetic
    try:
        for point in work(options):
            pipe.send(("point", point))
    except Skip as reason:
        pipe.send(("skipped", str(reason)))
    except BaseException:
        pipe.send(("error", traceback.format_exc(limit=-4)))
    pipe.send(("end", None))


def run_part(part: Part, options: Options, keep: Callable[[dict[str, Any]], None]) -> None:
    """Runs the part in a process of its own; `keep` gets its entry after every point."""
    entry: dict[str, Any] = {"points": []}
    start = time.perf_counter()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(part.work, options, theirs))
    process.start()
    theirs.close()
    kind = ""
    while kind != "end":
        if not ours.poll(max(0.0, start + options.seconds - time.perf_counter())):
            entry["cut_off_after_s"] = options.seconds
            break
        try:
            kind, value = ours.recv()
        except EOFError:
            process.join()
            entry["error"] = f"the process ended with status {process.exitcode}"
            break
        if kind == "point":
            entry["points"].append(value)
        elif kind != "end":
            entry[kind] = value
        entry["seconds"] = round(time.perf_counter() - start, 1)
        keep(entry)
    process.kill()
    process.join()
    keep(entry)


def main() -> int:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not open one before the fork
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds; always on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    parser.add_argument("--out", type=Path, help="JSON to write, after every point; it is printed in any case")
    given = parser.parse_args()
    found: dict[str, Any] = {
        "device": given.device, "gpus": torch.cuda.device_count() if given.device == "cuda" else 0,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]},
        "parts": {},
    }  # fmt: skip

    def keep(name: str, entry: dict[str, Any]) -> None:
        found["parts"][name] = entry
        found["seconds"] = round(time.perf_counter() - START, 1)
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")

    for name in given.only:
        part = PARTS[name]
        left = min(part.seconds, 60 * given.minutes - (time.perf_counter() - START))
        if left < 1:
            keep(name, {"points": [], "skipped": f"no time is left of {given.minutes:g} minutes"})
        else:
            tiny = given.tiny or given.device == "cpu"
            run_part(part, Options(given.device, tiny, given.repeats, left), partial(keep, name))
        entry = found["parts"][name]
        log(f"{name}: {entry.get('skipped') or entry.get('error') or str(len(entry['points'])) + ' points'}")
    print(json.dumps(found, indent=1))
    return 1 if any(failed(entry) for entry in found["parts"].values()) else 0


def failed(entry: dict[str, Any]) -> bool:
    return "error" in entry or any(not point.get("ok", True) for point in entry["points"])


if __name__ == "__main__":
    sys.exit(main())
