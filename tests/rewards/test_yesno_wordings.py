"""Yes/no questions answered by a sentence: written from the questions' side, before the code was read."""

import pytest

from rewards import RewardInput, YesNo

# question; then sentence and what it says: "yes", "no", or "-" where it says neither (nothing may be paid)
WORDINGS = {
    "Is the heart enlarged?": [
        ("The heart is enlarged.", "yes"),
        ("The image shows an enlarged heart.", "yes"),
        ("This chest X-ray demonstrates an enlarged heart.", "yes"),
        ("There is an enlarged heart.", "yes"),
        ("The heart appears enlarged.", "yes"),
        ("The heart is not enlarged.", "no"),
        ("The image does not show an enlarged heart.", "no"),
        ("There is no enlarged heart.", "no"),
        ("The image shows a heart of normal size.", "-"),
        ("The image shows a heart.", "-"),
        ("The image shows an enlarged liver.", "-"),
        ("The image shows the heart and an enlarged spleen.", "-"),
    ],
    "Is the aorta dilated?": [
        ("The abdominal aorta is dilated.", "yes"),
        ("The aorta in this image is dilated.", "yes"),
        ("A dilated aorta is seen.", "yes"),
        ("The abdominal aorta is not dilated.", "no"),
        ("No dilated aorta is seen.", "no"),
        ("The aorta lies behind a dilated stomach.", "-"),
    ],
    "Is there fluid in the lung?": [
        ("This image demonstrates the presence of fluid in the lung.", "yes"),
        ("There is fluid in the lung.", "yes"),
        ("Fluid is present in the lung.", "yes"),
        ("Fluid can be seen in the lung.", "yes"),
        ("The presence of fluid in the lung is noted.", "yes"),
        ("The image shows the absence of fluid in the lung.", "no"),
        ("There is no evidence of fluid in the lung.", "no"),
        ("No fluid is seen in the lung.", "no"),
        ("There is fluid in the stomach.", "-"),
        ("It is hard to say whether there is fluid in the lung.", "-"),
        ("Fluid in the lung would show as a white area.", "-"),
    ],
    "Is there a fracture in the left rib?": [
        ("There is a fracture in the left rib.", "yes"),
        ("The X-ray reveals a left rib fracture.", "yes"),
        ("There is a fracture of the right rib.", "-"),
        ("There is no fracture in the right rib.", "-"),
        ("The left rib does not have a fracture.", "no"),
    ],
    "Does the image show a pneumothorax?": [
        ("The image shows a pneumothorax.", "yes"),
        ("It shows a pneumothorax.", "yes"),
        ("The image does show a large pneumothorax.", "yes"),
        ("A pneumothorax is visible in the image.", "yes"),
        ("The image doesn't show a pneumothorax.", "no"),
        ("The image shows no pneumothorax.", "no"),
        ("The image shows no signs of a pneumothorax.", "no"),
        ("A pneumothorax is a collection of air in the pleural space.", "-"),
    ],
    "Was contrast used in this scan?": [
        ("Contrast was used in this scan.", "yes"),
        ("This scan was performed without contrast.", "no"),
        ("This scan was done with contrast.", "yes"),
        ("Contrast was not used.", "no"),
        ("Contrast is often used in scans.", "-"),
    ],
    "Are the lungs normal?": [
        ("The lungs are normal.", "yes"),
        ("The lungs appear normal.", "yes"),
        ("The image shows normal lungs.", "yes"),
        ("The lungs are abnormal.", "no"),
        ("The lungs are not normal.", "no"),
        ("The lungs do not look normal.", "no"),
        ("The right lung is normal.", "-"),
    ],
    "Was a mass seen in the liver?": [
        ("A mass was seen in the liver.", "yes"),
        ("There was a mass in the liver.", "yes"),
        ("A hypodense mass was seen in the right lobe of the liver.", "yes"),
        ("The scan revealed a liver mass.", "yes"),
        ("No mass was seen in the liver.", "no"),
        ("No masses were identified in the liver.", "no"),
        ("A mass was seen in the spleen.", "-"),
        ("Two masses may be seen in the liver.", "-"),
    ],
    "Is the patient's left kidney larger than the right kidney?": [
        ("The left kidney is larger than the right kidney.", "yes"),
        ("The right kidney is larger than the left kidney.", "-"),
        ("The left kidney is not larger than the right kidney.", "no"),
    ],
    "Are there more than 3 nodules?": [
        ("There are more than 3 nodules.", "yes"),
        ("There are more than 5 nodules.", "-"),
        ("There are no more than 3 nodules.", "no"),
    ],
}
CASES = [(question, text, said) for question, rows in WORDINGS.items() for text, said in rows]


def paid(question: str, text: str, gold: str) -> float:
    return YesNo().score(RewardInput(text, gold, prompt=question)).value


@pytest.mark.parametrize(("question", "text", "said"), CASES)
def test_no_sentence_is_paid_for_what_it_does_not_say(question, text, said):
    assert [gold for gold in ("yes", "no") if gold != said and paid(question, text, gold) > 0] == []


@pytest.mark.parametrize(("question", "text", "said"), [case for case in CASES if case[2] != "-"])
def test_a_sentence_that_says_it_is_paid(question, text, said):
    assert paid(question, text, said) == 1.0
