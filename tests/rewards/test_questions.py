"""A sentence answers a question that it restates, word by word; anything else says neither yes nor no."""

import time

import pytest

from rewards import OpenAnswer, RewardInput, YesNo

HEART, FRACTURE = "Is the heart enlarged?", "Is there a fracture?"
SENTENCES = [
    # question, answer, what it says
    (HEART, "The heart is enlarged.", "yes"),
    (HEART, "The heart is mildly enlarged.", "yes"),
    (HEART, "The heart appears enlarged.", "yes"),
    (HEART, "The heart is not enlarged.", "no"),
    (HEART, "The heart isn't enlarged.", "no"),
    (HEART, "The heart does not appear enlarged.", "no"),
    (HEART, "Yes, the heart is enlarged.", "yes"),
    (HEART, "No, the heart is enlarged.", None),
    (HEART, "The aorta is enlarged.", None),
    (HEART, "The aorta is enlarged, compressing the heart.", None),
    (HEART, "The heart is normal and the aorta is enlarged.", None),
    (HEART, "The heart may be enlarged.", None),
    (HEART, "The heart is possibly enlarged.", None),
    (HEART, "If the film is AP, the heart is enlarged.", None),
    (HEART, "I doubt that the heart is enlarged.", None),
    (HEART, "Some would say the heart is enlarged.", None),
    (HEART, HEART, None),
    (HEART, "The heart is enlarged. The heart is not enlarged.", None),
    (FRACTURE, "There is a fracture.", "yes"),
    (FRACTURE, "A fracture is present.", "yes"),
    (FRACTURE, "The image shows a fracture.", "yes"),
    (FRACTURE, "Based on the scan, there is a fracture of the left clavicle.", "yes"),
    (FRACTURE, "There is no fracture.", "no"),
    (FRACTURE, "No fracture is seen.", "no"),
    (FRACTURE, "No evidence of fracture.", "no"),
    (FRACTURE, "A fracture is not seen.", "no"),
    (FRACTURE, "A fracture is absent.", "no"),
    (FRACTURE, "There is no effusion, pneumothorax, or fracture.", "no"),
    (FRACTURE, "There is no displaced fracture.", None),
    (FRACTURE, "There is effusion without fracture.", None),
    (FRACTURE, "There is a possible fracture.", None),
    (FRACTURE, "There is a fracture or a mass.", None),
    (FRACTURE, "There is a fracture line artefact.", None),
    ("Are there skull fractures?", "There is a fracture of the skull.", "yes"),
    ("Are there skull fractures?", "There are no fractures of the skull.", "no"),
    ("Is there a mass?", "There is mass effect.", None),
    ("Is there a left fracture?", "There is a right fracture.", None),
    ("Is there a fracture in the left clavicle?", "There is a fracture in the right clavicle.", None),
    ("Is there free air under the diaphragm?", "There is no free air.", "no"),
    ("Is there free air under the diaphragm?", "There is free air.", None),
    ("Is there pneumothorax on the left?", "There is no pneumothorax on the right.", None),
    ("Are there two nodules?", "There are three nodules.", None),
    ("Is this an axial view?", "This is an axial view.", "yes"),
    ("Is this an axial view?", "The image is a coronal view.", None),
    ("Is this an anterior posterior image?", "This is a posterior anterior image.", None),
    ("Does the lesion enhance?", "The lesion enhances.", "yes"),
    ("Does the lesion enhance?", "The lesion does not enhance.", "no"),
    ("Are the lungs clear?", "The lungs are not clear.", "no"),
    ("Are the lungs clear?", "The lungs are clear except for a nodule.", None),
    ("Is the heart clearly visible?", "The heart is clearly visible.", "yes"),
    ("Is the spleen larger than the liver?", "The liver is larger than the spleen.", None),
    ("Is there no fracture?", "There is no fracture.", None),
    ("Is it benign or malignant?", "It is benign.", None),
    ("Is there edema? Is there a mass?", "There is a mass.", None),
    ("<image>\nWas contrast used? Answer with yes or no.", "Contrast was not used.", "no"),
    ("", "The heart is enlarged.", None),
]


