"""The intervals on simulated data, where the truth is known."""

import numpy as np
import pytest

from lingshu_rl.eval.stats import gain_between, mean_ci, paired_gain, summarise


def clustered(rng, images, per_image, accuracy, spread):
    """Answers whose chance of being right is shared by the questions of one image."""
    chances = np.clip(accuracy + spread * rng.choice([-1, 1], images), 0, 1)
    values = (rng.random((images, per_image)) < chances[:, None]).astype(float)
    return values.ravel().tolist(), np.repeat(np.arange(images), per_image).tolist()


def share_covered(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


def test_interval_covers_the_true_accuracy_19_times_in_20():
    rng = np.random.default_rng(1)
    intervals = [mean_ci((rng.random(100) < 0.6).astype(float).tolist(), resamples=500)["ci95"] for _ in range(400)]
    assert 0.915 < share_covered(intervals, 0.6) < 0.985


def test_clusters_keep_the_coverage_that_single_questions_lose():
    rng = np.random.default_rng(2)
    data = [clustered(rng, images=60, per_image=8, accuracy=0.5, spread=0.35) for _ in range(300)]
    by_image = share_covered([mean_ci(v, c, resamples=500)["ci95"] for v, c in data], 0.5)
    by_question = share_covered([mean_ci(v, resamples=500)["ci95"] for v, _ in data], 0.5)
    assert by_image > 0.91
    assert by_question < 0.85


def test_paired_gain_covers_the_true_gain():
    rng = np.random.default_rng(3)
    intervals = []
    for _ in range(300):
        luck = rng.random(150)  # shared by both answers, as hard questions are hard twice
        before, after = (luck < 0.45).astype(float), (luck < 0.45 + 0.2 * (rng.random(150) < 0.9)).astype(float)
        intervals.append(paired_gain(before.tolist(), after.tolist(), resamples=500)["ci95"])
    assert 0.91 < share_covered(intervals, 18.0) < 0.99


def test_no_gain_is_called_a_gain_one_time_in_forty():
    rng = np.random.default_rng(4)
    lows = []
    for _ in range(400):
        before, after = (rng.random((2, 120)) < 0.5).astype(float)
        lows.append(paired_gain(before.tolist(), after.tolist(), resamples=500)["ci95"][0])
    assert 0.003 < np.mean(np.array(lows) > 0) < 0.06


def test_known_figures():
    got = mean_ci([1, 0, 1, None, 1.0, 0.5])
    assert (got["accuracy"], got["n"], got["not_judged"]) == (0.7, 5, 1)
    assert 0 <= got["ci95"][0] < 0.7 < got["ci95"][1] <= 1
    gain = paired_gain([0, 0, 1, None], [1, 0, 1, 1])
    assert gain["points"] == pytest.approx(100 / 3)
    assert (gain["n"], gain["not_judged"]) == (3, 1)


def test_same_seed_same_interval():
    values = (np.random.default_rng(5).random(3000) < 0.3).astype(float).tolist()
    assert mean_ci(values, seed=7) == mean_ci(values, seed=7)
    assert mean_ci(values, seed=7)["ci95"] != mean_ci(values, seed=8)["ci95"]


def test_unanimous_answers_do_not_claim_certainty():
    all_right = mean_ci([1.0] * 20)["ci95"]
    assert all_right[1] == 1.0
    assert all_right[0] == pytest.approx(0.8316, abs=1e-4)  # Clopper-Pearson, 20 of 20
    assert mean_ci([1.0] * 200)["ci95"][0] > all_right[0]
    one_image = mean_ci([1, 0, 1, 1], ["same"] * 4)["ci95"]
    assert one_image[1] - one_image[0] > 0.9
    low, high = paired_gain([1, 0, 1], [1, 0, 1])["ci95"]
    assert low == -high < 0


def test_questions_without_an_image_are_not_one_cluster():
    values = (np.random.default_rng(6).random(200) < 0.5).astype(float).tolist()
    assert mean_ci(values, [""] * 200)["ci95"] == pytest.approx(mean_ci(values)["ci95"], abs=0.01)


def test_nothing_judged():
    assert mean_ci([None, None]) == {"accuracy": None, "ci95": [0.0, 1.0], "n": 0, "not_judged": 2}
    assert paired_gain([], [])["points"] is None


@pytest.mark.parametrize("call, words", [
    (lambda: mean_ci([0.5, 1.5]), r"values\[1\] is 1.5"),
    (lambda: mean_ci([float("nan")]), r"values\[0\]"),
    (lambda: mean_ci([1, 0], ["a"]), "2 values but 1 clusters"),
    (lambda: paired_gain([1], [1, 0]), "same questions"),
])  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def rows(values, kind="option", task="plane"):
    common = {"kind": kind, "task": task}
    return [{"id": f"q{i}", "image": f"i{i % 5}.png", "value": v, **common} for i, v in enumerate(values)]


def test_summary_pairs_by_id_and_splits_by_kind_and_task():
    before, after = rows([0, 0, 1, 1, 0]), rows([1, 1, 1, 0, None])[::-1]
    report = [{**row, "id": "r" + row["id"], "kind": "report", "task": "report"} for row in rows([0.5] * 4)]
    blank = rows([0] * 5)
    got = summarise({"before": before + report, "after": after, "after_blank": blank, "before_blank": blank})
    assert got["gain"]["points"] == pytest.approx(25.0)
    assert gain_between(before, after)["not_judged"] == 1
    assert got["before"]["n"] == 9 and got["by_kind"]["option"]["before"]["n"] == 5
    assert got["blank_image"]["accuracy"] == 0 and got["blank_image"]["before"]["n"] == 5
    assert "after" not in got["by_task"]["report"] and "shuffled_image" not in got
