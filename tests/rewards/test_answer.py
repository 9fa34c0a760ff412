import time

import pytest

from rewards.answer import extract

CASES = [
    # completion, status, channel, texts
    ("<answer>B</answer>", "ok", "tag", ("B",)),
    ("<ANSWER> 5 mg </ANSWER>", "ok", "tag", ("5 mg",)),
    ("<think>7</think><answer>5 mg</answer>", "ok", "tag", ("5 mg",)),
    ("<answer>A</answer><answer>B</answer>", "ok", "tag", ("A", "B")),
    ("<answer>A <answer>B</answer></answer>", "ok", "tag", ("A", "B")),
    ("<answer>B", "unparsed", "tag", ()),
    ("<answer>B</answer", "unparsed", "tag", ()),
    ("<answer></answer> The answer is B.", "unparsed", "tag", ()),
    ("</answer>B<answer>", "unparsed", "tag", ()),
    ("&lt;answer&gt;B&lt;/answer&gt;", "ok", "tag", ("B",)),
    ('<answer>{"answer": "B"}</answer>', "ok", "tag", ("B",)),
    (r"\boxed{\frac{1}{4}}", "ok", "boxed", (r"\frac{1}{4}",)),
    (r"\boxed{5\,\mathrm{mg/dL}}", "ok", "boxed", (r"5\,\mathrm{mg/dL}",)),
    (r"\boxed{A} then \boxed{B}", "ok", "boxed", ("A", "B")),
    (r"\boxed{B", "unparsed", "boxed", ()),
    (r"\boxed{\text{ }}", "unparsed", "boxed", ()),
    ('{"answer": 5, "unit": "mg"}', "ok", "json", ("5 mg",)),
    ('{"answer": 0.10}', "ok", "json", ("0.10",)),
    ("{'answer': 'B'}", "ok", "json", ("B",)),
    ('{"answer": ["B", "D"]}', "ok", "json", ("B, D",)),
    ('{"answer": "A", "answer": "B"}', "ok", "json", ("A", "B")),
    ('{"answer": "B"', "unparsed", "json", ()),
    ('{"answer": null}', "unparsed", "json", ()),
    ('{"a": 1}', "ok", "bare", ('{"a": 1}',)),
    ("The answer is 37.", "ok", "cue", ("37.",)),
    ("The answer is 5 mg. The other value, 7 mg, is wrong.", "ok", "cue", ("5 mg.",)),
    ("Answer: B. The others are wrong.", "ok", "cue", ("B. The others are wrong.",)),
    ("### Answer\n\n37 mg", "ok", "cue", ("37 mg",)),
    ("**Answer:** 37", "ok", "cue", ("37",)),
    ("The answer is 5. The answer is 6.", "ok", "cue", ("5.", "6.")),
    ("Is the answer 5? The answer is 6.", "ok", "cue", ("6.",)),
    ("I cannot answer this question.", "ok", "bare", ("I cannot answer this question.",)),
    ("some words\n\n37 mg", "ok", "bare", ("37 mg",)),
    ("Answer:", "ok", "bare", ("Answer:",)),
    ("<think>The answer is B.", "unparsed", "", ()),
    ("<think>a</think>", "unparsed", "", ()),
    ("  \n ", "unparsed", "", ()),
    ("thought</think>B", "ok", "bare", ("B",)),
    ("<think>a<think>b</think>c</think>B", "ok", "bare", ("B",)),
    ("B<|im_end|><answer>A</answer>", "ok", "bare", ("B",)),
    (
        "<|channel|>analysis<|message|>Maybe A.<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>",
        "ok",
        "bare",
        ("B",),
    ),
    ("<|channel|>final <|constrain|>json<|message|>B", "ok", "bare", ("B",)),
    ("<|channel|>analysis<|message|>So the answer is B", "unparsed", "", ()),
    ("analysisPossibly A.assistantfinalThe answer is B", "ok", "cue", ("B",)),
    ("analysisPossibly the answer is A", "unparsed", "", ()),
    ("The analysis: B", "ok", "bare", ("The analysis: B",)),
    ("<|channel>thought\nThe answer is A.\n<channel|>The answer is B", "ok", "cue", ("B",)),
    ("<|channel>thought\nThe answer is A.", "unparsed", "", ()),
    ("## Thinking\n\nThe answer is A.\n\n## Final Response\n\nB", "ok", "bare", ("B",)),
    ("## Thinking\n\nThe answer is A.", "unparsed", "", ()),
    ("## Thinking\n\nA film.\n\n<answer>B</answer>", "ok", "tag", ("B",)),
    (
        "Here are my reasoning steps:\nThe answer is A.\n[BEGIN FINAL RESPONSE]\nB\n[END FINAL RESPONSE]",
        "ok",
        "bare",
        ("B",),
    ),
    ("Here are my reasoning steps:\nThe answer is A.", "unparsed", "", ()),
    ("<|START_THINKING|>A<|END_THINKING|>B", "ok", "bare", ("B",)),
    ("<seed:think>A</seed:think>B", "ok", "bare", ("B",)),
    ("So <|begin_of_box|>B<|end_of_box|>", "ok", "boxed", ("B",)),
    ("So <|begin_of_box|>B", "unparsed", "boxed", ()),
    ("\\boxed{V = D/C}\nAnswer: B", "ok", "cue", ("B",)),
    ("Answer: B\n\\boxed{V = D/C}", "ok", "boxed", ("V = D/C",)),
    ("| Item | Answer |\n|---|---|\n| 1 | C |", "ok", "cue", ("C",)),
    ("| Item | **Answer** | Why |\n|:--|:--|---|\n| 1 | C | x |\n| 2 | B | y |\n", "ok", "cue", ("C", "B")),
    ("| Item | Answer |\nC", "ok", "cue", ("C",)),
    ('{"reasoning": "So the answer is A.", "answer": "B"}', "ok", "json", ("B",)),
    ("정답은 B입니다", "ok", "cue", ("B입니다",)),
    ("答案：Ｂ", "ok", "cue", ("B",)),
    ("答えはBです", "ok", "cue", ("Bです",)),
    ("الإجابة B", "ok", "cue", ("B",)),
    ("คำตอบคือ B", "ok", "cue", ("B",)),
]


