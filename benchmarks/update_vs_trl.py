"""The update against TRL's: log-probs, loss and backward of one model on the same tokens, in turns, in one process.

    python benchmarks/update_vs_trl.py --out benchmarks/baselines/update_vs_trl.json

TRL runs in its fastest CPU setting: float32, no gradient checkpointing, no reference, the faster of one batch of all
samples and one batch a prompt (found for each point). Both compute the entropy metric. Every point compares the two
gradients before anything is timed. Times are medians over the repeats; memory is what the process's resident size rises
by during one pass, gradients included. Writes a plot beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from workload import SIZES, build_model, machine, make_groups, peak_memory, trl_inputs, trl_trainer, update

from lingshu_rl.packing import pack

PROMPTS, TEXT = 2, 60
# (image side in tokens, completion tokens, group size); the first is the reference point: 144 image + 60 text tokens.
POINTS = [
    (12, 24, 8), (12, 24, 2), (12, 24, 4), (12, 24, 16), (12, 24, 32),
    (0, 24, 8), (6, 24, 8), (18, 24, 8), (12, 6, 8), (12, 96, 8),
]  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(model: Any, side: int, completion: int, group: int, repeats: int) -> dict[str, Any]:
    """One point of the grid: both updates on the same tokens."""
    groups = make_groups(PROMPTS, side, TEXT, completion, group)
    generator = torch.Generator().manual_seed(7)
    advantages = [torch.randn(group, generator=generator).tolist() for _ in groups]
    trainer = trl_trainer(model, group, PROMPTS)
    whole = [trl_inputs(groups, advantages)]
    # One prompt at a time: the mean over the micro-batch is divided by their number, as gradient accumulation does.
    single = [trl_inputs([g], [a]) for g, a in zip(groups, advantages, strict=True)]

    def theirs(batches: list[dict[str, Any]]) -> float:
        model.zero_grad()
        trainer.current_gradient_accumulation_steps = len(batches)
        total = 0.0
        for batch in batches:
            loss = trainer._compute_loss(model, batch)
            loss.backward()
            total += loss.item()
        return total

    def ours() -> float:
        model.zero_grad()
        return update(model, groups, advantages, token_budget=4096)

    settings = {"one batch": lambda: theirs(whole), "one batch a prompt": lambda: theirs(single)}
    expected = theirs(whole)
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss = ours()
    gap = max(
        ((p.grad - want[name]).abs().max() / want[name].abs().max().clamp_min(1e-12)).item()
        for name, p in model.named_parameters()
    )
    fastest = min(settings, key=lambda name: seconds(settings[name]))
    trl = settings[fastest]
    times: dict[str, list[float]] = {"ours": [], "trl": []}
    for _ in range(repeats):
        times["trl"].append(seconds(trl))
        times["ours"].append(seconds(ours))
    peaks = {}
    for name, work in (("trl", trl), ("ours", ours)):
        model.zero_grad()
        with peak_memory() as peak:
            work()
        peaks[name] = peak["mb"]
    prompt = len(groups[0].prompt_ids)
    ours_s, trl_s = statistics.median(times["ours"]), statistics.median(times["trl"])
    rows = pack(groups, model, 4096)
    return {
        "prompt_tokens": prompt,
        "image_tokens": side**2,
        "completion_tokens": completion,
        "group_size": group,
        "prompts": PROMPTS,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ours_s": ours_s,
        "trl_s": trl_s,
        "speedup": trl_s / ours_s,
        "token_ratio": PROMPTS * group * (prompt + completion) / sum(row.tokens for row in rows),
        "ours_peak_mb": peaks["ours"],
        "trl_peak_mb": peaks["trl"],
        "trl_setting": fastest,
        "loss_gap": abs(loss - expected),
        "gradient_gap": gap,
        "ours_all_s": times["ours"],
        "trl_all_s": times["trl"],
    }


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Seconds over the group size, and the speedup over each axis of the grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "group_size": "group size G",
        "prompt_tokens": "prompt tokens P",
        "completion_tokens": "completion tokens C",
    }
    first = points[0]
    figure, (timing, *panels) = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        others = [name for name in labels if name != key]
        line = sorted((p for p in points if all(p[o] == first[o] for o in others)), key=lambda p: p[key])
        places = [p[key] for p in line]
        panel.plot(places, [p["speedup"] for p in line], "o-")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(xlabel=label, ylabel="times faster than TRL", xlim=(0, None), ylim=(0, None))
        if key == "group_size":
            timing.plot(places, [p["trl_s"] for p in line], "s-", label="TRL")
            timing.plot(places, [p["ours_s"] for p in line], "o-", label="lingshu-rl")
            timing.set(xlabel=label, ylabel="seconds an update", xlim=(0, None), ylim=(0, None))
            timing.legend()
    at = ", ".join(f"{label.split()[-1]} = {first[key]}" for key, label in labels.items())
    figure.suptitle(f"one update of {PROMPTS} prompts; one axis varied around {at}")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; a PNG goes beside it")
    parser.add_argument("--size", choices=SIZES, default="9M")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--points", type=int, default=len(POINTS), help="only the first so many points")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = build_model(SIZES[options.size])
    points = []
    for side, completion, group in POINTS[: options.points]:
        point = measure(model, side, completion, group, options.repeats)
        points.append(point)
        print(
            f"P={point['prompt_tokens']:4} C={completion:3} G={group:2}  TRL {point['trl_s']:6.2f} s  "
            f"ours {point['ours_s']:6.2f} s  {point['speedup']:5.2f}x  memory {point['trl_peak_mb']:.0f} -> "
            f"{point['ours_peak_mb']:.0f} MiB  gradient gap {point['gradient_gap']:.0e}",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "points": points}, indent=1) + "\n")
    plot(points, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
