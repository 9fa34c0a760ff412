"""Where in a completion a reward was earned: checked, composed, carried through workers; the sentences of a report."""

from __future__ import annotations

import asyncio
import random
import time
from itertools import pairwise

import numpy as np
import pytest

from lingshu_rl.rewarding import Rewards
from rewards import ReportEntities, RewardInput, RewardResult, build
from rewards.base import Reward, Span
from rewards.executor import Executor
from rewards.report.extract import extract
from rewards.report.locate import locate

HERE = "test_spans"


class Words(Reward):
    """Earns a half for "left", nothing for "right", and loses a half for "maybe"."""

    name = "words"

    def score(self, sample: RewardInput) -> RewardResult:
        points = {"left": 0.5, "right": 0.0, "maybe": -0.5}
        found = {word: sample.completion.find(word) for word in points}
        spans = {word: [(at, at + len(word), points[word])] for word, at in found.items() if at >= 0}
        return RewardResult(0.5, spans=spans)


class Beyond(Reward):
    name = "beyond"

    def score(self, sample: RewardInput) -> RewardResult:
        return RewardResult(1.0, spans={"end": [(0, len(sample.completion) + 1, 1.0)]})


def test_spans_are_kept_as_plain_frozen_numbers():
    result = RewardResult(1.0, spans={"a": [(np.int64(0), 3, np.float32(0.5))], "b": ()})
    assert result.spans == {"a": (Span(0, 3, 0.5),), "b": ()}
    assert [type(x) for x in result.spans["a"][0]] == [int, int, float]


@pytest.mark.parametrize(
    ("span", "error", "told"),
    [
        ((0, 0, 0.5), ValueError, "start < end"),
        ((-1, 3, 0.5), ValueError, "0 <= start"),
        ((0, 3, 1.5), ValueError, r"\[-1, 1\]"),
        ((0, 3, float("nan")), ValueError, "finite"),
        ((0.5, 3, 0.5), TypeError, "integer"),
        ((0, 3, "much"), TypeError, "number"),
        ((0, 3), ValueError, r"is \(start, end, points\), got \(0, 3\)"),
    ],
)
def test_what_is_no_span_is_refused_by_name(span, error, told):
    with pytest.raises(error, match="effusion") as raised:
        RewardResult(1.0, spans={"effusion": [span]})
    assert raised.match(told)


def test_a_part_is_worth_its_share_of_the_whole():
    """Weights, multipliers and gates change what a span earned as they change the value; metrics place nothing."""
    words = {"class": f"{HERE}:Words"}
    length = {"class": f"{HERE}:Words", "multiply": 0.4}  # its value of 0.5 leaves 0.8
    spec = {
        "parts": {
            "a": {**words, "weight": 3},
            "b": {**words, "weight": 1},
            "watched": {**words, "weight": 0},
            "length": length,
        }
    }
    result = build(spec).score(RewardInput("maybe left", None))
    assert result.spans == {
        "a/left": (Span(6, 10, pytest.approx(0.3)),), "a/maybe": (Span(0, 5, pytest.approx(-0.3)),),
        "b/left": (Span(6, 10, pytest.approx(0.1)),), "b/maybe": (Span(0, 5, pytest.approx(-0.1)),),
    }  # fmt: skip
    shut = build({"parts": {"a": words, "gate": {**words, "gate": 0.9}}}).score(RewardInput("left", None))
    assert shut.value == 0.0 and shut.spans == {}
    routed = build({"route": {"open": words}}).score(RewardInput("left", None, kind="open"))
    assert routed.spans == {"open/left": (Span(0, 4, 0.5),)}


def test_they_come_back_from_other_processes_as_they_were():
    samples = [RewardInput(text, None) for text in ("left", "right or maybe", "")]
    with Executor(f"{HERE}:Words", mode="isolated", timeout_s=20) as executor:
        assert executor.score(samples) == Words().score_batch(samples)


def test_a_place_outside_of_the_completion_masks_its_sample_alone():
    with Executor(Beyond()) as executor:
        rewards = Rewards(executor, {}, Beyond())
        [result] = asyncio.run(rewards.score([RewardInput("left", None)]))
    assert result.value is None and result.status == "error" and "ends at 5 of 4 characters" in result.reason


