import json

import pytest

from lingshu_rl.cli import main as cli
from rewards.report import load
from rewards.report.coverage import load_texts, main, measure

TEXTS = ["The zygoma is bright. Left pleural effusion."] * 3 + ["The zygoma is bright. No pneumothorax. Normal heart."]


def test_unread_phrases_come_by_frequency_with_an_example():
    coverage = measure(TEXTS, load(("chest_xray",)))
    assert (coverage.reports, coverage.read) == (4, 4)
    phrases = {phrase: count for phrase, count, _ in coverage.phrases}
    assert phrases["zygoma is bright"] == 4 and "effusion" not in phrases and "the" not in phrases
    assert coverage.sentences[0] == ("the zygoma is bright", 4, "the zygoma is bright")
    assert ("pleural_effusion", 3) in coverage.found and ("no pneumothorax", 1) in coverage.found
    assert coverage.sentences_read == pytest.approx(1 - 4 / 9)
    assert 0.5 < coverage.words_known < 1.0


def test_a_pack_that_is_finished_leaves_nothing_unread(tmp_path):
    pack = {
        "name": "zygoma",
        "source": "this test",
        "licence": "none",
        "needs": ["chest_xray"],
        "findings": {"bright_zygoma": {"terms": ["bright zygoma", "zygoma is bright"]}},
    }
    path = tmp_path / "zygoma.json"
    path.write_text(json.dumps(pack))
    coverage = measure(TEXTS, load((str(path),)))
    assert coverage.phrases == coverage.sentences == [] and coverage.words_known == 1.0


def test_the_command_reads_csv_and_jsonl(tmp_path, capsys):
    table = tmp_path / "reports.csv"
    table.write_text("id,findings,impression\n1,The zygoma is bright.,Left effusion.\n2,The zygoma is bright.,\n")
    out = tmp_path / "coverage.json"
    assert cli(["rewards", "coverage", str(table), "--pack", "chest_xray", "--out", str(out), "--top", "5"]) == 0
    assert "zygoma" in capsys.readouterr().out
    assert json.loads(out.read_text())["reports"] == 2
    lines = tmp_path / "reports.jsonl"
    lines.write_text('{"body": "Left effusion."}\n{"body": ""}\n')
    assert load_texts(lines, ["body"]) == ["body: Left effusion."]
    assert main([str(lines), "--column", "body"]) == 0


def test_a_wrong_call_says_what_to_do(tmp_path, capsys):
    table = tmp_path / "reports.csv"
    table.write_text("id,body\n1,Left effusion.\n")
    assert main([str(table)]) == 2
    assert "it has id, body" in capsys.readouterr().err
    assert main([str(table), "--column", "body", "--pack", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "reports"),
    [
        ("a.csv", b'\xef\xbb\xbfid;Report Text\r\n1;"Left effusion; small."\r\n2;Clear lungs.\r\n', 2),
        ("a.csv", b"sep=;\r\nid;FINDINGS\r\n1;Left effusion.\r\n", 1),
        ("a.tsv", b"id\treport\n1\tLeft effusion, small.\n", 1),
        ("a.jsonl", b'{"report": "Left effusion."}\n\n{"report": null}\n{"id": 3, "impression": "Clear lungs."}\n', 2),
    ],
)
def test_reports_come_as_spreadsheets_write_them(tmp_path, name, content, reports):
    (tmp_path / name).write_bytes(content)
    assert len(load_texts(tmp_path / name, [])) == reports


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b'id,report\n1,a\n2,"b\n3,c\n', "a quote opens in the record of line 3 and never closes"),
        ("a.csv", b'id,report\n1,"a "b" c"\n', "line 2: "),
        ("a.csv", b"id,report\n1,a,b\n", "row 1 has 3 cells and the table 2 columns"),
        ("a.csv", "id,report\n1,a\n".encode("utf-16"), "iconv -f utf-16"),
        ("a.csv", "id,report\n1,größer\n".encode("latin1"), "iconv -f latin1"),
        ("a.csv", b"id,body\n1,a\n", "name those of the text with --column"),
        ("a.csv", b"", "it has no rows"),
        ("a.jsonl", b'{"report": "a"}\n{"report": \n', "line 2 is not JSON"),
        ("a.jsonl", b'["a"]\n', "line 1 holds a list"),
        ("a.txt", b"Left effusion.\n", "reports are read from .csv, .tsv, .jsonl"),
    ],
)
def test_a_file_of_reports_that_cannot_be_read_is_named_with_its_line(tmp_path, capsys, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / name)]) == 2
    told = capsys.readouterr().err
    assert reason in told and name in told


