"""Sweeps of a scripted trainer: order, resuming, failures, device sets, search. One sweep of real runs is at the end."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from launching import ROOT
from machines import machine

from lingshu_rl.failures import ConfigError
from lingshu_rl.progress import Progress
from lingshu_rl.storage.folders import InUse, own
from lingshu_rl.sweep import status as states
from lingshu_rl.sweep.answer import write_answers
from lingshu_rl.sweep.command import sweep_main
from lingshu_rl.sweep.plan import SweepError, parse_sweep
from lingshu_rl.sweep.run import run_sweep

SCRIPT = str(ROOT / "tests" / "scripted_trainer.py")
QUIET = Progress(quiet=True)


def plan(folder, **more):
    content = {"name": "t", "dir": str(folder), "seeds": 2, "command": ["{python}", SCRIPT], "base": {"eval.limit": 40}}
    return {**content, **({} if "search" in more else {"variants": {"a": None, "b": {"loss.kl_coef": 2}}}), **more}


def run(folder, **more):
    options = {key: more.pop(key) for key in ("only", "retry_failed") if key in more}
    sweep = parse_sweep(plan(folder, **more))
    outcome = run_sweep(sweep, progress=QUIET, **options)
    return sweep, outcome


def states_of(sweep):
    return {r.name: states.read(sweep.folder, r).state for r in sweep.runs()}


def lines(run):
    return len((run.folder / "metrics.jsonl").read_text().splitlines())


def without_costs(table):
    costs = ("wall_seconds", "device_seconds")
    return [{k: v for k, v in row.items() if k not in costs} for row in csv.DictReader(table.read_text().splitlines())]


def test_every_run_once_and_none_again(tmp_path):
    sweep, outcome = run(tmp_path)
    assert outcome.counts == {"done": 4} and set(states_of(sweep).values()) == {"done"}
    again, outcome = run(tmp_path)
    assert outcome.counts == {} and all(states.read(tmp_path, r).attempts == 1 for r in again.runs())


def test_only_some_then_the_rest(tmp_path):
    sweep, outcome = run(tmp_path, only=["b/seed-1"])
    assert outcome.counts == {"done": 1} and states_of(sweep)["b/seed-1"] == "done"
    _, outcome = run(tmp_path)
    assert outcome.counts == {"done": 3}


def test_a_failed_run_is_a_row_with_its_error_and_the_others_go_on(tmp_path):
    variants = {"a": None, "broken": {"train.lr": 9}, "b": {"loss.kl_coef": 2}}
    sweep, outcome = run(tmp_path, variants=variants)
    assert outcome.counts == {"done": 4, "failed": 2}
    row = next(r for r in write_answers(sweep)["rows"] if r["name"] == "broken")
    assert "ValueError: the loss is not a number" in row["errors"][0] and row["verdict"] == "none"
    assert "exit code 1: ValueError: the loss is not a number" in (tmp_path / "table.md").read_text()
    assert run(tmp_path, variants=variants)[1].counts == {}
    assert run(tmp_path, variants=variants, retry_failed=True)[1].counts == {"failed": 2}


def test_a_run_that_is_killed_and_one_without_a_result_are_failures(tmp_path):
    kill = ["{python}", "-c", "import os; print('hello'); os.kill(os.getpid(), 9)"]
    sweep, _ = run(tmp_path / "killed", command=kill, seeds=1)
    assert "was killed by SIGKILL" in states.read(sweep.folder, sweep.runs()[0]).error
    sweep, _ = run(tmp_path / "nothing", command=["{python}", "-c", "print('done nothing')"], seeds=1)
    assert "it wrote no summary.json: done nothing" in states.read(sweep.folder, sweep.runs()[0]).error


def test_what_a_run_says_of_its_end_is_told_in_full(tmp_path):
    said = "the run stopped: the first batch failed its checks:\n- log-probs differ\n- blank images change little\n"
    code = f"import sys; sys.stderr.write({said!r}); sys.stderr.write('Traceback (most recent call last):\\n  launcher\\nX: y\\n'); sys.exit(1)"
    sweep, _ = run(tmp_path, command=["{python}", "-c", code], seeds=1, only=["a"])
    error = states.read(sweep.folder, sweep.runs()[0]).error
    assert "failed its checks: - log-probs differ - blank images change little (log:" in error, error


def test_a_run_over_its_time_is_stopped_with_all_it_started(tmp_path):
    command = ["sh", "-c", "sleep 98.7654 & sleep 98.7653"]
    sweep, _ = run(tmp_path, command=command, seeds=1, timeout_s=0.5, only=["a"])
    assert "longer than timeout_s=0.5" in states.read(sweep.folder, sweep.runs()[0]).error
    assert subprocess.run(["pgrep", "-f", "sleep 98.765"], capture_output=True).returncode == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_started_again_it_gives_the_table_of_one_that_was_not(tmp_path, number):
    straight, _ = run(tmp_path / "straight", base={"eval.limit": 40, "train.steps": 10})
    write_answers(straight)
    file = tmp_path / "sweep.yaml"
    content = plan(tmp_path / "cut", base={"eval.limit": 40, "train.steps": 10})
    file.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "lingshu_rl.cli", "sweep", str(file)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "STEP_S": "0.1"}
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sweep = parse_sweep(content)
    second = sweep.runs()[1]
    wait_for(lambda: (second.folder / "metrics.jsonl").exists() and lines(second) >= 3)
    child.send_signal(number)
    out, _ = child.communicate(timeout=200)
    assert child.returncode == (130 if number == signal.SIGTERM else -9), out
    wait_for(lambda: subprocess.run(["pgrep", "-f", f"run.dir={tmp_path}/cut"], capture_output=True).returncode == 1)
    before = lines(second)
    assert 3 <= before < 10 and not (second.folder / "summary.json").exists()
    done = subprocess.run(command, env={**env, "STEP_S": "0"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(second) == 10 and states.read(sweep.folder, sweep.runs()[0]).attempts == 1
    assert without_costs(tmp_path / "cut" / "table.csv") == without_costs(tmp_path / "straight" / "table.csv")


def wait_for(condition, timeout_s=200):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_device_sets_work_side_by_side_and_each_run_sees_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("lingshu_rl.sweep.run.this_machine", lambda: machine(4, "4,5,GPU-x,GPU-y"))
    report = "import json, os, sys; from pathlib import Path; d = Path(next(w[8:] for w in sys.argv if w.startswith('run.dir='))); d.mkdir(parents=True); (d / 'env.json').write_text(json.dumps([os.environ['CUDA_VISIBLE_DEVICES']])); import time; n = lambda: len(list(d.parents[2].rglob('env.json'))); [time.sleep(0.02) for _ in range(500) if n() < 2]; (d / 'summary.json').write_text('{}'); (d / 'metrics.jsonl').write_text(''); sys.exit(n() < 2)"
    sweep, outcome = run(tmp_path, command=["{python}", "-c", report], devices=[[0, 1], [2, 3]])
    assert outcome.counts == {"done": 4}  # the first run ends only when a second has started beside it
    seen = {json.loads((r.folder / "env.json").read_text())[0] for r in sweep.runs()}
    assert seen == {"4,5", "GPU-x,GPU-y"}
    assert {states.read(tmp_path, r).device_count for r in sweep.runs()} == {2}
    with pytest.raises(ConfigError, match=r"devices\.sweep names GPU 4, but this process sees 4"):
        run(tmp_path / "other", command=["{python}", "-c", report], devices=[[4]])


def test_core_sets_bind_the_run(tmp_path):
    core = min(os.sched_getaffinity(0))
    tell = "import os, sys; from pathlib import Path; d = Path(next(w[8:] for w in sys.argv if w.startswith('run.dir='))); d.mkdir(parents=True); (d / 'summary.json').write_text(str(sorted(os.sched_getaffinity(0))))"
    sweep, _ = run(tmp_path, command=["{python}", "-c", tell], devices=f"cpu:{core}", seeds=1)
    assert (sweep.runs()[0].folder / "summary.json").read_text() == f"[{core}]"


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(
        SweepError, match=r"other settings \(eval.limit=30, eval.limit=40\); give the sweep another `dir`"
    ):
        run(tmp_path, base={"eval.limit": 30})
    _, outcome = run(tmp_path, seeds=3)  # more seeds are no other settings
    assert outcome.counts == {"done": 2}


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with own(tmp_path, "a sweep", "dir"), pytest.raises(InUse, match="a sweep"):
        run(tmp_path)


def test_a_thread_can_run_a_sweep(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path, seeds=1)[1].counts))
    thread.start()
    thread.join(200)
    assert found == [{"done": 2}]


SEARCH = {"trials": 5, "seed": 1, "space": {"loss.kl_coef": {"low": 0.0, "high": 4.0}, "train.group_size": [4, 8]}}


THREE = {**SEARCH, "trials": 3}


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_search_tries_settings_and_ranks_them(tmp_path, method):
    sweep, outcome = run(tmp_path, search={**SEARCH, "method": method})
    assert outcome.counts == {"done": 12}  # the baseline and five trials, two seeds each
    answer = write_answers(sweep)
    trials = answer["rows"][1:]
    assert answer["rows"][0]["is_baseline"] and len(trials) == 5
    scores = [row["score"] for row in trials]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= row["settings"]["loss.kl_coef"] <= 4 and row["settings"]["train.group_size"] in (4, 8) for row in trials)  # fmt: skip
    assert "picked" in " ".join(answer["words"])


def test_a_search_that_was_stopped_goes_on_to_the_same_trials(tmp_path):
    run(tmp_path / "whole", search=THREE)
    first, _ = run(tmp_path / "cut", search={**THREE, "trials": 2})
    half = json.loads((tmp_path / "cut" / "trials.json").read_text())
    run_of_second = parse_sweep(plan(tmp_path / "cut", search=THREE)).runs_of(_trial(tmp_path / "cut", 1))[1]
    status = states.read(first.folder, run_of_second)  # as if the sweep had been killed in the second trial's last run
    status.state = "running"
    states.write(first.folder, run_of_second, status)
    _, outcome = run(tmp_path / "cut", search=THREE)
    assert outcome.counts == {"done": 3}
    trials = json.loads((tmp_path / "cut" / "trials.json").read_text())
    assert len(half) == 2 and trials == json.loads((tmp_path / "whole" / "trials.json").read_text())


def _trial(folder, number):
    from lingshu_rl.sweep.search import read_trials

    return read_trials(parse_sweep(plan(folder, search=THREE)))[number]


def test_failed_trials_are_rows_and_can_be_tried_again(tmp_path):
    search = {"trials": 4, "seed": 2, "method": "random", "space": {"train.lr": [9, 1]}}
    sweep, outcome = run(tmp_path, search=search)
    failed = outcome.counts["failed"]
    assert 1 <= failed <= 3 and outcome.counts["done"] == 2 + 2 * (4 - failed)  # a trial that fails runs no more seeds
    rows = [row for row in write_answers(sweep)["rows"] if row["errors"]]
    assert len(rows) == failed and all(row["settings"] == {"train.lr": 9} for row in rows)
    assert run(tmp_path, search=search)[1].counts == {}
    assert run(tmp_path, search=search, retry_failed=True)[1].counts == {"failed": failed}


def test_a_trial_that_falls_behind_is_pruned_and_stays_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HANG_BELOW", "1.9")  # the three trials that are below the median of the first two
    search = {"trials": 5, "seed": 3, "method": "random", "space": {"loss.kl_coef": {"low": 0.0, "high": 4.0}},
              "prune": {"after": 3, "startup": 2}}  # fmt: skip
    more = {"search": search, "seeds": 2, "base": {"eval.limit": 10, "loss.kl_coef": 4}, "timeout_s": 200}
    sweep, outcome = run(tmp_path, **more)
    assert outcome.counts == {"done": 6, "pruned": 3}  # a pruned trial runs no second seed
    lost = [row for row in write_answers(sweep)["rows"] if row["pruned"]]
    assert len(lost) == 3 and all(row["settings"]["loss.kl_coef"] < 1.9 for row in lost)
    assert "at step 3 its reward/mean of" in lost[0]["pruned"][0]
    assert run(tmp_path, **more)[1].counts == {}


def test_the_command_lists_the_runs_and_their_time(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({**plan(tmp_path / "s"), "seconds_per_run": 90}))
    assert sweep_main(str(file), dry_run=True) == 0
    out = capsys.readouterr().out
    assert "loss.kl_coef=2" in out and "about 6 min 00 s: 4 runs of 90.0 s (the file's seconds_per_run)" in out
    assert not (tmp_path / "s").exists()
    assert sweep_main(str(file), only=["a"]) == 0
    capsys.readouterr()
    assert sweep_main(str(file), dry_run=True) == 0
    out = capsys.readouterr().out
    assert "median of this sweep's runs" in out and ": 2 runs of" in out and "0 of 2" in out
    assert sweep_main(str(file), settings=["train.lr=9"]) == 2  # other settings in the same folder
    assert "other settings" in capsys.readouterr().err
    file.write_text(yaml.safe_dump({**plan(tmp_path / "f"), "base": {"train.lr": 9}}))
    assert sweep_main(str(file)) == 1
    assert "4 run(s) failed; --retry-failed" in capsys.readouterr().err
    assert sweep_main(str(tmp_path / "none.yaml")) == 2


@pytest.mark.endurance
def test_a_sweep_of_real_runs(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({
        "name": "broken reward", "dir": str(tmp_path / "s"), "seeds": 1,
        "base": {"train.steps": 2, "train.prompts_per_step": 4, "train.group_size": 4, "eval.limit": 8,
                 "eval.controls": [], "loss.kl_coef": 0, "checkpoint.every": 0},
        "variants": {"usual": None, "always zero": {"rewards": {"spec": {"class": "tests.zero_reward:Zero"}, "preflight": False}}},
    }, sort_keys=False))  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "lingshu_rl.cli", "sweep", str(file)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((tmp_path / "s" / "sweep.json").read_text())
    usual, zero = answer["rows"]
    assert answer["regraded"] and zero["own_score"] == 0 and zero["score"] is not None
    assert "Constant reward" in zero["alarms"] and "Constant reward" not in usual["alarms"]
    assert usual["generated_tokens"] > 0 and usual["seconds"] > 0
    assert (tmp_path / "s" / "sweep.html").stat().st_size > 10_000
