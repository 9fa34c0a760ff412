"""Template questions: an independent recomputation from the raw labels and pixels agrees with every one."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_thoughts import read, synth

from lingshu_rl.data.load import load
from lingshu_rl.synth.regions import Region
from lingshu_rl.synth.rows import SynthError
from lingshu_rl.synth.template import TemplateQuestion, read_spec, template_rows

ROOT = Path(__file__).resolve().parents[2]
NIH = ROOT / "recipes" / "synth" / "nih_chest_xray.yaml"


def answer_text(row):
    return row["options"]["ABCDEFGH".index(row["answer"])] if row["kind"] == "option" else row["answer"]


def test_every_question_from_real_nih_labels_is_right(shared_data, tmp_path):
    folder = shared_data / "data" / "nih_cxr"
    spec = yaml.safe_load(NIH.read_text())
    spec["source"] |= {"table": str(folder / "labels.csv"), "images": [str(folder / "images384" / "{image}")]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert synth("template", tmp_path / "spec.yaml", "--out", tmp_path / "q.jsonl") == 0
    rows = read(tmp_path / "q.jsonl")
    table = {line["image"]: line for line in csv.DictReader((folder / "labels.csv").open())}
    words = {w: label for label, w in spec["questions"]["finding"]["values"].items()}
    views = {w: label for label, w in spec["questions"]["view"]["values"].items()}
    seen = Counter()
    for row in rows:
        line, task = table[row["meta"]["synth"]["from"]], row["meta"]["task"]
        present = set(line["findings"].split("|"))
        if task == "view":
            assert [views[o] == line["view"] for o in row["options"]].count(True) == 1
            assert views[answer_text(row)] == line["view"]
        elif task == "finding":
            assert [words[o] in present for o in row["options"]].count(True) == 1
            assert words[answer_text(row)] in present
        elif task == "has_finding":
            (asked,) = [w for w in words if row["question"].endswith(f" {w}?")]
            assert (row["answer"] == "yes") == (words[asked] in present)
        else:
            pairs = [b.split(":") for b in line["bboxes_384(label:x,y,w,h)"].split(";")]
            boxes = dict(pairs)
            (asked,) = [label for label in boxes if f" {label} " in row["question"]]
            assert [label for label, _ in pairs].count(asked) == 1
            x, _, w, _ = map(float, boxes[asked].split(","))
            assert answer_text(row) == ("left" if x + w / 2 < 192 else "right")
        assert row["meta"]["patient_id"] == line["patient"] and row["meta"]["synth"]["verdict"]["kept"]
        seen[task, answer_text(row)] += 1
    tasks = Counter(row["meta"]["task"] for row in rows)
    assert tasks["view"] == tasks["finding"] == tasks["has_finding"] == 400 and tasks["side"] >= 10
    assert seen["has_finding", "yes"] == seen["has_finding", "no"] == 200
    assert seen["view", "posterior-anterior (PA)"] == 200
    letters = Counter(row["answer"] for row in rows if row["meta"]["task"] == "finding")
    assert max(letters.values()) - min(letters.values()) <= 2  # no letter is right more often
    assert max(n for (task, _), n in seen.items() if task == "finding") < 100  # nor is pneumonia, half of all images
    assert len(load(tmp_path / "q.jsonl").prompts) == len(rows)


def masked_records(folder, count=30):
    """Squares of two tissues in a random place: the image shows nothing, the mask is the truth."""
    rng = np.random.default_rng(0)
    Image.new("L", (80, 60)).save(folder / "i.png")
    records = []
    for n in range(count):
        mask = np.zeros((60, 80), np.uint8)
        for value in (1, 2, 3)[: 1 + n % 3]:
            h, w = rng.integers(4, 24, 2)
            y, x = rng.integers(0, 60 - h), rng.integers(0, 80 - w)
            mask[y : y + h, x : x + w] = value
        Image.fromarray(mask).save(folder / f"m{n}.png")
        names = {"1": "liver", "2": "tumour", "3": "vessel"}
        records.append({"id": f"m{n}", "images": ["i.png"], "masks": [{"path": f"m{n}.png", "names": names}]})
    (folder / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


MASKS = {
    "source": {"records": "r.jsonl"},
    "questions": {
        "present": {"about": "regions.present", "form": "yesno", "ask": ["Is there a {name}?"]},
        "side": {"about": "regions.side", "form": "option", "options": 2, "ask": ["Which half holds the {name}?"]},
        "level": {"about": "regions.level", "form": "option", "options": 2, "ask": ["Which half holds the {name}?"]},
        "count": {"about": "regions.count", "form": "numeric", "ask": ["How many parts has the {name}?"]},
        "share": {"about": "regions.share", "form": "numeric", "ask": ["How much of the image is {name}?"]},
        "largest": {"about": "regions.largest", "form": "option", "ask": ["Which is the largest?"]},
    },
}


def test_every_question_from_masks_is_right(tmp_path):
    masked_records(tmp_path)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(MASKS))
    assert synth("template", tmp_path / "s.yaml", "--out", tmp_path / "q.jsonl") == 0
    rows = read(tmp_path / "q.jsonl")
    values = {"liver": 1, "tumour": 2, "vessel": 3}
    for row in rows:
        synth_meta = row["meta"]["synth"]
        mask = np.asarray(Image.open(tmp_path / f"{synth_meta['from']}.png"))
        inside = mask == values.get(synth_meta.get("name"), -1)
        y, x = np.nonzero(inside)
        task = row["meta"]["task"]
        if task == "present":
            assert (row["answer"] == "yes") == inside.any()
        elif task == "side":
            assert answer_text(row) == "left" if x.max() < 40 else x.min() >= 40 and answer_text(row) == "right"
        elif task == "level":
            assert answer_text(row) == "upper" if y.max() < 30 else y.min() >= 30 and answer_text(row) == "lower"
        elif task == "share":
            assert float(row["answer"].removesuffix(" %")) == pytest.approx(100 * inside.mean(), abs=0.051)
        elif task == "count":
            assert int(row["answer"]) == flood_count(inside)
        else:
            sizes = {name: (mask == value).sum() for name, value in values.items()}
            assert answer_text(row) == max(sizes, key=sizes.get)
            assert sorted(sizes.values())[-1] >= 1.5 * sorted(sizes.values())[-2]
    assert set(MASKS["questions"]) == {row["meta"]["task"] for row in rows}


def flood_count(inside):
    """Connected parts by filling, in another way than the library's."""
    left, parts = {(int(y), int(x)) for y, x in zip(*np.nonzero(inside), strict=True)}, 0
    while left:
        stack, size = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            size += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        parts += size >= 4
    return parts


