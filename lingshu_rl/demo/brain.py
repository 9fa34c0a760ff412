"""Slices of the MNI ICBM152 2009a symmetric brain (1 mm voxels, nilearn's copy) and of its tissue probability maps.

Training, validation and test slices come from slabs that lie apart along every axis. It is one average brain, so the
splits differ in place, angle and contrast, not in the person.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from lingshu_rl.demo.images import SIZE, DemoImage, package_file, vary

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the voxel axis across the slice
# [start, stop) in mm of world coordinates, at least 4 mm between two splits. The template is left-right symmetric:
# the slice at +x is the slice at -x, so sagittal slabs are slabs of |x|.
SLABS_MM = {
    "sagittal": {
        "train": ((0, 9), (21, 31), (42, 50), (62, 68)),
        "validation": ((35, 38),),
        "test": ((13, 17), (54, 58)),
    },
    "coronal": {
        "train": ((-104, -92), (-80, -68), (-57, -45), (-33, -21), (-10, 2), (14, 26), (37, 48), (60, 70)),
        "validation": ((-64, -61), (-17, -14), (30, 33)),
        "test": ((-88, -84), (-41, -37), (6, 10), (52, 56)),
    },
    "axial": {
        "train": ((-60, -49), (-37, -25), (-14, -2), (10, 21), (32, 43), (55, 64), (74, 80)),
        "validation": ((-21, -18), (25, 28), (68, 70)),
        "test": ((-45, -41), (2, 6), (47, 51)),
    },
}
COUNTS = {"train": 1100, "validation": 320, "test": 480}
FIELD_MM = 224  # what a picture shows from edge to edge where lengths and areas are asked
ZOOMED_MM = (200, 256)  # and where they are not
MAPS = {"t1": "anatomy", "gm": "grey matter map", "wm": "white matter map"}
SMALLEST_CM2 = 20.0  # a slice with less brain is not shown
VENTRICLE_SEEDS_MM = ((8, 0, 20), (-8, 0, 20))  # a point in each lateral ventricle
META = {"modality": "MRI", "organ": "brain", "patient_id": "mni152", "source": "MNI ICBM152 2009a symmetric (nilearn)"}


def slices(rng: np.random.Generator, counts: Mapping[str, int] = COUNTS) -> Iterator[DemoImage]:
    """The brain images of all splits."""
    maps, origin = volumes()
    area_cm2 = {plane: np.moveaxis(maps["brain"] > 0, axis, 0).sum((1, 2)) / 100 for plane, axis in AXES.items()}
    for split, count in counts.items():
        for n in range(count):
            plane = tuple(AXES)[n % 3]
            axis = AXES[plane]
            index = draw_slice(plane, split, area_cm2[plane], origin[axis], rng)
            cut = {key: np.moveaxis(volume, axis, 0)[index] for key, volume in maps.items()}
            yield _image(cut, plane, int(origin[axis]) + index, f"brain-{split}-{n:04d}", split, rng)


def draw_slice(plane: str, split: str, area_cm2: np.ndarray, origin_mm: int, rng: np.random.Generator) -> int:
    """The number of a slice of this split with enough brain. area_cm2: brain by slice. origin_mm: where slice 0
    lies."""
    mm = np.arange(len(area_cm2)) + origin_mm
    along = np.abs(mm) if plane == "sagittal" else mm
    inside = np.any([(along >= low) & (along < high) for low, high in SLABS_MM[plane][split]], axis=0)
    return int(rng.choice(np.nonzero(inside & (area_cm2 >= SMALLEST_CM2))[0]))


def volumes() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """uint8 volumes (x, y, z) and the world coordinate in mm of voxel (0, 0, 0)."""
    from nibabel.nifti1 import Nifti1Image
    from scipy import ndimage

    volumes = {}
    for key in MAPS:
        path = package_file("nilearn", "datasets", "data", f"mni_icbm152_{key}_tal_nlin_sym_09a_converted.nii.gz")
        image = Nifti1Image.from_filename(path)
        volumes[key] = np.asarray(image.dataobj)
    origin = np.rint(image.affine[:3, 3]).astype(int)
    volumes["brain"] = np.where(volumes["t1"] > 0, 255, 0).astype(np.uint8)
    # What is neither grey nor white matter is fluid; the lateral ventricles are its parts around the two seeds.
    fluid = (volumes["brain"] > 0) & (volumes["gm"].astype(int) + volumes["wm"] < 90)
    parts, _ = ndimage.label(fluid)
    seeds = [parts[tuple(np.array(seed) - origin)] for seed in VENTRICLE_SEEDS_MM]
    volumes["ventricle"] = np.where(np.isin(parts, seeds) & fluid, 255, 0).astype(np.uint8)
    return volumes, origin


def _image(
    cut: Mapping[str, np.ndarray], plane: str, position_mm: int, name: str, split: str, rng: np.random.Generator
) -> DemoImage:
    zoomed = rng.random() < 0.2
    field_mm = int(rng.integers(*ZOOMED_MM)) if zoomed else FIELD_MM
    angle = float(rng.uniform(-4, 4))
    shift = (int(rng.integers(-5, 6)), int(rng.integers(-5, 6)))
    shown = ("t1", "t1", "gm", "wm")[int(rng.integers(4))]
    inverted = bool(rng.random() < 0.15)

    def place(key: str, resample: Image.Resampling) -> Image.Image:
        """The slice upright in the middle of a 1 mm canvas, turned and shifted."""
        upright = Image.fromarray(np.ascontiguousarray(np.flipud(cut[key].T)))
        canvas = Image.new("L", (field_mm, field_mm))
        canvas.paste(upright, ((field_mm - upright.width) // 2, (field_mm - upright.height) // 2))
        return canvas.rotate(angle, resample, translate=shift)

    picture = place(shown, Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BOX)
    facts = {
        "modality": "MRI",
        "part": "head",
        "plane": plane,
        "map": MAPS[shown],
        "position_mm": position_mm,
        "ventricle_cm2": float((cut["ventricle"] > 0).sum() / 100),
        "inverted": inverted,
    }
    if not zoomed and shown != "wm":  # white matter does not show where the brain ends
        brain = np.asarray(place("brain", Image.Resampling.NEAREST)) > 0
        grey = np.asarray(place("gm", Image.Resampling.BILINEAR)) > 127
        columns, rows = np.nonzero(brain.any(axis=0))[0], np.nonzero(brain.any(axis=1))[0]
        facts |= {
            "width_mm": int(columns[-1] - columns[0] + 1),
            "height_mm": int(rows[-1] - rows[0] + 1),
            "area_cm2": float(brain.sum() / 100),
            "grey_percent": float(100 * (grey & brain).sum() / brain.sum()),
        }
    return DemoImage(split, name, vary(np.asarray(picture), rng, inverted), facts, META)
