"""How long a large set takes to load, and what it holds in memory: `python benchmarks/loading.py [--images N] [--texts N]`.

Writes the rows into a temporary folder (small PNG files of 8,633 sizes), loads each set in a process of its own and takes
100 prompts at random places; then again in another process with the prompts' tokens counted, as a run does (by the demo's
processor and vocabulary, or those of --model). Prints JSON; benchmarks/baselines/loading.json holds what a 2-core machine gave.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def write_images(folder: Path, count: int) -> None:
    from PIL import Image

    with (folder / "images.jsonl").open("w") as rows:
        for n in range(count):
            sub = folder / "png" / f"{n // 1000:04d}"
            if n % 1000 == 0:
                sub.mkdir(parents=True)
            Image.new("L", (16 + n % 97, 16 + n % 89), n % 256).save(sub / f"{n}.png")
            image = str((sub / f"{n}.png").relative_to(folder))
            rows.write(json.dumps({**row(n), "images": [image]}) + "\n")


def write_texts(folder: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([row(n) for n in range(min(count, 1000))])
    with (
        (folder / "texts.jsonl").open("w") as lines,
        pq.ParquetWriter(
            folder / "texts.parquet", table.schema.set(1, pa.field("images", pa.list_(pa.string())))
        ) as out,
    ):
        for start in range(0, count, 10_000):
            part = [row(n) for n in range(start, min(start + 10_000, count))]
            out.write_table(pa.Table.from_pylist(part, schema=out.schema))
            lines.writelines(json.dumps(one) + "\n" for one in part)


def row(n: int) -> dict[str, object]:
    return {
        "id": f"row-{n:07d}",
        "images": [],
        "question": f"Case {n}: a patient of {n % 90} years has had a fever for {n % 13} days. Which test comes first?",
        "options": ["blood culture", "chest radiograph", "lumbar puncture", f"observation for {n % 48} hours"],
        "answer": "ABCD"[n % 4],
        "kind": "option",
    }


def measure(source: str, model: str) -> dict[str, float]:
    """In this process: seconds, rows, and the greatest resident memory in MB above that of the imports.

    model: whose tokens are counted; "" = none.
    """
    from lingshu_rl.data.load import load

    counting = counted_by(model) if model else {}
    load([row(0)], **counting)
    counting = counted_by(model) if model else {}
    before, start = peak_mb(), time.perf_counter()
    prompts = load(source, **counting).prompts
    longest = counting["lengths"].longest().total if counting else 0
    seconds = time.perf_counter() - start
    peak = peak_mb()
    places = random.Random(0).sample(range(len(prompts)), 100)
    start = time.perf_counter()
    assert all(prompts[n].id == f"row-{n:07d}" for n in places)
    took = (time.perf_counter() - start) / len(places)
    return {
        "rows": len(prompts),
        "load_s": round(seconds, 1),
        "peak_mb": round(peak),
        "peak_mb_above_imports": round(peak - before),
        "ms_per_prompt": round(1e3 * took, 3),
        **({"longest": longest, "others_at_most": counting["lengths"].bound} if counting else {}),
    }


def counted_by(model: str) -> dict[str, Any]:
    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.model.lengths import Lengths, PictureTokens

    lengths = Lengths(PictureTokens(PromptEncoder(model)))
    return {"fault": lengths.fault, "lengths": lengths}


def peak_mb() -> float:
    """The greatest resident memory of this process; getrusage would count its parent's as well."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--model", default="demo", help="whose tokens are counted")
    parser.add_argument("--only", nargs=2, metavar=("SOURCE", "MODEL"), help="measure this source in this process")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only)))
        return
    found = {}  # -P: rewards.py beside this file is not the package
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, arguments.images)
        write_texts(folder, arguments.texts)
        for file in ("images.jsonl", "texts.jsonl", "texts.parquet"):
            for title, model in ((file, ""), (f"{file}, counted", arguments.model)):
                command = [sys.executable, "-P", __file__, "--only", str(folder / file), model]
                done = subprocess.run(command, capture_output=True, text=True)
                found[title] = json.loads(done.stdout) if done.returncode == 0 else sys.exit(done.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
