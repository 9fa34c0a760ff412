"""The terminal view of a run, of one that grows, and of a sweep."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml
from launching import ROOT
from report.test_run_report import make_run, questions
from rich.console import Console

from lingshu_rl.cli import main
from lingshu_rl.progress import Progress
from lingshu_rl.report.watch import sparkline, sweep_rows, view, watch
from lingshu_rl.storage.folders import own
from lingshu_rl.sweep import status as states
from lingshu_rl.sweep.plan import parse_sweep
from lingshu_rl.sweep.run import run_sweep, write_plan
from lingshu_rl.sweep.status import Status


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return make_run(folder / "run", questions(folder, 40), steps=12)


def text(path):
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view(path))
    return console.export_text()


def test_a_finished_run(run):
    shown = text(run)
    for words in (
        "step 12 of 12",
        "finished",
        "reward",
        "KL",
        "held-out accuracy:",
        "before",
        "after",
        "tokens/s",
        "rollout 2.",
    ):
        assert words in shown, words
    assert "889 tokens/s" in shown  # 4000 tokens in 4.5 s


def test_a_run_under_way_says_what_is_left_and_its_alarms(run, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 100}}))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["policy/kl"] = 0.9
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 13, "rew')
    with own(tmp_path, "a run", "run.dir"):
        shown = text(tmp_path)
    assert "running (process" in shown
    assert "step 12 of 100" in shown and "about 6 min 36 s of training left" in shown
    assert "! KL spikes: Step 12" in shown and "last step logged" in shown


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 5}")
    assert "no step is logged yet" in text(tmp_path) and "no process works on it" in text(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from lingshu_rl.storage.folders import own
with own(Path(sys.argv[1]), "a run", "run.dir"):
    print("holds", flush=True)
    time.sleep(600)
"""


def test_a_run_whose_process_was_killed_is_not_called_running(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 5}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5, "time/step": 2.0}\n')
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        assert f"running (process {process.pid} on" in text(tmp_path) and "of training left" in text(tmp_path)
        process.kill()
    shown = text(tmp_path)
    assert f"stopped: process {process.pid} on" in shown and "running" not in shown and "left" not in shown
    lock = tmp_path / ".lock"
    lock.write_text(lock.read_text().replace(f" on {socket.gethostname()}", " on elsewhere"))
    assert "begun by process" in text(tmp_path)  # its lock need not be seen from here


def test_runs_of_a_sweep_that_was_killed_are_not_called_running(tmp_path):
    content = {"dir": str(tmp_path), "seeds": 1, "variants": {"a": None, "b": {"train.lr": 9}}}
    sweep = parse_sweep(content)
    write_plan(sweep)
    states.write(tmp_path, sweep.runs()[0], Status("a/seed-0", list(sweep.runs()[0].overrides), state="running"))
    with own(tmp_path, "a sweep", "dir"):
        assert [row["state"] for row in sweep_rows(tmp_path)] == ["running", "waiting"]
    assert [row["state"] for row in sweep_rows(tmp_path)] == ["stopped", "waiting"]


def test_watching_ends_with_the_run(tmp_path, monkeypatch, run):
    monkeypatch.setattr("lingshu_rl.report.watch.REFRESH_S", 0.05)
    console = Console(width=120, file=open(tmp_path / "out.txt", "w"), force_terminal=True)  # noqa: SIM115
    target, codes = tmp_path / "run", []
    thread = threading.Thread(target=lambda: codes.append(watch(target, console=console)))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()  # it waits for the folder
    target.mkdir()
    (target / "config.yaml").write_text("train: {steps: 12}")
    time.sleep(0.3)
    assert thread.is_alive()
    (target / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    (target / "summary.json").write_text((run / "summary.json").read_text())
    thread.join(20)
    console.file.flush()
    shown = (tmp_path / "out.txt").read_text()
    assert codes == [0] and "waiting for" in shown and "step 12 of 12" in shown


def test_a_sweep(tmp_path, capsys):
    content = {"dir": str(tmp_path), "seeds": 1, "command": ["{python}", str(ROOT / "tests" / "scripted_trainer.py")],
               "variants": {"a": None, "b": {"train.lr": 9}}}  # fmt: skip
    run_sweep(parse_sweep(content), progress=Progress(quiet=True))
    assert main(["watch", str(tmp_path), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "a/seed-0" in shown and "done" in shown and "failed" in shown
    assert watch(tmp_path, console=Console(file=open("/dev/null", "w"))) == 0  # noqa: SIM115


def test_a_folder_without_a_run(tmp_path, capsys):
    assert main(["watch", str(tmp_path), "--once"]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2, 2]) == "▁▁" and len(sparkline(list(range(1000)))) == 40
