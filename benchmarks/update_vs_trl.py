"""The update against TRL's: log-probs, loss and backward of one model on the same tokens, in turns, in one process.

    python benchmarks/update_vs_trl.py --out benchmarks/baselines/update_vs_trl.json
    python benchmarks/update_vs_trl.py --families --out benchmarks/baselines/update_families.json
    python benchmarks/update_vs_trl.py --slices --out benchmarks/baselines/update_slices.json

The first is a grid around one point of Qwen2.5-VL, with a plot beside the JSON. The second is a hybrid, whose layers of
linear attention go on from the prompt's state, and families that cannot share a prompt and run in padded batches. The
third are prompts of 8, 16 and 32 slices of a volume, 36 tokens each.

TRL runs in its fastest CPU setting: float32, no gradient checkpointing, no reference, the faster of one batch of all
samples and one batch a prompt (found for each point). Both compute the entropy metric. Every point compares the two
gradients before anything is timed. Times are the best of the repeats (`*_median_s`, `*_cpu_s`: the medians, and processor
time); memory is what the process's resident size rises by during one pass, gradients included. Either takes about 6 minutes
on two cores; `--quick` runs small points in seconds, to see that it works.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.utils import get_total_norm
from workload import (
    HYBRID,
    OWN_POSITIONS,
    QWEN,
    SIGHTLESS,
    SIZES,
    STATE_SPACE,
    as_loaded,
    build_model,
    make_groups,
    peak_memory,
    point,
    time_in_turns,
    trl_inputs,
    trl_trainer,
    update,
    write,
)

PROMPTS, BUDGET = 2, 4096


@dataclass(frozen=True)
class Setting:
    """A point to measure. side: of each image, in tokens. ragged: completions of 1 to `completion` tokens."""

    family: str = QWEN
    side: int = 12
    text: int = 60
    completion: int = 24
    group: int = 8
    ragged: bool = False
    images: int = 1


GRID = [
    Setting(),  # the reference point: 144 image + 60 text tokens
    *(Setting(group=group) for group in (2, 4, 16, 32)),
    *(Setting(side=side) for side in (0, 6, 18)),
    *(Setting(completion=completion) for completion in (6, 96)),
]
FAMILIES_GRID = [
    *(Setting(HYBRID, group=group) for group in (4, 8, 16)),
    *(Setting(OWN_POSITIONS, ragged=ragged) for ragged in (False, True)),
    *(Setting(STATE_SPACE, side=0, text=204, ragged=ragged) for ragged in (False, True)),
]
SLICES_GRID = [Setting(side=6, images=slices) for slices in (8, 16, 32)]
QUICK_SLICES = [Setting(side=2, images=slices, completion=6, group=4) for slices in (3, 6)]
QUICK_GRID = [Setting(side=4, completion=6, group=group) for group in (4, 2)]
QUICK_FAMILIES = [
    Setting(family, 0 if family in SIGHTLESS else 4, completion=6, group=4, ragged=True)
    for family in (HYBRID, OWN_POSITIONS, STATE_SPACE)
]


def measure(model: Any, at: Setting, repeats: int) -> dict[str, Any]:
    """One point: both updates on the same tokens."""
    groups = make_groups(PROMPTS, at.side, at.text, at.completion, at.group, ragged=at.ragged, images=at.images)
    generator = torch.Generator().manual_seed(7)
    advantages = [torch.randn(at.group, generator=generator).tolist() for _ in groups]
    trainer = trl_trainer(model, at.group, PROMPTS)
    whole = [trl_inputs(groups, advantages)]
    # One prompt at a time: the mean over the micro-batch is divided by their number, as gradient accumulation does.
    single = [trl_inputs([g], [a]) for g, a in zip(groups, advantages, strict=True)]

    def theirs(batches: list[dict[str, Any]]) -> float:
        as_loaded(model).zero_grad()
        trainer.current_gradient_accumulation_steps = len(batches)
        total = 0.0
        for batch in batches:
            loss = trainer._compute_loss(model, batch)
            loss.backward()
            total += loss.item()
        return total

    def ours() -> float:
        model.zero_grad()
        return update(model, groups, advantages, BUDGET)

    settings = {"one batch": lambda: theirs(whole), "one batch a prompt": lambda: theirs(single)}
    expected = theirs(whole)
    # Without an image the vision tower has no gradient on either side.
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = ours()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # The worst parameter's, and that of all together: a hybrid's decay has a gradient that float32 hardly resolves.
    gap = max(((got[n] - w).abs().max() / w.abs().max().clamp_min(1e-12)).item() for n, w in want.items())
    difference = get_total_norm([got[n] - w for n, w in want.items()]).item()
    gaps = {
        "loss_gap": abs(loss - expected),
        "gradient_gap": gap,
        "gradient_gap_norm": difference / get_total_norm(list(want.values())).item(),
    }
    trial = time_in_turns(settings, 1)
    fastest = min(settings, key=lambda name: trial[name].best)
    ways = {"trl": settings[fastest], "ours": ours}
    timings = time_in_turns(ways, repeats)
    peaks = {}
    for name, work in ways.items():
        model.zero_grad()
        with peak_memory() as peak:
            work()
        peaks[name] = peak["mb"]
    what = {"family": at.family, "images": at.images, "ragged": at.ragged, "trl_setting": fastest}
    return point(model, groups, BUDGET, timings, peaks, **what, **gaps)


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
    parser.add_argument("--repeats", type=int, default=5)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--families", action="store_true", help="a hybrid, and families that cannot share; no plot")
    other.add_argument("--slices", action="store_true", help="many images in a prompt, as of a volume; no plot")
    parser.add_argument("--points", type=int, help="only the first so many points")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small points once each")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    grid, quick = GRID, QUICK_GRID
    if options.families or options.slices:
        grid, quick = (FAMILIES_GRID, QUICK_FAMILIES) if options.families else (SLICES_GRID, QUICK_SLICES)
    size, repeats = ("3M", 1) if options.quick else (options.size, options.repeats)
    points: list[dict[str, Any]] = []
    for at in (quick if options.quick else grid)[: options.points]:
        if not points or points[-1]["family"] != at.family:
            model = build_model(SIZES[size], family=at.family)  # only one in memory
        found = measure(model, at, repeats)
        points.append(found)
        print(
            f"{at.family}  images={at.images:2} P={found['prompt_tokens']:4} C={'1-' * at.ragged}{found['completion_tokens']:<3} "
            f"G={found['group_size']:2}  TRL {found['trl_s']:6.2f} s  ours {found['ours_s']:6.2f} s  "
            f"{found['speedup']:5.2f}x (median {found['speedup_median']:.2f}x, processor "
            f"time {found['speedup_cpu']:.2f}x)  memory {found['trl_peak_mb']:.0f} -> {found['ours_peak_mb']:.0f} MiB  "
            f"gradient gap {found['gradient_gap_norm']:.0e}, worst parameter {found['gradient_gap']:.0e}",
            flush=True,
        )
        write(options.out, points)
    if grid is GRID:
        plot(points, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
