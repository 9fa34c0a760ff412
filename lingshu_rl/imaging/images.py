"""Images of rows as the model sees them: decoded in one place, resized once, and sent to everyone as the same bytes.

Trainer, engine, reference, evaluation and SFT all read `Picture.encoded()`, so their pixels are the same by
construction, whatever each one's decoder makes of EXIF, alpha or palettes. A file in which there is nothing of that
kind, and whose size is within the budget, is sent as it is stored.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lingshu_rl.imaging import png
from lingshu_rl.imaging.files import FORMATS, UnreadablePicture, opened_file, told_as
from lingshu_rl.imaging.volumes import View
from lingshu_rl.imaging.voxels import content_size

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 20
MIN_PIXELS = 56 * 56
MAX_ASPECT = 200  # longer over shorter side; processors of the Qwen family refuse more, and no patch shows much of it
KEPT_BYTES = 512 << 20  # of pictures that were prepared: those of a step under way, or of a small set over all epochs
FORMATS_SENT = ("PNG", "JPEG")  # of `Picture.encoded`

_GREY = {"1", "L", "LA"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_DEEP = re.compile(r";16[BLN]")  # of a decoder's raw mode: it drops the low byte
_ORIENTATION = 0x0112  # EXIF's tag
_SWAPPED = range(5, 9)  # orientations that swap the sides
_XMP = ("XML:com.adobe.xmp", "xmp")
_NOT_PLAIN = {"exif", "transparency", *_XMP}  # what changes how an image is seen
_END_OF_JPEG = b"\xff\xd9"
PHONE = "MPO"  # what Pillow calls several JPEGs in one file: the photo, then its preview or depth map


@dataclass(frozen=True)
class Budget:
    """Pixels of a picture: larger ones are reduced and smaller ones enlarged to it, sides in proportion.

    multiple: sides are brought to the nearest multiple of it. Processors do so themselves (28 pixels for Qwen2.5-VL);
    where it is done here, what a model says in pixels is meant in the picture that everyone knows.
    """

    max_pixels: int = MAX_PIXELS
    min_pixels: int = MIN_PIXELS
    multiple: int = 1

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture of this size gets."""
        width, height = self._scaled(width, height)
        side = self.multiple
        return max(side, round(width / side) * side), max(side, round(height / side) * side)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
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
        return self.budget.fit(*self.file_size)

    @property
    def file_size(self) -> tuple[int, int]:
        """Width and height before the budget, upright. Raises UnreadablePicture."""
        if not all(self._header.size):
            raise UnreadablePicture(self._header.fault)
        return self._header.size

    def fault_in_header(self) -> str | None:
        """Why it cannot be used, as far as its header tells, or None."""
        return self._header.fault or _aspect_fault(self.size, self.told)

    def fault(self) -> str | None:
        """Why it cannot be used, or None. Decodes it: a header alone says nothing about a cut-off file."""
        if found := self.fault_in_header():
            return found
        try:
            with opened(self.source) as image:
                image.draft("L", (64, 64))  # JPEG decodes at an eighth of the size, yet reads the whole file
                image.load()
                hidden = image.has_transparency_data and not image.convert("RGBA").getchannel("A").getbbox()
        except UnreadablePicture as error:
            return str(error)
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

    def encoded(self) -> bytes:
        """The prepared picture, 8 bits, grey or RGB, as PNG or JPEG. Raises UnreadablePicture."""
        if (kept := _KEPT.get(self)) is None:
            _KEPT.put(self, kept := _prepared(self))
        return kept

    def pixels(self) -> Image:
        """RGB, of exactly these bytes. Raises UnreadablePicture."""
        return decoded(self.encoded())

    def blank(self) -> Picture:
        """A grey one of the same size: the control for "does the model look at the image?"."""
        from PIL import Image

        return replace(self, source=png.write(Image.new("L", self.size, 128)))

    @property
    def told(self) -> str:
        """The image in a message."""
        return told_as(self.source)

    @cached_property
    def _header(self) -> Header:
        return _read_header(self.source)


@contextmanager
def opened(source: str | Path | bytes, formats: tuple[str, ...] = FORMATS) -> Iterator[Image]:
    """`opened_file`, or the slices that a name of a volume's view stands for. Raises UnreadablePicture."""
    if (view := _view(source)) is None:
        with opened_file(source, formats) as image:
            yield image
        return
    try:
        yield view.image()
    except UnreadablePicture:
        raise
    except Exception as error:  # of a volume that changed, or of a reader of its kind of file
        raise UnreadablePicture(f"unreadable image {source!s}: {str(error) or type(error).__name__}") from error