def test_nuclei_of_a_label_mask_are_counted_by_label(tmp_path):
    import importlib.util

    package = Path(importlib.util.find_spec("stardist").origin).parent / "data" / "images"
    with Image.open(package / "mask2d.tif") as image:
        labels = np.asarray(image)
    Image.new("L", labels.shape[::-1]).save(tmp_path / "i.png")
    records = []
    for n, (y, x) in enumerate([(0, 0), (0, 128), (128, 0), (128, 128)]):
        np.save(tmp_path / f"m{n}.npy", labels[y : y + 128, x : x + 128].astype(np.int64))
        Image.new("L", (128, 128)).save(tmp_path / f"i{n}.png")
        records.append(
            {"id": f"t{n}", "images": [f"i{n}.png"], "masks": [{"path": f"m{n}.npy", "names": {"*": "nucleus"}}]}
        )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    spec = {
        "source": {"records": "r.jsonl"},
        "questions": {"count": {**MASKS["questions"]["count"], "ask": ["How many?"]}},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(spec))
    assert synth("template", tmp_path / "s.yaml", "--out", tmp_path / "q.jsonl") == 0
    for row in read(tmp_path / "q.jsonl"):
        n = int(row["meta"]["synth"]["from"][1:])
        y, x = divmod(n, 2)
        tile = labels[128 * y : 128 * y + 128, 128 * x : 128 * x + 128]
        assert int(row["answer"]) == len(set(tile.ravel().tolist()) - {0})
    assert len(read(tmp_path / "q.jsonl")) == 4


