import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewards import RewardInput
from rewards.report import ReportEntities, extract, load
from rewards.report.lexicon import DEFAULT_PACKS, PACK_FOLDER

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
OWN = [json.loads(line) for line in (HERE / "cases_report.jsonl").read_text(encoding="utf-8").splitlines()]
PROTECTED = {"negation_flip", "laterality", "scope", "repetition", "keyword_stuffing", "empty"}
NORMAL = "The lungs are clear. Heart size is normal. No pleural effusion or pneumothorax. No acute osseous abnormality."
REWARD = ReportEntities()


def pay(completion: str, reference: str) -> float:
    value = REWARD.score(RewardInput(completion, reference)).value
    assert value is not None, f"reference not judged: {reference!r}"
    return value


def ordered(row: dict) -> bool:
    good, bad = pay(row["hyp_good"], row["reference"]), pay(row["hyp_bad"], row["reference"])
    return {"good>bad": good > bad, "good==bad": abs(good - bad) <= 0.1, "good>=bad": good >= bad - 0.05}[
        row["relation"]
    ]


def statements(text: str) -> set[tuple[str, str, str]]:
    return {(e.finding, e.assertion, e.side) for e in extract(text, REWARD.lexicon).entities}


@pytest.mark.parametrize("row", OWN, ids=lambda row: f"{row['id']}-{row['category']}")
def test_own_cases_are_ordered(row):
    assert ordered(row)


def test_there_are_enough_own_cases_of_every_category():
    assert len(OWN) >= 80
    assert {row["category"] for row in OWN} >= PROTECTED


def test_shared_cases_are_ordered():
    path = SHARED / "cases" / "report.jsonl"
    if not path.is_file():
        pytest.skip("the shared cases are not here")
    firm = [
        row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if not row["policy_dependent"]
    ]
    wrong = [row for row in firm if not ordered(row)]
    assert not [row["id"] for row in wrong if row["category"] in PROTECTED]
    assert len(wrong) <= 0.03 * len(firm), [row["id"] for row in wrong]


P, U, A = "present", "uncertain", "absent"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No pneumothorax, effusion or fracture.", {("pneumothorax", A), ("pleural_effusion", A), ("fracture", A)}),
        ("Pneumothorax and effusion are not seen.", {("pneumothorax", A), ("pleural_effusion", A)}),
        ("Mild cardiomegaly, pneumothorax not seen.", {("cardiomegaly", P), ("pneumothorax", A)}),
        ("No pneumothorax, but a small effusion.", {("pneumothorax", A), ("pleural_effusion", P)}),
        ("No pneumothorax; small left effusion.", {("pneumothorax", A), ("pleural_effusion", P)}),
        ("No pneumothorax, small left effusion.", {("pneumothorax", A), ("pleural_effusion", P)}),
        ("No pneumothorax and small left effusion.", {("pneumothorax", A), ("pleural_effusion", P)}),
        ("No consolidation and the heart is enlarged.", {("consolidation", A), ("cardiomegaly", P)}),
        ("No pneumothorax is identified and effusion is small.", {("pneumothorax", A), ("pleural_effusion", P)}),
        ("Cardiomegaly without edema and with a nodule.", {("cardiomegaly", P), ("edema", A), ("nodule", P)}),
        ("Not only effusion but also pneumothorax.", {("pleural_effusion", P), ("pneumothorax", P)}),
        ("Pneumothorax cannot be excluded.", {("pneumothorax", U)}),
        ("Can't exclude pneumonia.", {("pneumonia", U)}),
        ("Pneumonia has been ruled out.", {("pneumonia", A)}),
        ("Atelectasis rather than pneumonia.", {("atelectasis", P), ("pneumonia", A)}),
        ("Opacity, atelectasis versus pneumonia.", {("opacity", P), ("atelectasis", U), ("pneumonia", U)}),
        ("No opacity to suggest pneumonia.", {("opacity", A), ("pneumonia", A)}),
        ("No effusion, possible atelectasis.", {("pleural_effusion", A), ("atelectasis", U)}),
        ("The effusion has resolved.", {("pleural_effusion", A)}),
        ("Pulmonary edema has not resolved.", {("edema_pulmonary", P)}),
        ("No improvement in pulmonary edema.", {("edema_pulmonary", P)}),
        ("Fracture is not displaced.", {("fracture", P)}),
        ("Pneumothorax: none. Effusion: small.", {("pneumothorax", A), ("pleural_effusion", P)}),
        ("Pneumothorax: No. Effusion: Yes.", {("pneumothorax", A), ("pleural_effusion", P)}),
        ("Lungs are clear except for a nodule.", {("lung", A), ("nodule", P)}),
        ("Other than mild cardiomegaly, no acute abnormality.", {("cardiomegaly", P), ("any", A)}),
        ("The lungs are grossly clear of effusion or nodule.", {("pleural_effusion", A), ("nodule", A)}),
        ("The lungs are not clear.", {("lung", P)}),
        ("Is there a pneumothorax?", set()),
        ("History of pneumonia. Rule out effusion.", set()),
        ("Recommend CT to exclude a mass.", set()),
        ("INDICATION: rule out pneumonia. FINDINGS: Nodule.", {("nodule", P)}),
        ("There is an effusion. It has resolved.", {("pleural_effusion", A)}),
        ("Vascular engorgement appears within normal limits.", {("vascular_congestion", A)}),
    ],
)
def test_assertion_scopes(text, expected):
    assert {(finding, assertion) for finding, assertion, _ in statements(text)} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Air in the right pleural space.", {("pneumothorax", "right")}),
        ("The mediastinum is shifted rightward.", {("mediastinal_shift", "right")}),
        ("Right upper and left lower lobe opacities.", {("opacity", "right"), ("opacity", "left")}),
        ("Effusion and atelectasis on the left.", {("pleural_effusion", "left"), ("atelectasis", "left")}),
        ("Lingular nodule.", {("nodule", "left")}),
        ("Bilateral effusions, right greater than left.", {("pleural_effusion", "bilateral")}),
        ("Effusion on the left, none on the right.", {("pleural_effusion", "left"), ("pleural_effusion", "right")}),
        ("Left mass with right hilar adenopathy.", {("mass", "left"), ("lymphadenopathy", "right")}),
        ("Right IJ line with tip in the right atrium.", {("central_line", "right")}),
    ],
)
def test_sides_go_to_their_finding(text, expected):
    assert {(finding, side) for finding, _, side in statements(text)} == expected