def _read_header(source: str | bytes) -> Header:
    try:
        if (view := _view(source)) is not None:
            return Header(view.size)
        with opened(source) as image:
            return Header(_upright_size(image), _kind_fault(image, told_as(source)))
    except UnreadablePicture as error:
        return Header(fault=str(error))
    except ValueError as error:  # of a volume
        return Header(fault=f"unreadable image {source!s}: {error}")


def _orientation(image: Image) -> int:
    """The turn that EXIF asks for, else XMP, as it stands before the pixels: size and pixels follow the same one.

    A block that cannot be read asks for none. 1 also where Pillow tells the turned size itself, by a TIFF's own tag.
    """
    from PIL import Image as Images

    if _ORIENTATION in getattr(image, "tag_v2", ()):
        return 1
    xmp = Images.new("1", (1, 1))
    xmp.info = {key: value for key, value in image.info.items() if key in _XMP}
    for told in (image, xmp):
        try:  # the base class's: a PNG's own decodes it, to look behind the pixels too
            return int(Images.Image.getexif(told).get(_ORIENTATION, 1))
        except Exception:  # Pillow raises whatever a damaged block leads to
            continue
    return 1


def _view(source: str | Path | bytes) -> View | None:
    return View.of(source) if isinstance(source, str) else None


def _upright_size(image: Image) -> tuple[int, int]:
    """Width and height after the turn, without decoding."""
    return (image.height, image.width) if _orientation(image) in _SWAPPED else image.size


def upright(image: Image) -> Image:
    """An image of a file, decoded and turned as it asks for."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = None if image.format == "TIFF" else turns.get(_orientation(image))  # Pillow turns TIFFs when it loads them
    image.load()
    return image if turn is None else image.transpose(turn)


def _kind_fault(image: Image, told: str) -> str | None:
    """Why a picture of this depth, mode or number of frames stands for no 8-bit picture."""
    frames = getattr(image, "n_frames", 1)
    if image.mode.startswith(("I", "F")) or _DEEP.search(str(getattr(image, "tile", ""))):
        return f"image {told} has over 8 bits a channel, of which RGB shows a part: choose a window and save 8 bits"
    if image.mode not in _GREY | _COLOUR:
        return f"image {told} is of mode {image.mode}, which is no picture: save it as grey or RGB"
    if frames > 1 and image.format != PHONE:
        return (
            f"image {told} has {frames} frames ({image.format}): save the one that is meant, or each of them as an "
            "image of the row"
        )
    return None


def _aspect_fault(size: tuple[int, int], told: str) -> str | None:
    if max(size) <= MAX_ASPECT * min(size):
        return None
    return (
        f"image {told} is a strip of {size[0]} x {size[1]} pixels (after data.max_pixels and data.min_pixels): sides "
        f"over {MAX_ASPECT}:1 are refused by processors; cut it into pieces"
    )


class _Kept:
    """The prepared bytes of the pictures used last, up to KEPT_BYTES in all. For any thread."""

    def __init__(self) -> None:
        self._found: OrderedDict[Picture, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, picture: Picture) -> bytes | None:
        with self._lock:
            if picture in self._found:
                self._found.move_to_end(picture)
            return self._found.get(picture)

    def put(self, picture: Picture, content: bytes) -> None:
        with self._lock:
            self._bytes += len(content) - len(self._found.pop(picture, b""))
            self._found[picture] = content
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._found.popitem(last=False)[1])


_KEPT = _Kept()


def _prepared(picture: Picture) -> bytes:
    from PIL import Image

    with opened(picture.source) as found:
        if (stored := _as_stored(found, picture)) is not None:
            return stored
        image = _on_white(upright(found))
    wanted = picture.budget.fit(*image.size)
    if image.size != wanted:
        image = image.resize(wanted, Image.Resampling.BICUBIC)
    return png.write(image)


def _as_stored(image: Image, picture: Picture) -> bytes | None:
    """The file's own bytes where every decoder makes the prepared pixels of them, else None. Decodes nothing."""
    plain = (
        image.format in FORMATS_SENT
        and image.mode in ("L", "RGB")
        and not _DEEP.search(str(getattr(image, "tile", "")))
    )
    if not plain or image.size != picture.budget.fit(*image.size) or not image.info.keys().isdisjoint(_NOT_PLAIN):
        return None
    content = picture.source if isinstance(picture.source, bytes) else Path(picture.source).read_bytes()
    whole = png.is_plain(content) if image.format == "PNG" else content.endswith(_END_OF_JPEG)
    return content if whole else None


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


def decoded(content: bytes) -> Image:
    """RGB pixels of an encoded picture. Raises UnreadablePicture."""
    with opened(content, FORMATS_SENT) as image:
        return image.convert("RGB")


def data_uri(content: bytes) -> str:
    """Encoded bytes as an address that holds them."""
    kind = "png" if content.startswith(png.SIGNATURE) else "webp" if content[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
