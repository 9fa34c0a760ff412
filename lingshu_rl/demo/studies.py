"""Crops of CT, MR, X-ray, ultrasound, fundus and microscopy pictures that ship inside packages.

CT and ultrasound give each split studies of its own. Where a modality has one or two pictures only, each split has a
region of its own, with a strip between regions that no split shows. Licences: pydicom and pydicom-data MIT,
scikit-image's retina and ihc without known restriction, stardist's tiles BSD-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from lingshu_rl.demo import read
from lingshu_rl.demo.images import SIZE, SPLITS, DemoImage, vary

WHOLE: read.Box = (0, 0, 1, 1)
# Regions of one picture that serves all splits, laid so that each holds every kind of content.
HALVES = {"train": (0, 0, 0.55, 1), "validation": (0.58, 0, 1, 0.36), "test": (0.58, 0.39, 1, 1)}
LIMB = {"train": (0.38, 0, 0.78, 0.5), "validation": (0.5, 0.53, 0.68, 0.7), "test": (0.45, 0.73, 0.75, 1)}
GLANDS = {"train": (0, 0, 0.47, 1), "validation": (0.5, 0, 1, 0.24), "test": (0.5, 0.27, 1, 0.95)}
CELLS = {"train": (0, 0, 0.5, 1), "validation": (0.53, 0, 1, 0.27), "test": (0.53, 0.3, 1, 1)}
BROWN_LEVELS = 30  # a pixel counts as brown (DAB stain) when its red exceeds its blue by this many of 255 levels

Window = tuple[int, int, int]  # left, top and side of a crop in the picture, in pixels
ONCE = dict.fromkeys(SPLITS, 1)


@dataclass(frozen=True)
class Study:
    """Pictures of one patient or specimen and how to crop them.

    counts: images for train, validation, test. boxes: the region of each split. side: crop size as shares of the
    region's shorter side. turn: largest angle in degrees, or None for quarter turns and mirrors, as microscopy allows.
    measure: facts of a crop.
    """

    name: str
    meta: Mapping[str, str]
    views: Callable[[], read.Views]
    counts: tuple[int, int, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    boxes: Mapping[str, read.Box] = field(default_factory=lambda: dict.fromkeys(SPLITS, WHOLE))
    side: tuple[float, float] = (0.8, 1.0)
    turn: float | None = 8.0
    measure: Callable[[np.ndarray, Window], dict[str, Any]] | None = None


def crops(rng: np.random.Generator, times: Mapping[str, int] = ONCE) -> Iterator[DemoImage]:
    """The images of all studies and splits. times: crops of a split as multiples of each study's own count."""
    for study in STUDIES:
        views = study.views()
        for split, count in zip(SPLITS, study.counts, strict=True):
            for n in range(count * times[split]):
                picture, facts = views[n % len(views)]
                crop, window = _crop(picture, study.boxes[split], study.side, study.turn, rng)
                measured = study.measure(crop, window) if study.measure else {}
                small = np.asarray(
                    Image.fromarray(np.ascontiguousarray(crop)).resize((SIZE, SIZE), Image.Resampling.BOX)
                )
                facts = {"modality": study.meta["modality"], **study.facts, **facts, **measured}
                yield DemoImage(split, f"{study.name}-{split}-{n:03d}", vary(small, rng), facts, study.meta)


def _crop(
    picture: np.ndarray, box: read.Box, sides: tuple[float, float], turn: float | None, rng: np.random.Generator
) -> tuple[np.ndarray, Window]:
    """A square of the region, turned about its middle, and where it was cut before turning."""
    left, top, right, bottom = read.pixels_of(picture, box)
    outer = int(rng.uniform(*sides) * min(right - left, bottom - top))
    x, y = int(rng.integers(left, right - outer + 1)), int(rng.integers(top, bottom - outer + 1))
    crop = picture[y : y + outer, x : x + outer]
    if turn is None:
        crop = np.rot90(crop, int(rng.integers(4)))
        return np.ascontiguousarray(np.fliplr(crop) if rng.random() < 0.5 else crop), (x, y, outer)
    angle = float(rng.uniform(-turn, turn))
    small = Image.fromarray(np.ascontiguousarray(crop)).resize((2 * SIZE, 2 * SIZE), Image.Resampling.BOX)
    # Only what the turned square covers wholly is kept: nothing comes from outside the region, no corner is empty.
    share = 1 / (abs(np.cos(np.radians(angle))) + abs(np.sin(np.radians(angle))))
    edge = round(SIZE * (1 - share))
    turned = np.asarray(small.rotate(angle, Image.Resampling.BILINEAR))
    return turned[edge : 2 * SIZE - edge, edge : 2 * SIZE - edge], (x, y, outer)


def _nuclei(crop: np.ndarray, window: Window) -> dict[str, Any]:
    """Nuclei that lie in the crop with at least half of their area."""
    left, top, side = window
    labels = read.nucleus_labels()
    whole = np.bincount(labels.ravel())
    inside = np.bincount(labels[top : top + side, left : left + side].ravel(), minlength=len(whole))
    return {"nuclei": int((2 * inside[1:] >= np.maximum(whole[1:], 1)).sum())}


