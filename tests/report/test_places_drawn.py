"""Labels and answers of grounding rows, drawn on the image in the report."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from lingshu_rl.report.html import write_report
from rewards import RewardInput, default_reward

META = {"box_scale": "pixel", "image_size": [200, 100]}
CASES = {
    "box": (
        [20, 10, 100, 50],
        "[40, 10, 100, 50]",
        ('x="0.1" y="0.1" width="0.4" height="0.4"', 'x="0.2" y="0.1" width="0.3"'),
    ),
    "points": ([20, 10, 100, 50], "[50, 30]", ('cx="0.3" cy="0.3"', 'cx="0.25" cy="0.3"')),
    "mask": ([[20, 10, 100, 10, 100, 50, 20, 50]], "[[20, 10, 60, 10, 60, 50, 20, 50]]", ("<rect", "<rect")),
}


def stored(name, kind, gold, completion, image):
    sample = RewardInput(f"<answer>{completion}</answer>", gold, kind=kind, meta=META)
    result = default_reward().score(sample)
    return {
        "id": name, "kind": kind, "task": "", "question": "Where?", "options": [], "gold": gold, "image": str(image),
        "completion": sample.completion, "parsed": result.parsed, "value": result.value, "status": result.status,
        "reason": result.reason, "error": None, "tokens": 9, "finish_reason": "stop",
    }  # fmt: skip


def page(tmp_path, rows):
    (tmp_path / "eval").mkdir()
    for stage in ("before", "after"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "eval" / f"{stage}.jsonl").write_text(text)
    return write_report(tmp_path).read_text()


@pytest.mark.parametrize("kind", CASES)
def test_the_label_and_the_answer_are_drawn(tmp_path, kind):
    gold, said, (label, answer) = CASES[kind]
    image = tmp_path / "a.png"
    Image.new("L", (200, 100)).save(image)
    wrong = stored("1", kind, gold, "[[150, 60, 160, 60, 160, 70]]" if kind == "mask" else said, image)
    html = page(tmp_path, [{**wrong, "value": 0.4}, stored("2", kind, gold, said, image)])
    assert '<svg class="marks"' in html
    for side, drawn in (("label", label), ("answer", answer)):
        assert re.search(rf'<(?:rect|circle) class="{side}"', html) and drawn in html


def test_what_a_model_wrote_stays_text(tmp_path):
    label = "<script>alert(1)</script>"
    said = json.dumps({"bbox": [1, 2, 30, 40], "label": label})
    row = {**stored("1", "box", [20, 10, 100, 50], said, ""), "value": 0.1}
    assert "<script>alert" not in page(tmp_path, [row])


def test_answers_that_cannot_be_read_and_old_runs_have_no_drawing(tmp_path):
    rows = [
        {**stored("1", "box", [20, 10, 100, 50], "left", ""), "value": 0.0},
        {**stored("2", "box", [20, 10, 100, 50], "left", ""), "parsed": [1, 2]},
    ]
    assert '<svg class="marks"' not in page(tmp_path, rows)