def test_attributes_of_one_finding():
    (entity,) = extract(
        "Unchanged moderate spiculated nodule, 1.2 x 0.9 cm, in the left apex.", REWARD.lexicon
    ).entities
    assert (entity.finding, entity.side, entity.places, entity.change) == ("nodule", "left", ("apex",), "stable")
    assert entity.severity == (2.5, 2.5) and entity.size_mm == 12.0
    assert ("margin", "irregular") in entity.qualifiers
    (tube,) = extract("ETT tip 4 cm above the carina, in good position.", REWARD.lexicon).entities
    assert (tube.size_mm, tube.places, dict(tube.qualifiers)) == (40.0, ("carina",), {"position": "good"})


def test_normal_against_normal_is_one_and_a_report_against_itself_too():
    for other in (
        "No acute cardiopulmonary abnormality.",
        "Normal chest.",
        NORMAL,
        "Lungs clear. Heart normal. No effusion or pneumothorax.",
    ):
        assert pay(other, NORMAL) == pytest.approx(1.0), other
    for row in OWN:
        assert pay(row["reference"], row["reference"]) == pytest.approx(1.0), row["id"]


@pytest.mark.parametrize(
    "reference",
    [
        "Large left pneumothorax. The heart is normal. No effusion.",
        "Right lower lobe pneumonia. No pleural effusion or pneumothorax. Heart size is normal.",
        "Pulmonary edema. No pneumothorax. No acute osseous abnormality.",
        "Right upper lobe mass. The lungs are otherwise clear. No effusion.",
    ],
)
def test_a_copied_normal_report_does_not_pay(reference):
    assert pay(NORMAL, reference) < 0.04


@pytest.mark.parametrize(
    "completion", ["", "  \n", "lorem ipsum 123", "<think>Cardiomegaly.</think>", "<think>Cardiomegaly."]
)
def test_empty_pays_nothing(completion):
    result = REWARD.score(RewardInput(completion, "Cardiomegaly."))
    assert (result.value, result.status) == (0.0, "unparsed") and result.reason


@pytest.mark.parametrize(
    "completion",
    [
        "I cannot interpret medical images.",
        "I'm sorry, but I can't help with that. A normal report reads: the lungs are clear.",
        "As an AI language model I am unable to view radiographs. The lungs are clear.",
    ],
)
def test_refusals_pay_nothing(completion):
    assert pay(completion, NORMAL) == 0.0


def test_a_report_may_say_what_it_cannot_exclude():
    assert pay("I cannot exclude a small left effusion.", "Possible small left effusion.") > 0.8


@pytest.mark.parametrize("gold", ["", "Thank you for this referral.", None, 3, "word " * 2000])
def test_a_reference_without_findings_is_not_judged(gold):
    result = REWARD.score(RewardInput("Cardiomegaly.", gold))
    assert (result.value, result.status) == (None, "gold_invalid")
    assert REWARD.check_gold(RewardInput("", gold)) == result.reason != ""


