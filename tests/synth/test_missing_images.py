"""A picture that is missing or broken costs its own row, whatever the step; the others are made."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from test_thoughts import read, synth
from writer_server import ScriptedWriter


@pytest.fixture
def rows(tmp_path):
    Image.new("L", (64, 48), 90).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    mask = np.zeros((48, 64), np.uint8)
    mask[4:20, 2:22] = 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    row = {
        "question": "What is the most common use?",
        "kind": "option",
        "options": ["imaging", "surgery"],
        "answer": "A",
    }
    more = {"meta": {"modality": "CT"}, "masks": [{"path": "m.png", "names": {"1": "liver"}}]}
    made = [{"id": name, "images": [f"{name}.png"], **row, **more} for name in ("gone", "broken", "good")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    return tmp_path / "r.jsonl"


def said(body):
    text = json.dumps(body["messages"])
    if "exam questions" in text:
        return '[{"question": "Is it a CT?", "kind": "yesno", "answer": "yes"}]'
    if "most common use" in text:
        return "<think>It is plainly an imaging tool.</think><answer>A</answer>"
    caption = "This CT shows the liver; it is sharp and well exposed, and nothing else stands out here."
    return caption if "Join two" in text or ("CT" in text and "Error" not in text) else "<answer>yes</answer>"


@pytest.mark.parametrize("step", ["thoughts", "captions", "instruct"])
def test_steps_with_a_writer_drop_the_row_and_never_ask_about_it(rows, step):
    with ScriptedWriter(said) as server:
        code = synth(step, rows, "--out", rows.with_name("o.jsonl"), "--url", server.url, "--model", "w")
    assert code == 0 and {row["meta"]["synth"]["from"] for row in read(rows.with_name("o.jsonl"))} == {"good"}
    dropped = {d["id"]: d["reason"] for d in read(rows.with_name("o.dropped.jsonl"))}
    assert {name: dropped[name] for name in ("gone", "broken")} == {
        "gone": "image not found",
        "broken": "unreadable image",
    }


def test_rewriting_drops_rows_whose_picture_is_not_there(rows):
    assert synth("rewrite", rows, "--to", "open", "--out", rows.with_name("o.jsonl")) == 0
    assert {row["id"] for row in read(rows.with_name("o.jsonl"))} == {"broken-open", "good-open"}  # seen, not decoded
    (dropped,) = read(rows.with_name("o.dropped.jsonl"))
    assert (dropped["reason"], dropped["row"]["meta"]["synth"]["from"]) == ("image not found", "gone")


def test_a_template_goes_on_without_the_records_that_cannot_be_measured(rows):
    spec = {"source": {"records": str(rows)}, "questions": {"side": {"about": "regions.side", "form": "option", "options": 2, "ask": ["Where is the {name}?"]}}}  # fmt: skip
    rows.with_name("spec.yaml").write_text(yaml.safe_dump(spec))
    assert synth("template", rows.with_name("spec.yaml"), "--out", rows.with_name("o.jsonl")) == 0
    assert {row["meta"]["synth"]["from"] for row in read(rows.with_name("o.jsonl"))} == {"good"}
    assert {d["id"]: d["reason"] for d in read(rows.with_name("o.dropped.jsonl"))} == dict.fromkeys(("gone", "broken"), "unreadable record")  # fmt: skip
