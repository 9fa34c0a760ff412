"""The pipeline: what is run again after which change, and that a killed one ends with the same files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lingshu_rl.cli import main
from lingshu_rl.failures import ConfigError
from lingshu_rl.pipeline.steps import Pipeline, load_pipeline
from lingshu_rl.progress import Progress
from lingshu_rl.storage.folders import InUse, own

ROOT = Path(__file__).resolve().parents[2]
# Copies its inputs into the output, upper or lower case; leaves a line in `ran` each time it runs.
COPY = """
import pathlib, sys, time
ran, out, how, pause, *inputs = sys.argv[1:]
with open(ran, "a") as log:
    log.write(out + "\\n")
time.sleep(float(pause))
text = "".join(pathlib.Path(i).read_text() for i in inputs)
pathlib.Path(out).write_text(getattr(text, how)())
"""
FILE = """
dir: {dir}
vars: {{how: upper, pause: 0, ran: {ran}}}
steps:
  a: {{run: "python {{here}}/copy.py {{ran}} {{out}}/a.txt {{how}} {{pause}} {{here}}/a.in", inputs: ["{{here}}/copy.py", "{{here}}/a.in"], outputs: [a.txt]}}
  b: {{run: "python {{here}}/copy.py {{ran}} {{out}}/b.txt lower 0 {{here}}/b.in", inputs: ["{{here}}/copy.py", "{{here}}/b.in"], outputs: [b.txt]}}
  c: {{run: "python {{here}}/copy.py {{ran}} {{out}}/c.txt lower {{pause}} {{a}}/a.txt", inputs: ["{{here}}/copy.py"], outputs: [c.txt]}}
  d: {{run: "python {{here}}/copy.py {{ran}} {{out}}/d.txt title 0 {{b}}/b.txt {{c}}/c.txt", inputs: ["{{here}}/copy.py"], outputs: [d.txt]}}
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "copy.py").write_text(COPY)
    (tmp_path / "a.in").write_text("First ")
    (tmp_path / "b.in").write_text("Second ")
    (tmp_path / "ran").write_text("")
    (tmp_path / "p.yaml").write_text(FILE.format(dir=tmp_path / "runs", ran=tmp_path / "ran"))
    return tmp_path


def run(place, *settings):
    """Which steps ran."""
    before = (place / "ran").read_text()
    assert main(["pipeline", str(place / "p.yaml"), *settings]) == 0
    return "".join(Path(line).stem for line in (place / "ran").read_text()[len(before) :].splitlines())


def result(place):
    newest = max((place / "runs").glob("d-*/d.txt"), key=lambda p: p.stat().st_mtime_ns)
    return newest.read_text()


def test_a_change_reruns_what_depends_on_it_and_nothing_else(place):
    assert run(place) == "abcd" and result(place) == "Second First "
    assert run(place) == ""
    (place / "b.in").write_text("Third ")
    assert run(place) == "bd" and result(place) == "Third First "
    (place / "b.in").write_text("Second ")
    assert run(place) == ""  # what was made before is found again
    (place / "a.in").write_text("FIRST ")
    assert run(place) == "a"  # a.txt has the same bytes as before: the change stops there
    assert run(place, "how=lower") == "ac"  # another a.txt, the same c.txt
    (place / "copy.py").write_text(COPY + "\n# the program changed\n")
    assert run(place) == "abcd"
    assert run(place, "--force", "c") == "c"


