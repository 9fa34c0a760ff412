"""kill -9 at random moments: a server's death is healed inside the run, any other by giving the same command again, and
the metrics are those of a run that nothing happened to, to the last digit.

LINGSHU_RL_KILLS: how many (100). LINGSHU_RL_KILLS_DIR: a folder with a journal (kills.jsonl), by which a later call goes on.
LINGSHU_RL_KILLS_ENGINE=stand-in: with `answering_engine.py` in place of vLLM, where seconds count; all else is real.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, TOKEN, Servers, launch_command
from short_runs import metrics_of
from test_train import untimed

from lingshu_rl.processes.token import TOKEN_ENV
from lingshu_rl.processes.workers import Worker, free_port, stop_all

pytestmark = pytest.mark.endurance
STEPS = 4
SETTINGS = [f"train.steps={STEPS}", "train.prompts_per_step=4", "train.group_size=4", "train.warmup_steps=1", "eval.limit=4",
            "eval.controls=[]", "checkpoint.every=1", "rollout.max_tokens=16", "run.trackers=[]", "rewards.preflight=false"]  # fmt: skip
ROLLOUT = "vllm.entrypoints"
REFERENCE = "lingshu_rl.reference.server"


# What is killed, where the engine is, what is trained: one kill each, over and over. An engine of a run's own takes a minute to
# start, so most runs share one.
CASES = [
    *[("main rank", "split", "full"), ("main rank", "split", "lora"), ("launch", "split", "full"), ("launch", "split", "lora")] * 3,
    ("second rank", "split", "full"), ("second rank", "split", "lora"), ("reference", "split", "full"),
    ("reference", "split", "lora"), ("rollout", "split", "full"), ("rollout", "split", "lora"),
    ("main rank", "colocated", "full"), ("second rank", "colocated", "lora"),
]  # fmt: skip
CHEAP = os.environ.get("LINGSHU_RL_KILLS_ENGINE") == "stand-in"
if CHEAP:
    CASES = [case for case in CASES if case[0] != "rollout" and case[1] == "split"]
KILLS = int(os.environ.get("LINGSHU_RL_KILLS", "100"))
JOURNAL = os.environ.get("LINGSHU_RL_KILLS_DIR", "")  # kills that are told there already are not done again
STARTING = ("devices:", "policy:", "before: accuracy")  # lines of a run's output after which it may be hit
TRAINING = ("first batch:", *(f"step {step}/{STEPS}" for step in range(1, STEPS)))
LORA = "train.lora={r: 4, target_modules: [q_proj, v_proj]}"


class Nursery:
    """See `nursery.py`. One for runs that talk to servers, one for runs with vLLM in their own processes."""

    def __init__(self, *modules):
        self.process = subprocess.Popen(
            [sys.executable, "tests/nursery.py", "lingshu_rl.train", "lingshu_rl.policy", "deepspeed", *modules], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        while (line := self.process.stdout.readline()) != "ready\n":
            assert line, "the nursery did not start"

    def ask(self, **what):
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("{"):
            assert line, "the nursery ended"
        return json.loads(line)


class Born:
    """A run of a nursery. log: what it said so far is `said`; a run started again says more in the same file."""

    def __init__(self, nursery, folder, env, settings, ranks):
        self.nursery, self.log = nursery, folder.parent / f"{folder.name}.txt"
        self.log.touch()
        self.before = self.log.stat().st_size
        words = [*SETTINGS, *settings, f"run.dir={folder}"]
        self.pids = nursery.ask(words=words, env=env, ranks=ranks, log=str(self.log))["pids"]

    @property
    def said(self):
        return self.log.read_bytes()[self.before :].decode(errors="replace")

    def code(self):
        """0 when all ranks ended well, None while one runs, else the first bad one."""
        codes = self.nursery.ask(poll=self.pids)["codes"]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout_s):
        deadline = time.monotonic() + timeout_s
        while (code := self.code()) is None:
            if time.monotonic() > deadline:
                self.kill_group()
                raise AssertionError(f"still running after {timeout_s} s: {self.log.read_text()}")
            time.sleep(0.1)
        return code

    def until(self, line, timeout_s=400):
        """Whether it came to say so; False when it ended before."""
        deadline = time.monotonic() + timeout_s
        while line not in self.said:
            if self.code() is not None:
                return False
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return True

    def kill_group(self):
        os.killpg(self.pids[0], signal.SIGKILL)

    def kill(self, role):
        if role == "launch":
            self.kill_group()
        elif role in ("main rank", "second rank"):
            os.kill(self.pids[role == "second rank"], signal.SIGKILL)
        else:
            mark = ROLLOUT if role == "rollout" else REFERENCE
            for child in psutil.Process(self.pids[0]).children():
                if mark in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def nurseries():
    made = {}

    def get(place):
        if place not in made:
            made[place] = Nursery(*(["vllm"] if place == "colocated" else []))
        return made[place]

    yield get
    for nursery in made.values():
        nursery.process.kill()


class CheapServers(Servers):
    """The rows have no images, and rewards that differ whatever is said: by the answer's letters."""

    @property
    def rows(self):
        folder = self.transfer.parent
        rows = [
            {"id": f"r{n}", "images": [], "kind": "open", "answer": "x", "question": f"Is it {n}?"} for n in range(12)
        ]
        for name, some in (("train", rows), ("test", rows[:2])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({**row, "id": name + row["id"]}) + "\n" for row in some))  # fmt: skip
        return [f"data.train={folder}/train.jsonl", f"data.test={folder}/test.jsonl", "check.on_failure=warn",
                "rewards.spec={class: 'length_reward:Length'}"]  # fmt: skip


