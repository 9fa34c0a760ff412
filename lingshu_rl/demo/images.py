"""The demo's images: real medical pictures that ship inside packages, cut so that no test picture resembles a training one.

Every image comes with facts measured from its voxels, masks or metadata; questions are made from these facts alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 112  # pixels a side
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DemoImage:
    """pixels: uint8 (SIZE, SIZE) grey or (SIZE, SIZE, 3) colour. facts: what questions may ask. meta: the row's `meta`."""

    split: str
    name: str
    pixels: np.ndarray
    facts: Mapping[str, Any]
    meta: Mapping[str, str]


def package_file(package: str, *parts: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the demo's images need the package {package!r}: install lingshu-rl[train]")
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this version of {package!r} no longer ships it")
    return path


# --- the MNI152 brain -------------------------------------------------------------------------------------------------

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the voxel axis across the slice
FIELD_MM = 224  # what one picture shows, wherever a length or an area is asked
# Slabs repeat along each axis: [start, stop) in mm of the period; what lies between them is the gap and is never shown.
PERIOD_MM = 44
SLABS_MM = {"train": (0, 24), "validation": (28, 31), "test": (35, 40)}
MNI_COUNTS = {"train": 900, "validation": 150, "test": 220}


def mni_images(rng: np.random.Generator) -> Iterator[DemoImage]:
    """Slices of the MNI ICBM152 2009a symmetric average brain (1 mm voxels) and of its tissue probability maps."""
    import nibabel

    volumes = {}
    for key in ("t1", "gm", "wm"):
        path = package_file("nilearn", "datasets", "data", f"mni_icbm152_{key}_tal_nlin_sym_09a_converted.nii.gz")
        image = nibabel.load(path)
        volumes[key] = np.asarray(image.dataobj)
    origin = np.rint(image.affine[:3, 3]).astype(int)
    for split, count in MNI_COUNTS.items():
        places = [(plane, i) for plane in PLANES for i in _slab_indices(volumes["t1"], origin, plane, split)]
        by_plane = {plane: [i for p, i in places if p == plane] for plane in PLANES}
        for n in range(count):
            plane = tuple(PLANES)[n % 3]
            index = int(rng.choice(by_plane[plane]))
            yield _mni_slice(volumes, origin, plane, index, f"mni-{split}-{n:04d}", split, rng)


def _slab_indices(t1: np.ndarray, origin: np.ndarray, plane: str, split: str) -> list[int]:
    """Voxel indices across `plane` that belong to a split and show at least 20 cm2 of brain."""
    axis = PLANES[plane]
    low, high = SLABS_MM[split]
    area = (t1 > 0).sum(axis=tuple(a for a in range(3) if a != axis)) / 100
    indices = np.nonzero(area >= 20)[0]
    mm = indices + origin[axis]
    # The template is left-right symmetric: the slice at +x is the slice at -x, so sagittal slabs go by |x|.
    along = np.abs(mm) if plane == "sagittal" else mm
    inside = (along % PERIOD_MM >= low) & (along % PERIOD_MM < high)
    return indices[inside].tolist()


def _mni_slice(
    volumes: Mapping[str, np.ndarray], origin: np.ndarray, plane: str, index: int, name: str, split: str, rng: np.random.Generator
) -> DemoImage:
    axis = PLANES[plane]
    angle = float(rng.uniform(-10, 10))
    shift = tuple(int(s) for s in rng.integers(-12, 13, 2))
    field_mm = FIELD_MM
    shown = ("t1", "t1", "t1", "gm", "wm")[int(rng.integers(5))]
    inverted = bool(rng.random() < 0.25)

    slices = {key: np.moveaxis(volume, axis, 0)[index] for key, volume in volumes.items()}

    def cut(volume: np.ndarray, resample: Image.Resampling) -> Image.Image:
        plane_2d = np.flipud(volume.T)
        height, width = plane_2d.shape
        canvas = Image.new("L", (field_mm, field_mm))
        canvas.paste(Image.fromarray(np.ascontiguousarray(plane_2d)), ((field_mm - width) // 2, (field_mm - height) // 2))
        return canvas.rotate(angle, resample, translate=shift)

    mask = np.asarray(cut((slices["t1"] > 0).astype(np.uint8), Image.Resampling.NEAREST)) > 0
    grey = np.asarray(cut(slices["gm"], Image.Resampling.BILINEAR)) > 127
    picture = cut(slices[shown], Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BOX)
    columns, rows = np.nonzero(mask.any(axis=0))[0], np.nonzero(mask.any(axis=1))[0]
    facts = {
        "modality": "MRI",
        "organ": "brain",
        "plane": plane,
        "map": {"t1": "anatomy", "gm": "grey matter map", "wm": "white matter map"}[shown],
        "position_mm": int(index + origin[axis]),
        "width_mm": int(columns[-1] - columns[0] + 1),
        "height_mm": int(rows[-1] - rows[0] + 1),
        "area_cm2": float(mask.sum() / 100),
        "grey_percent": float(100 * (grey & mask).sum() / mask.sum()),
        "inverted": inverted,
    }
    meta = {"modality": "MRI", "organ": "brain", "patient_id": "mni152", "source": "nilearn: MNI ICBM152 2009a symmetric"}
    return DemoImage(split, name, vary(np.asarray(picture), inverted, rng), facts, meta)


def vary(pixels: np.ndarray, inverted: bool, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and noise as they differ from scanner to scanner; `inverted` swaps black and white."""
    x = pixels.astype(np.float64) / 255
    x = x ** rng.uniform(0.7, 1.4) * rng.uniform(0.75, 1.0) + rng.uniform(0.0, 0.12)
    x = x + rng.normal(0, rng.uniform(0.0, 0.03), x.shape)
    x = np.clip(x, 0, 1)
    return np.rint(255 * (1 - x if inverted else x)).astype(np.uint8)


def all_images(seed: int) -> list[DemoImage]:
    """Every image of the demo, in a fixed order. Each source has its own random stream, so that sources do not disturb one another."""
    sources = (mni_images,)
    return [image for n, source in enumerate(sources) for image in source(np.random.default_rng([seed, n]))]
