"""What every kind of image file becomes: accepted with the same pixels for all, or refused with the reason."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from lingshu_rl.data.load import DataError, load
from lingshu_rl.imaging import images, png
from lingshu_rl.imaging.files import UnreadablePicture
from lingshu_rl.imaging.images import MAX_PIXELS, MIN_PIXELS, Budget, Picture
from lingshu_rl.rollout.client import chat_messages

FREE = Budget(min_pixels=1)


def film(width=96, height=64, mode="RGB"):
    """Dark, with a bright corner, so that a turn or a lost channel shows."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 4, : width // 4] = (250, 120, 30)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_the_engine_sees(picture):
    """The pixels of the data address, read as vLLM reads it: turned by EXIF, alpha on white, then RGB."""
    prompt_image = chat_messages(_Asked(picture))[0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(prompt_image.partition(",")[2]))) as image:
        assert not image.has_transparency_data and not image.getexif()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


class _Asked:
    def __init__(self, picture):
        self.id, self.images = "q", (picture,)
        self.messages = ({"role": "user", "content": [{"type": "image"}]},)


SIZES = [(1, 1), (1, 60), (60, 1), (3, 2), (28, 28), (56, 56), (112, 84), (1400, 7), (640, 480), (1024, 1024), (1760, 1760),
         (2500, 3000), (4000, 3500)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_comes_within_the_budget_in_proportion_and_alike_for_all(size):
    picture = Picture(encoded(film(*size, mode="L")))
    assert picture.fault_in_header() is None and picture.fault() is None
    width, height = picture.size
    own = np.asarray(picture.pixels())
    assert own.shape == (height, width, 3) and (own == as_the_engine_sees(picture)).all()
    assert MIN_PIXELS <= width * height <= MAX_PIXELS
    assert abs(width - size[0] * height / size[1]) <= max(1.0, size[0] / size[1]) + 1
    if MIN_PIXELS <= size[0] * size[1] <= MAX_PIXELS:
        assert (width, height) == size
    assert Picture(picture.encoded()).size == picture.size  # preparing twice changes nothing


@pytest.mark.parametrize(("width", "height"), [(2400, 6), (6, 2400), (240, 1), (19990, 100)])
def test_a_strip_that_processors_refuse_is_refused_with_its_numbers(width, height):
    fault = Picture(encoded(Image.new("L", (width, height)))).fault_in_header()
    assert fault is not None and "200:1" in fault and " x " in fault


MODES = {
    "1-bit": (film(mode="1"), "PNG", {}), "grey": (film(mode="L"), "PNG", {}), "palette": (film(mode="P"), "PNG", {}),
    "cmyk jpeg": (film(mode="CMYK"), "JPEG", {"quality": 95}), "cmyk tiff": (film(mode="CMYK"), "TIFF", {}),
    "ycbcr": (film(mode="YCbCr"), "TIFF", {}), "bmp": (film(), "BMP", {}), "gif": (film(mode="P"), "GIF", {}),
    "webp": (film(), "WEBP", {"lossless": True}), "tiff": (film(), "TIFF", {"compression": "tiff_lzw"}), "ppm": (film(), "PPM", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_every_common_mode_and_format_keeps_its_picture(name):
    image, kind, options = MODES[name]
    picture = Picture(encoded(image, kind, **options))
    assert picture.fault() is None and picture.size == (96, 64)
    own = np.asarray(picture.pixels()).astype(int)
    assert (own == as_the_engine_sees(picture)).all()
    assert own[4, 4].sum() > 300 and own[40, 60].sum() < 90  # the corner is bright and the rest dark


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_turn_that_exif_asks_for_is_made_and_the_header_knows_the_size(turn, kind):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(film(), kind, exif=exif.tobytes() if kind != "TIFF" else exif)
    picture = Picture(data)
    assert picture.size == picture.pixels().size == ((64, 96) if turn >= 5 else (96, 64))
    with Image.open(io.BytesIO(data)) as raw:
        upright = np.asarray(ImageOps.exif_transpose(raw).convert("RGB"))
    assert (np.asarray(picture.pixels()) == upright).all() and (as_the_engine_sees(picture) == upright).all()


def with_alpha(mode, alpha):
    image = film(mode=mode)
    image.putalpha(Image.new("L", image.size, alpha))
    return encoded(image)


def palette_with_a_clear_colour():
    image = film(mode="P")
    return encoded(image, transparency=image.getpixel((90, 60)))


@pytest.mark.parametrize("data", [with_alpha("L", 60), with_alpha("RGB", 60), palette_with_a_clear_colour()])
def test_what_shines_through_alpha_is_white_for_all(data):
    picture = Picture(data)
    assert picture.fault() is None
    own = np.asarray(picture.pixels())
    assert (own == as_the_engine_sees(picture)).all() and own[60, 90].min() > 180  # the dark part, nearly clear


def frames(kind, **options):
    return encoded(
        film(), kind, save_all=True, append_images=[film().rotate(180), film(mode="L").convert("RGB")], **options
    )


DEEP = "choose a window"
REFUSED = {
    "16-bit grey": (encoded(Image.new("I;16", (60, 60), 4000)), DEEP),
    "32-bit integers": (encoded(Image.new("I", (60, 60), 4000), "TIFF"), DEEP),
    "float": (encoded(Image.new("F", (60, 60), 0.5), "TIFF"), DEEP),
    "GIF of frames": (frames("GIF"), "3 frames (GIF)"), "pages": (frames("TIFF"), "3 frames (TIFF)"),
    "WebP of frames": (frames("WEBP"), "3 frames (WEBP)"), "APNG": (frames("PNG"), "3 frames (PNG)"),
    "cut off": (encoded(Image.effect_noise((90, 90), 60))[:2000], "unreadable"), "no image": (b"DICM", "unreadable"),
    "transparent": (with_alpha("L", 0), "fully transparent"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_single_8_bit_picture_is_refused_with_the_reason(name):
    data, reason = REFUSED[name]
    assert reason in str(Picture(data).fault())


def test_16_bit_colour_is_refused_too_though_pillow_opens_it_as_rgb():
    cv2 = pytest.importorskip("cv2")
    data = cv2.imencode(".png", np.full((60, 60, 3), 900, dtype=np.uint16))[1].tobytes()
    assert DEEP in str(Picture(data).fault_in_header())


# What Pillow would open by itself: PostScript starts Ghostscript, the others reach decoders that no row needs.
ODD_MODES = {"XBM": "1", "MSP": "1", "SPIDER": "F"}
KINDS = ("EPS", "PDF", "ICO", "TGA", "PCX", "JPEG2000", "DDS", "SGI", "XBM", "ICNS", "MSP", "SPIDER")
UNLISTED = {kind: encoded(film(mode=ODD_MODES.get(kind, "RGB")), kind) for kind in KINDS} | {
    "PostScript by hand": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    "FLI": bytes(4) + b"\x11\xaf" + bytes(200),
}


@pytest.mark.parametrize("name", UNLISTED)
@pytest.mark.parametrize("ending", [".png", ".eps", ""])
def test_a_format_that_is_not_listed_is_refused_whatever_the_file_is_called(name, ending, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail(f"started {a}"))
    path = tmp_path / f"film{ending}"
    path.write_bytes(UNLISTED[name])
    for source in (str(path), UNLISTED[name]):
        picture = Picture(source)
        assert "it is no PNG, JPEG," in str(picture.fault_in_header())
        with pytest.raises(UnreadablePicture, match="PPM file; save it as one"):
            picture.encoded()


def test_a_pil_image_of_such_a_format_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail(f"started {a}"))
    with pytest.raises(DataError, match="an image of format EPS: it must be one of PNG,"):
        load(
            [
                {
                    "id": "a",
                    "images": [Image.open(io.BytesIO(UNLISTED["EPS"]))],
                    "question": "?",
                    "answer": "vein",
                    "kind": "open",
                }
            ]
        )


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>%d</tiff:Orientation></x:xmpmeta>'
DAMAGED = {
    "no TIFF": b"Exif\0\0nonsense", "cut": b"Exif\0\0II*\0\xff\xff\xff\x7f", "empty": b"Exif\0\0",
    "beyond the end": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\0" * 3,
    "orientation is a text": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",
}  # fmt: skip


def with_xmp(kind, turn):
    if kind == "PNG":
        notes = PngImagePlugin.PngInfo()
        notes.add_itxt("XML:com.adobe.xmp", (XMP % turn).decode())
        return {"pnginfo": notes}
    return {"tiffinfo": {700: XMP % turn}} if kind == "TIFF" else {"xmp": XMP % turn}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", [0, 1, 3, 5, 6, 7, 8, 9])
def test_a_turn_that_only_xmp_asks_for_is_made_in_size_and_pixels(turn, kind):
    data = encoded(film(), kind, **with_xmp(kind, turn))
    picture = Picture(data)
    assert picture.size == picture.pixels().size == ((64, 96) if turn in (5, 6, 7, 8) else (96, 64))
    with Image.open(io.BytesIO(data)) as raw:
        upright = np.asarray(ImageOps.exif_transpose(raw).convert("RGB"))
    assert (np.asarray(picture.pixels()) == upright).all() and (as_the_engine_sees(picture) == upright).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_exif_costs_the_turn_and_not_the_picture(name, kind):
    picture = Picture(encoded(film(), kind, exif=DAMAGED[name]))
    assert picture.fault() is None and picture.size == picture.pixels().size == (96, 64)
    (kept,) = (
        load(
            [
                {
                    "id": "a",
                    "images": [Image.open(io.BytesIO(picture.source))],
                    "question": "?",
                    "answer": "vein",
                    "kind": "open",
                }
            ]
        )
        .prompts[0]
        .images
    )
    assert (np.asarray(kept.pixels()) == np.asarray(picture.pixels())).all()


def test_exif_behind_the_pixels_is_not_followed_by_half():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(film(), exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert Picture(moved).size == Picture(moved).pixels().size


def test_a_phones_second_picture_does_not_hide_its_first():
    data = encoded(film(), "MPO", save_all=True, append_images=[Image.new("RGB", (96, 64), "white")], quality=95)
    picture = Picture(data)
    assert picture.fault() is None and np.asarray(picture.pixels())[40, 60].max() < 40


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "bomb" in str(Picture(encoded(film())).fault_in_header())


def test_a_file_that_is_gone_or_broken_is_named_when_it_is_wanted(tmp_path):
    path = tmp_path / "gone.png"
    assert Picture(str(path)).fault_in_header() == f"image file not found: {path}"
    path.write_bytes(b"no picture")
    for wanted in (Picture(str(path)).encoded, Picture(str(path)).pixels, Picture(str(path)).blank):
        with pytest.raises(UnreadablePicture, match=r"gone\.png"):
            wanted()


def test_a_blank_picture_has_the_size_of_the_prepared_one():
    blank = Picture(encoded(Image.new("L", (4000, 1000)))).blank()
    assert blank.size == Picture(encoded(Image.new("L", (4000, 1000)))).size == blank.pixels().size
    assert blank.pixels().getextrema() == ((128, 128),) * 3


def test_the_header_is_all_that_a_size_needs(monkeypatch):
    data = encoded(film(3000, 2500))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert Picture(data, FREE).size == Budget().fit(3000, 2500)


def test_rows_with_unusable_images_are_refused_by_row_and_reason(tmp_path):
    rows = []
    for name, (data, _) in REFUSED.items():
        (tmp_path / f"{name}.img").write_bytes(data)
        rows.append({"id": name, "images": [f"{name}.img"], "question": "?", "answer": "vein", "kind": "open"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        load(tmp_path / "rows.jsonl")
    assert {r.id: r.place for r in error.value.refused} == {name: f"line {i}" for i, name in enumerate(REFUSED, 1)}
    for refused in error.value.refused:
        assert REFUSED[refused.id][1] in refused.reason


def test_rows_of_one_to_eight_images_keep_their_order(tmp_path):
    for count in range(1, 9):
        sources = [encoded(Image.new("L", (60 + n, 60), 20 * n)) for n in range(count)]
        (prompt,) = load([{"id": "a", "images": sources, "question": "?", "answer": "vein", "kind": "open"}]).prompts
        assert [p.size[0] for p in prompt.images] == [60 + n for n in range(count)]
        assert prompt.reward_input().images == tuple(sources)  # rewards get what the row gave


@pytest.mark.parametrize("file", ["alpha_in_step_2", "exif_in_step_2"])
def test_alpha_and_turned_photos_are_the_same_for_trainer_and_engine(shared_data, file):
    prompts = load(shared_data / "cases" / "door" / "run" / f"{file}.jsonl", instruction="short").prompts
    for prompt in prompts:
        for picture in prompt.images:
            assert (np.asarray(picture.pixels()) == as_the_engine_sees(picture)).all()


def test_a_strip_is_refused_at_load(shared_data):
    with pytest.raises(DataError, match=r"line 4 \(id n3\): image .*ecg_strip_2400x6.png is a strip of 2400 x 6"):
        load(shared_data / "cases" / "door" / "run" / "strip_in_step_2.jsonl")


@pytest.mark.parametrize("size", [(640, 480), (1001, 777), (57, 300), (3000, 2000)])
def test_sides_of_a_multiple_are_left_alone_by_the_processor(size):
    from transformers import Qwen2VLImageProcessor

    picture = Picture(encoded(Image.new("L", size)), Budget(multiple=28))
    processor = Qwen2VLImageProcessor(
        size={"shortest_edge": 56 * 56, "longest_edge": 1 << 24}, patch_size=14, merge_size=2
    )
    _, rows, columns = processor(images=[picture.pixels()], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert picture.size == picture.pixels().size == (14 * columns, 14 * rows)


def with_chunk(content, kind, data=b""):
    """The PNG with a chunk before its end."""
    return content[:-12] + png._chunk(kind, data) + content[-12:]


PLAIN = {
    "png": encoded(film()),
    "grey png": encoded(film(mode="L")),
    "jpeg": encoded(film(), "JPEG"),
    "ours": png.write(film()),
}
NOT_PLAIN = {
    "too large": encoded(film(2000, 2000)),
    "a turn behind the pixels": with_chunk(PLAIN["png"], b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "text": with_chunk(PLAIN["png"], b"tEXt", b"Comment\0hello"),
    "more behind the end": PLAIN["png"] + b"more",
    "a palette": encoded(film(mode="P")),
    "a jpeg with exif": encoded(film(), "JPEG", exif=Image.Exif().tobytes()),
    "another format": encoded(film(), "BMP"),
}  # fmt: skip


def test_a_plain_file_within_the_budget_is_sent_as_it_is_stored(tmp_path):
    for name, content in PLAIN.items():
        assert Picture(content).encoded() == content
        path = tmp_path / name
        path.write_bytes(content)
        assert Picture(str(path), FREE).encoded() == content


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_any_other_file_is_sent_as_a_plain_png(name):
    sent = Picture(NOT_PLAIN[name]).encoded()
    assert sent != NOT_PLAIN[name] and png.is_plain(sent)
    assert (as_the_engine_sees(Picture(NOT_PLAIN[name])) == np.asarray(Picture(NOT_PLAIN[name]).pixels())).all()


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_file_that_was_cut_or_damaged_is_not_passed_on(name):
    content = PLAIN[name]
    with pytest.raises(UnreadablePicture):
        Picture(content[: len(content) // 2]).encoded()
    if name != "jpeg":  # which has no checksums
        assert not any(
            png.is_plain(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :]) for i in range(len(content))
        )


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_png_of_ours_holds_the_pixels_it_was_written_from(mode):
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 9), (9, 1), (31, 57)):
        pixels = random.integers(0, 256, (height, width, 3)[: 3 if mode == "RGB" else 2], dtype=np.uint8)
        with Image.open(io.BytesIO(png.write(Image.fromarray(pixels)))) as image:
            assert image.mode == mode and (np.asarray(image) == pixels).all()


def test_prepared_bytes_are_kept_up_to_a_bound_those_used_last(monkeypatch):
    monkeypatch.setattr(images, "KEPT_BYTES", 100)
    kept = images._Kept()
    one, two, three = (Picture(bytes([n])) for n in range(3))
    kept.put(one, b"1" * 40)
    kept.put(two, b"2" * 40)
    kept.put(two, b"2" * 50)
    assert kept.get(one) == b"1" * 40
    kept.put(three, b"3" * 30)
    assert (kept.get(one), kept.get(two), kept.get(three)) == (b"1" * 40, None, b"3" * 30)
    kept.put(two, b"2" * 200)
    assert [kept.get(picture) for picture in (one, two, three)] == [None] * 3
