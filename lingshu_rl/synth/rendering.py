"""Text questions as pictures: the model has to read what a person would see on a screen or a sheet of paper."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.data.rows import LETTERS
from lingshu_rl.synth.rows import Dropped, Kept, Outcome, Record, SynthError, provenance, training_row

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

QUESTION = "Answer the question in the image."
MARGIN = 24  # pixels
TALLEST = 2048  # pixels; a longer text is dropped, not cut


@dataclass(frozen=True)
class Page:
    """font: a TrueType file; "" for matplotlib's DejaVu Sans, without it Pillow's own (ASCII). size, width in
    pixels."""

    font: str = ""
    size: int = 20
    width: int = 640

    def __post_init__(self) -> None:
        if self.size < 8 or self.width < 200:
            raise SynthError("--font-size must be at least 8 and --width at least 200 pixels")

    def load(self) -> FreeTypeFont:
        from PIL import ImageFont

        path = self.font or _dejavu()
        if not path:
            return ImageFont.load_default(self.size)  # type: ignore[return-value]
        try:
            return ImageFont.truetype(path, self.size)
        except OSError as error:
            raise SynthError(f"--font {path}: {error}") from None


def _dejavu() -> str:
    spec = importlib.util.find_spec("matplotlib")
    path = Path(str(spec.origin)).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" if spec else None
    return str(path) if path is not None and path.is_file() else ""


def rendered(records: Iterable[Record], folder: Path, page: Page, options_in_image: bool = True) -> Iterator[Outcome]:
    """Rows without an image become rows whose image is their text; the answer stays what it was.

    options_in_image: the options are in the picture and the row's options are bare letters; else they stay text.
    """
    font = page.load()
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        name = str(record["id"])
        options = [str(o) for o in record.get("options") or []]
        lines = [str(record.get("question", ""))]
        if options_in_image:
            lines += [f"{LETTERS[i]}. {text}" for i, text in enumerate(options)]
        text = "\n".join(lines)
        if record.get("images"):
            yield Dropped(name, "has an image already", "", record)
        elif missing := unknown_characters(text, font):
            yield Dropped(name, "font lacks characters", " ".join(missing), record)
        elif (picture := draw(text, font, page)) is None:
            yield Dropped(name, "text is too long", f"over {TALLEST} pixels high", record)
        else:
            path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.png"
            picture.save(path, "PNG")
            fields: dict[str, Any] = {k: v for k, v in record.items() if k in ("answer", "kind", "unit", "tolerance")}
            if options:
                fields["options"] = list(LETTERS[: len(options)]) if options_in_image else options
                if options_in_image:
                    fields["answer"] = letter_of(record["answer"], options)
            verdict = {"verifier": "glyphs and size", "kept": True, "size": list(picture.size)}
            synth = provenance(
                "render", record, verdict, text=text, options=options, font=" ".join(filter(None, font.getname()))
            )
            row = training_row(record, "image", question=QUESTION, **fields, meta={"synth": synth})
            yield Kept({**row, "images": [str(path.resolve())]})


def letter_of(answer: Any, options: list[str]) -> Any:
    """The letter of an answer given by its text; a letter, or letters, stay."""
    folded = [option.casefold().strip() for option in options]
    place = folded.index(str(answer).casefold().strip()) if str(answer).casefold().strip() in folded else None
    return LETTERS[place] if place is not None else answer


def unknown_characters(text: str, font: FreeTypeFont) -> list[str]:
    """Characters that the font would draw as its box for "no such sign"."""
    box = _glyph(font, "\U0010fffe")
    return sorted(c for c in set(text) if not c.isspace() and _glyph(font, c) == box)


def _glyph(font: FreeTypeFont, character: str) -> bytes:
    mask = font.getmask(character)
    return bytes(mask) + bytes(str(mask.size), "ascii")


def draw(text: str, font: FreeTypeFont, page: Page) -> Image | None:
    """Black on white, wrapped at words (long words at letters); None when it would be too tall."""
    from PIL import Image, ImageDraw

    lines = wrap(text, font, page.width - 2 * MARGIN)
    ascent, descent = font.getmetrics()
    step = ascent + descent + 4
    height = 2 * MARGIN + step * len(lines)
    if height > TALLEST:
        return None
    picture = Image.new("RGB", (page.width, height), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + number * step), line, fill=(0, 0, 0), font=font)
    return picture


def wrap(text: str, font: FreeTypeFont, width: int) -> list[str]:
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            trial = f"{line} {word}".strip()
            if font.getlength(trial) <= width:
                line = trial
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width:
                cut = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    return lines
