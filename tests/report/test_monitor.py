"""The signs of a policy that plays its reward, on completions of which every rate is known."""

import math

import pytest

from lingshu_rl.report.alarms import find_alarms
from lingshu_rl.report.monitor import entropy, monitors, reward_by_length


def row(
    prompt="q", member=0, value=1.0, *, text="x", kind="option", parsed='"A"', gold="A", status="ok", tokens=5, fmt=None
):
    components = "{}" if fmt is None else f'{{"format": {fmt}}}'
    return {"step": 1, "prompt_id": prompt, "member": member, "value": value, "completion": text, "kind": kind, "parsed": parsed,
            "gold": gold, "status": status, "tokens": tokens, "components": components}  # fmt: skip


def test_shares_of_unread_and_contradictory_answers():
    rows = [row(status="ok")] * 5 + [row(status="unparsed", value=0.0)] * 3 + [row(status="conflict", value=0.0)] * 2
    rates = monitors(rows)
    assert (rates["unparsed"], rates["conflict"]) == (0.3, 0.2)


def test_right_format_wrong_answer_needs_a_good_form_and_a_bad_reward():
    by_part = [row(fmt=1.0, value=0.0), row(fmt=0.0, value=0.0), row(fmt=1.0, value=1.0), row(fmt=1.0, value=None)]
    assert monitors(by_part)["format_right_answer_wrong"] == pytest.approx(1 / 3)
    by_status = [row(value=0.0), row(value=0.0, status="unparsed"), row(value=1.0), row(value=0.4)]
    assert monitors(by_status)["format_right_answer_wrong"] == 0.5


def test_duplicates_count_within_a_group_only():
    rows = [row("a", i, text=t) for i, t in enumerate(["x", "x ", " x", "y"])] + [
        row("b", i, text="x") for i in range(4)
    ]
    assert monitors(rows)["duplicates"] == pytest.approx(1 - (2 + 1) / 8)
    assert "duplicates" not in monitors([row("a"), row("b")])


def test_entropy_of_letters():
    rows = [row(parsed=f'"{letter}"', gold=gold) for letter, gold in zip("AABC", "AABB", strict=True)]
    rates = monitors(
        [*rows, row(kind="numeric", parsed="7"), row(status="unparsed", value=0.0, parsed="null", gold="A")]
    )
    assert rates["letter_entropy"] == pytest.approx(1.5)
    assert rates["gold_entropy"] == pytest.approx(entropy("AABBA"))
    assert entropy("AAAA") == 0.0 and math.copysign(1, entropy("AAAA")) == 1


def test_length_and_reward_are_compared_within_groups():
    # Long answers belong to easy questions, but within a question the shorter one earns more.
    rows = [row("easy", 0, 1.0, tokens=50), row("easy", 1, 0.8, tokens=52), row("hard", 0, 0.2, tokens=5), row("hard", 1, 0.0, tokens=7)]  # fmt: skip
    assert monitors(rows)["length_correlation"] == pytest.approx(-1.0)
    assert "length_correlation" not in monitors([row("a", 0, tokens=3), row("a", 1, tokens=3)])


def test_questions_by_how_many_completions_are_right():
    rows = [row("a", i, v) for i, v in enumerate([1, 1])] + [row("b", i, v) for i, v in enumerate([0, 1])]
    rows += [row("c", i, v) for i, v in enumerate([0, 0])] + [row("d", i, None) for i in range(2)]
    rates = monitors(rows)
    assert (rates["all_right"], rates["all_wrong"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_reward_by_length_keeps_equal_lengths_together():
    rows = [row(tokens=t, value=v) for t, v in [(3, 1), (3, 0), (3, 1), (3, 0), (4, 1), (9, 0), (9, 0), (9, 1)]]
    parts = reward_by_length([*rows, row(tokens=99, value=None)])
    assert [(p["from"], p["to"], p["n"]) for p in parts] == [(3, 3, 4), (4, 4, 1), (9, 9, 3)]
    assert parts[0]["reward"] == 0.5 and reward_by_length([]) == []
    assert sum(p["n"] for p in reward_by_length([row(tokens=t) for t in range(10)])) == 10


def test_nothing_stored_has_no_rates():
    assert monitors([]) == {}


def names(rows=(), metrics=()):
    return [alarm.name for alarm in find_alarms(metrics, {}, rows)]


def test_alarms_of_a_played_reward():
    varied = [row(f"q{i}", m, float(m < 2), text=f"{i} {m}", parsed=f'"{"ABCD"[(i + m) % 4]}"', gold="ABCD"[i % 4], tokens=(5, 9, 9, 5)[m]) for i in range(40) for m in range(4)]  # fmt: skip
    assert names(varied) == []
    assert names([r | {"completion": "the same"} for r in varied]) == []  # 75 % of a group of four
    many = [row(f"q{i}", m, float(m % 2), text="the same", parsed=f'"{"ABCD"[i % 4]}"', gold="ABCD"[i % 4]) for i in range(4) for m in range(16)]  # fmt: skip
    assert names(many) == ["Repeated completions"]
    assert names([r | {"status": "conflict", "value": 0.0} if i % 5 == 0 else r for i, r in enumerate(varied)]) == ["Conflicting answers"]  # fmt: skip
    assert names([r | {"tokens": 5 + 9 * int(r["value"])} for r in varied]) == ["Reward follows length"]


def test_a_reward_that_never_moves_is_an_alarm():
    step = {"reward/mean": 0.0, "reward/std": 0.0}
    assert names(metrics=[{"step": i, **step} for i in (1, 2, 3)]) == ["Constant reward"]
    assert names(metrics=[{"step": 1, **step}, {"step": 2, **step, "reward/mean": 0.1, "reward/std": 0.2}]) == []
    assert names(metrics=[{"step": 1, **step}]) == []
