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
        ("No mass was seen in the spleen.", "-"),
        ("There is no mass in the spleen.", "-"),
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
# The same, from the view of what looks alike: written after the rules, against them.
LOOK_ALIKES = {
    "Is the heart enlarged?": [
        ("The heart is non-enlarged.", "no"),
        ("The heart is borderline enlarged.", "-"),
        ("The heart is less enlarged.", "-"),
        ("The left heart is enlarged.", "-"),
        ("An enlarged liver displaces the heart.", "-"),
        ("The heart and the liver are enlarged.", "yes"),
        ("The heart is enlarged and the lungs are clear.", "yes"),
        ("The heart looks enlarged on this image.", "yes"),
        ("The image shows an enlarged cardiac silhouette.", "yes"),
        ("The heart is of normal size.", "-"),
        ("The heart is significantly enlarged.", "yes"),
        ("The heart is not significantly enlarged.", "-"),
        ("The heart shadow is enlarged.", "-"),
        ("The heart was enlarged in the previous film.", "-"),
        ("The patient has an enlarged heart.", "yes"),
        ("The patient does not have an enlarged heart.", "no"),
        ("The enlarged heart is seen.", "yes"),
        ("It is false that the heart is enlarged.", "no"),
        ("The heart is far from enlarged.", "-"),
        ("The heart is anything but enlarged.", "-"),
        ("The heart failed to be enlarged.", "-"),
        ("The heart is said to be enlarged.", "-"),
        ("A normal, not enlarged, heart is seen.", "-"),
        ("The heart ceased to be enlarged.", "-"),
        ("Neither the heart nor the aorta is enlarged.", "-"),
    ],
    "Is there a pleural effusion?": [
        ("There is a small left pleural effusion.", "yes"),
        ("Bilateral pleural effusions are present.", "yes"),
        ("There is a pleural effusion on the left.", "yes"),
        ("There is no left pleural effusion.", "-"),
        ("There is no pleural effusion on the left.", "-"),
        ("There is no large pleural effusion.", "-"),
        ("No pleural effusion or pneumothorax is seen.", "no"),
        ("No pneumothorax or pleural effusion is seen.", "no"),
        ("The pleural effusion has resolved.", "-"),
        ("There is pericardial effusion.", "-"),
        ("There is risk of pleural effusion.", "-"),
        ("There is a mass and a pleural effusion.", "yes"),
        ("There is a mass but no pleural effusion.", "no"),
        ("There is a pleural effusion but no mass.", "yes"),
        ("There is a pleural effusion and no mass.", "-"),
        ("The image shows signs of a pleural effusion.", "yes"),
        ("The image shows no evidence of pleural effusion.", "no"),
        ("There is evidence of pleural effusion.", "yes"),
        ("The image suggests the absence of a pleural effusion.", "no"),
        ("Pleural effusion is absent.", "no"),
        ("There is a pleural effusion drain.", "-"),
        ("A drain for pleural effusion is seen.", "-"),
        ("There are no signs of a pleural effusion.", "no"),
        ("The image does not show any pleural effusion.", "no"),
        ("There isn't a pleural effusion.", "no"),
        ("There is not a pleural effusion.", "no"),
        ("Pleural effusion is a cause of dyspnea.", "-"),
        ("A pleural effusion can be identified.", "yes"),
        ("A pleural effusion cannot be identified.", "no"),
        ("A pleural effusion cannot be excluded.", "-"),
        ("Pleural effusion is ruled out.", "-"),
        ("Removal of the pleural effusion is shown.", "-"),
    ],
    "Is the mass on the left side?": [
        ("The mass is on the left side.", "yes"),
        ("The mass is on the right side.", "-"),
        ("The mass is located on the left.", "yes"),
        ("The mass is not on the left side.", "no"),
        ("A mass on the left side is benign.", "-"),
    ],
    "Is the trachea displaced by the mass?": [
        ("The trachea is displaced by the mass.", "yes"),
        ("The mass is displaced by the trachea.", "-"),
        ("The trachea is not displaced by the mass.", "no"),
    ],
    "Does the tumor compress the trachea?": [
        ("The tumor compresses the trachea.", "yes"),
        ("The trachea compresses the tumor.", "-"),
        ("The tumor does not compress the trachea.", "no"),
    ],
    "Is this a CT scan?": [
        ("This is a CT scan.", "yes"),
        ("This is an MRI scan.", "-"),
        ("This is not a CT scan.", "no"),
        ("The image is a CT scan.", "yes"),
        ("This is a CT scan of the chest.", "yes"),
    ],
    "Is the gallbladder visible?": [
        ("The gallbladder is visible.", "yes"),
        ("The gallbladder can be seen.", "yes"),
        ("The gallbladder is not visible.", "no"),
        ("The gallbladder is visible in the image.", "yes"),
        ("The gallbladder is inflamed.", "-"),
        ("The gallbladder is removed.", "-"),
    ],
    "Are there abnormalities in the lungs?": [
        ("There are abnormalities in the lungs.", "yes"),
        ("There are no abnormalities in the lungs.", "no"),
        ("No abnormality is seen.", "no"),
        ("The lungs have abnormalities.", "yes"),
        ("The right lung has abnormalities.", "yes"),
        ("There are abnormalities in the left lung.", "yes"),
    ],
    "Can a fracture be seen?": [
        ("A fracture can be seen.", "yes"),
        ("A fracture is seen.", "yes"),
        ("A fracture cannot be seen.", "no"),
        ("No fracture can be seen.", "no"),
    ],
    "Do you see cardiomegaly?": [
        ("I see cardiomegaly.", "yes"),
        ("Cardiomegaly is seen.", "yes"),
        ("I do not see cardiomegaly.", "no"),
        ("Cardiomegaly is not seen.", "no"),
    ],
    "Does the patient have pneumonia?": [
        ("The patient has pneumonia.", "yes"),
        ("The patient does not have pneumonia.", "no"),
        ("The patient's father has pneumonia.", "-"),
        ("The patient has aspiration pneumonia.", "yes"),
    ],
    "Is the patient male?": [
        ("The patient is male.", "yes"),
        ("The patient is female.", "-"),
        ("The patient is not male.", "no"),
        ("This is a male patient.", "yes"),
    ],
    "Are the bones osteopenic?": [
        ("The bones are osteopenic.", "yes"),
        ("The image shows osteopenic bones.", "yes"),
        ("The bones are diffusely osteopenic.", "yes"),
        ("The bones are not osteopenic.", "no"),
        ("Some bones are osteopenic.", "-"),
    ],
    "Is there a fracture?": [
        ("A fracture is a medical emergency.", "-"),
        ("A fracture, caused by a fall, is a medical emergency.", "-"),
        ("A fracture occurs when a bone breaks.", "-"),
        ("A fracture is present when a bone is broken.", "-"),
        ("A fracture line artefact is seen.", "-"),
        ("A healed fracture is seen.", "yes"),
        ("The fracture has been confirmed.", "yes"),
        ("The fracture is treated.", "-"),
    ],
    "Is the clavicle fractured?": [
        ("There is a fracture of the clavicle.", "yes"),
        ("A fractured clavicle (displaced) is present.", "yes"),
        ("The clavicle fractured in the fall is a small bone.", "-"),
        ("There is no fracture of the clavicle.", "no"),
        ("There is a fracture near the clavicle.", "-"),
    ],
    "Is the pancreatic head large?": [
        ("The head of the pancreas is large.", "yes"),
        ("The head of the pancreas is quite large, measuring 3.5 cm.", "yes"),
        ("The tail of the pancreas is large.", "-"),
    ],
    "Is there enhancement?": [("The image is an enhanced scan.", "-"), ("The scan shows enhancement.", "yes")],
    "Is/Are the sinuses abnormal?": [
        ("The sinuses are abnormal, specifically the left one.", "yes"),
        ("The sinuses are normal.", "no"),
        ("The sinuses are not abnormal.", "no"),
    ],
    "Is there midline shift?": [
        ("There is midline shift.", "yes"),
        ("There is a midline shift to the right.", "yes"),
        ("There is no midline shift.", "no"),
        ("The midline is not shifted.", "no"),
    ],
}
CASES = [
    (question, text, said)
    for table in (WORDINGS, LOOK_ALIKES)
    for question, rows in table.items()
    for text, said in rows
]


def paid(question: str, text: str, gold: str) -> float:
    return YesNo().score(RewardInput(text, gold, prompt=question)).value


@pytest.mark.parametrize(("question", "text", "said"), CASES)
def test_no_sentence_is_paid_for_what_it_does_not_say(question, text, said):
    assert [gold for gold in ("yes", "no") if gold != said and paid(question, text, gold) > 0] == []


@pytest.mark.parametrize(("question", "text", "said"), [case for case in CASES if case[2] != "-"])
def test_a_sentence_that_says_it_is_paid(question, text, said):
    assert paid(question, text, said) == 1.0
