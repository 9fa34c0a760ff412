"""Reads the pictures of the packages: DICOM with its windows and colours, photographs, microscopy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lingshu_rl.demo.images import package_file
from lingshu_rl.imaging.images import opened

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture
Views = list[tuple[np.ndarray, dict[str, Any]]]  # uint8 pictures of one study, each with facts of its own
WINDOWS = {"soft tissue window": (40, 400), "bone window": (400, 2000)}  # centre and width in Hounsfield units
AIR_HU = -300  # below this lies no body


def pixels_of(picture: np.ndarray, box: Box) -> tuple[int, int, int, int]:
    """A box in pixels: left, top, right, bottom."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (round(share * length) for share, length in zip(box, (width, height) * 2, strict=True))
    return left, top, right, bottom


def dicom_file(name: str) -> Path:
    """A DICOM file of pydicom-data (which installs itself as `data_store`), else one of pydicom's own."""
    try:
        return package_file("data_store", "data", name)
    except FileNotFoundError:
        return package_file("pydicom", "data", "test_files", name)


def ct(name: str) -> Views:
    """One axial slice in two windows, the front of the patient upwards, cut to the body with a margin of air."""
    import pydicom

    data = pydicom.dcmread(dicom_file(name))
    hounsfield = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
    if float(data.ImageOrientationPatient[4]) < 0:  # rows run from back to front
        hounsfield = np.flipud(hounsfield)
    body = _body(hounsfield)
    body = np.pad(body, max(body.shape) // 12, constant_values=-1000)
    return [(_scaled(body, c - w / 2, c + w / 2), {"window": window}) for window, (c, w) in WINDOWS.items()]


def grey(name: str) -> Views:
    """A grey picture scaled between its 1st and 99.5th percentile; stored negatives are turned to positives."""
    import pydicom

    data = pydicom.dcmread(dicom_file(name))
    pixels = data.pixel_array.astype(np.float64)
    picture = _scaled(pixels, *np.percentile(pixels, (1, 99.5)))
    return [(255 - picture if data.PhotometricInterpretation == "MONOCHROME1" else picture, {})]


def ultrasound(name: str, box: Box, frames: int = 1) -> Views:
    """Evenly spaced frames, cut to the box that holds the scan: the text around it would give the answer away."""
    import pydicom
    from pydicom.pixels import apply_color_lut, pixel_array

    path = dicom_file(name)
    data = pydicom.dcmread(path)
    views: Views = []
    for n in range(frames):
        picture = pixel_array(path, index=n * int(data.get("NumberOfFrames", 1)) // frames)
        if data.PhotometricInterpretation == "PALETTE COLOR":
            picture = (apply_color_lut(picture, data) >> 8).astype(np.uint8)
        left, top, right, bottom = pixels_of(picture, box)
        views.append((picture[top:bottom, left:right], {}))
    return views


def photo(package: str, *parts: str) -> Views:
    """A colour picture as it is."""
    with opened(package_file(package, *parts)) as image:
        return [(np.asarray(image.convert("RGB")), {})]


def fluorescence() -> Views:
    """Stardist's 16-bit tile of stained nuclei, scaled between its 1st and 99.8th percentile."""
    with opened(package_file("stardist", "data", "images", "img2d.tif")) as image:
        pixels = np.asarray(image).astype(np.float64)
    return [(_scaled(pixels, *np.percentile(pixels, (1, 99.8))), {})]


@cache
def nucleus_labels() -> np.ndarray:
    """The tile's label picture: 0 is background, every other number one nucleus."""
    with opened(package_file("stardist", "data", "images", "mask2d.tif")) as image:
        return np.asarray(image).astype(np.int64)


def _scaled(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((pixels - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _body(hounsfield: np.ndarray) -> np.ndarray:
    """The bounding box of the largest connected part that is not air: the body without the table."""
    from scipy import ndimage

    parts, _ = ndimage.label(hounsfield > AIR_HU)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return hounsfield[ndimage.find_objects(parts)[sizes.argmax() - 1]]