def test_only_the_answer_is_read():
    thought = "<think>Perhaps a right pneumothorax.</think><answer>Left effusion.</answer>"
    assert pay(thought, "Left effusion.") == pytest.approx(1.0)


def test_the_opposite_assertion_costs_more_than_silence_and_a_wrong_side_less():
    reference = "Left effusion. Cardiomegaly. Right basal atelectasis."
    silent = pay("Cardiomegaly. Right basal atelectasis.", reference)
    right = pay(reference, reference)
    wrong_side = pay("Right effusion. Cardiomegaly. Right basal atelectasis.", reference)
    assert silent < wrong_side < right - 0.05
    assert pay("No effusion. Cardiomegaly. Right basal atelectasis.", reference) < silent
    denied_side = pay("Right effusion, none on the left. Cardiomegaly. Right basal atelectasis.", reference)
    assert denied_side < silent


@pytest.mark.parametrize(
    "right",
    [
        "Left effusion.",
        "Large right pneumothorax.",
        "Right lower lobe consolidation.",
        "Fracture of the left 6th rib.",
        "8 mm nodule in the left upper lobe.",
        "Right kidney stone.",
        "Infarct in the left thalamus.",
        "Left mastectomy. Right PICC line.",
        "Left effusion. Left basal atelectasis. Right rib fracture. Right apical scarring.",
    ],
)
@pytest.mark.parametrize("beside", ["", "Cardiomegaly. Emphysema. Hiatal hernia. Scoliosis. No ascites."])
def test_a_wrong_side_costs_a_quarter_of_the_findings_credit(right, beside):
    """In a report of one finding and of many: of what the sided findings earn, 0.15 to 0.3 is lost."""
    turn = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    wrong = " ".join(turn.get(word, word) for word in right.split())
    full, swapped = (REWARD.score(RewardInput(f"{text} {beside}", f"{right} {beside}")) for text in (right, wrong))

    def credit(result):
        return sum(row["points"] for row in result.parsed if row["side"] and row["source"] == "completion")

    assert 0.15 <= 1 - credit(swapped) / credit(full) <= 0.3
    assert {row["verdict"] for row in swapped.parsed if row["side"]} == {"wrong side"}
    share = credit(full) / sum(row["points"] for row in full.parsed)
    assert 0.15 * share <= full.value - swapped.value <= 0.3


def test_borderline_is_nearly_normal():
    assert pay(NORMAL.replace("normal.", "at the upper limit of normal."), NORMAL) > 0.85
    assert pay(NORMAL, NORMAL.replace("Heart size is normal.", "Borderline heart size.")) > 0.8
    both = "Heart size at the upper limit of normal. Normal heart."
    assert pay(both, both) == pytest.approx(1.0)
    assert pay("Normal heart size.", "Borderline heart size.") > 0.8 > pay("Large heart.", "Borderline heart size.")


def test_evidence_of_a_matched_finding_is_free():
    reference = "Left pleural effusion."
    assert pay("Left pleural effusion with blunting of the left costophrenic angle.", reference) > 0.99
    assert pay("Blunting of the left costophrenic angle. Cardiomegaly.", reference) < 0.6


def test_a_device_costs_by_its_risk_in_a_normal_report_too():
    fine = pay(f"{NORMAL} Monitor leads overlie the chest.", NORMAL)
    invented = pay(f"{NORMAL} Endotracheal tube in place.", NORMAL)
    wrong = pay(f"{NORMAL} Malpositioned endotracheal tube.", NORMAL)
    assert wrong < invented < fine - 0.1
    placed = "Endotracheal tube in good position."
    assert pay("The endotracheal tube is malpositioned.", placed) < 0.6 * pay(placed, placed)


def test_reports_that_earn_nothing_are_still_ordered():
    """A small part of the scale orders bad reports, so that a group of them is not all ties; no honest one is below it."""
    reference = "Large left pneumothorax. Right effusion. Cardiomegaly. No consolidation."
    worse_to_better = [
        "No pneumothorax. No effusion. Normal heart. Consolidation. Fractures. Nodule.",
        "No pneumothorax. No effusion. Normal heart. Consolidation.",
        "No pneumothorax. No effusion. Normal heart.",
        "Normal heart. No consolidation.",
        "Small right pneumothorax. No consolidation.",
    ]
    pays = [pay(text, reference) for text in worse_to_better]
    assert pays == sorted(pays) and len(set(pays)) == len(pays)
    assert max(pays[:4]) < 0.05 < pays[4]


