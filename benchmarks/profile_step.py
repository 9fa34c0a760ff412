"""Where the time of one policy update goes, part by part: torch's profiler over `Policy.update`, DeepSpeed and all.

    python benchmarks/profile_step.py --out benchmarks/baselines/profile_step.json --before earlier.json

Random Qwen2.5-VL, two prompts of 144 image + 60 text tokens, 24 completion tokens; shared rows at several sizes, and
padded rows once. A backward operation counts to the part whose forward made its node. `cpu_s` is time in the calling
thread, so that the parts add up to the update as profiled; where there is a CUDA device, `cuda_s` is that of the
kernels that a part started (the calling thread then mostly waits in `DeepSpeed`, which runs the backward pass). The
update is also timed without the profiler, in turns with a large float32 matrix product, the yardstick of `peak_share`;
on a machine with other work compare the processor time, with `--threads 1`. Writes a plot of stacked parts beside the
JSON, that of `--before` among them. `--quick` is one small point, in seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from workload import SIZES, build_model, make_groups, time_in_turns, write

from lingshu_rl import losses, policy
from lingshu_rl.model import logprobs
from lingshu_rl.planning.given import load_config
from lingshu_rl.types import TrainGroup

TOWER, PROJECTOR, ATTENTION, MLP = "vision tower", "projector", "attention", "MLP"
REST, HEAD, SOFTMAX, LOSS = "norms, rotary, embedding", "head", "log-softmax, gather", "loss"
OPTIMIZER, DEEPSPEED, PACKING, PYTHON = "optimiser", "DeepSpeed", "packing", "Python between operations"
PARTS = (TOWER, PROJECTOR, ATTENTION, MLP, REST, HEAD, SOFTMAX, LOSS, OPTIMIZER, DEEPSPEED, PACKING, PYTHON)
WHOLE = "one update"
# Which modules a part is, by how their names end: of the whole model, and of its decoder.
ANYWHERE = {TOWER: r"visual|vision_tower|vision_model", PROJECTOR: r"merger|multi_modal_projector|connector"}
IN_DECODER = {ATTENTION: r"self_attn|linear_attn|mixer", MLP: r"mlp|feed_forward"}
PROMPTS, SIDE, TEXT, COMPLETION, BUDGET = 2, 12, 60, 24, 4096
GRID = [("9M", 8, "shared"), ("9M", 16, "shared"), ("9M", 8, "dense"), ("93M", 8, "shared")]
QUICK = [("3M", 2, "shared")]
SQUARE = 1024  # side of the matrices of the yardstick


def make_policy(size: str, more: Sequence[str] = ()) -> policy.Policy:
    """more: settings of the run over those here."""
    from accelerate.state import AcceleratorState

    with tempfile.TemporaryDirectory() as folder:
        build_model(SIZES[size]).save_pretrained(folder)
        AcceleratorState._reset_state()  # the next policy brings its own DeepSpeed settings
        settings = [f"model={folder}", f"packing.token_budget={BUDGET}", f"rollout.max_tokens={COMPLETION}"]
        return policy.Policy(load_config(None, [*settings, *more]), on_gpu=torch.cuda.is_available())


def train_groups(group: int) -> list[TrainGroup]:
    advantages = torch.randn(group, generator=torch.Generator().manual_seed(7)).tolist()
    found = []
    for tokens in make_groups(PROMPTS, SIDE, TEXT, COMPLETION, group):
        elsewhere = [(-8.0,) * len(completion) for completion in tokens.completions]  # a random model's, about
        found.append(TrainGroup(tokens, tuple(advantages), tuple(elsewhere), tuple(map(torch.tensor, elsewhere))))
    return found


@contextmanager
def marked(trainer: policy.Policy) -> Iterator[None]:
    """While open, the parts' modules and functions run in profiler ranges of their names."""

    def ranged(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(part):
                return call(*args, **kwargs)

        return run

    calls = [
        (policy, "forget_gradients", DEEPSPEED), (policy, "row_tensors", PACKING), (losses, "policy_loss", LOSS),
        (logprobs, "attention_masks", ATTENTION), (trainer, "_deal", PACKING), (trainer.engine, "step", DEEPSPEED),
        (trainer.engine, "backward", DEEPSPEED),
    ]  # fmt: skip
    base = trainer.module
    modules = [(REST, base), (HEAD, base.get_output_embeddings())]
    for top, parts in ((base, ANYWHERE), (base.get_decoder(), IN_DECODER)):
        for part, names in parts.items():
            modules += [(part, m) for n, m in top.named_modules() if re.search(rf"(^|\.)({names})$", n)]
    with ExitStack() as stack:
        for owner, name, part in calls:
            stack.enter_context(patch.object(owner, name, ranged(part, getattr(owner, name))))
        for part, module in modules:
            entered: list[Any] = []

            def enter(*_: Any, part: str = part, entered: list[Any] = entered) -> None:
                entered.append(record_function(part))
                entered[-1].__enter__()

            def leave(*_: Any, entered: list[Any] = entered) -> None:
                entered.pop().__exit__(None, None, None)

            for handle in (module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)):
                stack.callback(handle.remove)
        yield


