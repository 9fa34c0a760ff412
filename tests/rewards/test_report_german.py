"""A second language is a pack: its small words go to the English ones, findings and organs get further terms."""

import pytest

from rewards import RewardInput
from rewards.report import ReportEntities, extract

REWARD = ReportEntities(["german"])
SIGNS = {"present": "+", "uncertain": "?", "absent": "-"}


def reads(text: str) -> set[str]:
    return {
        SIGNS[e.assertion] + e.finding + (f"@{e.side}" if e.side and not e.group else "")
        for e in extract(text, REWARD.lexicon).entities
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Kein Pneumothorax. Kleiner Pleuraerguss links.", "-pneumothorax +pleural_effusion@left"),
        ("Kein Nachweis eines Pneumothorax.", "-pneumothorax"),
        ("Pleuraerguss nicht nachweisbar.", "-pleural_effusion"),
        ("Kein Pleuraerguss, kein Infiltrat, kein Pneumothorax.", "-pleural_effusion -opacity -pneumothorax"),
        ("Keine pneumonischen Infiltrate oder Pleuraergüsse.", "-opacity -pleural_effusion"),
        ("Herz vergrößert. Keine Stauung.", "+cardiomegaly -vascular_congestion"),
        ("Das Herz ist normal groß. Die Lungen sind frei.", "-heart -lung"),
        ("Verdacht auf Pneumonie im rechten Unterlappen.", "?pneumonia@right"),
        ("Pneumonie nicht ausgeschlossen.", "?pneumonia"),
        ("Unveränderter Rundherd im linken Oberlappen, 12 mm.", "+nodule@left"),
        ("Beidseitige Pleuraergüsse, rechts größer als links.", "+pleural_effusion@bilateral"),
        ("Klinische Angaben: Pneumonie. Fieber.\nBefund: Kein Infiltrat.", "-opacity"),
        ("Pleuraerguss: nein\nPneumothorax: ja", "-pleural_effusion +pneumothorax"),
        ("Weder Pleuraerguss noch Pneumothorax.", "-pleural_effusion -pneumothorax"),
        ("Frische Rippenfraktur links, keine Raumforderung.", "+fracture_rib@left -mass"),
        ("Zustand nach Pneumonie. Keine Ergüsse.", "-pleural_effusion"),
        ("Linksseitiger Erguss und rechtsseitige Atelektase.", "+pleural_effusion@left +atelectasis@right"),
        ("Kein Erguss, aber ein großer Pneumothorax rechts.", "-pleural_effusion +pneumothorax@right"),
        ("ZVK von rechts, kein Pneumothorax.", "+central_line@right -pneumothorax"),
        ("Mediastinum verbreitert.", "+mediastinal_widening"),
        ("Erguss und Infiltrat sind nicht abgrenzbar.", "-pleural_effusion -opacity"),
    ],
)
def test_german_texts_are_read_like_english_ones(text, expected):
    assert reads(text) == set(expected.split())


def test_a_german_report_is_paid_by_the_same_rules_also_against_an_english_one():
    reference = "Moderate left pleural effusion. The heart is enlarged. No pneumothorax."
    good = "Mäßiger Pleuraerguss links. Herz vergrößert. Kein Pneumothorax."
    bad = "Kein Pleuraerguss. Herz normal groß. Pneumothorax links."
    pays = [REWARD.score(RewardInput(text, reference)).value for text in (good, bad)]
    assert pays[0] == pytest.approx(1.0) and pays[1] < 0.05
