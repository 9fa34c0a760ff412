"""What a sweep answers: differences that are there, none that are not, in words and tables. Runs are scripted."""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from launching import ROOT
from report.test_run_report import HOSTILE, Page

from lingshu_rl.progress import Progress
from lingshu_rl.report import plots
from lingshu_rl.report.html import RunData
from lingshu_rl.sweep.answer import Member, compare, write_answers
from lingshu_rl.sweep.command import report_main
from lingshu_rl.sweep.plan import Variant, parse_sweep
from lingshu_rl.sweep.run import run_sweep
from lingshu_rl.sweep.status import Status

SCRIPT = str(ROOT / "tests" / "scripted_trainer.py")
VARIANTS = {
    "usual": None,
    "the same": {"train.group_size": 4},  # the scripted trainer does nothing with it
    "better": {"loss.kl_coef": 3},
    "always zero": {"rewards.spec": {"class": "zero"}},
    "broken": {"train.lr": 9},
}


def swept(folder, **content):
    content = {"name": "t", "dir": str(folder), "command": ["{python}", SCRIPT], "devices": "auto", **content}
    sweep = parse_sweep(content)
    run_sweep(sweep, progress=Progress(quiet=True))
    return sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return swept(tmp_path_factory.mktemp("s") / "s", variants=VARIANTS, seeds=4, base={"eval.limit": 150, "train.steps": 6}, question="Does it matter?")  # fmt: skip


@pytest.fixture(scope="module")
def answer(sweep):
    return write_answers(sweep)


def row_of(answer, name):
    return next(row for row in answer["rows"] if row["name"] == name)


def test_identical_variants_show_no_difference(answer):
    row = row_of(answer, "the same")
    assert row["verdict"] == "same" and row["difference"]["points"] == 0 and row["difference"]["p_corrected"] == 1
    assert "“the same” gave the same answers as the baseline" in " ".join(answer["words"])


def test_a_real_difference_is_told_with_its_size(answer):
    found = row_of(answer, "better")["difference"]
    assert row_of(answer, "better")["verdict"] == "better" and found["low"] > 0 and found["seeds"] == 4
    assert found["points"] == pytest.approx(
        100 * (row_of(answer, "better")["score"] - row_of(answer, "usual")["score"])
    )
    assert f"“better” is better: +{found['points']:.1f} points" in " ".join(answer["words"])
    assert answer["title"] == "2 of 3 changes can be told from noise"


def test_a_broken_reward_is_told_and_its_alarm_named(answer):
    row = row_of(answer, "always zero")
    assert row["verdict"] == "other reward" and row["own_difference"]["high"] < 0 and row["own_score"] == 0
    assert row["difference"]["points"] == 0  # graded alike its answers are the baseline's
    assert row["alarms"]["Constant reward"] == 4 and "Constant reward" not in row_of(answer, "usual")["alarms"]
    told = " ".join(answer["words"])
    assert "“always zero” is different by its own reward: −" in told and "Constant reward (4 of 4 runs)" in told


def test_a_failed_variant_is_a_row(answer):
    row = row_of(answer, "broken")
    assert row["verdict"] == "none" and row["seeds_done"] == 0 and len(row["errors"]) == 4
    assert "“broken” failed in 4 of 4 runs: exit code 1: ValueError: the loss is not a number." in answer["words"]


def test_the_same_figures_in_every_table(sweep, answer):
    stored = json.loads((sweep.folder / "sweep.json").read_text())
    assert [r["name"] for r in stored["rows"]] == list(VARIANTS) and stored["title"] == answer["title"]
    lines = list(csv.DictReader((sweep.folder / "table.csv").read_text().splitlines()))
    markdown, page = (sweep.folder / "table.md").read_text(), Page(sweep.folder / "sweep.html").text
    for line, row in zip(lines, answer["rows"], strict=True):
        assert line["variant"] == row["name"] and row["name"] in markdown and row["name"] in page
        if row["difference"]:
            points = row["difference"]["points"]
            assert float(line["points"]) == points and float(line["p_corrected"]) == row["difference"]["p_corrected"]
            text = f"{points:+.1f}".replace("-", "−")
            assert text in markdown and text in page
    assert float(lines[0]["generated_tokens"]) == 4 * 6 * 100 and float(lines[0]["device_seconds"]) > 0
    assert all(sentence.replace("\N{NO-BREAK SPACE}", " ") in page for sentence in answer["words"])


