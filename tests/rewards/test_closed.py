import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import LabelSet, OpenAnswer, RewardInput, YesNo


def score(reward, completion, gold, truncated=False, **meta):
    return reward.score(RewardInput(completion, gold, truncated=truncated, meta=meta))


YES_NO = [
    # completion, parsed (None: no answer)
    ("yes", "yes"),
    ("No.", "no"),
    ("<answer>Yes</answer>", "yes"),
    ("<answer>**No**</answer>", "no"),
    ("<think>no?</think><answer>yes</answer>", "yes"),
    ("\\boxed{\\text{No}}", "no"),
    ('{"answer": "yes"}', "yes"),
    ('{"answer": true}', "yes"),
    ('{"answer": false}', "no"),
    ("The answer is yes.", "yes"),
    ("The answer is no, since the lungs are clear.", "no"),
    ("Answer: No", "no"),
    ("Final answer: **Yes**", "yes"),
    ("Yes, there is a fracture.", "yes"),
    ("No, there is no fracture.", "no"),
    ("No. The lungs are clear.", "no"),
    ("The lungs are clear. No.", "no"),
    ("The lungs are clear.\n\nNo", "no"),
    ("Yes there is a nodule.", "yes"),
    ("There is no doubt: yes", "yes"),
    ("<answer>There is no doubt: yes</answer>", "yes"),
    ("Without a doubt, yes.", "yes"),
    ("I would say no.", "no"),
    ("So the answer is definitely yes.", "yes"),
    ("<answer>Yes, there is no midline shift.</answer>", "yes"),
    ("<answer>not present</answer>", "no"),
    ("<answer>present</answer>", "yes"),
    ("<answer>absent</answer>", "no"),
    ("<answer>True</answer>", "yes"),
    ("예", "yes"),
    ("아니요", "no"),
    ("아니요, 없습니다.", "no"),
    ("정답은 예입니다.", "yes"),
    ("是的", "yes"),
    ("答案是否", "no"),
    ("没有", "no"),
    ("はい", "yes"),
    ("いいえ、ありません。", "no"),
    ("答えははいです。", "yes"),
    ("نعم", "yes"),
    ("لا", "no"),
    ("हाँ", "yes"),
    ("नहीं", "no"),
    ("Sí.", "yes"),
    ("La respuesta es no.", "no"),
    ("Oui", "yes"),
    ("Non, il n'y en a pas.", "no"),
    ("Nein.", "no"),
    ("Die Antwort ist ja.", "yes"),
    ("Não", "no"),
    ("Да", "yes"),
    ("Ответ: нет", "no"),
    ("Không", "no"),
    ("Hayır", "no"),
    ("Ndiyo", "yes"),
    ("", None),
    ("<answer></answer>", None),
    ("The nodule is in the right lobe.", None),
    ("There is a node.", None),
    ("The study is normal.", None),
    ("I do not know.", None),
    ("It is not known.", None),
    ("No fracture is seen.", None),
    ("There is no effusion.", None),
    ("No abnormality.", None),
    ("Note the nasal bone.", None),
    ("Yesterday", None),
    ("<answer>Eyes</answer>", None),
    ("<answer>maybe</answer>", None),
    ("<answer>yes or no</answer>", None),
    ("<answer>yes/no</answer>", None),
    ("Yes and no.", None),
    ("Yes. No.", None),
    ("Yes, but no.", None),
    ("Yes or no", None),
    ("<answer>yes</answer><answer>no</answer>", None),
    ("The answer is yes. The answer is no.", None),
    ("Yes. <answer>no</answer>", None),
    ("<answer>no</answer> The answer is yes.", None),
    ("Is it yes?", None),
    ("Yes?", None),
    ("If it is acute, yes, otherwise no.", None),
    ("If it is acute, yes.", None),
    ("<think>The answer is yes", None),
    ("no doubt", None),
    ("The answer is not yes.", None),
]


@pytest.mark.parametrize(("completion", "parsed"), YES_NO)
def test_yes_or_no(completion, parsed):
    for gold in ("yes", "no"):
        result = score(YesNo(), completion, gold)
        assert (result.value, result.parsed) == (float(gold == parsed), parsed), result.reason


@pytest.mark.parametrize("gold", ["yes", "Yes.", "YES", "true", True, "예", "sí"])
def test_gold_yes(gold):
    assert YesNo().check_gold(RewardInput("", gold)) is None
    assert score(YesNo(), "<answer>yes</answer>", gold).value == 1.0
    assert score(YesNo(), "<answer>no</answer>", gold).value == 0.0


