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
