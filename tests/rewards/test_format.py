import pytest

from rewards import OptionLetter, Overlong, Repetition, RewardInput, ThinkAnswerFormat, build

GOOD = "<think>The angle is blunted.</think>\n<answer>B</answer>"


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (GOOD, 1.0),
        (f"  {GOOD}\n", 1.0),
        (f"{GOOD}<|im_end|>", 1.0),
        ("<think>The angle\n\nis blunted.</think><answer>\nB\n</answer>", 1.0),
        ("<answer>B</answer>", 0.0),
        ("<think></think><answer>B</answer>", 0.0),
        ("<think> \n </think><answer>B</answer>", 0.0),
        ("<think>ok</think><answer>B</answer>", 0.0),
        ("<think>The angle is blunted.</think><answer></answer>", 0.0),
        ("<think>The angle is blunted.</think><answer>...</answer>", 0.0),
        ("<think>The angle is blunted.</think>B", 0.0),
        ("<think>The angle is blunted.<answer>B</answer></think>", 0.0),
        ("<answer>B</answer><think>The angle is blunted.</think>", 0.0),
        (f"{GOOD} So B.", 0.0),
        (f"Well. {GOOD}", 0.0),
        (f"{GOOD}{GOOD}", 0.0),
        ("<think>a b c</think><think>d e f</think><answer>B</answer>", 0.0),
        ("<think>The angle is blunted.</think><answer>A</answer><answer>B</answer>", 0.0),
        ("<think>The angle is blunted.</think> junk <answer>B</answer>", 0.0),
        ("<think>The angle is blunted.</think><answer>B", 0.0),
        ("", 0.0),
    ],
)
def test_think_answer_format(completion, value):
    result = ThinkAnswerFormat().score(RewardInput(completion, "B"))
    assert result.value == value
    assert bool(result.reason) == (value == 0.0)


def test_the_prompt_may_open_the_think_block():
    completion = "The angle is blunted.</think><answer>B</answer>"
    assert ThinkAnswerFormat().score(RewardInput(completion, "B")).value == 0.0
    assert ThinkAnswerFormat().score(RewardInput(completion, "B", prompt="...<think>\n")).value == 1.0
    assert ThinkAnswerFormat().score(RewardInput(GOOD, "B", prompt="...<think>\n")).value == 1.0


def test_a_cut_answer_is_truncated():
    cut = RewardInput("<think>The angle is blunted.</think><answer>B", "B", truncated=True)
    assert ThinkAnswerFormat().score(cut).status == "truncated"


def test_settings_are_checked():
    with pytest.raises(ValueError, match="min_think_words"):
        ThinkAnswerFormat(min_think_words=0)
    with pytest.raises(ValueError, match="buffer"):
        Overlong(limit=100, buffer=0)
    with pytest.raises(ValueError, match="buffer"):
        Overlong(limit=100, buffer=200)
    with pytest.raises(ValueError, match="free_share"):
        Repetition(free_share=1.0)


@pytest.mark.parametrize(("length", "value"), [(0, 1.0), (800, 1.0), (850, 0.75), (900, 0.5), (1000, 0.0), (2000, 0.0)])
def test_overlong_falls_evenly_to_zero(length, value):
    assert Overlong(limit=1000, buffer=200).score(RewardInput("x" * length, "")).value == pytest.approx(value)


def test_repetition():
    clean = " ".join(f"word{n}" for n in range(60))
    assert Repetition().score(RewardInput(clean, "")).value == 1.0
    assert Repetition().score(RewardInput("short text", "")).value == 1.0
    half = Repetition().score(RewardInput(f"{clean} {clean}", "")).value
    loop = Repetition().score(RewardInput("the same words again " * 200, "")).value
    assert 0.5 < half < 0.8
    assert loop < 0.05


def test_as_multipliers_they_pay_no_wrong_answer():
    reward = build(
        {
            "parts": {
                "answer": {"class": "OptionLetter", "weight": 1.0},
                "format": {"class": "ThinkAnswerFormat", "multiply": 0.5},
                "length": {"class": "Overlong", "args": {"limit": 200, "buffer": 100}, "multiply": 1.0},
                "repetition": {"class": "Repetition", "multiply": 1.0},
            }
        }
    )
    options = ("CT", "MRI")

    def value(completion):
        return reward.score(RewardInput(completion, "B", options)).value

    wrong = GOOD.replace("B", "A")
    assert OptionLetter().score(RewardInput(wrong, "B", options)).value == 0.0
    assert value(wrong) == 0.0
    assert value("") == 0.0
    assert value(GOOD) == 1.0
    assert value("<answer>B</answer>") == pytest.approx(0.5)
    assert value(GOOD.replace("blunted", "x " * 60)) < 0.6