def test_one_seed_is_called_one_seed(tmp_path):
    sweep = swept(
        tmp_path, variants={"usual": None, "better": {"loss.kl_coef": 3}, "a bit": {"loss.kl_coef": 0.3}}, seeds=1
    )
    answer = write_answers(sweep)
    assert answer["title"] == "1 of 2 changes differs with the one seed that was run"
    told = " ".join(answer["words"])
    assert told.count("One seed cannot tell a setting's doing from a seed's: run at least three.") == 2


def test_what_cannot_be_told_says_what_it_would_take(tmp_path):
    sweep = swept(tmp_path, variants={"usual": None, "a bit": {"loss.kl_coef": 0.2}}, seeds=2)
    answer = write_answers(sweep)
    assert answer["title"] == "The change cannot be told from noise"
    row = row_of(answer, "a bit")
    assert row["verdict"] == "noise" and row["difference"]["smallest_visible"] > row["difference"]["points"]
    needed = row["difference"]["seeds_needed"]
    assert (f"{needed} seeds would show it" if needed else "it takes about") in " ".join(answer["words"])


def answered(monkeypatch, folder, variants, images):
    """The answer to made-up runs. variants: by name, one list of values a seed; images: of the questions."""
    runs = {}
    for name, seeds in variants.items():
        for seed, values in enumerate(seeds):
            rows = [{"id": f"q{i}", "value": v, "image": images[i], "status": "ok", "kind": "open", "gold": "", "parsed": ""} for i, v in enumerate(values)]  # fmt: skip
            path = folder / name / f"seed-{seed}"
            runs[path] = Member(Variant(name, {"name": name}), seed, path, Status("", state="done"), RunData(path, evals={"after": rows}))  # fmt: skip
    monkeypatch.setattr("lingshu_rl.sweep.answer.load_run", lambda path, scores: runs[path].data)
    return compare(list(runs.values()), next(iter(variants)))


@pytest.mark.parametrize("seeds", [1, 2, 4])
@pytest.mark.parametrize("images", [["one.png"] * 16, [""] * 3], ids=["one image", "three that agree"])
def test_a_large_difference_of_too_few_images_is_not_called_none_and_no_seeds_are_promised(monkeypatch, tmp_path, seeds, images):  # fmt: skip
    values = {"usual": [[0.2] * len(images)] * seeds, "other": [[0.888] * len(images)] * seeds}
    answer = answered(monkeypatch, tmp_path, values, images)
    row, told = row_of(answer, "other"), " ".join(answer["words"])
    assert row["verdict"] == "noise" and row["difference"]["points"] == pytest.approx(68.8)
    assert row["difference"]["seeds_needed"] is None and "seeds would show it" not in told
    assert answer["title"].startswith("The change cannot be told from noise") and "no difference" not in told
    assert ("All questions are about one image" in told) == (images[0] == "one.png")
    assert ("takes about" in told) == (images[0] == "" and seeds > 1)


def test_seeds_that_are_said_to_show_it_are_more_than_those_that_did_not(monkeypatch, tmp_path):
    rng = np.random.default_rng(3)
    for images in (["one"] * 12, [f"{i // 4}" for i in range(12)], [""] * 12):
        for _ in range(20):
            values = {name: rng.integers(0, 2, (2, 12)).tolist() for name in ("usual", "other")}
            row = row_of(answered(monkeypatch, tmp_path, values, images), "other")
            assert row["verdict"] != "noise" or (row["difference"]["seeds_needed"] or 3) > 2


def test_what_is_the_same_is_called_so_and_a_score_is_no_share_of_right_answers(monkeypatch, tmp_path):
    answer = answered(monkeypatch, tmp_path, {"usual": [[0.5] * 9] * 2, "other": [[0.5] * 9] * 2}, [""] * 9)
    assert answer["title"] == "The change gave the same answers as the baseline"
    assert "scores 50.0" in answer["words"][0] and " right" not in answer["words"][0]  # partial credit


