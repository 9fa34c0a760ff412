"""Images of rows as the model sees them: decoded in one place, resized once, and sent to everyone as the same bytes.

Trainer, engine, reference, evaluation and SFT all read `Picture.png()`, so their pixels are the same by construction,
whatever each one's decoder makes of EXIF, alpha or palettes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lingshu_rl.volumes import View, content_size

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 20
MIN_PIXELS = 56 * 56
MAX_ASPECT = 200  # longer over shorter side; processors of the Qwen family refuse more, and no patch shows much of it
PREPARED = 64  # pictures whose bytes are kept: about those of a step that is under way

_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_DEEP = re.compile(r";16[BLN]")  # of a decoder's raw mode: it drops the low byte
_TURNED = range(5, 9)  # EXIF orientations that swap the sides
_PHONE = "MPO"  # several JPEGs: the photo, then its preview or depth map


class UnreadablePicture(OSError):
    """An image that cannot be decoded, or no longer; the text names it."""


@dataclass(frozen=True)
class Budget:
    """Pixels of a picture: larger ones are reduced and smaller ones enlarged to it, sides in proportion."""

    max_pixels: int = MAX_PIXELS
    min_pixels: int = MIN_PIXELS

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture of this size gets."""
        area = width * height
        if area > self.max_pixels:
            scale = math.sqrt(self.max_pixels / area)
            return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
        scale = math.sqrt(max(1.0, self.min_pixels / area))
        return math.ceil(width * scale), math.ceil(height * scale)


DEFAULT_BUDGET = Budget()


@dataclass(frozen=True)
class Header:
    """What a file says of itself before it is decoded. size: width and height as it is seen, (0, 0) when unreadable."""

    size: tuple[int, int] = (0, 0)
    fault: str | None = None


@dataclass(frozen=True)
class Picture:
    """One image of a row. source: a path or encoded bytes, as the row gave it."""

    source: str | bytes
    budget: Budget = DEFAULT_BUDGET

    @property
    def name(self) -> str:
        """The path, or a hash of the bytes: pictures of one name are the same."""
        return self.source if isinstance(self.source, str) else hashlib.blake2b(self.source, digest_size=8).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that everyone gets, from the header alone. Raises UnreadablePicture."""
        if not all(self._header.size):
            raise UnreadablePicture(self._header.fault)
        return self.budget.fit(*self._header.size)

    def fault_in_header(self) -> str | None:
        """Why it cannot be used, as far as its header tells, or None."""
        return self._header.fault or _aspect_fault(self.size, self.told)

    def fault(self) -> str | None:
        """Why it cannot be used, or None. Decodes it: a header alone says nothing about a cut-off file."""
        from PIL import Image

        if found := self.fault_in_header():
            return found
        try:
            with _opened(self.source) as image:
                image.draft("L", (64, 64))  # JPEG decodes at an eighth of the size, yet reads the whole file
                image.load()
                hidden = image.has_transparency_data and not image.convert("RGBA").getchannel("A").getbbox()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"unreadable image {self.told}: {error}"
        return f"image {self.told} is fully transparent: it shows nothing; save it without alpha" if hidden else None

    @property
    def file(self) -> str:
        """The file or folder that it is from; "" for bytes."""
        if isinstance(self.source, bytes):
            return ""
        view = View.of(self.source)
        return view.file if view is not None else self.source

    @property
    def content(self) -> tuple[str, int] | bytes:
        """What tells it from another one without being read: bytes as they are, or a file's name and size."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).digest()
        return os.path.basename(self.source), content_size(self.file)

    def png(self) -> bytes:
        """The prepared picture, 8 bits, grey or RGB. Raises UnreadablePicture."""
        return _prepared(self)

    def pixels(self) -> Image:
        """RGB, of exactly these bytes. Raises UnreadablePicture."""
        from PIL import Image

        with Image.open(io.BytesIO(self.png())) as image:
            return image.convert("RGB")

    def blank(self) -> Picture:
        """A grey one of the same size: the control for "does the model look at the image?"."""
        from PIL import Image

        return replace(self, source=_as_png(Image.new("L", self.size, 128)))

    @property
    def told(self) -> str:
        """The image in a message."""
        return self.source if isinstance(self.source, str) else f"of {len(self.source)} bytes"

    @cached_property
    def _header(self) -> Header:
        return _read_header(self.source, self.told)


def _read_header(source: str | bytes, told: str) -> Header:
    from PIL import Image

    try:
        if (view := _view(source)) is not None:
            return Header(view.size)
        if isinstance(source, str) and not Path(source).is_file():
            return Header(fault=f"image file not found: {source}")
        with _opened(source) as image:
            return Header(_upright_size(image), _kind_fault(image, told))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Header(fault=f"unreadable image {told}: {error}")


def _opened(source: str | bytes) -> Image:
    from PIL import Image

    if (view := _view(source)) is not None:
        return view.image()
    return Image.open(source if isinstance(source, str) else io.BytesIO(source))


def _view(source: str | bytes) -> View | None:
    return View.of(source) if isinstance(source, str) else None


def _upright_size(image: Image) -> tuple[int, int]:
    """Width and height after the turn that EXIF asks for, without decoding."""
    from PIL import ExifTags
    from PIL import Image as Images

    if image.format == "TIFF":  # Pillow turns these itself and tells the turned size
        return image.size
    exif = Images.Exif()
    exif.load(image.info.get("exif", b""))  # `getexif` of a PNG decodes it, to look behind the pixels too
    turned = exif.get(ExifTags.Base.Orientation) in _TURNED
    return (image.height, image.width) if turned else image.size


def _kind_fault(image: Image, told: str) -> str | None:
    """Why a picture of this depth, mode or number of frames stands for no 8-bit picture."""
    frames = getattr(image, "n_frames", 1)
    if image.mode.startswith(("I", "F")) or _DEEP.search(str(getattr(image, "tile", ""))):
        return f"image {told} has over 8 bits a channel, of which RGB shows a part: choose a window and save 8 bits"
    if image.mode not in _GREY | _COLOUR:
        return f"image {told} is of mode {image.mode}, which is no picture: save it as grey or RGB"
    if frames > 1 and image.format != _PHONE:
        return (
            f"image {told} has {frames} frames ({image.format}): save the one that is meant, or each of them as an image "
            "of the row"
        )
    return None


def _aspect_fault(size: tuple[int, int], told: str) -> str | None:
    if max(size) <= MAX_ASPECT * min(size):
        return None
    return (
        f"image {told} is a strip of {size[0]} x {size[1]} pixels (after data.max_pixels and data.min_pixels): sides over "
        f"{MAX_ASPECT}:1 are refused by processors; cut it into pieces"
    )


@lru_cache(maxsize=PREPARED)
def _prepared(picture: Picture) -> bytes:
    from PIL import Image, ImageOps

    try:
        with _opened(picture.source) as opened:
            image = _on_white(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadablePicture(f"unreadable image {picture.told}: {error}") from error
    wanted = picture.budget.fit(*image.size)
    if image.size != wanted:
        image = image.resize(wanted, Image.Resampling.BICUBIC)
    return _as_png(image)


def _on_white(image: Image) -> Image:
    """Grey or RGB; what shines through alpha is white, as in a viewer."""
    from PIL import Image as Images

    mode = "L" if image.mode in _GREY else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    seen = image.convert("RGBA")
    ground = Images.new("RGBA", seen.size, "white")
    ground.alpha_composite(seen)
    return ground.convert(mode)


def _as_png(image: Image) -> bytes:
    """Losslessly, with little compression: the bytes go to a process of this cluster and are read once."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
