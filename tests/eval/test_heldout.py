import io

from PIL import Image

from lingshu_rl.eval.controls import blank, shuffled
from lingshu_rl.imaging.images import Picture
from lingshu_rl.types import Prompt


def png(shade, size=(80, 40)):
    buffer = io.BytesIO()
    Image.new("L", size, shade).save(buffer, "PNG")
    return buffer.getvalue()


def prompt(name, task, *shades):
    return Prompt(
        name,
        ({"role": "user", "content": "?"},),
        tuple(Picture(png(s)) for s in shades),
        "A",
        (),
        "option",
        {"task": task},
    )


def test_blank_images_keep_their_number_and_size():
    (only,) = blank([prompt("a", "plane", 3, 200)])
    assert [i.size for i in only.images] == [i.pixels().size for i in only.images] == [(80, 40)] * 2
    assert {i.pixels().getpixel((5, 5)) for i in only.images} == {(128, 128, 128)}
    assert only.gold == "A" and only.id == "a"


def test_shuffled_images_come_from_another_question_of_the_same_task():
    asked = [prompt(f"p{i}", "plane", i) for i in range(5)] + [prompt(f"w{i}", "width", 100 + i) for i in range(4)]
    mixed = shuffled(asked)
    assert [p.id for p in mixed] == [p.id for p in asked]
    for before, after in zip(asked, mixed, strict=True):
        assert before.images != after.images
        same_task = {p.images for p in asked if p.meta["task"] == before.meta["task"]}
        assert after.images in same_task
    assert {p.images for p in mixed} == {p.images for p in asked}
    assert mixed == shuffled(asked)


def test_a_question_alone_in_its_task_keeps_its_image():
    assert shuffled([prompt("a", "plane", 1)])[0].images == prompt("a", "plane", 1).images
