"""Images of rows: paths or encoded bytes, what is wrong with one, and its pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def header_fault(image: str | bytes) -> str | None:
    """Why an image cannot be used, as far as its header tells, or None."""
    return _fault(image, whole=False)


def check_image(image: str | bytes) -> str | None:
    """Why an image cannot be used, or None. Decodes the pixels: a header alone says nothing about a cut-off file."""
    return _fault(image, whole=True)


def _fault(image: str | bytes, whole: bool) -> str | None:
    from PIL import Image

    if isinstance(image, str) and not Path(image).is_file():
        return f"image file not found: {image}"
    name = image if isinstance(image, str) else f"of {len(image)} bytes"
    try:
        with Image.open(image if isinstance(image, str) else io.BytesIO(image)) as picture:
            mode = picture.mode
            if whole:
                picture.draft("L", (64, 64))  # JPEG decodes at an eighth of the size, yet reads the whole file
                picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"unreadable image {name}: {error}"
    if mode.startswith(("I", "F")):
        return f"image {name} has over 8 bits a channel and would turn white in RGB: choose a window and save 8 bits"
    return None


def open_image(image: str | bytes) -> Image:
    from PIL import Image as Images

    with Images.open(image if isinstance(image, str) else io.BytesIO(image)) as opened:
        return opened.convert("RGB")


def blank_image(image: str | bytes) -> bytes:
    """A grey PNG of the same size: the control for "does the model look at the image?"."""
    from PIL import Image as Images

    buffer = io.BytesIO()
    Images.new("RGB", open_image(image).size, (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