def question(**fields):
    base = {
        "name": "f",
        "about": "labels.f",
        "form": "option",
        "ask": ("Which?",),
        "values": {"a": "A", "b": "B", "c": "C"},
    }
    return TemplateQuestion(**{**base, **fields})


def made(labels, q):
    records = [{"id": str(n), "images": [], "labels": {"f": label}} for n, label in enumerate(labels)]
    return list(template_rows(records, [q]))


def test_labels_that_make_each_other_doubtful_are_neither_options_nor_denied():
    (outcome,) = made([["a"]], question(related=(("a", "b"),)))
    assert set(outcome.row["options"]) == {"A", "C"}
    asked = made([["a"], ["c"], ["b"]] * 4, question(form="yesno", ask=("Is it {name}?",), related=(("a", "b"),)))
    for o in asked:
        label, record = o.row["meta"]["synth"]["name"], int(o.row["meta"]["synth"]["from"]) % 3
        assert (record, label) not in {(0, "B"), (2, "A")}


def test_records_that_a_label_space_does_not_know_are_dropped_with_the_label():
    (outcome,) = made([["zebra"]], question())
    assert outcome.reason == "label outside of the label space" and "zebra" in outcome.detail
    contradiction = made([["a", "none"]], question(none="none"))
    assert contradiction[0].reason == "label outside of the label space"
    assert made([["none"]], question(none="none")) == []  # nothing found: no option is right


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"about": "labels"}, "questions.f.about"),
        ({"about": "regions.shape"}, "questions.f.about"),
        ({"form": "report"}, "labels are asked as"),
        ({"about": "regions.side", "form": "yesno"}, "asked as 'option'"),
        ({"values": {"a": "A"}}, "at least two labels"),
        ({"ask": ()}, "at least one wording"),
        ({"options": 1}, "must be from 2"),
        ({"related": (("a", "z"),)}, "related names z"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_by_key(fields, message):
    with pytest.raises(SynthError, match=message):
        question(**fields)


def test_a_spec_with_an_unknown_key_column_or_box_is_refused(tmp_path, capsys):
    spec = tmp_path / "s.yaml"
    spec.write_text("source: {records: r.jsonl}\nquestions: {a: {abot: labels.x}}")
    with pytest.raises(SynthError, match="unknown key 'abot'"):
        read_spec(spec)
    (tmp_path / "t.csv").write_text("image,view,box\nx.png,AP,odd\n")
    questions = {"a": {"about": "labels.view", "form": "open", "ask": ["W?"], "values": {"AP": "AP", "PA": "PA"}}}
    for source, message in (
        ({"id": "{image}", "images": ["{picture}"]}, "no column for '{picture}'"),
        ({"id": "{image}", "images": ["{image}"], "boxes": "{box}"}, "a box reads"),
        ({"id": "{image}", "image": ["{image}"]}, "unknown key 'image'"),
    ):
        spec.write_text(yaml.safe_dump({"source": {"table": "t.csv", **source}, "questions": questions}))
        assert synth("template", spec, "--out", tmp_path / "o.jsonl") == 2
        assert message in capsys.readouterr().err


def test_a_region_near_the_middle_lies_on_neither_side():
    def region(x, w):
        return Region("r", (x, 0, w, 10), (100, 100))

    assert (region(0, 30).side, region(70, 30).side) == ("left", "right")
    assert region(38, 12).side == region(45, 20).side == region(50, 9).side == ""