# ------------------------------------------------------------------------------------------------------------- reports

GOLD = "Moderate left pleural effusion. Mild cardiomegaly. No pneumothorax."
RIGHT = "There is a moderate left pleural effusion"
DENIED = "The heart is normal in size"
INVENTED = "Fracture of the right sixth rib"
AGREED = "No pneumothorax"


def placed(completion, gold=GOLD):
    """(finding, its sentence, sign of its points)"""
    result = ReportEntities().score(RewardInput(completion, gold))
    return {
        (finding, completion[s.start : s.end], (s.points > 0) - (s.points < 0))
        for finding, spans in result.spans.items()
        for s in spans
    }


@pytest.mark.parametrize(
    "form",
    [
        "{}.",
        "<answer>{}.</answer>",
        "FINDINGS:\n- {}.\nRECOMMENDATION: Follow-up in six weeks.",
        # a draft in the thoughts is not what is paid
        "<think>Indication: cough. There is a moderate left pleural effusion, I think. No pneumothorax.</think>\n"
        "CLINICAL HISTORY: Left pleural effusion.\nFINDINGS: {}.",
    ],
)
def test_each_finding_is_placed_in_the_sentence_that_states_it(form):
    completion = form.format(".\n- ".join((RIGHT, DENIED, INVENTED, AGREED)))
    found = placed(completion)
    assert {
        ("pleural_effusion", RIGHT, 1),
        ("cardiomegaly", DENIED, -1),
        ("pneumothorax", AGREED, 1),
    } <= found
    [(_, where, sign)] = [one for one in found if "fracture" in one[0]]
    assert where == INVENTED and sign == -1
    assert len(found) == 4
    report = completion.index(RIGHT, completion.index("</think>") if "</think>" in completion else 0)
    spans = ReportEntities().score(RewardInput(completion, GOLD)).spans
    assert min(s.start for own in spans.values() for s in own) == report


def test_a_finding_said_twice_shares_what_it_earned_and_pronouns_belong_to_it():
    text = "Left pleural effusion. No pneumothorax. It is large. The effusion is on the left."
    result = ReportEntities().score(RewardInput(text, "Left pleural effusion."))
    spans = result.spans["pleural_effusion"]
    assert {text[s.start : s.end] for s in spans} >= {"Left pleural effusion", "The effusion is on the left"}
    assert len({s.points for s in spans}) == 1 and spans[0].points > 0


def test_short_forms_answers_and_tables_are_found_where_they_stand():
    text = (
        "COPD: yes.\nPleural effusion | no\nPneumothorax | no\n\nETT in place; pt s/p CABG. The cœur naïve 心 is ﬁne."
    )
    found = placed(text, "COPD. No pleural effusion. No pneumothorax.")
    assert ("pneumothorax", "Pneumothorax | no", 1) in found
    assert any(where.startswith("COPD") and sign > 0 for _, where, sign in found)


def test_points_are_the_value_where_all_is_right():
    result = ReportEntities().score(RewardInput(GOLD, GOLD))
    assert result.value == 1.0
    assert sum(s.points for spans in result.spans.values() for s in spans) == pytest.approx(1.0, abs=1e-3)


def test_a_text_that_says_the_same_over_and_over_is_placed_in_order_and_costs_little():
    lexicon, words = ReportEntities().lexicon, random.Random(0).choices(["no", "left", "effusion"], k=1300)
    text = " ".join(f"{word}." if n % 9 == 8 else word for n, word in enumerate(words))
    said, started = extract(text, lexicon), time.process_time()
    places = locate(said.sentences, text, lexicon)
    assert time.process_time() - started < 0.5
    assert len(places) > 100 and None not in places
    assert all(text[end] == "." for _, end in places[:-1])
    assert all(before[1] < after[0] for before, after in pairwise(places))


@pytest.mark.parametrize(
    "sentence", ["There is a XXXX left-sided pleural effusion as well", "No XXXX fracture is seen"]
)
def test_a_sentence_with_a_redacted_word_is_placed_whole(sentence):
    text = f"Right pleural effusion. {sentence}. The heart is normal. There is no pneumothorax as well."
    lexicon = ReportEntities().lexicon
    start, end = locate(extract(text, lexicon).sentences, text, lexicon)[1]
    assert text[start:end] == sentence