@pytest.mark.parametrize("gold", ["maybe", "", None, 1, "yes or no", ["yes"]])
def test_gold_that_is_neither_is_masked(gold):
    assert "OptionLetter" in YesNo().check_gold(RewardInput("", gold))
    result = score(YesNo(), "yes", gold)
    assert (result.value, result.status) == (None, "gold_invalid")


def test_a_cut_yes_is_no_answer():
    assert score(YesNo(), "Yes, there is", "yes", truncated=True).status == "truncated"
    assert score(YesNo(), "<answer>yes</answer> Th", "yes", truncated=True).value == 1.0


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_judged(text):
    for reward, gold in ((YesNo(), "yes"), (OpenAnswer(), "left lung"), (LabelSet(), ["edema", "effusion"])):
        result = score(reward, text, gold)
        assert result.value is not None and result == score(reward, text, gold)


OPEN_RIGHT = [
    ("pneumonia", "Pneumonia"),
    ("<answer>Pneumonia.</answer>", "pneumonia"),
    ("<answer>the left lung</answer>", "Left lung"),
    ("<answer>Left-lung</answer>", "left lung"),
    ("<answer>lungs</answer>", "lung"),
    ("<answer>vertebra</answer>", "vertebrae"),
    ("<answer>oedema</answer>", "edema"),
    ("<answer>Haemorrhage</answer>", "hemorrhage"),
    ("<answer>tumor</answer>", "tumour"),
    ("<answer>X-ray</answer>", "x ray"),
    ("<answer>Xray</answer>", "X-ray"),
    ("<answer>two</answer>", "2"),
    ("<answer>2</answer>", 2),
    ("The answer is pneumonia.", "pneumonia"),
    ("<answer>The answer is pneumonia</answer>", "pneumonia"),
    ("<answer>It is a pneumothorax.</answer>", "pneumothorax"),
    ("<answer>The image shows a pneumothorax.</answer>", "pneumothorax"),
    ("\\boxed{\\text{pneumonia}}", "pneumonia"),
    ('{"answer": "pneumonia"}', "pneumonia"),
    ("<answer>pneumonia, because of the air bronchogram</answer>", "pneumonia"),
    ("<answer>computed tomography (CT)</answer>", "computed tomography"),
    ("<answer>CT</answer>", "Computed tomography (CT)"),
    ("<answer>computed tomography</answer>", "CT (computed tomography)"),
    ("<answer>right lung, left lung</answer>", "left lung, right lung"),
    ("<answer>liver and spleen</answer>", "Spleen, liver"),
    ("<answer>no pneumonia</answer>", "no pneumonia"),
    ("<answer>Aspirin or warfarin</answer>", "aspirin or warfarin"),
    ("<answer>폐렴</answer>", "폐렴"),
]
OPEN_WRONG = [
    ("<answer>Aspirin or Warfarin</answer>", "aspirin"),
    ("<answer>Aspirin/Warfarin</answer>", "aspirin"),
    ("<answer>Aspirin, Warfarin, Heparin</answer>", "aspirin"),
    ("<answer>aspirin and warfarin</answer>", "aspirin"),
    ("<answer>aspirin</answer>", "aspirin and warfarin"),
    ("<answer>right lung</answer>", "left lung"),
    ("<answer>lung</answer>", "left lung"),
    ("<answer>left lung</answer>", "lung"),
    ("<answer>bilateral lungs</answer>", "left lung"),
    ("<answer>no pneumonia</answer>", "pneumonia"),
    ("<answer>not pneumonia</answer>", "pneumonia"),
    ("<answer>pneumonia is absent</answer>", "pneumonia"),
    ("<answer>pneumonia</answer>", "no pneumonia"),
    ("<answer>type 2 diabetes</answer>", "type 1 diabetes"),
    ("<answer>HPV type 1</answer>", "type 1 diabetes"),
    ("<answer>bronchopneumonia</answer>", "pneumonia"),
    ("<answer>hypokalemia</answer>", "hyperkalemia"),
    ("<answer>pneumonia or not</answer>", "pneumonia"),
    ("<answer></answer>", "pneumonia"),
    ("", "pneumonia"),
    ("<answer>pneumonia</answer><answer>effusion</answer>", "pneumonia"),
    ("The answer is effusion. <answer>pneumonia</answer>", "pneumonia"),
    ("<answer>pneumonia", "pneumonia"),
    ("<think>pneumonia</think>", "pneumonia"),
    ("pneumonia\neffusion", "pneumonia"),
    ("<answer>1 2</answer>", "12"),
    ("<answer>5.0</answer>", "50"),
    ("<answer>pneumonia (effusion)</answer>", "pneumonia"),
    ("<answer>axis</answer>", "axi"),
]


