"""What must hold for OptionLetter on any text."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import OptionLetter, RewardInput

REWARD = OptionLetter()
OPTIONS = ("Cardiomegaly", "Pleural effusion", "Rib fracture", "Normal chest", "Lung abscess")
LETTERS = "ABCDE"

FORMS = (
    "<answer>{letter}</answer>",
    "<answer>{letter}. {text}</answer>",
    "<answer>{text}</answer>",
    "\\boxed{{{letter}}}",
    '{{"answer": "{letter}"}}',
    "The answer is {letter}.",
    "The correct answer is {text}.",
    "Answer: ({letter}) {text}",
    "**Answer:** {letter}",
    "{letter} is the correct answer.",
    "I choose {letter}.",
    "정답은 {letter}입니다.",
    "答案是{letter}。",
    "La respuesta es {letter}.",
    "{letter}",
    "({letter}) {text}",
    "{text}",
)
PIECES = st.sampled_from(
    [
        *(
            "A",
            "B",
            "C",
            " ",
            "\n",
            ".",
            ",",
            "(",
            ")",
            "*",
            "?",
            "not ",
            "or ",
            "and ",
            "no ",
            "so ",
            "if ",
            "I ",
            "a ",
        ),
        *(
            "the answer is ",
            "Answer: ",
            "<answer>",
            "</answer>",
            "<think>",
            "</think>",
            "\\boxed{",
            "}",
            '{"answer": "',
        ),
        *('"}', "is correct", "because ", "Rib fracture", "Cardiomegaly", "Normal chest", "답은 ", "答案是"),
    ]
)
HOSTILE = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join))


def answer(form, letter, options=OPTIONS):
    return form.format(letter=letter, text=options[LETTERS.index(letter)])


def score(completion, gold="B", options=OPTIONS, **meta):
    return REWARD.score(RewardInput(completion, gold, options, meta=meta))


@settings(max_examples=400, deadline=None)
@given(HOSTILE, st.booleans(), st.booleans())
def test_any_text_is_judged_and_twice_the_same(text, multi, truncated):
    sample = RewardInput(text, "B", OPTIONS, truncated=truncated, meta={"multi": multi})
    first = REWARD.score(sample)
    assert first.value in (0.0, 1.0)
    assert first == REWARD.score(sample)
    assert first == OptionLetter().score(sample)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=6), st.one_of(st.text(max_size=20), st.none(), st.integers()), HOSTILE)
def test_any_options_and_gold_are_judged_or_refused(options, gold, text):
    sample = RewardInput(text, gold, tuple(options))
    result = REWARD.score(sample)
    assert (result.value is None) == (REWARD.check_gold(sample) is not None)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.sampled_from(FORMS),
    st.sampled_from(LETTERS),
    st.sampled_from(LETTERS),
    st.sampled_from(["\n", " ", "\n\n", "\nWait. ", "\nNo, ", " Actually, "]),
)
def test_a_second_different_answer_never_raises_the_pay(form, other_form, letter, other, joint):
    once = answer(form, letter)
    twice = once + joint + answer(other_form, other)
    for gold in LETTERS:
        if other != letter:
            assert score(twice, gold).value <= score(once, gold).value, twice


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from(LETTERS))
def test_each_form_pays_its_letter_only(form, letter):
    for gold in LETTERS:
        assert score(answer(form, letter), gold).value == float(gold == letter)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from(LETTERS), st.randoms(use_true_random=False))
def test_shuffled_options_move_the_letter_and_keep_the_pay(form, letter, rng: random.Random):
    shuffled = list(OPTIONS)
    rng.shuffle(shuffled)
    text = OPTIONS[LETTERS.index(letter)]
    moved = LETTERS[shuffled.index(text)]
    before = score(answer(form, letter), "B")
    gold = LETTERS[shuffled.index(OPTIONS[1])]
    after = score(answer(form, moved, tuple(shuffled)), gold, tuple(shuffled))
    assert after.value == before.value
    assert after.parsed == moved


@settings(max_examples=200, deadline=None)
@given(st.permutations(LETTERS), st.sampled_from([", ", " or ", " and ", "/", " ", "\n", "", "; ", "、"]))
def test_enumerating_the_options_never_pays(letters, joint):
    for wrapper in ("{}", "<answer>{}</answer>", "The answer is {}.", "\\boxed{{{}}}"):
        assert score(wrapper.format(joint.join(letters))).value == 0.0
        texts = joint.join(OPTIONS[LETTERS.index(letter)] for letter in letters)
        assert score(wrapper.format(texts)).value == 0.0


def test_an_option_without_a_visible_text_is_mentioned_nowhere():
    """A zero-width option is an empty text, which a search finds everywhere, without an end."""
    for options in (("\u200b", "CT"), ("\u00ad", "CT"), ("CT", "\ufeff")):
        result = REWARD.score(RewardInput("The answer is A", "A", options))
        assert result.value in (None, 0.0, 1.0)
