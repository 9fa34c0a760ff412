"""The demo's images: real medical pictures that ship inside packages, with facts from their voxels or metadata."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 112  # pixels a side
SPLITS = ("train", "validation", "test")
APART_BITS = 5  # a validation or test picture differs from every training picture in at least so many of 64 pHash bits


@dataclass(frozen=True)
class DemoImage:
    """pixels: uint8, (SIZE, SIZE) grey or (SIZE, SIZE, 3) colour. facts: what can be asked. meta: the row's `meta`."""

    split: str
    name: str
    pixels: np.ndarray
    facts: Mapping[str, Any]
    meta: Mapping[str, str]


def package_file(package: str, *parts: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the demo's images need the package {package!r}: pip install 'lingshu-rl[train]'")
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this version of {package!r} does not ship it")
    return path


def vary(pixels: np.ndarray, rng: np.random.Generator, inverted: bool = False) -> np.ndarray:
    """Brightness, contrast and noise as they differ from device to device; `inverted` swaps black and white."""
    x = pixels.astype(np.float64) / 255
    x = x ** rng.uniform(0.7, 1.4) * rng.uniform(0.75, 1.0) + rng.uniform(0.0, 0.12)
    x = np.clip(x + rng.normal(0, rng.uniform(0.0, 0.03), x.shape), 0, 1)
    return np.rint(255 * (1 - x if inverted else x)).astype(np.uint8)


def apart(pixels: np.ndarray, hashes: np.ndarray) -> bool:
    """Whether a picture resembles none of those whose perceptual hashes (n, 64) are given."""
    return bool((perceptual_hash(pixels) != hashes).sum(-1).min() >= APART_BITS)


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """imagehash's 64-bit pHash as booleans: pictures that differ in few bits look alike."""
    import imagehash

    return imagehash.phash(Image.fromarray(pixels)).hash.ravel()