def test_rib_levels_are_attributes():
    reference = "Fracture of the left 6th rib."
    assert 0.85 < pay("Fracture of the left 7th rib.", reference) < 1.0
    assert pay("Compression fracture of T9.", "Compression fracture of T8.") > 0.85
    assert pay("Compression fracture of T4.", "Compression fracture of T12.") < 0.5  # far away is another place


def test_more_of_the_same_or_of_the_false_never_pays_more():
    for row in OWN:
        before = pay(row["hyp_good"], row["reference"])
        assert pay(f"{row['hyp_good']}. {row['hyp_good']}", row["reference"]) <= before + 1e-9, row["id"]
        for false in ("Situs inversus.", "Left pneumothorax. No left pneumothorax.", "Possible sarcoidosis."):
            if not {f for f, _, _ in statements(false)} & {f for f, _, _ in statements(row["reference"])}:
                assert pay(f"{row['hyp_good']}. {false}", row["reference"]) <= before + 1e-9, (row["id"], false)


def test_rows_tell_people_what_happened():
    result = REWARD.score(RewardInput("Small left effusion. Rib fractures.", "Moderate left effusion. Cardiomegaly."))
    rows = {(row["finding"], row["source"]): row for row in result.parsed}
    matched = rows["pleural_effusion", "completion"]
    assert matched["verdict"] == "matched" and matched["side"] == "left" and matched["severity"] == [1.5, 1.5]
    assert matched["points"] > 0 and "left" in matched["matched"]
    assert rows["fracture_rib", "completion"]["verdict"] == "not in the reference"
    assert rows["cardiomegaly", "reference"]["verdict"] == "missed"
    assert set(result.components) >= {"precision", "recall", "f1", "contradiction_rate", "negative_recall", "repeated"}
    json.dumps(result.parsed)


def test_every_shipped_pack_names_its_source_and_works_alone():
    assert {path.stem for path in PACK_FOLDER.glob("*.json")} == {*DEFAULT_PACKS, "german"}
    for name in (*DEFAULT_PACKS, "german"):
        pack = json.loads((PACK_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert pack["source"] and pack["licence"]
        assert load((name,)).findings
    assert (
        pytest.approx(1.0)
        == ReportEntities(["head_ct"])
        .score(RewardInput("Acute hemorrhage in the right thalamus.", "Right thalamic bleed, acute."))
        .value
    )


def test_a_pack_is_only_data(tmp_path):
    pack = {
        "name": "fundus",
        "source": "this test",
        "licence": "none",
        "groups": {"retina": ""},
        "anatomy": {"macula": {"group": "retina", "terms": ["macula", "macular"]}},
        "findings": {"drusen": {"group": "retina", "terms": ["drusen/druse"]}},
        "pairs": ["macula + thickened = drusen"],
    }
    path = tmp_path / "fundus.json"
    path.write_text(json.dumps(pack))
    reward = ReportEntities([str(path)])
    values = [
        reward.score(RewardInput(t, "Drusen in the left macula.")).value for t in ("Left macular drusen.", "No drusen.")
    ]
    assert values[0] == pytest.approx(1.0) and values[1] < 0.05
    pack["pairs"] = ["macula + swollen = drusen"]
    path.write_text(json.dumps(pack | {"name": "again"}))
    load.cache_clear()
    with pytest.raises(ValueError, match="macula \\+ swollen"):
        ReportEntities([str(path)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": ""}, "licence"),
        ({"fndings": {}}, "fndings"),
        ({"findings": {"x": {"term": ["a"]}}}, "findings.x"),
        ({"findings": {"x": {"terms": ["pneumothorax"]}}, "needs": ["chest_xray"]}, "means both"),
        ({"findings": {"x": {"terms": ["a"], "related": {"nothing": 1.0}}}}, "nothing"),
        ({"findings": {"x": {"terms": ["a"], "group": "nowhere"}}}, "nowhere"),
        ({"needs": ["no_such_pack"]}, "no_such_pack"),
        ({"groups": {"a": "b", "b": "a"}}, "group a: it holds itself"),
    ],
)
def test_a_broken_pack_says_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({"name": "broken", "source": "test", "licence": "none"} | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load((str(path),))


VOCABULARY = (
    "no not without possible cannot exclude but and or with , ; . : ( ) ? \n left right bilateral small large mild severe tip "
    "is are has resolved seen the lungs heart enlarged clear normal effusion pneumothorax fracture nodule opacity upper lower "
    "lobe base apex 3 cm mm 1.2 x stable new increased tube removed aorta tortuous it which except for findings impression "
    "both chest acute abnormality otherwise none t12 6th rib either neither nor versus"
)
WORDS = VOCABULARY.split(" ")


@settings(max_examples=300, deadline=None)
@example("NO:L0AND")
@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)))
def test_never_raises_on_any_text(text):
    for reference in (NORMAL, "Small left effusion. Cardiomegaly."):
        result = REWARD.score(RewardInput(text, reference))
        assert result.value is not None and 0.0 <= result.value <= 1.0
        assert all(span.end <= len(text) for spans in result.spans.values() for span in spans)
    REWARD.score(RewardInput("Cardiomegaly.", text))


