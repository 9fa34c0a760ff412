"""Advantages on numbers worked out by hand, and their invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingshu_rl.advantages import denoised, gdpo_advantages, group_advantages, overlong_penalty
from lingshu_rl.objective import AdvantageConfig, Noise

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


# ------------------------------------------------------------------------------------------------- a judge that errs


def judged_rewards(true, noise, rng):
    """What a judge with these error rates says of the true rewards."""
    luck = rng.random(len(true))
    return np.where(true == 1, luck >= noise.false_refusal, luck < noise.false_pay).astype(float).tolist()


@pytest.mark.parametrize("noise", [Noise(0.1, 0.1), Noise(0.3, 0.05), Noise(0.0, 0.4), Noise(0.0, 0.0)])
def test_the_backward_correction_is_the_true_reward_on_average(noise):
    """Exact over the judge's two verdicts; the forward one is its multiple, less a constant."""
    for true in (0.0, 1.0):
        chance = 1 - noise.false_refusal if true else noise.false_pay
        refused, paid = denoised([0.0, 1.0], [True, True], noise, "backward")
        assert chance * paid + (1 - chance) * refused == pytest.approx(true)
        weights = denoised([0.0, 1.0], [True, True], noise, "forward")
        assert weights == pytest.approx([noise.false_refusal - 1, noise.false_refusal])
        assert weights == pytest.approx([noise.signal * (r - 1) for r in (refused, paid)])


@pytest.mark.parametrize("correction", ["backward", "forward"])
def test_the_policy_gradient_under_noise_is_the_clean_one(correction):
    """A softmax policy over four answers: the mean of A grad log pi over many groups, against the exact clean gradient.

    Half of the answers are certain (read by a rule), the others are judged. Without the correction the gradient points
    elsewhere: certain answers are preferred to equally right ones that are judged.
    """
    rng = np.random.default_rng(0)
    noise, probs = Noise(0.15, 0.25), np.array([0.2, 0.3, 0.15, 0.35])
    true, certain = np.array([1.0, 1.0, 0.0, 0.0]), np.array([True, False, True, False])
    clean = probs * (true - probs @ true)
    scale = noise.signal if correction == "forward" else 1.0
    sums = {name: np.zeros(4) for name in ("plain", correction)}
    groups, size = 1200, 8
    config = AdvantageConfig("leave_one_out")
    for _ in range(groups):
        picked = rng.choice(4, size, p=probs)
        said = judged_rewards(true[picked], noise, rng)
        rewards = [float(true[a]) if certain[a] else r for a, r in zip(picked, said, strict=True)]
        judged = [not certain[a] for a in picked]
        for name, values in (("plain", rewards), (correction, denoised(rewards, judged, noise, correction))):
            for a, advantage in zip(picked, group_advantages(values, config), strict=True):
                sums[name] += advantage * (np.eye(4)[a] - probs) / (groups * size)
    assert sums[correction] / scale == pytest.approx(clean, abs=0.015)
    assert np.abs(sums["plain"] - clean).max() > 0.03


def test_a_group_that_is_judged_throughout_keeps_its_normalised_advantages():
    """Both corrections are a line: dividing by the deviation takes it out again. Only its size is given back by no_std."""
    rewards, noise = [1.0, 0.0, 0.0, 1.0, 0.0], Noise(0.1, 0.2)
    plain = group_advantages(rewards, AdvantageConfig("group"))
    for correction in ("backward", "forward"):
        corrected = denoised(rewards, [True] * 5, noise, correction)
        assert group_advantages(corrected, AdvantageConfig("group")) == pytest.approx(plain, rel=1e-3)
    centred = group_advantages(rewards, AdvantageConfig("no_std"))
    backward = group_advantages(denoised(rewards, [True] * 5, noise, "backward"), AdvantageConfig("no_std"))
    assert backward == pytest.approx([a / noise.signal for a in centred])


def test_what_could_not_be_judged_stays_so_and_certain_rewards_stay_as_they_are():
    assert denoised([None, 1.0, 0.5], [True, False, False], Noise(0.1, 0.1), "backward") == [None, 1.0, 0.5]


@pytest.mark.parametrize(
    ("rates", "why"),
    [
        ({"false_pay": 0.5, "false_refusal": 0.5}, "sum up to 1"),
        ({"false_pay": 0.1}, "lacks 'false_refusal'"),
        ({"false_pay": -0.1, "false_refusal": 0.1}, r"\[0, 1\]"),
        ({"false_pay": None, "false_refusal": 0.1}, "advantage.noise"),
    ],
)
def test_impossible_rates_are_refused(rates, why):
    with pytest.raises(ValueError, match=why):
        AdvantageConfig(noise=rates)
    with pytest.raises(ValueError, match="correction"):
        AdvantageConfig(correction="sideways")


NOISE = Noise(0.1, 0.1)


def learnt(mode, seed, noise=NOISE, steps=30, prompts=40, answers=8, size=8):
    """The chance of the right answer after plain gradient steps of a linear softmax policy, last five steps' mean."""
    rng = np.random.default_rng(seed)
    seen, weights = rng.normal(size=(prompts, 16)) / 4, np.zeros((16, answers))
    right = np.argmax(seen @ rng.normal(size=(16, answers)), axis=1)
    chances = []
    for _ in range(steps):
        scores = np.exp(seen @ weights)
        probs = scores / scores.sum(axis=1, keepdims=True)
        chances.append(probs[np.arange(prompts), right].mean())
        gradient = np.zeros_like(weights)
        for i in rng.permutation(prompts)[:20]:
            picked = rng.choice(answers, size, p=probs[i])
            rewards = (picked == right[i]).astype(float)
            if mode != "clean":
                rewards = judged_rewards(rewards, noise, rng)
            if mode == "backward":
                rewards = denoised(rewards, [True] * size, noise, mode)
            advantages = group_advantages(list(rewards), NO_STD)
            slopes = np.array(advantages) @ np.eye(answers)[picked] - sum(advantages) * probs[i]
            gradient += np.outer(seen[i], slopes) / (20 * size)
        weights += 40.0 * gradient
    return np.mean(chances[-5:])


def test_corrected_advantages_learn_as_fast_as_clean_ones_where_the_step_follows_their_size():
    """Plain gradient steps, no division by the deviation: the noise slows learning down, the correction does not let it."""
    clean, plain, corrected = (
        np.mean([learnt(mode, seed) for seed in range(5)]) for mode in ("clean", "plain", "backward")
    )
    assert clean - plain > 0.015 and abs(clean - corrected) < 0.5 * (clean - plain), (clean, plain, corrected)
