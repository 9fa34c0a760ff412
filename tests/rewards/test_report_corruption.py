"""Real reports made worse step by step, and reports written blind: what they earn against honest ones."""

import csv
import re
from pathlib import Path

import pytest
from report_attacks import CONSTANTS

from rewards import RewardInput
from rewards.report import Entity, ReportEntities, extract

REPORTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "openi_reports" / "indiana_reports.csv"
REWARD = ReportEntities()
LEVELS = ("as written", "wrong attribute", "dropped finding", "negated finding", "invented finding", "another patient")
INVENTED = (
    "Large {} pneumothorax.",
    "Large {} pleural effusion.",
    "Fracture of the {} clavicle.",
    "{} upper lobe cavity.",
)
GRADES = {"mild": "severe", "small": "large", "minimal": "extensive", "moderate": "minimal", "severe": "mild"}
GRADES |= {"large": "small", "mildly": "severely"}
SIDES = {"left": "right", "right": "left"}

# (findings, honest impression): invented, so that the attacks are tried where the real reports are not
PAIRS = [
    ("The heart is normal. The lungs are clear. No effusion or pneumothorax.", "No acute cardiopulmonary disease."),
    ("Clear lungs. Normal heart size. No pleural effusion.", "Normal chest."),
    ("Lungs are clear bilaterally. No pneumothorax. Heart size within normal limits.", "No acute abnormality."),
    ("Heart size normal. No focal consolidation. No effusion. Bones are intact.", "No acute cardiopulmonary process."),
    ("Moderate left pleural effusion with adjacent atelectasis. Heart is enlarged.", "Left effusion. Cardiomegaly."),
    ("Right lower lobe consolidation. No effusion. Heart is normal.", "Right lower lobe pneumonia."),
    ("Large right pneumothorax. The mediastinum is midline.", "Large right pneumothorax without tension."),
    ("Cardiomegaly with pulmonary vascular congestion and small bilateral effusions.", "Congestive heart failure."),
    ("2 cm nodule in the left upper lobe. No effusion.", "Left upper lobe nodule, 2 cm."),
    ("Hyperexpanded lungs with flattened diaphragms. No consolidation.", "Hyperinflation, consistent with COPD."),
    ("Fracture of the left 6th rib. No pneumothorax.", "Left 6th rib fracture. No pneumothorax."),
    ("Low lung volumes with bibasilar atelectasis. No effusion.", "Bibasilar atelectasis."),
]


def pay(completion: str, reference: str) -> float | None:
    return REWARD.score(RewardInput(completion, reference)).value


def real_rows() -> list[dict[str, str]]:
    if not REPORTS.is_file():
        pytest.skip("the Open-i reports are not here")
    with REPORTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean(values: list[float | None]) -> float:
    judged = [value for value in values if value is not None]
    return sum(judged) / len(judged)


def attacks_are_held(pairs: list[tuple[str, str]]) -> None:
    honest = mean([pay(impression, findings) for findings, impression in pairs])
    earned = {name: mean([pay(text, findings) for findings, _ in pairs]) for name, text in CONSTANTS.items()}
    assert {name: value for name, value in earned.items() if value > 0.75 * honest} == {}


def test_there_are_35_kinds_of_blind_reports():
    assert len(CONSTANTS) == 35


def test_no_blind_report_earns_three_quarters_of_an_honest_one():
    attacks_are_held(PAIRS)


def test_no_blind_report_earns_three_quarters_of_an_honest_impression_of_real_patients():
    rows = [row for row in real_rows() if len(row["findings"]) > 40 and len(row["impression"]) > 10]
    attacks_are_held([(row["findings"], row["impression"]) for row in rows[:: len(rows) // 300][:300]])


@pytest.mark.parametrize("extra", ["everything possible", "everything present", "rare list", "present and denied"])
def test_adding_a_blind_list_to_an_honest_report_never_pays(extra):
    for findings, impression in PAIRS:
        before, after = pay(impression, findings), pay(f"{impression} {CONSTANTS[extra]}", findings)
        assert before is not None and after is not None and after < before, (findings, before, after)


def told(text: str) -> list[Entity]:
    return [e for e in extract(text, REWARD.lexicon).entities if e.assertion != "absent" and not e.group]


def positives(text: str) -> set[str]:
    return {e.finding for e in told(text)}


def weights(text: str) -> float:
    return max((REWARD.lexicon.finding(f).weight for f in positives(text)), default=0.0)


def attributes(text: str) -> set[tuple[object, ...]]:
    return {(e.finding, e.side, e.severity) for e in told(text)}


def swapped(sentence: str) -> str:
    """Left for right and mild for severe."""
    words = SIDES | GRADES
    pattern = r"\b(" + "|".join(words) + r")\b"
    return re.sub(pattern, lambda m: words[m[1].lower()], sentence, flags=re.IGNORECASE)


def unlike(text: str, other: str) -> bool:
    """Whether no finding of one text is a finding of the other, or may stand for one."""
    related = REWARD.lexicon.related
    return not any(a == b or related.get((a, b)) for a in positives(text) for b in positives(other))


def named(finding: str) -> str:
    names = {"edema_pulmonary": "pulmonary edema", "fracture_rib": "rib fracture"}
    return names.get(finding, finding.replace("_", " "))


def without(sentences: list[str], at: int, new: str = "") -> str:
    return " ".join(new if i == at else s for i, s in enumerate(sentences))


def corrupted(text: str, others: list[str], number: int) -> list[str] | None:
    """The report at every level, each with the faults of the one before; None where it has too little to corrupt.

    A fault only counts where it changes what the report says: a side of the heart is none, nor a finding told twice.
    """
    sentences = [s for s in re.split(r"(?<=[.])\s+", text) if s]
    telling = sorted((i for i, s in enumerate(sentences) if weights(s) >= 0.4), key=lambda i: -weights(sentences[i]))
    marked = next(
        (i for i in telling if attributes(without(sentences, i, swapped(sentences[i]))) != attributes(text)), None
    )
    alone = [i for i in telling if i != marked and positives(without(sentences, i)) != positives(text)]
    if marked is None or len(alone) < 2:
        return None
    dropped, denied = alone[:2]
    side = "left" if number % 2 else "right"
    invented = next(s.format(side) for s in INVENTED if unlike(s.format(side), text))
    steps = [list(sentences)]
    denial = " ".join(f"No {named(f)}." for f in sorted(positives(sentences[denied])))
    for at, new in ((marked, swapped(sentences[marked])), (dropped, ""), (denied, denial)):
        steps.append([new if i == at else s for i, s in enumerate(steps[-1])])
    steps.append([*steps[-1], invented])
    other = next(t for t in others if weights(t) >= 0.8 and unlike(t, text))
    return [*(" ".join(s for s in step if s) for step in steps), other]


def test_pay_falls_with_every_fault():
    """Over 300 real reports with at least three sentences that tell of something, adjacent levels are in order >= 95 %."""
    texts = [row["findings"] for row in real_rows() if row["findings"].strip()]
    ordered = {level: 0 for level in LEVELS[1:]}
    reports = 0
    for i, text in enumerate(texts):
        levels = corrupted(text, texts[i + 1 :] + texts, i)
        if levels is None:
            continue
        pays = [pay(level, text) for level in levels]
        for name, better, worse in zip(LEVELS[1:], pays, pays[1:], strict=False):
            assert better is not None and worse is not None
            ordered[name] += worse < better
        reports += 1
        if reports == 300:
            break
    assert reports == 300
    assert sum(ordered.values()) >= 0.95 * 300 * len(ordered), ordered
    assert min(ordered.values()) >= 0.88 * 300, ordered
