"""kill -9 at random moments: a worker's death is healed inside the run, any other by giving the same command again, and
the metrics are those of a run that nothing happened to, to the last digit."""

import json
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
from launching import ROOT, launch_command
from short_runs import metrics_of
from test_train import untimed

pytestmark = pytest.mark.endurance
STEPS = 5
SETTINGS = [f"train.steps={STEPS}", "train.prompts_per_step=4", "train.group_size=4", "train.warmup_steps=1", "eval.limit=4",
            "eval.controls=[]", "checkpoint.every=1", "rollout.max_tokens=16", "run.trackers=[]"]  # fmt: skip
ROLLOUT = "vllm.entrypoints"
REFERENCE = "lingshu_rl.reference.server"
# What is killed, over how many runs. Workers of the run's own; the rest are shared servers, so that a run stays short.
FAULTS = [("rollout", 5), ("reference", 6), ("rank", 5), ("launch", 6), ("colocated rank", 4)]


class Started:
    """A launch in the background with its output in a file."""

    def __init__(self, folder, env, settings, processes):
        self.log = folder.parent / f"{folder.name}.txt"
        with open(self.log, "a") as out:
            self.process = subprocess.Popen(
                launch_command([*SETTINGS, *settings, f"run.dir={folder}"], processes), cwd=ROOT,
                env={**env, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.began = time.monotonic()

    def children(self, mark):
        """This launch's processes with `mark` in their command line, parents first."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if mark in " ".join(child.cmdline()):
                    found.append(child.pid)
            except psutil.Error:
                continue
        return found

    def wait(self, timeout_s=600):
        return self.process.wait(timeout=timeout_s)


def settings_for(fault, servers):
    """(settings, policy ranks) of the runs in which `fault` strikes."""
    if fault == "rollout":
        return [f"reference.urls=[{servers.reference}]"], 1
    if fault == "reference":
        return [f"rollout.urls=[{servers.rollout}]"], 1
    if fault == "colocated rank":  # with an engine in each rank
        return [f"reference.urls=[{servers.reference}]", "rollout.placement=colocate"], 2
    return servers.settings, 2 if fault == "rank" else 1


@pytest.fixture(scope="module")
def baseline(servers, tmp_path_factory):
    """Metrics and duration of a run that nothing happens to, by number of ranks."""
    made = {}

    def get(ranks):
        if ranks not in made:
            folder = tmp_path_factory.mktemp("baseline") / "run"
            run = Started(folder, {**servers.env, "OMP_NUM_THREADS": "1"}, servers.settings, ranks)
            assert run.wait() == 0, run.log.read_text()
            made[ranks] = untimed(metrics_of(folder)), time.monotonic() - run.began
        return made[ranks]

    return get


@pytest.mark.parametrize(("fault", "seed"), [(fault, seed) for fault, runs in FAULTS for seed in range(runs)])
def test_a_killed_run_ends_with_the_numbers_of_one_that_was_not(fault, seed, servers, baseline, tmp_path):
    settings, ranks = settings_for(fault, servers)
    expected, usual_s = baseline(ranks)
    folder, env = tmp_path / "run", {**servers.env, "OMP_NUM_THREADS": "1"}
    moment = random.Random(f"{fault}/{seed}").random()
    run = Started(folder, env, settings, ranks)
    after_start = fault in ("rollout", "reference")
    if after_start:  # a server that cannot even start is an error, so it is killed while the run is under way
        while "training" not in run.log.read_text() and "step 1/" not in run.log.read_text():
            assert run.process.poll() is None, run.log.read_text()
            time.sleep(0.1)
        time.sleep(moment * 0.3 * usual_s)
    else:
        time.sleep(moment * usual_s)
    marks = {"rollout": ROLLOUT, "reference": REFERENCE, "rank": "grpo_medvqa.py", "colocated rank": "grpo_medvqa.py"}
    if fault == "launch":
        os.killpg(run.process.pid, signal.SIGKILL)
    elif victims := run.children(marks[fault]):
        os.kill(victims[-1], signal.SIGKILL)
    code = run.wait()
    if after_start:
        assert code == 0, run.log.read_text()
    while code != 0:
        run = Started(folder, env, settings, ranks)
        code = run.wait()
        assert code == 0, run.log.read_text()
    assert untimed(metrics_of(folder)) == expected
    assert (folder / "summary.json").exists() and not list(folder.glob("checkpoints/*.part"))


def test_two_of_each_give_what_one_of_each_gives_also_when_one_dies(servers, baseline, tmp_path):
    expected, _ = baseline(1)
    folder = tmp_path / "run"
    run = Started(folder, {**servers.env, "OMP_NUM_THREADS": "1"}, ["rollout.servers=2", "reference.replicas=2"], 1)
    while "step 2/" not in run.log.read_text():
        assert run.process.poll() is None, run.log.read_text()
        time.sleep(0.1)
    for mark in (ROLLOUT, REFERENCE):
        os.kill(run.children(mark)[0], signal.SIGKILL)
    assert run.wait() == 0, run.log.read_text()
    assert untimed(metrics_of(folder)) == expected
    assert "rollout server 1" in run.log.read_text()


def test_an_engine_over_the_processes_of_two_ranks_samples_what_one_alone_does(servers, baseline, tmp_path):
    expected, _ = baseline(2)
    folder = tmp_path / "run"
    shared = [
        "rollout.placement=colocate",
        "rollout.vllm={tensor_parallel_size: 2}",
        f"reference.urls=[{servers.reference}]",
    ]
    run = Started(folder, {**servers.env, "OMP_NUM_THREADS": "1"}, shared, 2)
    assert run.wait() == 0, run.log.read_text()
    for one, other in zip(expected, untimed(metrics_of(folder)), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_one_step_of_staleness_learns_as_well_as_none(servers, tmp_path):
    """Three seeds each: the mean held-out accuracy lies inside the interval of the mean without staleness."""
    accuracy, width = {0: [], 1: []}, []
    for staleness in (0, 1):
        for seed in range(3):
            folder = tmp_path / f"{staleness}-{seed}"
            settings = [*servers.settings, "train.steps=40", "train.prompts_per_step=16", "train.group_size=8", "rollout.max_tokens=40",
                        "eval.limit=200", "checkpoint.every=0", f"train.max_staleness={staleness}", f"seed={seed}"]  # fmt: skip
            run = Started(folder, servers.env, settings, 1)
            assert run.wait(3600) == 0, run.log.read_text()
            after = json.loads((folder / "summary.json").read_text())["after"]
            accuracy[staleness].append(after["accuracy"])
            width.append(after["ci95"][1] - after["ci95"][0])
            assert max(row["staleness"] for row in metrics_of(folder)) == staleness
    half = sum(width) / len(width) / 2 / 3**0.5  # of the mean over three seeds
    assert sum(accuracy[1]) / 3 > sum(accuracy[0]) / 3 - 2**0.5 * half, accuracy
