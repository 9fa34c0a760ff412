import json
from collections import Counter

import pytest

from lingshu_rl.stream import PromptStream, make_stream
from lingshu_rl.types import Group, Prompt, Scored
from rewards.base import RewardResult


def test_every_prompt_once_an_epoch_and_batches_cross_epochs():
    stream = PromptStream(list(range(10)), seed=3)
    drawn = [x for start in range(0, 30, 4) for x in stream.take(start, 4)][:30]
    assert all(sorted(drawn[e : e + 10]) == list(range(10)) for e in (0, 10, 20))
    assert drawn[:10] != drawn[10:20]


def test_taking_again_from_a_position_gives_the_same_prompts():
    a, b = PromptStream(list("abcdefg"), seed=1), PromptStream(list("abcdefg"), seed=1)
    a.take(0, 5)
    assert a.take(5, 6) == b.take(5, 6)
    assert PromptStream(list("abcdefg"), seed=2).take(0, 7) != b.take(0, 7)


def prompt(name, **meta):
    return Prompt(name, ({"role": "user", "content": "?"},), (), "A", (), "option", meta)


def group(of, values):
    members = (Scored(None, RewardResult(v, "ok" if v is not None else "error")) for v in values)  # type: ignore[arg-type]
    return Group(of, tuple(members))


def test_without_a_curriculum_nothing_is_kept_or_changed():
    stream = make_stream([prompt("a"), prompt("b")], "none", 0, 8)
    before = stream.take(0, 6)
    stream.observe([group(before[0], [1.0, 0.0])], 1)
    assert stream.state() == {} and stream.take(0, 6) == before


def test_prompts_that_are_sometimes_right_are_drawn_more_often():
    rates = {"never": 0.0, "always": 1.0, "half": 0.5, "seldom": 0.1}
    items = [prompt(f"{name}{n}", pass_rate=rate) for name, rate in rates.items() for n in range(25)]
    stream = make_stream(items, "pass_rate", 0, 8)
    drawn = Counter()
    for step in range(60):
        batch = stream.take(step * 10, 10)
        assert len({p.id for p in batch}) == 10
        drawn.update(p.id.rstrip("0123456789") for p in batch)
        stream.observe([], (step + 1) * 10)
    assert drawn["half"] > drawn["seldom"] > 4 * drawn["never"] and drawn["never"] + drawn["always"] > 0
    assert drawn["half"] > 10 * drawn["always"] / 2


def test_rates_follow_what_is_seen_and_unjudged_members_do_not_count():
    items = [prompt("a", pass_rate=0.5), prompt("b"), prompt("c", pass_rate=0.25)]
    stream = make_stream(items, "pass_rate", 0, 4)
    stream.observe(
        [group(items[0], [1.0, 1.0, None, 1.0]), group(items[1], [1.0, 0.0]), group(items[2], [None, None])], 3
    )
    assert stream.rates == {"a": 0.75, "b": 0.5, "c": 0.25}
    assert stream.weight(items[1].id) == pytest.approx(1 - 2 * 0.5**4)


def test_a_curriculum_goes_on_from_its_state_with_the_same_prompts():
    items = [prompt(f"p{n}", pass_rate=n / 40) for n in range(40)]
    straight = make_stream(items, "pass_rate", 7, 8)

    def steps(stream, first, last):
        out = []
        for step in range(first, last):
            batch = stream.take(step * 6, 6)
            more = stream.take(step * 6 + 6, 3)  # further prompts of the same step are others
            assert not {p.id for p in batch} & {p.id for p in more}
            out.append([p.id for p in batch])
            stream.observe([group(p, [float(len(p.id) % 2), 1.0]) for p in batch], (step + 1) * 6)
        return out

    all_steps = steps(straight, 0, 9)
    again = make_stream(items, "pass_rate", 7, 8)
    steps(again, 0, 4)
    resumed = make_stream(items, "pass_rate", 7, 8)
    resumed.restore(json.loads(json.dumps(again.state())))
    assert steps(resumed, 4, 9) == all_steps[4:]


def test_more_prompts_than_there_are_start_over_and_a_bad_rate_is_named():
    items = [prompt(f"p{n}") for n in range(3)]
    taken = make_stream(items, "pass_rate", 0, 8).take(0, 7)
    assert len(taken) == 7 and {p.id for p in taken[:3]} == {p.id for p in taken[3:6]} == {"p0", "p1", "p2"}
    with pytest.raises(ValueError, match=r"'x'.*from 0 to 1, got 7"):
        make_stream([prompt("x", pass_rate=7)], "pass_rate", 0, 8)
