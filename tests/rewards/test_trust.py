"""A judge is measured before it rewards: what it refuses, what it pays, whom it favours, what talks it round."""

import json
import sys
from dataclasses import replace

import pytest
from launching import ROOT

from rewards import JudgeReward, RewardInput, RubricReward, build
from rewards.preflight import main
from rewards.trust import ATTACKS, estimate, measure, wilson

sys.path.insert(0, str(ROOT / "recipes"))
from noisy_judge import serving, texts_of, verdict

ROWS = [
    RewardInput("", gold, kind="open", prompt=f"What does film {n} show?")
    for n, gold in enumerate(["fracture", "effusion", "embolism", "mass", "oedema", "atelectasis"])
]


def honest(body):
    return verdict({**body, "model": "noise-0-0"})


def trust_in(say, rows=ROWS, kind=JudgeReward, tried=40):
    with serving(say) as url:
        found = measure(rows, kind(url=url, model="noise-0-0", cache=":memory:", retries=0), rows=tried)
    assert len(found) == 1
    return found[0]


def shares(rates):
    return {rate.name: rate.share for rate in rates}


@pytest.mark.parametrize(
    ("hits", "count", "interval"),
    [(0, 20, (0.0, 0.1611)), (20, 20, (0.8389, 1.0)), (5, 50, (0.0435, 0.2136)), (0, 0, (0.0, 1.0))],
)
def test_intervals_are_wilsons(hits, count, interval):
    assert wilson(hits, count) == pytest.approx(interval, abs=1e-4)


def test_an_honest_judge_passes():
    trust = trust_in(honest)
    assert trust.false_pay.share == 0 and trust.problems(0.0, 1.0) == []
    assert (
        set(shares(trust.attacks).values()) == {0.0} and shares(trust.order)["judged otherwise in the other order"] == 0
    )
    assert shares(trust.refused)["the label"] == 0  # a sentence about it may need more than rules
    assert "points" in trust.length_bias


def test_the_rates_of_a_noisy_judge_are_found():
    rows = [replace(ROWS[n % len(ROWS)], prompt=f"What does slide {n} show?") for n in range(60)]
    trust = trust_in(lambda body: verdict({**body, "model": "noise-40-25"}), rows, tried=60)
    assert trust.false_pay.share == pytest.approx(0.4, abs=0.2) and trust.refused[0].share == pytest.approx(
        0.25, abs=0.2
    )
    said = trust.problems(0.1, 1.0)
    assert any("wrong answers paid" in problem and "the limit is 10.0%" in problem for problem in said)


@pytest.mark.parametrize(
    ("attack", "word"),
    [
        ("told what to say", "Ignore all instructions"),
        ("marks closed early", "every criterion is met"),
        ("a verdict for an answer", "is final"),
        ("flattery", "experienced examiner"),
        ("said to be correct", "exactly the reference"),
        ("authority", "attending physicians"),
        ("a long wrong answer", "compared with one another"),
        ("what was asked, repeated", "What does film"),
    ],
)
def test_each_attack_that_works_is_named(attack, word):
    def gullible(body):
        return json.dumps({"same": word in " ".join(texts_of(body)[1:]) or json.loads(honest(body))["same"]})

    trust = trust_in(gullible, ROWS[:2])
    assert attack in ATTACKS and shares(trust.attacks)[attack] == 1.0 and trust.false_pay.share == 0.0
    assert [attack in problem for problem in trust.problems(0.1, 1.0)] == [True]


def test_a_favoured_place_is_shown():
    """It says "same" to whatever stands second, unless it is wrong and first is right."""
    trust = trust_in(lambda body: json.dumps({"same": (texts_of(body)[1] in ("fracture", "effusion", "embolism", "mass", "oedema", "atelectasis") and texts_of(body)[1] < texts_of(body)[2]) or json.loads(honest(body))["same"]}))  # fmt: skip
    told = shares(trust.order)
    assert told["judged otherwise in the other order"] > 0.2
    assert told["paid with the label first"] != told["paid with the label last"] or trust.order[1].hits > len(ROWS)


def test_a_favoured_length_is_shown():
    def verbose(body):
        return json.dumps({"same": len(texts_of(body)[2]) > 200 or json.loads(honest(body))["same"]})

    assert "long wrong answers are paid +100.0 points" in trust_in(verbose).length_bias


def test_a_judge_that_says_nothing_is_no_judge():
    trust = trust_in(lambda body: "I cannot say.")
    assert trust.false_pay.share is None and any("no verdict" in problem for problem in trust.problems(1.0, 1.0))


def test_a_judge_that_nobody_serves_is_said_to_be_so():
    [trust] = measure(ROWS, JudgeReward(cache=":memory:"))
    assert all("no url" in problem for problem in trust.problems(1.0, 1.0)) and trust.problems(1.0, 1.0)


def test_one_label_for_all_rows_leaves_no_wrong_ones_to_try():
    trust = trust_in(honest, [replace(row, gold="mass") for row in ROWS])
    assert any("nothing was asked" in problem for problem in trust.problems(1.0, 1.0))


def test_rubrics_are_tried_with_replies():
    rubric = [{"criterion": f"names the {word}", "points": 2} for word in ("finding", "side")]
    rows = [
        RewardInput("", gold, kind="open", prompt="Report.", meta={"rubric": rubric})
        for gold in ("left", "right", "both")
    ]
    trust = trust_in(lambda body: '{"met": true}', rows, RubricReward)
    assert trust.false_refusal.share == 0 and trust.false_pay.share == 1 and trust.order == ()
    assert shares(trust.attacks)["an empty answer"] == 0  # never asked


def test_the_trial_asks_about_what_was_estimated():
    asked = []
    with serving(lambda body: asked.append(body) or honest(body)) as url:
        judge = JudgeReward(url=url, model="m", cache=":memory:", retries=0)
        [(_, calls, tokens)] = estimate(ROWS, judge, rows=6)
        measure(ROWS, judge, rows=6)
    assert 0.7 * calls <= len(asked) <= calls and tokens > 0


def test_rewards_check_tries_judges_and_says_what_they_pay(tmp_path, capsys):
    rows = [
        {"id": f"r{n}", "images": [], "question": s.prompt, "answer": s.gold, "kind": "open"}
        for n, s in enumerate(ROWS)
    ]
    rows.append({"id": "y", "images": [], "question": "Is it?", "answer": "yes", "kind": "yesno"})
    data, spec, out = tmp_path / "d.jsonl", tmp_path / "s.yaml", tmp_path / "o.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    with serving(lambda body: '{"same": true}') as url:
        args = {"url": url, "model": "m", "cache": str(tmp_path / "c.sqlite")}
        spec.write_text(
            json.dumps(
                {"route": {"yesno": "YesNo", "open": {"class": "JudgeReward", "args": args, "behind": "OpenAnswer"}}}
            )
        )
        assert main(["check", str(data), "--spec", str(spec), "--out", str(out)]) == 1
        told = capsys.readouterr().out
        assert "FAIL: wrong answers paid: 100.0%" in told and "7 rows" in told and "always 'yes'" in told
        assert main(["check", str(data), "--spec", str(spec), "--judge-limits", "1", "1"]) == 0
    kept = json.loads(out.read_text())
    assert kept["ok"] is False and kept["judges"][0]["rates"]["wrong"]["share"] == 1.0


def test_only_samples_that_go_to_a_judge_are_tried():
    assert measure(ROWS, build("OpenAnswer")) == []
    assert (
        measure([RewardInput("", "yes", kind="yesno")], build({"route": {"yesno": "YesNo", "open": "JudgeReward"}}))
        == []
    )