@settings(max_examples=100, deadline=None)
@given(st.permutations([sentence for row in OWN[:8] for sentence in [row["reference"]]]))
def test_the_order_of_sentences_does_not_matter(sentences):
    reference = " ".join(row["reference"] for row in OWN[:8])
    assert pay(" ".join(sentences), reference) == pytest.approx(pay(reference, reference))


def digest() -> str:
    rows = [REWARD.score(RewardInput(row[k], row["reference"])) for row in OWN for k in ("hyp_good", "hyp_bad")]
    return hashlib.sha256(repr([(r.value, r.parsed, dict(r.components)) for r in rows]).encode()).hexdigest()


def test_every_process_gives_the_same_result():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_report; print(test_report.digest())"
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    for seed in ("1", "77"):
        command = [sys.executable, "-c", code, str(HERE)]
        done = subprocess.run(command, env=env | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == digest()


def hostile(size: int = 20_000) -> dict[str, str]:
    chance = random.Random(0)
    shuffled = " ".join(chance.choice(WORDS) for _ in range(size // 4))
    texts = {
        "words": "effusion ",
        "list": "no left effusion, ",
        "clauses": "the heart is enlarged and ",
        "letters": "a ",
        "commas": ", ",
        "lines": "effusion\n",
        "sizes": "nodule 3 mm. ",
        "colons": "findings: ",
        "skipped": "technique: ",
        "numbers": "1.2 x 3 ",
        "tags": "<answer>",
        "zero width": "\u200b\u0645",
        "one word": "x",
        "sorry": "i am not able to the the ",
    }
    return {"shuffled": shuffled[:size], **{name: (text * size)[:size] for name, text in texts.items()}}


@pytest.mark.parametrize(("name", "text"), hostile().items(), ids=lambda x: x if len(str(x)) < 20 else "")
def test_twenty_kilobytes_take_no_longer_than_50_ms(name, text):
    times = []
    for i in range(4):
        begin = time.process_time()
        REWARD.score(RewardInput(f"{i} {text}", "Small left effusion. Cardiomegaly. No pneumothorax."))
        times.append(time.process_time() - begin)
    assert min(times) < 0.5, name


def test_hostile_text_touches_neither_disk_nor_network_nor_processes(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("touched the outside")

    with monkeypatch.context() as patch:
        for target in (
            "builtins.open",
            "socket.socket",
            "subprocess.Popen",
            "os.system",
            "builtins.eval",
            "builtins.exec",
        ):
            patch.setattr(target, forbidden)
        for text in (
            "__import__('os').system('x')",
            "file:///etc/passwd",
            "${jndi:ldap://x}",
            "packs/../../x.json effusion",
        ):
            assert REWARD.score(RewardInput(text, "Small left effusion.")).value is not None


def test_real_reports_are_read():
    path = SHARED / "data" / "openi_reports" / "indiana_reports.csv"
    if not path.is_file():
        pytest.skip("the Open-i reports are not here")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["findings"] + row["impression"]).strip()]
    readings = [extract(f"{row['findings']}\n{row['impression']}", REWARD.lexicon).entities for row in rows]
    assert sum(map(bool, readings)) > 0.99 * len(rows)
    for code, names, least in (
        ("Pneumothorax", {"pneumothorax"}, 0.95),
        ("Pleural Effusion", {"pleural_effusion", "costophrenic_blunting"}, 0.95),
        ("Cardiomegaly", {"cardiomegaly", "cardiomediastinal_enlargement", "chamber_enlargement"}, 0.95),
        ("Pulmonary Atelectasis", {"atelectasis"}, 0.95),
    ):
        coded = [e for row, e in zip(rows, readings, strict=True) if code in row["Problems"].split(";")]
        found = [any(x.finding in names and x.assertion != "absent" for x in e) for e in coded]
        assert sum(found) >= least * len(found), code
    stated = [e for e in readings if any(x.finding == "pneumothorax" and x.assertion == "present" for x in e)]
    assert len(stated) < 40  # 22 of the reports are coded with it; more would mean that denials are missed
