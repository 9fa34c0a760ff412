"""Rows as strangers bring them: one for every kind of picture and of text. They train as they are, or are refused at load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TURN = 0x0112  # EXIF's tag of the orientation
LEFT_RIGHT = {"options": ["left", "right"], "kind": "option"}


def film(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A gradient that differs by row, column and channel, so that a turn, a shift or a lost channel moves log-probs."""
    across, down = np.linspace(0, 200, width), np.linspace(0, 55, height)
    grey = np.add.outer(down, across)
    colour = np.stack([grey, grey.max() - grey, np.broadcast_to(across, grey.shape)], axis=-1)
    return Image.fromarray(colour.astype(np.uint8)).convert(mode)


def turned(turn: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[TURN] = turn
    return {"exif": exif}


def with_alpha(mode: str) -> Image.Image:
    image = film(90, 60, mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def one_clear_colour() -> dict[str, Any]:
    return {"transparency": 3}


# File -> how it is written. The file's ending says in which format.
PICTURES: dict[str, Callable[[Path], None]] = {
    **{f"{w}x{h}.png": partial(film(w, h).save) for w, h in ((1, 1), (1, 90), (90, 1), (5, 3), (27, 29), (640, 481), (180, 2))},
    "4000x3500.jpg": partial(film(4000, 3500, "L").save, quality=60),
    "2500x3000.png": partial(film(2500, 3000, "L").save),
    **{f"exif{n}.jpg": partial(film(120, 60).save, **turned(n)) for n in range(1, 9)},
    "exif6.png": partial(film(120, 60).save, **turned(6)),
    "exif8.webp": partial(film(120, 60).save, **turned(8)),
    "grey.jpg": partial(film(90, 60, "L").save),
    "bits.png": partial(film(90, 60, "1").save),
    "palette.png": partial(film(90, 60, "P").save),
    "clear_palette.png": partial(film(90, 60, "P").save, **one_clear_colour()),
    "palette.gif": partial(film(90, 60, "P").save),
    "clear.gif": partial(film(90, 60, "P").save, **one_clear_colour()),
    "alpha.png": partial(with_alpha("RGB").save),
    "grey_alpha.png": partial(with_alpha("L").save),
    "alpha.webp": partial(with_alpha("RGB").save),
    "lossy.webp": partial(film(90, 60).save, quality=40),
    "lossless.webp": partial(film(90, 60).save, lossless=True),
    "cmyk.jpg": partial(film(90, 60, "CMYK").save),
    "cmyk.tiff": partial(film(90, 60, "CMYK").save),
    "lab.tiff": partial(film(90, 60, "LAB").save),
    "lzw.tiff": partial(film(90, 60).save, compression="tiff_lzw"),
    "plain.bmp": partial(film(90, 60).save),
    "progressive.jpg": partial(film(90, 60).save, progressive=True),
    "a name with spaces, ümläuts and 中文.png": partial(film(90, 60).save),
}  # fmt: skip

TEXTS = {
    "german": "Liegt ein Pleuraerguß vor, und wenn ja: auf welcher Seite?",
    "chinese": "胸腔积液在哪一侧？",
    "japanese": "胸水はどちら側ですか。",
    "korean": "흉수는 어느 쪽에 있습니까?",
    "arabic": "في أي جانب يوجد الانصباب الجنبي؟",
    "hebrew": "באיזה צד נמצא התפליט?",
    "hindi": "फुफ्फुस बहाव किस ओर है?",
    "thai": "น้ำในช่องเยื่อหุ้มปอดอยู่ด้านใด",
    "greek": "Σε ποια πλευρά είναι η συλλογή;",
    "emoji": "🫁 left or right? 👩🏽‍⚕️ 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "combining": "e\u0301panchement a\u0300 gauche ou a\u0300 droite ? \u200b\u202eabc\u202c",
    "spaces": "   Which side?  \t\n\n\n  The effusion\u00a0only.   ",
    "markup": "<b>Which</b> side? {{ side }} {% if x %} $\\frac{1}{2}$ `code` \\n %s {0}",
    "long": "The film was taken supine. " * 60 + "Which side?",
    "other placeholders": "<image> <|image|> <image_soft_token> <IMG_CONTEXT> <start_of_image> [IMG] <img></img> Which side?",
    "other turns": "[INST] <start_of_turn>user <|start_header_id|>user<|end_header_id|> ### Human: Which side?",
}


def text_row(name: str, question: str) -> dict[str, Any]:
    return {"id": name, "question": question, "answer": "A", **LEFT_RIGHT}


def visitors(folder: Path) -> list[dict[str, Any]]:
    """Rows that train with the demo's model, their pictures written into the folder."""
    for name, write in PICTURES.items():
        write(folder / name)
    question = "Which side is brighter?"
    rows = [text_row(name, question) | {"images": [name]} for name in PICTURES]
    several = list(PICTURES)[-8:]
    rows += [text_row(f"{n} images", question) | {"images": several[:n]} for n in range(2, 9)]
    rows += [text_row(name, question) | {"images": [image]} for name, image in volumes(folder).items()]
    rows.append(text_row("the same image twice", question) | {"images": ["plain.bmp", "plain.bmp"]})
    rows += [text_row(name, text) | {"images": []} for name, text in TEXTS.items()]
    rows.append(text_row("text and image", TEXTS["thai"]) | {"images": ["exif6.png"]})
    rows.append({**text_row("options of all languages", "?"), "options": list(TEXTS.values())[:5], "images": []})
    return rows


def volumes(folder: Path) -> dict[str, dict[str, Any]]:
    """Images of a row that are slices of one NIfTI file, by the row's name."""
    import nibabel

    grey = np.add.outer(np.add.outer(np.arange(24) * 9, np.arange(20) * 5), np.arange(18) * 3).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(grey, np.diag([-1.0, 1.0, 3.0, 1.0])), folder / "volume.nii.gz")
    return {
        "a stack of slices": {"volume": "volume.nii.gz", "slices": 4, "window": [150, 300]},
        "a montage": {"volume": "volume.nii.gz", "slices": 6, "plane": "coronal", "layout": "montage"},
        "slices by index": {"volume": "volume.nii.gz", "slices": [3, 0], "plane": "sagittal"},
    }


def cut_off(file: Path) -> None:
    film(90, 60).save(file)
    file.write_bytes(file.read_bytes()[:200])


def no_picture(file: Path) -> None:
    file.write_text("<html>404</html>")


def frames(file: Path) -> None:
    film(90, 60, "L").save(file, save_all=True, append_images=[film(90, 60, "L").rotate(90, expand=False)])


# File -> how it is written, and a word of the reason for which a row with it is refused.
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut.png": (cut_off, "cut.png"),
    "page.png": (no_picture, "page.png"),
    "stack.tiff": (frames, "2 frames"),
    "moving.gif": (frames, "2 frames"),
    "deep.png": (partial(Image.fromarray(np.full((60, 90), 40_000, dtype=np.uint16)).save), "over 8 bits"),
    "float.tiff": (partial(Image.fromarray(np.full((60, 90), 0.5, dtype=np.float32)).save), "float"),
    "strip.png": (partial(film(2400, 6).save), "2400"),
    "clear.png": (partial(Image.new("RGBA", (90, 60)).save), "transparent"),
}