def _brown(crop: np.ndarray, window: Window) -> dict[str, Any]:
    """The share of the crop that is stained brown."""
    return {"brown_percent": float(100 * (crop[..., 0].astype(int) - crop[..., 2] > BROWN_LEVELS).mean())}


def _meta(modality: str, organ: str, patient_id: str, source: str) -> Mapping[str, str]:
    return {"modality": modality, "organ": organ, "patient_id": patient_id, "source": source}


MICROSCOPY: Mapping[str, Any] = {"side": (0.35, 0.95), "turn": None}
STUDIES = (
    Study(
        "ct-head-a",
        _meta("CT", "head", "CQ500-CT-310", "pydicom-data 693_UNCR"),
        partial(read.ct, "693_UNCR.dcm"),
        (50, 0, 0),
        {"part": "head"},
    ),
    Study(
        "ct-head-b",
        _meta("CT", "head", "JXD191021006", "pydicom J2K_pixelrep_mismatch"),
        partial(read.ct, "J2K_pixelrep_mismatch.dcm"),
        (0, 0, 24),
        {"part": "head"},
    ),
    Study(
        "ct-abdomen",
        _meta("CT", "abdomen", "PANCREAS_0001", "pydicom-data explicit_VR-UN"),
        partial(read.ct, "explicit_VR-UN.dcm"),
        (50, 0, 0),
        {"part": "abdomen"},
    ),
    Study("ct-spine", _meta("CT", "spine", "1CT1", "pydicom CT_small"), partial(read.ct, "CT_small.dcm"), (0, 14, 0)),
    Study(
        "mr-abdomen",
        _meta("MRI", "abdomen", "021234567", "pydicom-data MR-SIEMENS-DICOM-WithOverlays"),
        partial(read.grey, "MR-SIEMENS-DICOM-WithOverlays.dcm"),
        (40, 0, 12),
        {"part": "abdomen"},
        boxes=HALVES,
    ),
    Study(
        "mr-shoulder",
        _meta("MRI", "shoulder", "5MR2", "pydicom-data MR2_UNCR"),
        partial(read.grey, "MR2_UNCR.dcm"),
        (30, 0, 0),
    ),
    Study(
        "xray-chest",
        _meta("X-ray", "chest", "9RG1", "pydicom-data RG1_UNCR"),
        partial(read.grey, "RG1_UNCR.dcm"),
        (60, 10, 18),
        {"part": "chest"},
        boxes=HALVES,
    ),
    Study(
        "xray-leg",
        _meta("X-ray", "leg", "11RG3", "pydicom-data RG3_UNCR"),
        partial(read.grey, "RG3_UNCR.dcm"),
        (40, 6, 12),
        {"part": "leg"},
        boxes=LIMB,
    ),
    Study(
        "us-pelvis",
        _meta("ultrasound", "pelvis", "98279", "pydicom-data gdcm-US-ALOKA-16"),
        partial(read.ultrasound, "gdcm-US-ALOKA-16.dcm", (0.07, 0.15, 0.94, 0.86)),
        (50, 0, 0),
    ),
    Study(
        "us-node",
        _meta("ultrasound", "lymph node", "13US1", "pydicom-data US1_UNCR"),
        partial(read.ultrasound, "US1_UNCR.dcm", (0.13, 0.37, 0.9, 0.71)),
        (40, 0, 0),
    ),
    Study(
        "us-heart-a",
        _meta("ultrasound", "heart", "anonymous", "pydicom-data color-px"),
        partial(read.ultrasound, "color-px.dcm", (0.12, 0.02, 0.85, 0.95)),
        (0, 12, 0),
    ),
    Study(
        "us-heart-b",
        _meta("ultrasound", "heart", "204", "pydicom-data color3d_jpeg_baseline"),
        partial(read.ultrasound, "color3d_jpeg_baseline.dcm", (0.15, 0.08, 0.85, 0.86), frames=8),
        (0, 0, 24),
    ),
    Study(
        "fundus",
        _meta("fundus photo", "eye", "skimage-retina", "scikit-image retina"),
        partial(read.photo, "skimage", "data", "retina.jpg"),
        (80, 12, 24),
        {"part": "eye"},
        boxes=HALVES,
        side=(0.6, 1.0),
    ),
    Study(
        "ihc",
        _meta("stained tissue", "colon", "skimage-ihc", "scikit-image ihc"),
        partial(read.photo, "skimage", "data", "ihc.png"),
        (140, 24, 44),
        {"stain": "immunostain"},
        boxes=GLANDS,
        measure=_brown,
        **MICROSCOPY,
    ),
    Study(
        "he",
        _meta("stained tissue", "tissue", "stardist-histo", "stardist histo"),
        partial(read.photo, "stardist", "data", "images", "histo.jpg"),
        (60, 10, 20),
        {"stain": "H&E"},
        boxes=HALVES,
        **MICROSCOPY,
    ),
    Study(
        "nuclei",
        _meta("fluorescence", "cells", "stardist-img2d", "stardist img2d"),
        read.fluorescence,
        (160, 24, 44),
        {"stain": "fluorescence"},
        boxes=CELLS,
        measure=_nuclei,
        **MICROSCOPY,
    ),
)
