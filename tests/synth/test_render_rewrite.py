"""Text questions as pictures; multiple choice as open questions and back."""

import json

import numpy as np
import pytest
from PIL import Image
from test_thoughts import read, synth

from lingshu_rl.data.load import load
from lingshu_rl.synth.rendering import MARGIN, Page, draw, unknown_characters
from lingshu_rl.synth.rewrite import has_one_answer
from lingshu_rl.synth.rows import SynthError
from rewards import OptionLetter


def rows_file(folder, rows):
    full = [{"id": f"r{n}", "images": [], **row} for n, row in enumerate(rows)]
    (folder / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in full))
    return full


MCQ = {"question": "Which vitamin does the liver store most?", "kind": "option", "options": ["vitamin A", "vitamin C", "niacin"], "answer": "vitamin A"}  # fmt: skip


def test_the_picture_holds_the_question_and_the_row_its_answer(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "i.png")
    rows_file(tmp_path, [MCQ, {"question": "Dose in mg?", "kind": "numeric", "answer": "5 mg", "unit": "mg"},
                         {**MCQ, "images": ["i.png"]}, {**MCQ, "question": "维生素"}, {**MCQ, "question": "why " * 9000}])  # fmt: skip
    assert synth("render", tmp_path / "r.jsonl", "--out", tmp_path / "o.jsonl") == 0
    first, second = read(tmp_path / "o.jsonl")
    reasons = [d["reason"] for d in read(tmp_path / "o.dropped.jsonl")]
    assert reasons == ["has an image already", "font lacks characters", "text is too long"]
    assert first["options"] == ["A", "B", "C"] and first["answer"] == "A" and second["unit"] == "mg"
    assert (
        first["meta"]["synth"]["text"]
        == "Which vitamin does the liver store most?\nA. vitamin A\nB. vitamin C\nC. niacin"
    )
    assert MCQ["question"] not in first["question"]
    prompts = load(tmp_path / "o.jsonl").prompts
    assert OptionLetter().score(prompts[0].reward_input("<answer>A</answer>")).value == 1.0
    assert OptionLetter().score(prompts[0].reward_input("<answer>B</answer>")).value == 0.0
    ink = np.asarray(Image.open(prompts[0].images[0].source).convert("L")) < 128
    bands = np.diff(np.concatenate(([0], ink.any(1).astype(int)))) == 1
    assert bands.sum() == 4  # four lines of text, in their margins
    edge = MARGIN - 4
    assert not ink[:edge].any() and not ink[-edge:].any() and not ink[:, :edge].any() and not ink[:, -edge:].any()
    before = {p.name: p.read_bytes() for p in (tmp_path / "o.images").iterdir()}
    synth("render", tmp_path / "r.jsonl", "--out", tmp_path / "o.jsonl")
    assert {p.name: p.read_bytes() for p in (tmp_path / "o.images").iterdir()} == before


def test_options_may_stay_text_and_size_and_width_are_used(tmp_path):
    rows_file(tmp_path, [MCQ])
    synth(
        "render",
        tmp_path / "r.jsonl",
        "--out",
        tmp_path / "o.jsonl",
        "--options",
        "text",
        "--width",
        300,
        "--font-size",
        30,
    )
    (row,) = read(tmp_path / "o.jsonl")
    assert row["options"] == MCQ["options"] and row["meta"]["synth"]["text"] == MCQ["question"]
    with Image.open(load(tmp_path / "o.jsonl").prompts[0].images[0].source) as image:
        assert image.width == 300 and image.height > 3 * 30
    with pytest.raises(SynthError, match=r"--font nothing\.ttf"):
        Page(font="nothing.ttf").load()
    with pytest.raises(SynthError, match="--font-size"):
        Page(size=2)


def test_no_word_leaves_the_page():
    page = Page(width=240)
    font = page.load()
    picture = draw("pneumonoultramicroscopicsilicovolcanoconiosis " * 3, font, page)
    ink = np.asarray(picture.convert("L")) < 128
    assert ink.any() and not ink[:, -MARGIN + 2 :].any()
    assert unknown_characters("A µ ≥ 5 °C", font) == [] and unknown_characters("日", font) == ["日"]


