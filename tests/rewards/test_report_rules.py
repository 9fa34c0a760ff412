"""The steps of reading alone, and that each of them has a case: without it some text of the tables is misread."""

import json
import re
import subprocess
import sys
from pathlib import Path

import every_report_rule
import pytest
from test_report_reading import CASES, reads

from rewards import RewardInput
from rewards.report import ReportEntities, clause, clauses, extract, load, match, stance
from rewards.report.extract import _read_sentence
from rewards.report.fields import spell_out
from rewards.report.lexicon import DEFAULT_PACKS
from rewards.report.sections import split
from rewards.report.sentences import read
from rewards.report.stance import WordSpan, reaches
from rewards.report.terms import Mention, find

LEXICON = load(DEFAULT_PACKS)
OWN = [json.loads(line) for line in (Path(__file__).parent / "cases_report.jsonl").read_text().splitlines()]


def marks_of(text: str):
    (sentence,) = read(text, LEXICON).sentences
    return find(sentence.words, LEXICON)


def meant(text: str, expected: str) -> bool:
    wanted = {part for part in re.split(r" (?=[-+?])", expected) if part}
    found = reads(text.replace("\\n", "\n"))
    loose = found | {statement.split("@")[0] for statement in found}
    positive = {s for s in found if s[0] != "-"} == {s for s in wanted if s[0] != "-"}
    return positive and all(denial in loose for denial in wanted if denial[0] == "-")


def some_case_fails() -> bool:
    _read_sentence.cache_clear()
    try:
        return any(not meant(text, expected) for _, text, expected in CASES)
    finally:
        _read_sentence.cache_clear()


@pytest.mark.parametrize("step", clause.SITE_STEPS, ids=lambda step: step.__name__)
def test_every_site_step_has_a_case(step, monkeypatch):
    monkeypatch.setattr(clause, "SITE_STEPS", tuple(s for s in clause.SITE_STEPS if s is not step))
    assert some_case_fails()


@pytest.mark.parametrize("rule", clauses._RULES, ids=lambda rule: rule.__name__)
def test_every_rule_of_clause_borders_has_a_case(rule, monkeypatch):
    monkeypatch.setattr(clauses, "_RULES", tuple(r for r in clauses._RULES if r is not rule))
    assert some_case_fails()


@pytest.mark.parametrize("source", ["_contrasts", "_statements", "_finished_lines"])
def test_every_source_of_clause_borders_has_a_case(source, monkeypatch):
    monkeypatch.setattr(clauses, source, lambda *arguments: ())
    assert some_case_fails()


@pytest.mark.parametrize("direction", sorted(stance.DIRECTIONS))
def test_every_direction_of_a_cue_has_a_case(direction, monkeypatch):
    monkeypatch.setitem(stance.DIRECTIONS, direction, lambda *arguments: [])
    assert some_case_fails()


@pytest.mark.parametrize("step", ["_within_limits", "_settle", "_direction"])
def test_every_step_of_stance_has_a_case(step, monkeypatch):
    without = {
        "_within_limits": lambda c: None,
        "_settle": lambda c: stance.Reach(tuple(c.denied), (*c.doubted, *c.reopened), tuple(c.unasserted)),
        "_direction": lambda c, cue: cue.role.replace("_either", "_before"),
    }
    monkeypatch.setattr(stance, step, without[step])
    assert some_case_fails()


@pytest.mark.parametrize("step", ["say_normal", "say_abnormal", "say_things", "attach", "_either_or"])
def test_every_step_after_the_sites_has_a_case(step, monkeypatch):
    monkeypatch.setattr(clause, step, lambda *arguments: [])
    assert some_case_fails()


def test_sections_alone():
    text = "HISTORY:\nPneumonia.\n\nFINDINGS: No effusion.\nRECOMMENDATION: CT."
    assert [(s.kind, s.text.strip()) for s in split(text, LEXICON)] == [
        ("skip", "Pneumonia."),
        ("findings", "No effusion."),
        ("closing", "CT."),
    ]


def test_answer_forms_alone():
    assert spell_out("Effusion: no\nNodule= true", LEXICON).split("\n") == ["Effusion: no. ", "Nodule: yes. "]
    plain = "A sentence without any of them."
    assert spell_out(plain, LEXICON) is plain


def test_heads_alone():
    marks = marks_of("Small left pleural effusion.")
    assert marks.heads == [Mention(2, 4, "pleural_effusion")]
    assert [(m.kind, m.value) for m in marks.modifiers] == [("severity", 1.5), ("side", "left")]


def test_clause_borders_alone():
    marks = marks_of("No effusion, but the heart is enlarged and the lungs are clear.")
    assert [" ".join(marks.words[i : i + 2]) for i in clauses.clause_starts(marks, ())] == [
        *("no effusion", "the heart", "the lung")
    ]


def test_stance_alone():
    marks = marks_of("No effusion, possible nodule.")
    reach = reaches(marks, 0, len(marks.words))
    assert (reach.denied, reach.doubted, reach.unasserted) == ((WordSpan(1, 3),), (WordSpan(4, 5),), ())


def test_attributes_alone():
    (effusion, nodule) = extract("Small left effusion and a 9 mm nodule at the right apex.", LEXICON).entities
    assert (effusion.side, effusion.severity, effusion.size_mm) == ("left", (1.5, 1.5), None)
    assert (nodule.side, nodule.places, nodule.size_mm) == ("right", ("apex",), 9.0)


@pytest.mark.slow
def test_every_branch_of_the_report_modules_is_noticed_by_a_case():
    """In a process of its own: the modules are compiled anew."""
    command = [sys.executable, every_report_rule.__file__]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "", "add a case to tests/rewards/cases_re*, or delete the rule"


@pytest.mark.parametrize("constant", ["WRONG_SIDE", "RISK", "OPPOSITE", "FALSE_DENIED", "NONE_FOUND", "NEGATIVE_CAP"])
def test_every_price_has_a_case(constant, monkeypatch):
    """Another value of a price changes what some pair of texts is paid."""
    pairs = [(row["hyp_bad"], row["reference"]) for row in OWN]
    pairs.append(("Malpositioned endotracheal tube.", "Endotracheal tube in good position."))

    def pays() -> list[float | None]:
        return [ReportEntities().score(RewardInput(text, reference)).value for text, reference in pairs]

    before = pays()
    monkeypatch.setattr(match, constant, getattr(match, constant) * 0.5)
    assert pays() != before
