"""The stance of findings in clinical sentences of other kinds: discharge summaries, echocardiography, pathology."""

import csv
from pathlib import Path

import pytest

from rewards.report import extract, load
from rewards.report.lexicon import DEFAULT_PACKS

SENTENCES = Path(__file__).resolve().parents[3] / "shared" / "data" / "negex" / "negex_dev.tsv"
LEXICON = load(DEFAULT_PACKS)


def stances(text: str) -> dict[str, set[str]]:
    """finding -> how it is told; whole organ systems are left out."""
    told: dict[str, set[str]] = {}
    for entity in extract(text, LEXICON).entities:
        if not entity.group:
            told.setdefault(entity.finding, set()).add(entity.assertion)
    return told


def test_findings_of_other_notes_are_affirmed_and_denied_as_people_marked_them():
    """Over the concepts that the packs know. "Lungs show no opacities" holds its denial itself: affirmed means that it is
    said so."""
    if not SENTENCES.is_file():
        pytest.skip("the NegEx sentences are not here")
    judged = right = 0
    with SENTENCES.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            concept, sentence = stances(row["Concept"]), stances(row["Sentence"])
            told = set().union(*(sentence[finding] for finding in concept if finding in sentence))
            if not told:
                continue
            own_denial = set().union(*concept.values()) == {"absent"}
            said = "Negated" if (told == {"absent"}) != own_denial else "Affirmed"
            judged += 1
            right += said == row["Negation"]
    assert judged >= 250
    assert right >= 0.97 * judged
