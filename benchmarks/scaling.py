"""How the update grows with group size, prompt, completion and model, and how much of the machine it uses.

    python benchmarks/scaling.py --out benchmarks/baselines/scaling.json

One axis is varied at a time around 144 image + 60 text prompt tokens, 24 completion tokens, G = 8, two prompts. The
share of the peak is the arithmetic that was really executed (torch's flop counter), over time, over the speed of a large
float32 matrix product measured in turns with it. Times are the best of the repeats. Writes a plot beside the JSON. About
4 minutes on two cores; `--quick` runs two small points of two axes in seconds, to see that it works.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode
from workload import SIZES, build_model, make_groups, peak_memory, point, time_in_turns, update, write

PROMPTS, TEXT, BUDGET = 2, 60, 4096
# axis -> (size, image side in tokens, completion tokens, group size)
AXES = {
    "group_size": [("9M", 12, 24, g) for g in (1, 2, 4, 8, 16, 32, 64)],
    "prompt_tokens": [("9M", side, 24, 8) for side in (0, 6, 12, 18, 24)],
    "completion_tokens": [("9M", 12, c, 8) for c in (6, 12, 24, 48, 96, 192)],
    "parameters": [(size, 12, 24, 8) for size in SIZES],
}


QUICK = {
    "group_size": [("3M", 4, 6, 2), ("3M", 4, 6, 4)],
    "parameters": [("3M", 4, 6, 4), ("9M", 4, 6, 4)],
}
SQUARE = 1024  # side of the matrices of the yardstick


def measure(model: Any, side: int, completion: int, group: int, repeats: int) -> dict[str, Any]:
    groups = make_groups(PROMPTS, side, TEXT, completion, group)
    advantages = [torch.randn(group).tolist() for _ in groups]
    a, b = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)

    def work() -> None:
        model.zero_grad()
        update(model, groups, advantages, BUDGET)

    with FlopCounterMode(display=False) as counter:
        work()
    torch.mm(a, b)
    timings = time_in_turns({"ours": work, "square": lambda: torch.mm(a, b)}, repeats)
    model.zero_grad()
    with peak_memory() as memory:
        work()
    gflops = counter.get_total_flops() / timings["ours"].best / 1e9
    peak = 2 * SQUARE**3 / timings.pop("square").best / 1e9
    share = {"gflops": gflops, "matmul_peak_gflops": peak, "peak_share": gflops / peak}
    return point(model, groups, BUDGET, timings, {"ours": memory["mb"]}, **share)


def plot(axes: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds over each axis, with the share of the matrix-multiply peak beside every point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(axes), figsize=(4 * len(axes), 3.6), layout="constrained")
    for panel, (axis, points) in zip(panels, axes.items(), strict=True):
        panel.plot([p[axis] for p in points], [p["ours_s"] for p in points], "o-")
        for p in points:
            panel.annotate(f"{p['peak_share']:.0%}", (p[axis], p["ours_s"]), (5, -11), textcoords="offset points")
        panel.set(xlabel=axis.replace("_", " "), xlim=(0, None), ylim=(0, None))
        panel.margins(0.12)
    panels[0].set_ylabel("seconds an update")
    figure.suptitle("one update of two groups; labels: share of the measured matrix-multiply peak")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; a PNG goes beside it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="few and small points, once each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    repeats = 1 if options.quick else options.repeats
    models: dict[str, Any] = {}
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis, settings in (QUICK if options.quick else AXES).items():
        for size, side, completion, group in settings:
            if size not in models:
                models = {size: build_model(SIZES[size])}  # only one in memory
            found = measure(models[size], side, completion, group, repeats)
            axes.setdefault(axis, []).append({"axis": axis, **found})
            print(
                f"{axis:17} {found[axis]:>9}  {found['ours_s']:6.2f} s  {found['ours_peak_mb']:5.0f} MiB  "
                f"{found['peak_share']:.0%} of {found['matmul_peak_gflops']:.0f} GFLOP/s",
                flush=True,
            )
            write(options.out, [found for line in axes.values() for found in line])
    plot(axes, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
