"""Invented questions: kept only where a second reading, graded by the rewards, agrees."""

import json

from PIL import Image
from test_thoughts import read, synth
from writer_server import ScriptedWriter, images_of, text_of

from lingshu_rl.data.load import load
from lingshu_rl.synth.instruct import read_items

ITEMS = [
    {"question": "Which organ is shown?", "kind": "option", "options": ["liver", "lung", "heart"], "answer": "lung"},
    {"question": "Is there an effusion?", "kind": "yesno", "answer": "no"},
    {"question": "What is the modality?", "kind": "open", "answer": "X-ray"},
    {"question": "How old is the patient?", "kind": "open", "answer": "Error"},
    {"question": "Is the patient a smoker?", "kind": "yesno", "answer": "yes"},
    {"question": "Which side?", "kind": "option", "options": ["left", "right"], "answer": "both"},
    {"question": "Is the heart large?", "kind": "yesno", "answer": "yes"},
    {"question": "Write a poem.", "kind": "poem", "answer": "roses"},
]
SECOND = {"organ": "B", "effusion": "No", "modality": "x-ray", "smoker": "Error", "heart": "no"}


def answer(body):
    text = text_of(body)
    if "exam questions" in text:
        return "```json\n" + json.dumps(ITEMS) + "\n```" if "known" in text else "I would rather not."
    (said,) = [a for key, a in SECOND.items() if key in text.splitlines()[0]]
    return f"<think>I look at it.</think><answer>{said}</answer>"


def test_a_question_is_kept_where_both_readings_agree_and_each_other_has_its_reason(tmp_path):
    Image.new("L", (40, 40)).save(tmp_path / "i.png")
    rows = [{"id": "a", "images": ["i.png"], "caption": "Chest film.", "meta": {"modality": "X-ray"}},
            {"id": "b", "images": ["i.png"]}, {"id": "c", "images": []}]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with ScriptedWriter(answer) as server:
        args = (
            "instruct",
            tmp_path / "r.jsonl",
            "--out",
            tmp_path / "o.jsonl",
            "--url",
            server.url,
            "--model",
            "w",
            "--count",
            8,
        )
        assert synth(*args) == 0
    kept, dropped = read(tmp_path / "o.jsonl"), {d["id"]: d["reason"] for d in read(tmp_path / "o.dropped.jsonl")}
    assert [r["id"] for r in kept] == ["a-q0", "a-q1", "a-q2"]
    assert dropped == {
        "a-q3": "writer answered Error", "a-q4": "second reading answered Error", "a-q5": "not a usable row",
        "a-q6": "wrong answer", "a-q7": "not a usable row", "b": "reply is no JSON list", "c": "no image",
    }  # fmt: skip
    seconds = [b for b in server.bodies if "exam questions" not in text_of(b)]
    assert all(images_of(b) and 'write "Error"' in text_of(b) for b in seconds)
    for row in kept:
        assert row["meta"]["synth"]["verdict"]["value"] == 1.0 and len(row["meta"]["synth"]["requests"]) == 2
    assert "8 different" in text_of(server.bodies[0]) or "8 different" in text_of(server.bodies[1])
    assert len(load(tmp_path / "o.jsonl").prompts) == 3


def test_lists_are_found_in_replies_and_nothing_else_is():
    assert read_items('Here: [{"a": 1}] done') == [{"a": 1}]
    assert read_items("```\n[1]\n```") == [1]
    assert read_items('{"a": 1}') is None and read_items("no") is None and read_items("[1, 2") is None