PACK = {
    "name": "knee",
    "source": "this test",
    "licence": "none",
    "needs": ["skeleton"],
    "groups": {"menisci": ""},
    "anatomy": {"notch": {"group": "menisci", "terms": ["femoral notch"]}},
    "findings": {"loose_body": {"group": "menisci", "weight": 0.8, "terms": ["loose body"]}},
    "pairs": ["notch + loose_body = loose_body"],
}


def changed(part, value):
    """The pack with another value at "part.key.key"."""
    pack = json.loads(json.dumps(PACK))
    *path, last = part.split(".")
    within = pack
    for key in path:
        within = within[key]
    within[last] = value
    return pack


@pytest.mark.parametrize(
    ("pack", "reason"),
    [
        ([PACK], "a pack is a mapping of its parts, not a list"),
        (changed("findings", [{"name": "x"}]), "findings is a mapping, not [{'name': 'x'}]"),
        (changed("findings.loose_body", None), "findings.loose_body needs terms"),
        (changed("findings.loose_body", "loose body"), "findings.loose_body needs terms"),
        (changed("findings.loose_body.terms", "loose body"), "findings.loose_body.terms is a list, not 'loose body'"),
        (changed("findings.loose_body.terms", [1]), "findings.loose_body: 1 is no term"),
        (changed("findings.loose_body.terms", [""]), "findings.loose_body: '' is no term"),
        (changed("findings.loose_body.weight", "0,8"), "findings.loose_body.weight is a number, not '0,8'"),
        (changed("findings.loose_body.weight", True), "findings.loose_body.weight is a number, not True"),
        (changed("findings.loose_body.weight", -1), "findings.loose_body: -1 is no weight or share"),
        (changed("findings.loose_body.related", ["effusion"]), "findings.loose_body.related is a mapping"),
        (
            changed("findings.loose_body.related", {"nodule": "high"}),
            "findings.loose_body: 'high' is no weight or share",
        ),
        (changed("anatomy.notch.broad", "no"), "anatomy.notch.broad is true or false, not 'no'"),
        (changed("anatomy.notch.group", ["menisci"]), "anatomy.notch.group is a text, not ['menisci']"),
        (changed("needs", "skeleton"), "needs is a list, not 'skeleton'"),
        (changed("groups", ["menisci"]), "groups is a mapping, not ['menisci']"),
        (changed("groups.menisci", "bones"), "group menisci: unknown group 'bones'"),
        (changed("pairs", ["notch loose_body"]), "pairs: 'notch loose_body' is not written 'organ + state = finding'"),
        (changed("pairs", ["nitch + loose_body = loose_body"]), "unknown organ 'nitch'"),
        (changed("pairs", ["notch + lose = loose_body"]), "unknown state or finding 'lose'"),
        (changed("pairs", ["notch + loose_body = free_body"]), "unknown finding 'free_body'"),
    ],
)
def test_a_mistake_in_a_pack_is_named_with_its_entry(tmp_path, capsys, pack, reason):
    (tmp_path / "knee.json").write_text(json.dumps(pack))
    (tmp_path / "reports.csv").write_text("report\nA loose body.\n")
    assert main([str(tmp_path / "reports.csv"), "--pack", str(tmp_path / "knee.json")]) == 2
    told = capsys.readouterr().err
    assert reason in told and "knee.json" in told


def test_a_right_pack_is_loaded(tmp_path):
    (tmp_path / "knee.json").write_text(json.dumps(PACK))
    assert "loose_body" in load((str(tmp_path / "knee.json"),)).findings