@pytest.mark.parametrize(("completion", "gold"), OPEN_RIGHT)
def test_open_answers_in_other_clothes(completion, gold):
    result = score(OpenAnswer(), completion, gold)
    assert result.value == 1.0, result.reason


@pytest.mark.parametrize(("completion", "gold"), OPEN_WRONG)
def test_open_answers_that_are_others(completion, gold):
    result = score(OpenAnswer(), completion, gold)
    assert result.value == 0.0
    assert result.reason


def test_synonyms_are_a_list_or_a_mapping():
    said = "<answer>blocked coronary</answer>"
    assert score(OpenAnswer(), said, "myocardial infarction").value == 0.0
    assert score(OpenAnswer(), said, "myocardial infarction", synonyms=["blocked coronary", "MI"]).value == 1.0
    mapping = {"Myocardial infarction": ["blocked coronaries"], "Stroke": ["brain attack"]}
    assert score(OpenAnswer(), said, "myocardial infarction", synonyms=mapping).value == 1.0
    assert score(OpenAnswer(), "<answer>brain attack</answer>", "myocardial infarction", synonyms=mapping).value == 0.0
    assert score(OpenAnswer(), said, ["blocked coronary", "MI"]).value == 1.0


@pytest.mark.parametrize("gold", ["", " ", None, True, [], ["a", ""], {"a": 1}, "?!"])
def test_open_gold_that_cannot_be_judged(gold):
    assert OpenAnswer().check_gold(RewardInput("", gold))
    assert score(OpenAnswer(), "<answer>x</answer>", gold).value is None


LABELS = ["Edema", "Pleural effusion"]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<answer>edema, pleural effusion</answer>", 1.0),
        ("<answer>Pleural effusions and oedema</answer>", 1.0),
        ("<answer>\n- Edema\n- Pleural effusion\n</answer>", 1.0),
        ('{"answer": ["edema", "pleural effusion"]}', 1.0),
        ("edema; pleural effusion", 1.0),
        ("<answer>edema, edema, pleural effusion</answer>", 1.0),
        ("<answer>edema, pleural effusion, no pneumothorax</answer>", 1.0),
        ("<answer>edema</answer>", 2 / 3),
        ("<answer>edema, fracture</answer>", 0.25),
        ("<answer>edema, pleural effusion, fracture</answer>", 0.6),
        ("<answer>fracture</answer>", 0.0),
        ("<answer>edema, fracture, mass, nodule</answer>", 0.0),
        ("<answer>none</answer>", 0.0),
        ("<answer>edema or pleural effusion</answer>", 0.0),
        ("<answer>edema, no edema, pleural effusion</answer>", 0.0),
        ("<answer>no edema, no pleural effusion</answer>", 0.0),
        ("<answer>edema, pleural effusion, none</answer>", 0.0),
        ("<answer>edema</answer><answer>pleural effusion</answer>", 0.0),
        ("", 0.0),
        ("<answer></answer>", 0.0),
    ],
)
def test_label_sets(completion, value):
    assert score(LabelSet(), completion, LABELS).value == pytest.approx(value)


def test_naming_every_label_does_not_pay():
    every = ", ".join(["edema", "pleural effusion", *(f"finding {n}" for n in range(12))])
    assert score(LabelSet(), f"<answer>{every}</answer>", LABELS).value == 0.0
    assert score(LabelSet(wrong_cost=0), f"<answer>{every}</answer>", LABELS).value == pytest.approx(4 / 16)


@pytest.mark.parametrize(("completion", "value"), [("none", 1.0), ("[]", 1.0), ("<answer>No finding</answer>", 1.0)])
def test_an_empty_label_set_has_to_be_said(completion, value):
    assert score(LabelSet(), completion, []).value == value
    assert score(LabelSet(), "", []).value == 0.0
    assert score(LabelSet(), "<answer>edema</answer>", []).value == 0.0


