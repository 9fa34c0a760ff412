"""The pre-flight: good labels pass, bad ones are named, and rewards that pay the undeserving are caught."""

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import default_reward
from rewards.executor import Executor
from rewards.kinds import find
from rewards.preflight import RowsError, check, load_rows, main

HERE = "test_preflight"


class Tagged(Reward):
    """Exact match of what stands between the answer tags; letters and words only."""

    def score(self, sample):
        found = re.search(r"<answer>(.*?)</answer>", sample.completion, re.DOTALL)
        said = found.group(1).strip().casefold() if found else ""
        return RewardResult(
            float(said == find(sample.kind).write(sample)[0].casefold()), parsed=said, reason="" if found else "no tag"
        )

    def check_gold(self, sample):
        return "label is a question mark" if sample.gold == "?" else None


class Substring(Reward):
    """Pays when label and answer contain one another, as a published reward does."""

    def score(self, sample):
        found = re.search(r"<answer>(.*?)</answer>", sample.completion, re.DOTALL)
        said, gold = (found.group(1) if found else "").casefold(), str(sample.gold).casefold()
        return RewardResult(float(said in gold or gold in said))


class Generous(Reward):
    def score(self, sample):
        return RewardResult(1.0)


class Fragile(Tagged):
    def score(self, sample):
        if not sample.completion.strip():
            raise IndexError("no text")
        return super().score(sample)


def rows() -> list[RewardInput]:
    words = ["lung", "heart", "liver", "spleen", "kidney", "brain"]
    found = []
    for i, word in enumerate(words * 4):
        found.append(
            RewardInput("", gold="ABCD"[i % 4], options=tuple(words[:4]), kind="option", prompt="Which organ?")
        )
        found.append(RewardInput("", gold=["yes", "no", "no"][i % 3], kind="yesno", prompt="Is it a lung?"))
        found.append(RewardInput("", gold=word, kind="open", prompt="Which organ?"))
        found.append(RewardInput("", gold=i + 1, kind="numeric", prompt="How long?", meta={"unit": "mm"}))
        found.append(RewardInput("", gold=f"The {word} is enlarged.", kind="report"))
    return found


def by_name(report, kind):
    return {probe.name: probe for probe in report.probes if probe.kind == kind}


def test_a_sound_reward_passes_and_constants_are_shown():
    report = check(rows(), Tagged())
    assert report.ok, report.text()
    assert report.rows == {"option": 24, "yesno": 24, "open": 24, "numeric": 24, "report": 24}
    option = by_name(report, "option")
    assert option["the label"].mean == 1 and option["another row's label"].mean == 0
    assert {"all letters", "any letter", "all option texts", "label or a wrong one", "the question"} <= set(option)
    assert option["always 'A'"].mean == 0.25
    assert by_name(report, "yesno")["always 'no'"].mean == pytest.approx(2 / 3)
    assert by_name(report, "open")["always 'lung'"].mean == pytest.approx(4 / 24)
    assert report.summary() == "120 rows (24 option, 24 yesno, 24 open, 24 numeric, 24 report): all labels earn 1"
    assert "always 'no'" in report.text()


def test_a_substring_reward_is_caught_with_the_rows_it_pays():
    report = check(rows(), Substring(), ids=[f"id{i}" for i in range(120)])
    assert not report.ok
    option = by_name(report, "option")
    assert not option["an empty answer"].ok and option["an empty answer"].mean == 1
    assert not option["any letter"].ok and not option["label or a wrong one"].ok and not option["nothing"].ok
    assert option["nothing"].paid[0] == "id0"
    assert "FAIL (paid: id0" in report.text() and "'any letter' earns 1.00 on option rows" in report.summary()


def test_a_reward_that_pays_everything_or_fails_on_nothing_is_caught():
    report = check(rows(), Generous())
    assert all(not by_name(report, kind)["another row's label"].ok for kind in report.rows)
    report = check(rows(), Fragile())
    assert {probe.name for probe in report.probes if not probe.ok} == {"nothing"}
    assert "24 not judged" in report.text()


def test_bad_labels_are_named_with_their_reason():
    samples = rows()[:10]
    samples[2] = RewardInput("", gold="?", kind="open")
    samples[5] = RewardInput("", gold="</answer>", kind="open")
    report = check(samples, Executor(Tagged()), ids=[f"q{i}" for i in range(10)])
    assert [row.id for row in report.bad] == ["q2", "q5"]
    assert report.bad[0].reason == "label is a question mark"
    assert "earns 0.00" in report.bad[1].reason and report.bad[1].gold == "</answer>"
    assert "bad: q2 (open): label is a question mark; label ?" in report.text() and "2 bad labels" in report.summary()


