"""Differences over seeds and questions, on simulated runs whose true difference is known."""

import numpy as np
import pytest

from lingshu_rl.eval.seeds import aligned, difference, items_needed, seeds_needed, smallest_visible
from lingshu_rl.eval.stats import holm


def runs(rng, seeds, items, *, effect=0.0, seed_sd=0.02, item_sd=0.1, per_image=2):
    """Differences of right answers (1, 0, -1): the chance of being right moves with the setting, seed and image."""
    images = items // per_image
    hard = rng.uniform(0.2, 0.7, (1, images)).repeat(per_image, 1)
    own = np.clip(rng.normal(0, item_sd, (1, images)), -0.15, 0.15).repeat(per_image, 1)
    luck = np.clip(rng.normal(0, seed_sd, (seeds, 1)), -0.05, 0.05)
    before, after = rng.random((seeds, items)) < hard, rng.random((seeds, items)) < hard + effect + luck + own
    return after.astype(float) - before, np.arange(items) // per_image


def many(seeds, repeats=250, **how):
    rng = np.random.default_rng([seeds, len(how)])
    return [difference(*runs(rng, seeds, 120, **how), bound=1.0) for _ in range(repeats)]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_covers_the_true_difference(seeds):
    found = many(seeds, effect=0.08)
    assert np.mean([f.low <= 0.08 <= f.high for f in found]) > 0.93


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.05])
def test_no_difference_is_called_one_at_most_one_time_in_twenty(seeds, seed_sd):
    assert np.mean([f.p <= 0.05 for f in many(seeds, seed_sd=seed_sd)]) < 0.08


def test_seeds_that_scatter_more_than_their_questions_are_not_overlooked():
    """What goes wrong without seeds in the interval: every seed is off by its own luck, the questions agree with it."""
    rng = np.random.default_rng(3)
    tries = [runs(rng, 3, 400, seed_sd=0.05, item_sd=0.0) for _ in range(250)]
    honest = np.mean([difference(d, c, bound=1.0).p <= 0.05 for d, c in tries])
    pooled = np.mean([difference(d.mean(axis=0, keepdims=True), c, bound=1.0).p <= 0.05 for d, c in tries])
    assert honest < 0.08 < 0.1 < pooled


def test_a_large_effect_is_seen_and_p_agrees_with_the_interval():
    assert np.mean([f.p <= 0.05 for f in many(5, effect=0.25)]) > 0.9
    for f in many(3, repeats=60, effect=0.1):
        assert (f.p < 0.05) == (f.low > 0 or f.high < 0)


def test_five_seeds_are_not_needlessly_wide():
    """Against the interval of someone who knows the true spread."""
    found = many(5, effect=0.05, item_sd=0.0)
    truth = 1.96 * np.std([f.mean for f in found])
    assert np.mean([(f.high - f.low) / 2 for f in found]) < 2 * truth


def test_few_differing_answers_do_not_look_certain():
    d = np.zeros((2, 40))
    d[0, :2] = d[1, 5:7] = 1  # both seeds two more right answers: equal means, no scatter at all
    assert difference(d, bound=1.0).p > 0.05


def test_agreement_claims_no_certainty():
    same = difference(np.zeros((3, 50)), bound=1.0)
    assert (same.mean, same.p) == (0.0, 1.0) and same.low < -0.02 and same.high > 0.02
    worse = difference(np.full((3, 50), -1.0), bound=1.0)
    assert worse.p < 1e-6 and worse.low == -1.0 and worse.high > -0.95


def test_one_figure_a_run_is_an_ordinary_paired_t_test():
    from scipy.stats import ttest_1samp

    d = np.array([[0.1], [0.3], [0.2], [0.25]])
    found, wanted = difference(d), ttest_1samp(d[:, 0], 0)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval()), rel=1e-6)


def test_seeds_needed_are_enough_and_not_twice_too_many():
    rng = np.random.default_rng(8)
    first = difference(*runs(rng, 5, 400, effect=0.05, seed_sd=0.03, item_sd=0.0), bound=1.0)
    needed = seeds_needed(first, effect=0.05)
    assert needed is not None and 3 <= needed <= 20
    seen = [difference(*runs(rng, needed, 400, effect=0.05, seed_sd=0.03, item_sd=0.0), bound=1.0).p <= 0.05 for _ in range(150)]  # fmt: skip
    assert np.mean(seen) > 0.6
    assert seeds_needed(first, effect=0.10) < needed < seeds_needed(first, effect=0.05, alpha=0.005)


def test_questions_can_be_what_is_missing():
    rng = np.random.default_rng(9)
    d = np.repeat(rng.choice([-1.0, 0.0, 1.0], (1, 100)), 4, axis=0)  # the same in every seed
    found = difference(d, bound=1.0)
    assert seeds_needed(found) is None and items_needed(found) > 100
    assert items_needed(difference(np.full((2, 100), 1.0) - (rng.random((2, 100)) < 0.1), bound=1.0)) is None


def test_one_image_says_nothing_about_others():
    rng = np.random.default_rng(4)
    d, _ = runs(rng, 5, 40, effect=0.3)
    found = difference(d, ["one"] * 40, bound=1.0)
    assert found.clusters == 1 and found.item_variance is None
    assert (seeds_needed(found), items_needed(found), smallest_visible(found)) == (None, None, None)


def test_one_seed_says_nothing_about_seeds():
    rng = np.random.default_rng(10)
    found = difference(*runs(rng, 1, 200, effect=0.3), bound=1.0)
    assert found.p < 0.01 and found.seed_variance is None
    assert seeds_needed(found) is None and smallest_visible(found) is None


def test_runs_are_paired_by_seed_and_question():
    base = {0: {"a": 1.0, "b": 0.0, "c": 1.0}, 1: {"a": 0.0, "b": 0.0, "c": 1.0}, 2: {"a": 1.0}}
    other = {1: {"c": 0.0, "a": 1.0, "b": 0.5}, 0: {"a": 0.0, "b": None, "c": 1.0}}
    seeds, items, d, left_out = aligned(base, other)
    assert (seeds, items, left_out) == ([0, 1], ["a", "c"], 1)
    assert d.tolist() == [[-1.0, 0.0], [1.0, -1.0]]
    assert aligned(base, {7: {"a": 1.0}})[2].size == 0


def test_holm_against_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.02, float("nan"), 0.9])
    assert corrected[0] == pytest.approx(0.04) and corrected[1] != corrected[1] and corrected[2] == 0.9
    assert holm([]) == []


def test_holm_keeps_false_alarms_of_the_family_at_one_in_twenty():
    rng = np.random.default_rng(11)
    assert np.mean([min(holm(list(rng.random(6)))) <= 0.05 for _ in range(2000)]) < 0.065


@pytest.mark.parametrize("d", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan]])])
def test_what_is_no_filled_table_is_refused(d):
    with pytest.raises(ValueError, match="seeds, items"):
        difference(d)
