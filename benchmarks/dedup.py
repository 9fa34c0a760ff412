"""Near-duplicate removal over synthetic text rows: time, peak memory, and whether the planted copies are found.

    python benchmarks/dedup.py --rows 1000000 --out benchmarks/baselines/dedup.json

Rows are findings put together from phrases; one in twenty repeats an earlier row with a word exchanged, dropped or moved.
The step runs as in a pipeline (`lingshu-rl curate`): rows from a file, index on disk, kept and dropped rows to files. Peak
memory is the process's largest resident set, of which the start (interpreter and libraries) is shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lingshu_rl.curate.pipeline import parse_pipeline, run_pipeline
from lingshu_rl.progress import Progress

COPIES = 20  # one row in so many repeats an earlier one
BACK = 5_000  # how far back the repeated row may stand, in rows
SITES = [
    "apex",
    "base",
    "hilum",
    "lobe",
    "segment",
    "fissure",
    "recess",
    "margin",
    "dome",
    "angle",
    "septum",
    "wall",
    "notch",
    "carina",
    "pedicle",
]
SIDES = ["left", "right", "bilateral", "upper", "lower", "medial", "lateral", "anterior", "posterior", "central"]
FINDINGS = ["opacity", "nodule", "effusion", "fracture", "cyst", "mass", "calcification", "thickening", "lucency", "granuloma", "collapse", "fibrosis", "oedema", "scar"]  # fmt: skip
QUALITIES = [
    "small",
    "large",
    "faint",
    "dense",
    "round",
    "irregular",
    "sharp",
    "hazy",
    "linear",
    "patchy",
    "stable",
    "new",
    "old",
    "subtle",
    "coarse",
]
VERBS = ["is seen", "is noted", "can be made out", "is present", "appears", "projects", "is suspected", "remains"]
EXTRAS = ["without change", "since the last film", "on this view", "as described", "of uncertain age", "near the device", "in the follow-up", "after treatment"]  # fmt: skip


def report(rng: random.Random) -> list[str]:
    """Four to seven sentences with numbers of their own, so that two reports agree by chance in a few pairs only."""
    return [
        f"A {rng.choice(QUALITIES)} {rng.choice(FINDINGS)} of {rng.randint(2, 99)} mm {rng.choice(VERBS)} at the "
        f"{rng.choice(SIDES)} {rng.choice(SITES)} {rng.choice(EXTRAS)}."
        for _ in range(rng.randint(4, 7))
    ]


def reworded(sentences: list[str], rng: random.Random) -> list[str]:
    """The same findings: sentences in another order, one verb exchanged, an extra dropped."""
    changed = rng.sample(sentences, len(sentences))
    spot = rng.randrange(len(changed))
    for verb in VERBS:
        if verb in changed[spot]:
            changed[spot] = changed[spot].replace(verb, rng.choice(VERBS))
            break
    return changed


def rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    recent: list[tuple[int, list[str]]] = []
    for i in range(count):
        copy = i % COPIES == COPIES - 1
        first, sentences = rng.choice(recent) if copy else (i, report(rng))
        text = " ".join(reworded(sentences, rng) if copy else sentences)
        if not copy:
            recent.append((i, sentences))
            if len(recent) > BACK:
                recent.pop(0)
        meta = {"copy_of": str(first)} if copy else {}
        yield {
            "id": str(i),
            "images": [],
            "question": "Write the findings.",
            "answer": text,
            "kind": "report",
            "meta": meta,
        }


def measure(count: int, seed: int, folder: Path) -> dict[str, Any]:
    raw = folder / "raw.jsonl"
    with raw.open("w", encoding="utf-8") as file:
        for row in rows(count, seed):
            file.write(json.dumps(row) + "\n")
    start_mib = peak_mib()
    pipeline = parse_pipeline({"out": str(folder / "out"), "sources": [{"path": str(raw)}], "steps": ["dedup_text"]})
    progress = Progress(quiet=False)
    begun, begun_cpu = time.monotonic(), time.process_time()
    report = run_pipeline(pipeline, progress)
    seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - begun_cpu
    found = false = 0
    with (folder / "out" / "dropped" / "01_dedup_text.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            if json.loads(line)["row"]["meta"].get("copy_of"):
                found += 1
            else:
                false += 1
    planted = count // COPIES
    times = [step["seconds"] for step in report["steps"]]
    return {
        "rows": count,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds_reading": round(times[0], 1),
        "seconds_dedup": round(times[1], 1),
        "rows_per_cpu_second": round(count / cpu_seconds),
        "peak_mib": round(peak_mib()),
        "start_mib": round(start_mib),
        "planted": planted,
        "found": found,
        "recall": round(found / planted, 4),
        "precision": round(found / (found + false), 4) if found + false else None,
        "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where to work (default: a temporary folder; about 2 GB a million rows)"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dedup-", dir=arguments.folder))
    try:
        result = measure(arguments.rows, arguments.seed, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