def test_label_synonyms_and_gold():
    assert score(LabelSet(), "<answer>hydrothorax, edema</answer>", LABELS).value < 1.0
    synonyms = {"Pleural effusion": ["hydrothorax"]}
    assert score(LabelSet(), "<answer>hydrothorax, edema</answer>", LABELS, synonyms=synonyms).value == 1.0
    assert score(LabelSet(), "<answer>edema; pleural effusion</answer>", "Edema, Pleural effusion").value == 1.0
    for gold in (None, 3, ["edema", "Edema"], ["edema", ""], [1]):
        assert LabelSet().check_gold(RewardInput("", gold))
        assert score(LabelSet(), "edema", gold).value is None
    with pytest.raises(ValueError, match="wrong_cost"):
        LabelSet(wrong_cost=-1)


@pytest.mark.parametrize(
    "unit", ["yes, ", "no ", "yes. ", "so ", "a, ", "(a) ", "½1", "答案是B", "and ", "< ", "B\n", "the "]
)
def test_hostile_text_is_read_in_linear_time(unit):
    text = unit * (20_000 // len(unit))
    for reward, gold in ((YesNo(), "yes"), (OpenAnswer(), "left lung"), (LabelSet(), ["edema"])):
        for completion in (text, f"<answer>{text}</answer>", f"The answer is {text}"):
            best = min(_cpu_seconds(reward, completion, gold) for _ in range(2))
            assert best < 0.25, f"{reward.name}: {best:.3f} s for 20,000 characters of {unit!r}"


def _cpu_seconds(reward, completion, gold):
    start = time.process_time()
    score(reward, completion, gold)
    return time.process_time() - start


SHAPES = [
    # completion, gold, value
    ("<answer>No Finding</answer>", ["No Finding"], 1.0),
    ("<answer>Normal</answer>", ["No Finding"], 1.0),
    ("<answer>no DR</answer>", ["No DR"], 1.0),
    ("<answer>DR</answer>", ["No DR"], 0.0),
    ("<answer>No Finding</answer>", ["Effusion"], 0.0),
    ("<answer>Effusion</answer>", ["No Finding"], 0.0),
    ("<answer>No Finding, Support Devices</answer>", ["No Finding", "Support Devices"], 1.0),
    ("<answer>1. Edema\n2. Mass</answer>", ["Edema", "Mass"], 1.0),
    ("<answer>Mass|Edema</answer>", "Edema|Mass", 1.0),
    ('{"labels": ["Mass", "Edema"]}', ["Edema", "Mass"], 1.0),
    ('{"Edema": 1, "Mass": true, "Nodule": 0}', ["Edema", "Mass"], 1.0),
    ('{"findings": {"Edema": "yes", "Mass": "present"}}', ["Edema", "Mass"], 1.0),
    ('```json\n["Edema", "Mass"]\n```', ["Edema", "Mass"], 1.0),
    ("<answer>Labels: Edema, Mass</answer>", ["Edema", "Mass"], 1.0),
    ("The findings are: edema and a mass.", ["Edema", "Mass"], 1.0),
    ("Edema: 1\nMass: 1\nNodule: 0", ["Edema", "Mass"], 1.0),
    ("Edema: yes; Mass: yes; Nodule: no", ["Edema", "Mass"], 1.0),
    ("Edema - present\nMass - present\nNodule - absent", ["Edema", "Mass"], 1.0),
    ("Edema: 0\nMass: 0\nNodule: 1", ["Edema", "Mass"], 0.0),
    ("<answer>Edema (left base), Mass (small)</answer>", ["Edema", "Mass"], 1.0),
    ("<answer>Edema (absent), Mass</answer>", ["Edema", "Mass"], 2 / 3),
    ("<answer>Edema (possible), Mass</answer>", ["Edema", "Mass"], 0.25),
    ("<answer>Pleural_Thickening</answer>", ["Pleural Thickening"], 1.0),
    ("<answer>Mass and nodule, edema</answer>", ["Mass and nodule", "Edema"], 1.0),
    ("<answer>The image shows edema and a mass.</answer>", ["Edema", "Mass"], 1.0),
    ("<answer>Edema is present, a mass is absent</answer>", ["Edema"], 1.0),
    ("<answer>Edema is absent</answer>", ["Edema"], 0.0),
]


@pytest.mark.parametrize(("completion", "gold", "value"), SHAPES)
def test_label_sets_as_people_write_them(completion, gold, value):
    result = score(LabelSet(), completion, gold)
    assert result.value == pytest.approx(value), (result.parsed, result.reason)


def test_a_label_set_that_cannot_be_earned_is_named():
    assert "cannot be earned" in LabelSet().check_gold(RewardInput("", ["edema because of failure"]))