def test_each_axis_of_a_grid_by_itself(tmp_path):
    axes = {"loss.kl_coef": [0, 2], "train.group_size": [4, 8]}
    sweep = swept(tmp_path, axes=axes, seeds=3, base={"eval.limit": 100})
    answer = write_answers(sweep)
    kl, size = answer["axis_effects"]
    assert (kl["axis"], kl["label"], kl["against"], kl["places"]) == ("loss.kl_coef", "2", "0", 2)
    assert kl["p_corrected"] < 0.05 and kl["points"] > 5 and size["identical"] and size["points"] == 0
    page = Page(sweep.folder / "sweep.html").text
    assert "Each axis by itself" in page and "Final accuracy over loss.kl_coef" in page and "group_size=8" in page


def test_nothing_done_yet_is_a_page_too(tmp_path):
    sweep = parse_sweep({"name": "t", "dir": str(tmp_path), "variants": {"a": None, "b": {"train.lr": 1e-5}}})
    answer = write_answers(sweep)
    assert answer["title"] == "Nothing can be compared yet" and "0 of 3 seeds" in Page(tmp_path / "sweep.html").text


def test_hostile_names_and_errors_stay_text(tmp_path):
    content = {"variants": {"a": None, HOSTILE[:60]: {"train.lr": 9}}, "seeds": 1, "question": HOSTILE}
    sweep = swept(tmp_path, **content)
    write_answers(sweep)
    page = Page(tmp_path / "sweep.html")
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and page.text.count("<script>alert(1)") >= 2
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "http://" not in page.source and "https://" not in page.source


def test_the_reports_of_a_sweep_and_of_several_runs(sweep, answer, tmp_path, capsys):
    (sweep.folder / "sweep.html").unlink()
    assert report_main([str(sweep.folder)], None) == 0
    assert (sweep.folder / "sweep.html").exists()
    runs = [sweep.folder / "runs" / v / f"seed-{s}" for v in ("usual", "better") for s in (0, 1, 2)]
    out = tmp_path / "two.html"
    assert report_main([str(r) for r in runs], str(out)) == 0
    found = json.loads((tmp_path / "two.json").read_text())
    assert [row["seeds_done"] for row in found["rows"]] == [3, 3] and found["rows"][1]["difference"]["seeds"] == 3
    assert "usual/seed-0" in Page(out).text and (tmp_path / "two-table.md").exists()
    capsys.readouterr()
    assert report_main([str(r) for r in runs[:2]], str(out)) == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert report_main([str(tmp_path / "no"), str(runs[0])], None) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_the_command_from_outside(tmp_path):
    file = tmp_path / "s.yaml"
    content = {
        "dir": str(tmp_path / "s"),
        "command": ["{python}", SCRIPT],
        "variants": {"a": None, "b": {"loss.kl_coef": 3}},
    }
    file.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "lingshu_rl.cli", "sweep", str(file)]
    done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "6 runs" in done.stdout and not (tmp_path / "s").exists()
    done = subprocess.run([*command, "--only", "a", "b/seed-0", "--set", "eval.limit=30"], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "s" / "sweep.html").exists(), done.stderr
    assert "one seed" in done.stdout and re.search(r"│ b +│ 1/3", done.stdout)


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [0.2, 0.9, 0.4]])
def test_figures_draw_whatever_there_is(values):
    curve = {"step": list(range(len(values))), "mean": values, "low": values, "high": [v + 0.1 for v in values]}
    svg = plots.band_chart({"a": curve, "b": curve})
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", svg)]
    assert heights and all(0 <= y <= plots.HEIGHT for y in heights)
    assert "nothing was logged" in plots.band_chart({})
    assert plots.axis_plot(["x", "y" * 80], {"a": [values, []]}).count('class="seed"') == len(values)
    assert "no run has ended" in plots.axis_plot(["x"], {"a": [[]]})
    found = {"points": -3.0, "low": -200.0, "high": 2.0, "by_seed": {0: -3.0}}
    assert "nan" not in plots.difference_plot(found, 10.0) and 'x1="0.00%"' in plots.difference_plot(found, 10.0)