@pytest.mark.parametrize(("completion", "status", "channel", "texts"), CASES)
def test_the_deciding_channel(completion, status, channel, texts):
    answer = extract(completion)
    assert (answer.status, answer.channel, answer.texts) == (status, channel, texts)


def test_thoughts_in_json_are_no_answers_before_it():
    assert extract('{"thinking": "The answer is A.", "answer": "B"}').lower == ()
    assert extract('{"answer": "B", "explanation": "The answer is A."}').lower != ()


def test_lower_channels_are_handed_on_with_their_place():
    answer = extract("The answer is B. \\boxed{A} <answer>C</answer>")
    assert answer.texts == ("C",)
    assert [(c.channel, c.text) for c in answer.lower] == [("boxed", "A"), ("cue", "B.")]
    for candidate in (*answer.candidates, *answer.lower):
        assert answer.body[candidate.start : candidate.end].strip().startswith(candidate.text.rstrip("."))
    assert len(answer.rest) == len(answer.body)
    assert "C" not in answer.rest


def test_only_marks_that_close_survive_a_cut():
    assert extract("<answer>B</answer>").closed
    assert not extract("The answer is B").closed
    assert not extract("<answer>B").closed


def test_invisible_characters_and_wide_forms_are_folded_but_not_look_alikes():
    assert extract("<ans\u200bwer>\u202aＢ\u202c</answer>").texts == ("B",)
    assert extract("<answer>В</answer>").texts == ("В",)  # Cyrillic


@pytest.mark.parametrize(
    "unit",
    [
        "<answer>",
        "</answer>",
        "\\boxed{",
        "{",
        '{"answer": [',
        "the answer is ",
        "answer, to y ",
        "Answer:\n",
        ". ",
        "答案是B",
        "उत्तर ",
        "<think>",
        "ﷺ",
        "½1",
        "*",
        "&lt;",
    ],
)
def test_hostile_text_is_read_in_linear_time(unit):
    text = unit * (20_000 // len(unit))
    took = min(_cpu_seconds(text) for _ in range(3))
    assert took < 0.2, f"{took:.3f} s for 20,000 characters of {unit!r}"


def _cpu_seconds(text):
    start = time.process_time()
    extract(text)
    return time.process_time() - start
