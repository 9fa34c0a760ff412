"""The miniature plan's instruction data: usable rows, wrong as often as asked for."""

import random

from lingshu_rl.data.rows import row_to_prompt
from lingshu_rl.demo.base import careless_row
from lingshu_rl.demo.policy import training_rows
from lingshu_rl.demo.questions import sft_text
from lingshu_rl.sft.examples import completion_of


def test_careless_rows_are_usable_and_wrong_as_often_as_asked():
    rows, folder = training_rows()
    rng = random.Random(0)
    changed = [careless_row(row, rng, 0.4) for row in rows]
    for row in changed:
        row_to_prompt(row, base_dir=folder, instruction="short")
    asked = [(a, b) for a, b in zip(rows, changed, strict=True) if a["kind"] != "report"]
    wrong = sum(a["answer"] != b["answer"] or a["meta"]["think"] != b["meta"]["think"] for a, b in asked)
    assert 0.35 < wrong / len(asked) < 0.45
    assert [careless_row(row, rng, 0.0)["answer"] for row in rows[:50]] == [row["answer"] for row in rows[:50]]


def test_a_stage_trains_the_text_that_the_demo_policy_was_made_with():
    rows, folder = training_rows()
    for row in rows[:40]:
        prompt = row_to_prompt(row, base_dir=folder, instruction="short")
        assert completion_of(prompt, "think") == sft_text(row)