def seconds_by_part(events: Sequence[Any]) -> dict[str, dict[str, float]]:
    """What each part took, of all events of the profiler between the ends of `WHOLE`.

    An event belongs to the nearest range around it; a backward one to the part of the forward that has its number.
    """
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    (whole,) = (e for e in host if e.name == WHOLE)
    made: dict[tuple[int, int], Any] = {}  # the last with a number made the node; others only saw it coming
    for event in sorted(host, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not event.fwd_thread:
            made[event.thread, event.sequence_nr] = event

    def part_of(event: Any) -> str:
        while event is not None:
            if event.name in PARTS:
                return str(event.name)
            if event.name.startswith("Optimizer."):
                return OPTIMIZER
            if event.fwd_thread and (event.fwd_thread, event.sequence_nr) in made:
                event = made[event.fwd_thread, event.sequence_nr]
            else:
                event = event.cpu_parent
        return PYTHON

    found = {part: {"cpu_s": 0.0, "cuda_s": 0.0} for part in PARTS}
    for event in host:
        if not whole.time_range.start <= event.time_range.start <= whole.time_range.end:
            continue
        part = part_of(event)
        if part == HEAD and event.name not in (HEAD, "aten::mm", "aten::addmm_"):
            part = SOFTMAX
        found[part]["cuda_s"] += event.self_device_time_total / 1e6
        if event.thread == whole.thread:
            between = event.name in PARTS and part != DEEPSPEED
            found[PYTHON if between else part]["cpu_s"] += event.self_cpu_time_total / 1e6
    return found


def measure(trainer: policy.Policy, group: int, layout: str, repeats: int) -> dict[str, Any]:
    groups, device = train_groups(group), trainer.accelerator.device
    trainer.layout = layout

    def update() -> None:
        trainer.update(groups, 0)
        if device.type == "cuda":
            torch.cuda.synchronize()

    square = torch.randn(SQUARE, SQUARE, device=device)
    with FlopCounterMode(display=False) as counter:
        update()
    timings = time_in_turns({"update": update, "square": lambda: torch.mm(square, square).sum().item()}, repeats + 1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    walls, runs = [], []
    for _ in range(repeats):
        with marked(trainer), profile(activities=activities) as profiler:
            began = time.perf_counter()
            with record_function(WHOLE):
                update()
            walls.append(time.perf_counter() - began)
        runs.append(seconds_by_part(profiler.events()))
    middle = walls.index(statistics.median_low(walls))
    peak = 2 * SQUARE**3 / timings["square"].best / 1e9
    gflops = counter.get_total_flops() / timings["update"].best / 1e9
    return {
        "parameters": trainer.parameters, "group_size": group, "prompts": PROMPTS, "layout": layout,
        "device": device.type, "update_s": timings["update"].best,
        "update_median_s": statistics.median(timings["update"].wall_s), "update_all_s": timings["update"].wall_s,
        "update_cpu_s": min(timings["update"].cpu_s),
        "gflops": gflops, "matmul_peak_gflops": peak, "peak_share": gflops / peak,
        "profiled_s": walls[middle], "parts": runs[middle],
    }  # fmt: skip


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar of parts for every point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(10, 1.6 + 0.5 * len(points)), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    names = [p["name"] for p in points]
    left = [0.0] * len(points)
    for n, part in enumerate(PARTS):
        widths = [p["parts"][part]["cuda_s" if p["device"] == "cuda" else "cpu_s"] for p in points]
        panel.barh(names, widths, left=left, label=part, color=colours[n])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    panel.invert_yaxis()
    panel.set(xlabel="seconds of one update, as profiled")
    figure.legend(ncols=6, fontsize="small", loc="outside lower center")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; a PNG goes beside it")
    parser.add_argument("--before", type=Path, help="JSON of an earlier state, shown in the plot as well")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--points", type=int, help="only the first so many points")
    parser.add_argument("--quick", action="store_true", help="one small point")
    parser.add_argument("settings", nargs="*", help="of the run, as deepspeed.zero_optimization.stage=0")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    points: list[dict[str, Any]] = []
    built, trainer = "", None
    for size, group, layout in (QUICK if options.quick else GRID)[: options.points]:
        if size != built:
            built, trainer = size, make_policy(size, options.settings)  # only one in memory
        point = measure(trainer, group, layout, 1 if options.quick else options.repeats)
        points.append({"name": f"{size}, G = {group}, {layout}", **point})
        print(
            f"{points[-1]['name']}: {point['update_s']:.3f} s (median {point['update_median_s']:.3f}, processor "
            f"time {point['update_cpu_s']:.3f} s), as profiled "
            f"{point['profiled_s']:.3f} s, {point['peak_share']:.0%} of {point['matmul_peak_gflops']:.0f} GFLOP/s"
        )
        for part, took in point["parts"].items():
            print(f"  {part:27} {1e3 * took['cpu_s']:8.1f} ms {1e3 * took['cuda_s']:8.1f} ms on CUDA", flush=True)
        write(options.out, points)
    earlier = json.loads(options.before.read_text())["points"] if options.before else []
    plot([{**p, "name": f"before: {p['name']}"} for p in earlier] + points, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