def test_what_would_run_and_why_is_said_without_running(place, capsys):
    run(place)
    (place / "b.in").write_text("Third ")
    assert main(["pipeline", str(place / "p.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "a: done before" in said and "b: would run (changed: input {here}/b.in)" in said and "c, d" in said
    assert (place / "ran").read_text().count("b.txt") == 1
    assert main(["pipeline", str(place / "p.yaml"), "--dry-run", "how=lower"]) == 0
    assert "a: would run (changed: command)" in capsys.readouterr().out


def test_outputs_that_someone_removed_or_changed_are_made_again(place):
    run(place)
    next((place / "runs").glob("c-*/c.txt")).unlink()
    assert run(place) == "c"
    next((place / "runs").glob("b-*/b.txt")).write_text("tampered")
    assert run(place) == "b" and result(place) == "Second First "


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_pipeline_goes_on_where_it_was_and_leaves_no_process(place, number):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lingshu_rl.cli", "pipeline", str(place / "p.yaml"), "pause=1"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while "c.txt" not in (place / "ran").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    process.wait()
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    time.sleep(1.2)
    assert not list((place / "runs").glob("c-*/c.txt"))  # the step ended with its pipeline
    assert run(place, "pause=1") == "cd"
    straight = place / "straight"
    assert main(["pipeline", str(place / "p.yaml"), f"dir={straight}", "pause=1"]) == 0
    files = [
        sorted((p.parent.name, p.name, p.read_text()) for p in d.glob("?-*/?.txt")) for d in (place / "runs", straight)
    ]
    assert files[0] == files[1]


def test_a_step_that_fails_is_named_with_its_log_and_the_rest_waits(place, capsys):
    (place / "copy.py").write_text(COPY.replace("text =", "assert 'c.txt' not in out, 'no c today'\ntext ="))
    assert main(["pipeline", str(place / "p.yaml")]) == 1
    error = capsys.readouterr().err
    assert "step c ended with exit code 1" in error and "no c today" in error and "log.txt" in error
    assert [Path(line).stem for line in (place / "ran").read_text().splitlines()] == ["a", "b", "c"]
    text = (place / "p.yaml").read_text()
    (place / "p.yaml").write_text(text.replace("outputs: [b.txt]", "outputs: [b.txt, other.txt]"))
    assert main(["pipeline", str(place / "p.yaml")]) == 1
    assert "left no other.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{a}}/a.txt", "{{x}}/a.txt", "{x} is neither a variable nor an earlier step"),
        ("{{b}}/b.txt", "{{e}}/b.txt", "{e} is neither"),
        ("outputs: [a.txt]", "outputs: []", "steps.a.outputs is empty"),
        ('inputs: ["{{here}}/copy.py", "{{here}}/b.in"]', 'inputs: ["{{here}}/copy.py"]', "the command reads {here}/b.in, which is not among its inputs"),
        ("{{here}}/a.in", "{{here}}/gone.in", "gone.in: no such file"),
        ("outputs", "output", "did you mean"),
        ("  b:", "  how:", "not that of a variable"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_work_is_refused_by_step(place, capsys, old, new, message):
    (place / "p.yaml").write_text(FILE.replace(old, new).format(dir=place / "runs", ran=place / "ran"))
    assert main(["pipeline", str(place / "p.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_variable_or_step_is_refused(place, capsys):
    assert main(["pipeline", str(place / "p.yaml"), "--force", "z"]) == 2
    assert "the steps are a, b, c, d" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown key 'hw'"):
        load_pipeline(place / "p.yaml", ["hw=1"])
    with pytest.raises(ConfigError, match="no variable 'hw'"):
        load_pipeline(place / "p.yaml", ["vars.hw=1"])


def test_two_pipelines_do_not_share_a_folder(place):
    with own(place / "runs", "a pipeline", "dir"), pytest.raises(InUse, match="a pipeline"):
        Pipeline(load_pipeline(place / "p.yaml"), place).run(Progress(quiet=True))


def test_the_table_pairs_each_stage_with_the_one_before(place, capsys):
    def graded(values):
        return "".join(json.dumps({"id": str(n), "value": v, "image": str(n)}) + "\n" for n, v in enumerate(values))

    (place / "a.in").write_text(graded([0, 0, 1, 0] * 10))
    (place / "b.in").write_text(graded([1, 1, 1, 0] * 10))
    more = '\ntable: [{{stage: start, rows: "{{c}}/c.txt"}}, {{stage: tuned, rows: "{{b}}/b.txt"}}]\n'
    (place / "p.yaml").write_text((FILE + more).format(dir=place / "runs", ran=place / "ran"))
    assert main(["pipeline", str(place / "p.yaml"), "how=lower"]) == 0
    said = capsys.readouterr().out
    assert "| start | 25.0 % (" in said and "| tuned | 75.0 % (" in said and "| +50.0 (" in said
    rows = json.loads((place / "runs" / "table.json").read_text())
    assert rows[1]["gain"]["points"] == 50 and rows[1]["gain"]["ci95"][0] > 30
    assert (place / "runs" / "table.md").read_text() in said


READY = [*sorted((ROOT / "recipes" / "pipelines").glob("*.yaml")), ROOT / "recipes" / "grounding.yaml"]


@pytest.mark.parametrize("file", READY, ids=lambda p: p.stem)
def test_the_ready_pipelines_are_read(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_pipeline(file)
    assert config.steps and config.table


@pytest.mark.endurance
def test_the_miniature_plan_in_short_form(tmp_path):
    """All four stages with a few steps each: base, three SFT stages, RL with real engines, and the table."""
    short = ["lookup_steps=2", "seeing_steps=2", "pool_draws=1", "language_steps=4", "shallow_steps=2", "deep_steps=2",
             "instruct_steps=8", "rl_steps=2", "limit=24"]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "lingshu_rl.cli",
        "pipeline",
        "recipes/pipelines/miniature.yaml",
        f"dir={tmp_path}",
        *short,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["stage"] for row in rows] == [
        "before alignment", "shallow alignment", "deep alignment", "instruction tuning", "RL"
    ]  # fmt: skip
    assert all(row["n"] == 24 and len(row["gain"]["ci95"]) == 2 for row in rows[1:])
    again = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert again.stdout.count("done before") == 3
