"""Composition: the arithmetic, masking, routing, and what a bad spec is told."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import Compose, Part, Route, SpecError, build, default_reward, is_batched

HERE = "test_compose"


class Says(Reward):
    """Gives the number that the completion holds under `key`, as in "a=0.5 b=1"; "none" cannot be judged."""

    name = "says"

    def __init__(self, key: str = "a") -> None:
        self.key = key

    def score(self, sample):
        fields = dict(item.split("=") for item in sample.completion.split())
        text = fields[self.key]
        if text == "none":
            return RewardResult(None, "timeout", reason=f"{self.key} took too long")
        return RewardResult(
            float(text), parsed=f"{self.key}:{text}", reason=f"said {text}", components={"raw": float(text)}
        )

    def check_gold(self, sample):
        return None if sample.gold else f"{self.key} has no label"


class Doubled(Says):
    """Handles a batch in one call and counts the calls."""

    calls = 0

    def score_batch(self, samples):
        Doubled.calls += 1
        return [self.score(sample) for sample in samples]


def says(key: str, **role: float) -> dict:
    return {"class": f"{HERE}:Says", "args": {"key": key}, **role}


def value(spec: dict, text: str) -> float | None:
    return build(spec).score(RewardInput(text, gold=1)).value


def test_weights_are_a_mean_and_components_carry_every_name():
    reward = build({"parts": {"right": says("a", weight=3), "style": says("b"), "watch": says("c", weight=0)}})
    result = reward.score(RewardInput("a=1 b=0 c=0.25", gold=1))
    assert result.value == pytest.approx(0.75)
    assert result.components == {
        "right": 1.0, "right/raw": 1.0, "style": 0.0, "style/raw": 0.0, "watch": 0.25, "watch/raw": 0.25,
    }  # fmt: skip
    assert result.parsed == "a:1" and result.status == "ok"
    assert "style: said 0" in result.reason and "right" not in result.reason
    assert reward.weights == {"right": 3, "style": 1}


def test_a_gate_opens_at_its_threshold_and_a_multiplier_shrinks():
    gate = {"parts": {"right": says("a"), "format": says("b", gate=0.5)}}
    assert [value(gate, f"a=1 b={b}") for b in (0.4, 0.5, 1)] == [0, 1, 1]
    penalty = {"parts": {"right": says("a"), "length": says("b", multiply=1)}}
    assert value(penalty, "a=0.5 b=0.5") == 0.25
    soft = {"parts": {"right": says("a"), "format": says("b", multiply=0.1)}}
    assert value(soft, "a=1 b=0") == pytest.approx(0.9)


@given(b=st.floats(0, 1), c=st.floats(0, 1), strength=st.floats(0.01, 1), gate=st.floats(0.01, 1))
def test_factors_never_pay_a_wrong_answer_and_never_raise_a_right_one(b, c, strength, gate):
    reward = Compose(
        {
            "right": Part(Says("a")),
            "style": Part(Says("b"), "multiply", strength),
            "form": Part(Says("c"), "gate", gate),
        }
    )
    assert reward.score(RewardInput(f"a=0 b={b!r} c={c!r}", gold=1)).value == 0
    assert 0 <= reward.score(RewardInput(f"a=1 b={b!r} c={c!r}", gold=1)).value <= 1


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.001, 1e6)), min_size=1, max_size=6))
def test_the_value_stays_in_the_unit_interval_for_any_weights(parts):
    reward = Compose({f"p{i}": Part(Says(f"p{i}"), "weight", w) for i, (_, w) in enumerate(parts)})
    result = reward.score(RewardInput(" ".join(f"p{i}={v!r}" for i, (v, _) in enumerate(parts)), gold=1))
    assert 0 <= result.value <= 1
    best = reward.score(RewardInput(" ".join(f"p{i}=1" for i in range(len(parts))), gold=1))
    assert best.value == pytest.approx(1)


def test_an_unjudged_part_masks_the_sample_with_its_status_and_reason():
    for role in ({"weight": 1}, {"gate": 1}, {"multiply": 1}):
        result = build({"parts": {"right": says("a"), "slow": says("b", **role)}}).score(
            RewardInput("a=1 b=none", gold=1)
        )
        assert (result.value, result.status, result.reason) == (None, "timeout", "slow: b took too long")
        assert result.components == {"right": 1.0, "right/raw": 1.0}


def test_an_unjudged_metric_is_left_out_and_masks_nothing():
    result = build({"parts": {"right": says("a"), "watch": says("b", weight=0)}}).score(
        RewardInput("a=1 b=none", gold=1)
    )
    assert result.value == 1 and "watch" not in result.components


def test_routing_by_kind_names_the_kind_and_refuses_the_unknown():
    reward = build({"parts": {"answer": {"route": {"option": says("a"), "report": says("b")}}}})
    results = reward.score_batch([RewardInput("a=1 b=0", gold=1, kind=kind) for kind in ("report", "option", "optin")])
    assert [result.value for result in results] == [0, 1, None]
    assert results[1].components == {"answer": 1, "answer/option": 1, "answer/option/raw": 1}
    assert results[2].status == "gold_invalid" and "did you mean 'option'" in results[2].reason
    assert "optin" in reward.check_gold(RewardInput("", gold=1, kind="optin"))
    assert reward.check_gold(RewardInput("", gold=None, kind="report")) == "answer: b has no label"
    assert reward.check_gold(RewardInput("", gold=1, kind="report")) is None


def test_check_gold_does_not_ask_metrics():
    reward = build({"parts": {"right": says("a"), "watch": says("b", weight=0)}})
    assert reward.check_gold(RewardInput("", gold=None)) == "right: a has no label"
    assert Compose({"r": Part(Route({"": Says()}))}).check_gold(RewardInput("", gold=1)) is None


def test_batches_reach_the_parts_whole():
    spec = {
        "parts": {
            "answer": {"route": {"x": {"class": f"{HERE}:Doubled"}, "y": says("a")}},
            "watch": says("a", weight=0),
        }
    }
    reward = build(spec)
    cls = type(reward.parts["answer"].reward.routes["x"])
    cls.calls = 0
    results = reward.score_batch([RewardInput("a=1", gold=1, kind=kind) for kind in "xyxx"])
    assert [r.value for r in results] == [1, 1, 1, 1] and cls.calls == 1
    assert is_batched(reward) and not is_batched(build(says("a")))


def test_an_exception_says_in_which_part_it_arose():
    with pytest.raises(KeyError) as caught:
        build({"parts": {"outer": {"parts": {"inner": says("zzz")}}}}).score(RewardInput("a=1", gold=1))
    assert caught.value.__notes__ == ["in reward part 'inner'", "in reward part 'outer'"]


def test_parts_nest():
    spec = {"parts": {"deep": {"parts": {"x": says("a"), "y": says("b", gate=1)}, "multiply": 1}, "right": says("c")}}
    result = build(spec).score(RewardInput("a=0.5 b=1 c=1", gold=1))
    assert result.value == 0.5 and result.components["deep/y/raw"] == 1.0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"pars": {}}, ["spec", "'pars'", "did you mean 'parts'"]),
        ({"parts": {"a": {**says("a"), "wieght": 1}}}, ["spec.parts.a", "'wieght'", "did you mean 'weight'"]),
        ({"parts": {"a": {**says("a"), "weight": 1, "gate": 1}}}, ["one role", "weight and gate"]),
        ({"parts": {"a": says("a", weight=-1)}}, ["spec.parts.a", "negative", "multiply"]),
        ({"parts": {"a": says("a", weight=0)}}, ["weight above 0"]),
        ({"parts": {"a": says("a"), "b": says("b", gate=2)}}, ["gate must be in (0, 1]"]),
        ({"parts": {"a": says("a", weight="much")}}, ["weight must be a number", "'much'"]),
        ({"parts": {"a/b": says("a")}}, ["without '/'"]),
        ({"class": f"{HERE}:Says", "args": {"kye": "a"}}, ["argument of Says", "'kye'", "did you mean 'key'"]),
        ({"class": f"{HERE}:Sayz"}, ["has no 'Sayz'", "did you mean 'Says'"]),
        ({"class": "no_such_module:X"}, ["no module 'no_such_module'", "PYTHONPATH"]),
        ({"class": "json:JSONDecoder"}, ["not a subclass of rewards.Reward"]),
        ({"class": "__main__:X"}, ["move it to a module"]),
        ({"class": "OptionLeter"}, ["did you mean 'OptionLetter'"]),
        ({"class": f"{HERE}:Says", "route": {}}, ["exactly one of"]),
        ({"route": {}}, ["spec.route", "expected a mapping"]),
        ([], ["expected a name or a mapping, got list"]),
        ({"route": {"option": 3}}, ["spec.route.option", "int"]),
    ],
)
def test_a_bad_spec_is_refused_with_its_place_and_the_nearest_name(spec, words):
    with pytest.raises(SpecError) as caught:
        build(spec)
    for word in words:
        assert word in str(caught.value)


RIGHT = {
    "option": (RewardInput("B", gold="B", options=("CT", "MRI"), kind="option"), "A"),
    "yesno": (RewardInput("yes", gold="yes", kind="yesno"), "no"),
    "open": (RewardInput("left lung", gold="left lung", kind="open"), "right lung"),
    "numeric": (RewardInput("5 mg", gold=5, kind="numeric", meta={"unit": "mg"}), "5 g"),
    "report": (
        RewardInput("There is a left pleural effusion.", gold="Left pleural effusion.", kind="report"),
        "No pleural effusion.",
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_the_default_pays_the_answer_of_every_kind_and_form_alone_nothing(kind):
    reward = default_reward()
    sample, wrong = RIGHT[kind]
    formed = "<think>The findings speak for it.</think><answer>{}</answer>"

    def scored(text):
        return reward.score(replace(sample, completion=text))

    right = scored(formed.format(sample.completion))
    assert right.value == 1 and right.components["format"] == 1 and right.components[f"answer/{kind}"] == 1
    unformed = scored(f"<answer>{sample.completion}</answer>")
    assert unformed.value == 1 and unformed.components["format"] == 0
    false = scored(formed.format(wrong))
    least = 0.05 if kind == "report" else 0.0  # the lowest part of a report's scale orders wrong ones
    assert false.value <= least and false.components["format"] == 1
