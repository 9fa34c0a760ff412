"""How the update grows with group size, prompt, completion and model, and how much of the machine it uses.

    python benchmarks/scaling.py --out benchmarks/baselines/scaling.json

One axis is varied at a time around 144 image + 60 text prompt tokens, 24 completion tokens, G = 8, two prompts. The
share of the peak is the arithmetic that was really executed (torch's flop counter), over time, over the speed of a large
float32 matrix product measured on the same machine right before the point. Writes a plot beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode
from workload import SIZES, build_model, machine, make_groups, peak_memory, update

from lingshu_rl.packing import pack

PROMPTS, TEXT = 2, 60
# axis -> (size, image side in tokens, completion tokens, group size)
AXES = {
    "group_size": [("9M", 12, 24, g) for g in (1, 2, 4, 8, 16, 32, 64)],
    "prompt_tokens": [("9M", side, 24, 8) for side in (0, 6, 12, 18, 24)],
    "completion_tokens": [("9M", 12, c, 8) for c in (6, 12, 24, 48, 96, 192)],
    "parameters": [(size, 12, 24, 8) for size in SIZES],
}


def matmul_gflops(size: int = 1024, repeats: int = 5) -> float:
    """The best of a few float32 products of square matrices, in 10^9 operations a second."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def measure(model: Any, side: int, completion: int, group: int, repeats: int) -> dict[str, Any]:
    groups = make_groups(PROMPTS, side, TEXT, completion, group)
    advantages = [torch.randn(group).tolist() for _ in groups]

    def work() -> None:
        model.zero_grad()
        update(model, groups, advantages, token_budget=4096)

    with FlopCounterMode(display=False) as counter:
        work()
    peak = matmul_gflops()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    model.zero_grad()
    with peak_memory() as memory:
        work()
    prompt, ours_s = len(groups[0].prompt_ids), statistics.median(times)
    gflops = counter.get_total_flops() / ours_s / 1e9
    return {
        "prompt_tokens": prompt,
        "image_tokens": side**2,
        "completion_tokens": completion,
        "group_size": group,
        "prompts": PROMPTS,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ours_s": ours_s,
        "trl_s": None,
        "speedup": None,
        "token_ratio": PROMPTS * group * (prompt + completion) / sum(row.tokens for row in pack(groups, model, 4096)),
        "ours_peak_mb": memory["mb"],
        "trl_peak_mb": None,
        "gflops": gflops,
        "matmul_peak_gflops": peak,
        "peak_share": gflops / peak,
        "ours_all_s": times,
    }


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
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    models: dict[str, Any] = {}
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis, settings in AXES.items():
        for size, side, completion, group in settings:
            if size not in models:
                models = {size: build_model(SIZES[size])}  # only one in memory
            point = measure(models[size], side, completion, group, options.repeats)
            axes.setdefault(axis, []).append({"axis": axis, **point})
            print(
                f"{axis:17} {point[axis]:>9}  {point['ours_s']:6.2f} s  {point['ours_peak_mb']:5.0f} MiB  "
                f"{point['peak_share']:.0%} of {point['matmul_peak_gflops']:.0f} GFLOP/s",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    points = [point for line in axes.values() for point in line]
    options.out.write_text(json.dumps({"machine": machine(), "points": points}, indent=1) + "\n")
    plot(axes, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
