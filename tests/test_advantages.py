"""Advantages on numbers worked out by hand, and their invariances."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingshu_rl.advantages import gdpo_advantages, group_advantages, overlong_penalty
from lingshu_rl.objective import AdvantageConfig

GROUP, NO_STD, LEAVE_ONE_OUT = (AdvantageConfig(variant) for variant in ("group", "no_std", "leave_one_out"))


def test_by_hand() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0]
    deviation = math.sqrt(1 / 3) + 1e-4
    assert group_advantages(rewards, GROUP) == pytest.approx([x / deviation for x in (0.5, -0.5, -0.5, 0.5)])
    assert group_advantages(rewards, NO_STD) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages(rewards, LEAVE_ONE_OUT) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


def test_masked_members_count_for_nothing() -> None:
    for config in (GROUP, NO_STD, LEAVE_ONE_OUT):
        with_hole = group_advantages([1.0, None, 0.0, 0.5], config)
        assert with_hole[1] is None
        assert [a for a in with_hole if a is not None] == group_advantages([1.0, 0.0, 0.5], config)


@pytest.mark.parametrize("config", [GROUP, NO_STD, LEAVE_ONE_OUT])
def test_nothing_to_compare_gives_zero(config: AdvantageConfig) -> None:
    assert group_advantages([0.7], config) == [0.0]
    assert group_advantages([None, 0.7, None], config) == [None, 0.0, None]
    assert group_advantages([None, None], config) == [None, None]
    assert group_advantages([0.3, 0.3, 0.3], config) == [0.0, 0.0, 0.0]


rewards_lists = st.lists(st.floats(0, 1).map(lambda x: round(x, 3)), min_size=2, max_size=16)


@given(rewards_lists, st.sampled_from([GROUP, NO_STD, LEAVE_ONE_OUT]), st.floats(-1, 1))
def test_advantages_sum_to_zero_and_ignore_a_shift(rewards, config: AdvantageConfig, shift: float) -> None:
    advantages = group_advantages(rewards, config)
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    shifted = group_advantages([r + shift for r in rewards], config)
    assert shifted == pytest.approx(advantages, abs=1e-5)


def test_a_rare_component_keeps_its_say() -> None:
    """A format reward that one of eight misses, beside an accuracy that half of them earn."""
    accuracy, form = [1, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1, 0]
    members = [{"accuracy": float(a), "format": float(f)} for a, f in zip(accuracy, form, strict=True)]
    (advantages,) = gdpo_advantages([members], {"accuracy": 1.0, "format": 1.0})
    plain = group_advantages([m["accuracy"] + m["format"] for m in members], GROUP)
    assert advantages[7] < plain[7] < 0
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    assert [advantages[0]] * 4 == pytest.approx(advantages[::2])


def test_gdpo_leaves_out_what_is_missing() -> None:
    members = [{"a": 1.0, "b": 0.0}, None, {"a": 0.0}, {"a": 0.0, "b": 1.0}]
    (advantages,) = gdpo_advantages([members], {"a": 1.0, "b": 0.5})
    assert advantages[1] is None
    # b is compared between the two that have it; weight 0 turns a component into a metric.
    assert gdpo_advantages([members], {"a": 1.0, "b": 0.0}) == gdpo_advantages(
        [[None if m is None else {"a": m["a"]} for m in members]], {"a": 1.0}
    )
    assert gdpo_advantages([[{"a": 1.0}]], {"a": 1.0}) == [[0.0]]


def test_gdpo_gives_exact_zeros_to_a_group_without_contrast() -> None:
    """Or it would go to the reference and the update for a rounding error."""
    ragged = [{"a": value} for value in (0.1, 0.7, 0.2, 0.35, 0.9)]
    found = gdpo_advantages([ragged, [{"a": 0.3}, {"a": 0.3}, None], [*ragged, {"a": 0.4}]], {"a": 0.7})
    assert found[1] == [0.0, 0.0, None] and all(found[0]) and all(found[2])


def test_gdpo_needs_all_groups() -> None:
    with pytest.raises(ValueError, match="gdpo_advantages"):
        group_advantages([0.0, 1.0], AdvantageConfig("gdpo"))


def test_overlong_penalty_falls_over_the_buffer() -> None:
    config = AdvantageConfig(overlong_buffer=20, overlong_penalty=0.5)
    assert [overlong_penalty(n, 100, config) for n in (10, 80, 90, 100)] == [0.0, 0.0, -0.25, -0.5]
    assert overlong_penalty(100, 100, AdvantageConfig()) == 0.0


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"advantage\.variant='grpo' is not one of group"):
        AdvantageConfig("grpo")
    with pytest.raises(ValueError, match="overlong_buffer"):
        AdvantageConfig(overlong_buffer=-1)