def test_bad_rows_are_listed_by_reason_and_all_are_kept():
    same = [RewardInput("", gold="?", kind="open")] * 30
    different = [RewardInput("", gold=f"</answer>{i}", kind="open") for i in range(30)]
    report = check(same + different, Tagged())
    assert len(report.bad) == 60 and not report.ok
    assert "bad: row 1, row 2, row 3, row 4, row 5 and 25 more (open): label is a question mark" in report.text()
    assert "... and 11 more such lines" in report.text()


def test_several_letters_may_all_be_right():
    rows = [
        RewardInput("", gold=g, options=("x", "y"), kind="option", meta={"multi": True}) for g in ("A, B", "A", "B")
    ]
    option = by_name(check(rows, Tagged()), "option")
    assert option["all letters"].rows == 2 and "label or a wrong one" not in option


def test_another_template_reaches_rewards_that_read_other_marks():
    class Boxed(Reward):
        def score(self, sample):
            return RewardResult(float(sample.completion == f"[[{sample.gold}]]"))

    assert not check(rows()[:1], Boxed()).ok
    assert check(rows()[:1], Boxed(), template="[[{answer}]]").ok
    with pytest.raises(ValueError, match="template"):
        check(rows(), Boxed(), template="{text}")


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (RewardInput("", gold=True, kind="yesno"), "yes"),
        (RewardInput("", gold=["A", "C"], kind="option"), "A, C"),
        (RewardInput("", gold=5.5, kind="numeric", meta={"unit": "mg"}), "5.5 mg"),
        (RewardInput("", gold="5 mg", kind="numeric", meta={"unit": "mg"}), "5 mg"),
        (RewardInput("", gold=12, kind="numeric", meta={"unit": "1"}), "12"),
        (RewardInput("", gold=[120, 80], kind="numeric", meta={"unit": "mmHg", "kind": "pair"}), "120/80 mmHg"),
        (RewardInput("", gold=[5, 10], kind="numeric", meta={"unit": "mg", "kind": "range"}), "5 to 10 mg"),
        (RewardInput("", gold="left lung", kind="open"), "left lung"),
    ],
)
def test_labels_are_written_as_a_model_would(sample, text):
    assert find(sample.kind).write(sample)[0] == text


def test_a_list_as_a_label_is_tried_in_every_reading():
    class FirstOf(Reward):
        def score(self, sample):
            return RewardResult(float(f"<answer>{sample.gold[0]}</answer>" in sample.completion))

    class Box(Reward):
        def score(self, sample):
            return RewardResult(float(f"<answer>{sample.gold}</answer>" in sample.completion))

    rows = [RewardInput("", gold=["lung", "lungs"], kind="open"), RewardInput("", gold=["heart"], kind="open")]
    assert check(rows, FirstOf()).ok
    report = check([RewardInput("", gold=[1, 2], kind="open"), RewardInput("", gold=[3, 4], kind="open")], Box())
    assert report.ok and by_name(report, "open")["always '[1, 2]'"].mean == 0.5


def open_row(name, answer):
    return {"id": name, "images": [], "question": "Which organ?", "answer": answer, "kind": "open"}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_rows_are_read_without_their_images_and_odd_lines_are_refused(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"id": "a", "images": ["gone.png"], "question": "How much?", "answer": 5, "kind": "numeric", "unit": "mg",
         "tolerance": {"rel": 0.1}, "meta": {"modality": "CT"}},
        "",
        "{not json",
        "[1]",
        {"id": "b", "images": [], "question": "What?", "answer": "", "kind": "open"},
        {"id": "a", "images": [], "question": "What?", "answer": "x", "kind": "open"},
    )  # fmt: skip
    rows = load_rows(path)
    assert rows.ids == ("a",)
    assert (
        rows.samples[0].gold == 5 and rows.samples[0].prompt == "How much?" and rows.samples[0].images == ("gone.png",)
    )
    assert rows.samples[0].meta == {"modality": "CT", "unit": "mg", "tolerance": {"rel": 0.1}}
    assert [item.split(":")[0] for item in rows.refused] == ["line 3", "line 4", "line 5", "line 6"]
    with pytest.raises(RowsError, match="No such file"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(RowsError, match=r"\.jsonl"):
        load_rows(tmp_path / "rows.csv")
    with pytest.raises(RowsError, match="empty"):
        load_rows(write(tmp_path / "empty.jsonl"))


def test_the_command_checks_a_file_with_an_own_reward(tmp_path, monkeypatch, capsys):
    good = write(tmp_path / "good.jsonl", *[open_row(i, w) for i, w in enumerate(("lung", "heart"))])
    bad = write(tmp_path / "bad.jsonl", open_row(7, "?"), "oops")
    (tmp_path / "my_reward.py").write_text(f"from {HERE} import Tagged as Mine\n")
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(good), "--reward", "my_reward:Mine"]) == 0
    assert "2 rows (2 open): all labels earn 1" in capsys.readouterr().out
    assert main(["check", str(write(tmp_path / "none.jsonl", "oops")), "--reward", "my_reward:Mine"]) == 1
    assert "0 rows (no rows): no label could be tried; 1 lines refused" in capsys.readouterr().out
    assert main(["check", str(bad), "--reward", "my_reward:Mine", "--out", "report.json"]) == 1
    out = capsys.readouterr().out
    assert "bad: 7 (open)" in out and "refused: line 2" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is False and report["bad"][0]["id"] == "7" and report["refused"]
    assert main(["check", str(good), "--reward", "my_reward:Nothing"]) == 2
    assert "has no 'Nothing'" in capsys.readouterr().err
    assert main(["check", "absent.jsonl"]) == 2
    assert "absent.jsonl: No such file" in capsys.readouterr().err


