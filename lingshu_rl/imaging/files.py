"""Files of images: where a name leads, and what may be opened."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.rows import RowError

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's names of the formats that are read, whatever a file is called. Others start programs (PostScript).
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")


class UnreadablePicture(OSError):
    """An image that cannot be decoded, or no longer; the text names it."""


@contextmanager
def opened_file(source: str | Path | bytes, formats: tuple[str, ...] = FORMATS) -> Iterator[Image]:
    """An image by its content, of one of `formats`; its pixels are decoded when they are asked for.

    Everything in the library that opens an image file does so here. Raises UnreadablePicture for whatever is wrong with
    the file, found out inside the `with` block as well.
    """
    from PIL import Image, UnidentifiedImageError

    told = f"unreadable image {told_as(source)}"
    try:
        if not isinstance(source, bytes) and not Path(source).is_file():  # nor a pipe, which would be waited for
            raise UnreadablePicture(f"image file not found: {source}")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            yield image
    except UnreadablePicture:
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePicture(
            f"{told}: it is no {', '.join(formats[:-1])} or {formats[-1]} file; save it as one"
        ) from error
    except Exception as error:  # damage shows as errors of Pillow, zlib, struct, a decoder or Python itself
        raise UnreadablePicture(f"{told}: {str(error) or type(error).__name__}") from error


def told_as(source: str | Path | bytes) -> str:
    return f"of {len(source)} bytes" if isinstance(source, bytes) else f"{source!s}"


def full_path(image: str | Path, folder: str | Path) -> str:
    """Where an image's name leads from a folder. Raises RowError for what can be no name of a file."""
    try:
        path = str(Path(folder).joinpath(Path(image).expanduser()).resolve())
        path.encode()
    except (RuntimeError, ValueError, OSError) as error:  # no such user, a circle of links, a NUL, half a character
        raise RowError(f"image path {str(image)[:80]!r} cannot be one: {error}") from None
    return path