@pytest.fixture(scope="module")
def engines(request, tmp_path_factory):
    """The shared servers, or the stand-in and a real reference."""
    if not CHEAP:
        yield request.getfixturevalue("servers")
        return
    folder, ports = tmp_path_factory.mktemp("servers"), (free_port(), free_port())
    (folder / "transfer").mkdir()
    commands = [
        ["tests/answering_engine.py", str(ports[0])],
        ["-m", "lingshu_rl.cli", "serve", "reference", "--port", str(ports[1])],
    ]
    env = {TOKEN_ENV: TOKEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = [
        Worker(f"server {n}", [sys.executable, *words], url=f"http://127.0.0.1:{port}", log=folder / f"{n}.log", env=env, stop_timeout_s=5)
        for n, (words, port) in enumerate(zip(commands, ports, strict=True))
    ]  # fmt: skip
    try:
        for worker in workers:
            worker.wait_healthy(300)
        yield CheapServers(workers[0].url, workers[1].url, folder / "transfer")
    finally:
        stop_all(workers)


def settings_of(role, place, trained, servers):
    """(settings, policy ranks). Only the server that is to be killed is the run's own."""
    urls = {"rollout": f"rollout.urls=[{servers.rollout}]", "reference": f"reference.urls=[{servers.reference}]"}
    given = [url for name, url in urls.items() if name != role and (name == "reference" or place == "split")]
    own = ["rollout.placement=colocate"] if place == "colocated" else []
    rows = servers.rows if CHEAP else []
    return [*given, *own, *rows, *([LORA] if trained == "lora" else [])], 2 if role == "second rank" else 1


@pytest.fixture(scope="module")
def baselines(engines, nurseries, tmp_path_factory):
    """Metrics of a run that nothing happens to. Adapters alone are other arithmetic than merged weights, as two ranks are."""
    made = {}

    def get(case):
        role, place, trained = case
        adapters = role == "rollout" and trained == "lora"
        settings, ranks = settings_of(role, place, trained, engines)
        key = (ranks, trained, adapters)
        if key not in made:
            folder = tmp_path_factory.mktemp("baseline") / "run"
            run = Born(nurseries(place), folder, engines.env, settings, ranks)
            assert run.wait(900) == 0, run.log.read_text()
            made[key] = untimed(metrics_of(folder))
        return made[key]

    return get


def told_already():
    file = Path(JOURNAL, "kills.jsonl")
    return {json.loads(line)["kill"] for line in file.read_text().splitlines()} if JOURNAL and file.exists() else set()


@pytest.mark.parametrize("number", [n for n in range(KILLS) if n not in told_already()])
def test_a_killed_run_ends_with_the_numbers_of_one_that_was_not(number, engines, nurseries, baselines, tmp_path):
    role, place, trained = case = CASES[number % len(CASES)]
    draw = random.Random(f"kill {number}")
    settings, ranks = settings_of(*case, engines)
    expected = baselines(case)
    folder, began = tmp_path / "run", time.monotonic()
    heals = role in ("rollout", "reference")  # inside the run; any other goes on when it is started again
    moments, hits = TRAINING if heals else STARTING + TRAINING, []
    for _ in range(1 if heals or draw.random() < 0.7 else 2):  # some are killed once more after they were started again
        run = Born(nurseries(place), folder, engines.env, settings, ranks)
        if run.until(line := draw.choice(moments)):
            time.sleep(draw.uniform(0, 1.0))
            if run.code() is None:
                run.kill(role)
                hits.append(f"{line} | {run.said.splitlines()[-1]}")
        code = run.wait(600 if heals else 90)  # the other ranks end by themselves
        assert code == 0 if heals or not hits else code != 0 or run.said, run.log.read_text()
    if not heals:
        run = Born(nurseries(place), folder, engines.env, settings, ranks)
        assert run.wait(600) == 0, run.log.read_text()
    assert untimed(metrics_of(folder)) == expected, run.log.read_text()
    assert (folder / "summary.json").exists() and not list(folder.glob("checkpoints/*.part"))
    if JOURNAL:
        told = {"kill": number, "role": role, "place": place, "trained": trained, "hits": hits, "seconds": round(time.monotonic() - began)}  # fmt: skip
        with open(Path(JOURNAL, "kills.jsonl"), "a") as out:
            out.write(json.dumps(told) + "\n")


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


@pytest.fixture(scope="module")
def baseline(servers, tmp_path_factory):
    """Metrics of a run that nothing happens to, by number of ranks."""
    made = {}

    def get(ranks):
        if ranks not in made:
            folder = tmp_path_factory.mktemp("baseline") / "run"
            run = Started(folder, {**servers.env, "OMP_NUM_THREADS": "1"}, servers.settings, ranks)
            assert run.wait() == 0, run.log.read_text()
            made[ranks] = untimed(metrics_of(folder))
        return made[ranks]

    return get


def test_two_of_each_give_what_one_of_each_gives_also_when_one_dies(servers, baseline, tmp_path):
    expected = baseline(1)
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
    expected = baseline(2)
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