def test_multiple_choice_becomes_open_where_it_stands_alone_and_comes_back_as_it_was(tmp_path):
    rows = rows_file(tmp_path, [
        MCQ,
        {**MCQ, "question": "Which of the following is stored in the liver?"},
        {**MCQ, "question": "Which is stored?", "options": ["vitamin A", "all of the above"], "answer": "B"},
        {"question": "Is the liver an organ?", "kind": "option", "options": ["True", "False"], "answer": "A"},
        {"question": "What happens?", "kind": "option", "answer": "A",
         "options": ["The heart beats faster than it did before", "Nothing"]},
        {"question": "Open?", "kind": "open", "answer": "yes it is"},
    ])  # fmt: skip
    assert synth("rewrite", tmp_path / "r.jsonl", "--to", "open", "--out", tmp_path / "open.jsonl") == 0
    opened = read(tmp_path / "open.jsonl")
    assert [(r["kind"], r["answer"]) for r in opened] == [("open", "vitamin A"), ("yesno", "yes")]
    assert [d["reason"] for d in read(tmp_path / "open.dropped.jsonl")] == [
        "question needs its options", "answer refers to options", "answer is a statement", "not multiple choice"
    ]  # fmt: skip
    assert synth("rewrite", tmp_path / "open.jsonl", "--to", "options", "--out", tmp_path / "back.jsonl") == 0
    (back,) = read(tmp_path / "back.jsonl")
    assert (back["options"], back["answer"], back["question"]) == (rows[0]["options"], "A", rows[0]["question"])
    assert back["meta"]["synth"]["before"]["step"] == "rewrite open"


@pytest.mark.parametrize(
    ("question", "one"),
    [
        ("Which finding is present?", False),
        ("Which of these findings does this chest X-ray show?", False),
        ("Which drug lowers the pressure in the eye?", False),
        ("Which muscle abducts the eye?", False),
        ("A man has the largest liver of all. Which sign does he show?", False),
        ("What may be the diagnosis?", False),
        ("Which projection is this chest X-ray?", True),
        ("In which half of the image does the mass lie?", True),
        ("What is the most common cause of pneumonia?", True),
        ("How many nuclei are there?", True),
        ("What is the normal size of the heart?", True),
        ("He coughs and has chest pain. What is the diagnosis?", True),
        ("Who described it?", True),
    ],
)
def test_a_question_is_opened_only_if_it_has_one_right_answer(question, one):
    assert has_one_answer(question) is one


def test_a_question_that_other_rows_answer_otherwise_is_not_opened(tmp_path):
    row = {"question": "What is the main finding?", "kind": "option", "options": ["effusion", "mass", "fracture"]}
    rows_file(tmp_path, [{**row, "answer": "effusion"}, {**row, "answer": "mass"}, {**MCQ}, {**row, "question": "Which finding is it?", "answer": "mass"}])  # fmt: skip
    assert synth("rewrite", tmp_path / "r.jsonl", "--to", "open", "--out", tmp_path / "o.jsonl") == 0
    assert [r["answer"] for r in read(tmp_path / "o.jsonl")] == [MCQ["answer"]]
    dropped = read(tmp_path / "o.dropped.jsonl")
    assert [d["reason"] for d in dropped] == ["several answers are right"] * 2 + ["several answers may be right"]
    assert dropped[0]["detail"] == "effusion; mass"


def test_wrong_options_come_from_the_label_space_and_none_is_right(tmp_path):
    organs = ["liver", "the liver", "Livers", "spleen", "left kidney", "stomach", "aorta"]
    rows = [{"question": "Which organ?", "kind": "open", "answer": a, "meta": {"task": "organ"}} for a in organs]
    rows_file(
        tmp_path, [*rows, {"question": "Which drug?", "kind": "open", "answer": "aspirin", "meta": {"task": "drug"}}]
    )
    assert (
        synth(
            "rewrite", tmp_path / "r.jsonl", "--to", "options", "--count", 4, "--seed", 3, "--out", tmp_path / "o.jsonl"
        )
        == 0
    )
    made = read(tmp_path / "o.jsonl")
    assert len(made) == len(organs)
    for row in made:
        right = row["options"]["ABCD".index(row["answer"])]
        assert len(row["options"]) == 4 and set(row["options"]) <= set(organs)
        assert sum("liver" in o.lower() for o in row["options"]) <= 1 and right == rows[int(row["id"][1])]["answer"]
    assert [d["reason"] for d in read(tmp_path / "o.dropped.jsonl")] == ["too few other answers"]
    assert len({row["answer"] for row in made}) > 1