@pytest.mark.parametrize(("question", "answer", "said"), SENTENCES)
def test_a_sentence_says_yes_or_no(question, answer, said):
    for completion in (answer, f"<answer>{answer}</answer>"):
        for gold in ("yes", "no"):
            result = YesNo().score(RewardInput(completion, gold, prompt=question))
            assert (result.parsed, result.value) == (said, float(gold == said)), result.reason


def test_a_missing_question_is_named():
    result = YesNo().score(RewardInput("The heart is enlarged.", "yes"))
    assert "question" in result.reason


OPEN = [
    # question, answer, gold, whether it is right
    ("What organ is shown at the top left?", "The organ shown at the top left is the liver.", "liver", True),
    ("What organ is shown at the top left?", "The organ shown at the top left is not the liver.", "liver", False),
    ("What organ is shown at the top left?", "The organ shown at the top left is the left kidney.", "kidney", False),
    ("In what plane was the picture taken?", "The picture was taken in the sagittal plane.", "sagittal", True),
    ("In what plane was the picture taken?", "The picture was taken in the axial plane.", "sagittal", False),
    ("What is the abnormality in the left lung?", "There is a mass in the left lung.", "mass", True),
    ("What is the abnormality in the left lung?", "There is a mass in the right lung.", "mass", False),
    ("What is the abnormality in the left lung?", "There is no mass in the left lung.", "mass", False),
    ("What is the abnormality in the left lung?", "There is a mass and an effusion in the left lung.", "mass", False),
    ("Which lung is affected?", "The right lung is affected.", "right", True),
    ("Is the mass on the left or right?", "The mass is on the left.", "left", True),
    ("Is the mass on the left or right?", "The mass is on the left or right.", "left", False),
    ("Is the mass on the left or right?", "The mass is on the left and right.", "left", False),
    ("How many nodules are in the left lung?", "There are 2 nodules in the left lung.", "two", True),
    ("How many nodules are in the left lung?", "There may be 2 nodules in the left lung.", "two", False),
    ("What is the diagnosis?", "Some would say the diagnosis is pneumonia.", "pneumonia", False),
    ("What is the diagnosis?", "The most likely diagnosis is pneumonia.", "pneumonia", True),
    ("What is the diagnosis?", "Granulomatosis with polyangiitis (GPA)", "Granulomatosis with polyangiitis", True),
    ("What is the diagnosis?", "Pneumothorax (PE)", "pneumothorax", False),
    ("What is the diagnosis?", "Sjogren syndrome", "Sjögren syndrome", True),
    ("What is the modality?", "CT / computed tomography", "CT", True),
    ("What is the modality?", "CT / MRI", "CT", False),
    ("Which drug?", "a beta-blocker", "β-blocker", True),
    ("Which vessel?", "renal vein", "kidney vein", True),
    ("", "venous thrombosis", "vein thrombosis", True),
    ("", "Influenza", "Influenza A", False),
    ("", "Influenza A", "Influenza A", True),
    ("", "Hepatitis", "hepatitis a", False),
    ("", "Vitamin deficiency", "Vitamin A deficiency", False),
    ("", "A", "A", True),
    ("", "a fracture", "fracture", True),
    ("", "heart attack", "Myocardial infarction", True),
    ("", "pulmonary embolism", "pulmonary edema", False),
]


@pytest.mark.parametrize(("question", "answer", "gold", "is_right"), OPEN)
def test_an_open_answer_may_restate_its_question(question, answer, gold, is_right):
    result = OpenAnswer().score(RewardInput(f"<answer>{answer}</answer>", gold, prompt=question))
    assert result.value == float(is_right), result.reason


@pytest.mark.parametrize(
    "unit", ["the heart is ", "no ", "and ", "of ", "fracture, ", "is not ", "The heart is enlarged. "]
)
def test_hostile_sentences_are_read_in_linear_time(unit):
    text = unit * (20_000 // len(unit))
    for reward, gold in ((YesNo(), "yes"), (OpenAnswer(), "fracture")):
        for completion in (text, f"<answer>{text}</answer>"):
            sample = RewardInput(completion, gold, prompt=FRACTURE)
            best = min(_cpu_seconds(reward, sample) for _ in range(2))
            assert best < 0.25, f"{reward.name}: {best:.3f} s for 20,000 characters of {unit!r}"


def _cpu_seconds(reward, sample):
    start = time.process_time()
    reward.score(sample)
    return time.process_time() - start