def test_the_command_reads_a_spec_or_a_whole_config(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", open_row(1, "lung"))
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"parts: {{answer: {HERE}:Tagged}}\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        textwrap.dedent(f"""
        model: demo
        rewards:
          spec: {{route: {{open: {HERE}:Tagged}}}}
        """)
    )
    assert main(["check", str(data), "--spec", str(spec)]) == 0
    assert main(["check", str(data), "--spec", str(config)]) == 0
    spec.write_text("parts: [")
    assert main(["check", str(data), "--spec", str(spec)]) == 2
    assert "spec.yaml" in capsys.readouterr().err


def test_a_terminal_gets_a_drawn_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    check(rows()[:10], Tagged()).show()
    out = capsys.readouterr().out
    assert "│" in out and "10 rows" in out


def test_large_sets_are_probed_on_a_sample(monkeypatch):
    monkeypatch.setattr("rewards.preflight.PROBED_ROWS", 10)
    option = by_name(check(rows(), Tagged()), "option")
    assert option["the label"].rows == 24 and option["an empty answer"].rows == 10


def test_the_default_reward_passes_on_sound_labels_of_every_kind():
    report = check(rows(), default_reward())
    assert report.ok, report.text()


def test_the_recipe_runs_and_names_its_bad_label():
    recipe = Path(__file__).parents[2] / "recipes" / "custom_reward.py"
    run = subprocess.run([sys.executable, str(recipe)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "4 rows (4 open): 1 bad label\n" in run.stdout and "FAIL" not in run.stdout


def examples(tmp_path):
    """(module path, class or kind, rows): the rewards that README and recipes show."""
    root = Path(__file__).parents[2]
    shown = re.search(r"## An own reward\n```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "my_module.py").write_text(shown)
    side = {"images": [], "question": "Which side is the effusion on?", "kind": "open"}
    yield tmp_path, ["--reward", "my_module:Laterality"], [side | {"answer": a} for a in ("left", "Right", "Both.", "right")]  # fmt: skip
    box = {"images": [], "question": "Where is the nodule? Give its box.", "kind": "custom_reward:BOX"}
    boxes = ([40, 60, 80, 100], [200, 210, 260, 250], [5, 300, 65, 380])
    yield root / "recipes", [], [box | {"answer": a} for a in boxes]
    yield root / "recipes", ["--reward", "custom_reward:BoxIoU"], [box | {"answer": a, "kind": "open"} for a in boxes]


@pytest.mark.parametrize("number", range(3))
def test_the_rewards_that_are_shown_pass_their_own_check(number, tmp_path, monkeypatch, capsys):
    path, words, made = list(examples(tmp_path))[number]
    monkeypatch.syspath_prepend(str(path))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": f"q{i}", **row}) + "\n" for i, row in enumerate(made)))
    assert main(["check", str(file), *words]) == 0, capsys.readouterr().out


class Slow(Tagged):
    def score(self, sample):
        time.sleep(0.002)
        return super().score(sample)


def test_a_slow_reward_says_how_far_it_is_and_what_the_rest_takes(monkeypatch):
    monkeypatch.setattr("rewards.pace.PATIENCE_S", 0.05)
    heard = []
    check(rows(), Slow(), say=heard.append)
    assert len(heard) >= 2 and all(re.fullmatch(r"trying the reward: [\d,]+ of about [\d,]+ completions, \S+ s each; about \S+ min left", line) for line in heard)  # fmt: skip
    done = [int(line.split()[3].replace(",", "")) for line in heard]
    assert done == sorted(done)
    check(rows(), Tagged(), say=pytest.fail)  # nobody waits for ten seconds


def test_a_check_of_some_rows_takes_them_evenly(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": f"q{i}", "images": [], "question": "?", "answer": "left", "kind": "open"}) + "\n" for i in range(100)))  # fmt: skip
    assert main(["check", str(file), "--rows", "4", "--out", str(tmp_path / "o.json")]) == 0
    assert "4 rows (4 open)" in capsys.readouterr().out
    assert load_rows(file).some(4).ids == ("q0", "q25", "q50", "q75") and len(load_rows(file).some(0).ids) == 100
