"""Builds the demo's images and rows once, into a cache folder named after what they are made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from lingshu_rl.demo import brain, images, questions, read, studies

SEED = 20240611


def all_images(seed: int) -> list[images.DemoImage]:
    """Every image of the demo in a fixed order. The two sources have random streams of their own."""
    drawn = [
        *brain.slices(np.random.default_rng([seed, 1])),
        *studies.crops(np.random.default_rng([seed, 2])),
    ]
    training = np.stack([images.perceptual_hash(image.pixels) for image in drawn if image.split == "train"])
    return [image for image in drawn if image.split == "train" or images.apart(image.pixels, training)]


def held_out_hashes() -> np.ndarray:
    """(n, 64): perceptual hashes of the demo's validation and test pictures."""
    return np.stack([images.perceptual_hash(image.pixels) for image in all_images(SEED) if image.split != "train"])


def default_cache() -> Path:
    """$XDG_CACHE_HOME/lingshu_rl, or ~/.cache/lingshu_rl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lingshu_rl"


def version() -> str:
    """A hash of the code that makes the data: new code, new folder, never a stale one."""
    files = (__file__, *(module.__file__ for module in (brain, images, questions, read, studies)))
    code = b"".join(Path(str(file)).read_bytes() for file in files)
    return hashlib.sha256(code).hexdigest()[:12]


def build_demo(cache_dir: str | Path | None = None) -> Path:
    """The folder with `train.jsonl`, `validation.jsonl`, `test.jsonl` and `images/`; made if it is not there yet.

    Every run makes the same bytes. The folder appears whole or not at all, also when two processes build at once.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    target = cache / f"demo-{version()}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="building-demo-", dir=cache))
    try:
        _write(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # another process finished first: its bytes are the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write(folder: Path) -> None:
    (folder / "images").mkdir()
    pool = all_images(SEED)
    used: set[str] = set()
    for n, split in enumerate(images.SPLITS):
        rows = questions.make_rows(pool, split, np.random.default_rng([SEED, 100 + n]))
        used.update(Path(path).stem for row in rows for path in row["images"])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    for image in pool:
        if image.name in used:
            Image.fromarray(image.pixels).save(folder / "images" / f"{image.name}.png")
