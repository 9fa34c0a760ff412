import csv
import json
from pathlib import Path

import pytest

from rewards.report import ReportLabels
from rewards.report.labels import SCHEME_FOLDER

SHARED = Path(__file__).resolve().parents[3] / "shared"
P, U, A = "present", "uncertain", "absent"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Calcified granuloma in the left lung.", {}),
        ("Mild edema.", {"Edema": P}),
        ("Soft tissue edema of the left leg.", {}),
        ("Right hilar mass.", {"Lung Lesion": P}),
        ("Lung cancer in the left upper lobe.", {"Lung Lesion": P}),
        ("Hemopneumothorax on the left.", {"Pneumothorax": P, "Pleural Effusion": P}),
        ("Metastases in both lungs.", {}),
        ("Possible pneumonia at the left base.", {"Pneumonia": U}),
        ("Congestive heart failure.", {"Edema": P}),
        ("The heart is larger than normal.", {"Cardiomegaly": P}),
        ("Widened mediastinum.", {"Enlarged Cardiomediastinum": P}),
        ("A nodule in the left thyroid lobe.", {}),
        ("Pericardial effusion.", {}),
        ("Emphysema and scoliosis.", {}),
        ("PICC line in place.", {"Support Devices": P}),
    ],
)
def test_chexpert_labels_mean_what_the_published_lists_mean(text, expected):
    labels = ReportLabels("chexpert_14").read(text)
    devices_only = set(expected) == {"Support Devices"}
    assert {k: v for k, v in labels.items() if v != A and k != "No Finding"} == expected
    assert labels["No Finding"] == (P if devices_only else A)


def test_denials_are_absent_and_silence_is_left_out():
    labels = ReportLabels("chexpert_14").read("The lungs are clear. No pleural effusion. Heart size is normal.")
    assert labels["Pleural Effusion"] == labels["Consolidation"] == labels["Cardiomegaly"] == A
    assert labels["No Finding"] == P and "Fracture" not in labels
    assert ReportLabels("chexpert_14").read("Thank you.") == {}


def test_every_scheme_has_its_number_of_labels():
    numbers = {path.stem: len(ReportLabels(path.stem).names) for path in SCHEME_FOLDER.glob("*.json")}
    assert numbers == {"chexpert_14": 14, "ct_rate_18": 18, "nih_14": 15}  # 14 and "No Finding"


def test_nih_labels():
    text = "Left pleural thickening. Nodule in the right lung. Hiatal hernia. No pneumothorax."
    labels = ReportLabels("nih_14").read(text)
    assert {k for k, v in labels.items() if v == P} == {"Pleural_Thickening", "Nodule", "Hernia"}
    assert labels["Pneumothorax"] == A


def test_a_scheme_of_ones_own_and_its_errors(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "labels": {"Wet": {"findings": ["pleural_effusion"]}}}))
    assert ReportLabels(str(path)).read("Left effusion.") == {"Wet": P}
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({"name": "broken", "labels": {"Wet": {"findings": ["no_such_finding"]}}}))
    with pytest.raises(ValueError, match=r"Wet.*no_such_finding"):
        ReportLabels(str(path))
    with pytest.raises(FileNotFoundError, match="chexpert_14"):
        ReportLabels("chexpert")


def test_chest_ct_labels_of_real_reports():
    path = SHARED / "data" / "ct_rate" / "ct_reports_dev.csv"
    if not path.is_file():
        pytest.skip("the labelled CT reports are not here")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reader = ReportLabels("ct_rate_18")
    read = [{k for k, v in reader.read(row["report_text"]).items() if v != A} for row in rows]
    scores, counts = [], [0, 0, 0]
    for label in reader.names:
        truth = [row[label] == "1" for row in rows]
        said = [label in labels for labels in read]
        hits = sum(t and s for t, s in zip(truth, said, strict=True))
        scores.append(2 * hits / (sum(truth) + sum(said)))
        counts = [a + b for a, b in zip(counts, (hits, sum(truth), sum(said)), strict=True)]
    assert 2 * counts[0] / (counts[1] + counts[2]) >= 0.92
    assert sum(scores) / len(scores) >= 0.90
    assert min(scores) > 0.7
