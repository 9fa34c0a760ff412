"""What goes wrong in real runs: they end with its name, or go on, and leave nothing behind."""

import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest
from launching import ROOT, launch
from short_runs import SHORT, engines_of, metrics_of, started

from lingshu_rl.stream import PromptStream

pytestmark = pytest.mark.slow


def alive(pid):
    """Whether a process with this number runs; one that ended and waits to be collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("fault", ["interrupt", "terminate", "kill_reference", "kill_trainer"])
def test_a_fault_ends_the_run_with_its_name_and_leaves_nothing_behind(fault, servers, tmp_path):
    folder = tmp_path / "run"
    settings = [f"rollout.urls=[{servers.rollout}]", "run.max_restarts=0"]
    process, log = started(settings, folder, servers.env, "step 1/500")
    mine = engines_of(folder)
    assert mine
    began = time.monotonic()
    if fault == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    elif fault == "terminate":
        process.terminate()
    elif fault == "kill_trainer":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(mine[0], signal.SIGKILL)
    process.wait(timeout=30)
    while any(map(alive, mine)) and time.monotonic() - began < 30:
        time.sleep(0.2)
    assert not any(map(alive, mine)) and not engines_of(folder) and time.monotonic() - began < 30
    if fault == "kill_reference":
        text = log.read_text()
        assert (
            "reference server 0 was killed by SIGKILL" in text and "reference-0.log" in text and process.returncode != 0
        )
        assert "the state after step" in text and list(folder.glob("checkpoints/step-*/run.json"))
    elif fault != "kill_trainer":
        deadline = time.monotonic() + 20
        while "the run was stopped" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "the run was stopped" in log.read_text()
        saved = list(folder.glob("checkpoints/step-*/run.json"))
        assert bool(saved) == (fault == "terminate")


def test_a_run_starts_its_own_rollout_server_and_notices_its_death(tmp_path):
    folder = tmp_path / "run"
    process, log = started(
        ["loss.kl_coef=0", "eval.limit=4", "eval.controls=[]", "run.max_restarts=0"],
        folder,
        os.environ.copy(),
        "step 1/500",
    )
    mine = engines_of(folder)
    os.kill(mine[0], signal.SIGKILL)
    process.wait(timeout=30)
    text = log.read_text()
    assert process.returncode != 0 and "rollout server 0 was killed by SIGKILL" in text and "rollout-0.log" in text
    deadline = time.monotonic() + 20
    while any(map(alive, mine)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(alive, mine)) and not engines_of(folder)


@pytest.mark.parametrize("allowed", [0.05, 0.0])
def test_a_prompt_that_the_engine_refuses_is_set_aside_or_ends_the_run_with_a_checkpoint(servers, tmp_path, allowed):
    """The second step meets a question far longer than the model's context, which went unseen at load."""
    order = PromptStream(range(12), seed=0).take(0, 12)
    rows = [
        {"id": f"row-{i}", "images": [], "kind": "yesno", "answer": "yes",
         "question": "Is it the brain? " * (3000 if i == order[5] else 1)}
        for i in range(12)
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({**rows[order[0]], "id": "held-out"}) + "\n")
    settings = [
        f"data.train={tmp_path / 'train.jsonl'}",
        f"data.test={tmp_path / 'test.jsonl'}",
        "data.curriculum=none",
        "eval.controls=[]",
        "eval.limit=2",
        "train.steps=3",
        f"data.max_refused_share={allowed}",
    ]
    run = tmp_path / "run"
    if not allowed:
        seen = launch([*SHORT, *servers.settings, *settings, f"run.dir={run}"], env=servers.env)
        assert seen.returncode == 1 and "1 of 12 rows cannot be used" in seen.stdout, seen.stdout[-3000:]
        assert f"line {order[5] + 1} (id row-{order[5]}): its prompt has" in seen.stdout
        assert "of the servers in rollout.urls" in seen.stdout and not (run / "checkpoints").exists()
    script = tmp_path / "blind.py"
    script.write_text(
        "import sys, lingshu_rl.model.lengths as l\n"
        "l.Lengths.of = lambda self, prompt: None\n"
        "from lingshu_rl.cli import train_main\n"
        "sys.exit(train_main(sys.argv[1:]))\n"
    )
    done = launch([*SHORT, *servers.settings, *settings, f"run.dir={run}"], env=servers.env, script=str(script))
    assert done.returncode == (0 if allowed else 1) and "Traceback" not in done.stdout, done.stdout[-3000:]
    assert f"refused prompt 'row-{order[5]}': HTTP 400" in done.stdout and "maximum context length" in done.stdout
    if allowed:
        steps = metrics_of(run)
        assert [step.get("prompts/refused", 0) for step in steps] == [0, 1, 0] and list(steps[1]["refused"]) == [
            f"row-{order[5]}"
        ]
        assert "Prompts set aside" in (run / "report.html").read_text()
        return
    assert f"the state after step 1 is in {run / 'checkpoints' / 'step-000001'}" in done.stdout
    assert (run / "checkpoints" / "step-000001" / "run.json").exists()


def test_an_exception_in_the_trainer_stops_everything(servers, tmp_path):
    folder = tmp_path / "run"
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys, lingshu_rl.policy as p\n"
        "def update(self, groups, step, judge): raise ValueError('a bug in the update')\n"
        "p.Policy.update = update\n"
        "from lingshu_rl.cli import train_main\n"
        "sys.exit(train_main(sys.argv[1:]))\n"
    )
    done = launch(
        [*SHORT, f"rollout.urls=[{servers.rollout}]", f"run.dir={folder}"], env=servers.env, script=str(script)
    )
    assert done.returncode != 0 and "ValueError: a bug in the update" in done.stdout
    assert not engines_of(folder)


def test_an_engine_that_keeps_its_old_weights_ends_the_run_before_anything_is_learnt_from_it(servers, tmp_path):
    script = tmp_path / "deaf.py"
    script.write_text(
        "import sys, lingshu_rl.run as r\n"
        "send = r.Run.send_weights\n"
        "async def once(self):\n"
        "    if self.version == 0: await send(self)\n"
        "r.Run.send_weights = once\n"
        "from lingshu_rl.cli import train_main\n"
        "sys.exit(train_main(sys.argv[1:]))\n"
    )
    run = tmp_path / "run"
    settings = [*SHORT, *servers.settings, "train.warmup_steps=0", "train.lr=2e-3", "eval.limit=2", "eval.controls=[]"]
    done = launch([*settings, f"run.dir={run}"], env=servers.env, script=str(script))
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout[-3000:]
    assert "log-probs differ in step 2" in done.stdout and "holds other weights" in done.stdout
    assert f"the state after step 1 is in {run / 'checkpoints' / 'step-000001'}" in done.stdout


def test_a_reward_that_cannot_judge_stops_the_run_with_examples(servers, tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "from rewards import Reward, RewardResult\n"
        "class Broken(Reward):\n"
        "    name = 'broken'\n"
        "    def score(self, sample):\n"
        "        raise KeyError('no such finding')\n"
    )
    env = {**servers.env, "PYTHONPATH": str(tmp_path)}
    settings = [
        "rewards.spec={class: 'my_rewards:Broken'}",
        "rewards.preflight=false",
        "train.group_size=32",
        "eval.controls=[]",
    ]
    done = launch([*SHORT, *servers.settings, *settings, f"run.dir={tmp_path / 'run'}"], env=env)
    assert done.returncode != 0 and "could not be judged" in done.stdout and "no such finding" in done.stdout


def test_rewards_that_raise_hang_or_eat_memory_cost_their_own_samples_alone(servers, tmp_path):
    """In isolated workers; the run goes on, and masked samples are counted where they belong."""
    settings = [
        "rewards.spec={class: 'hostile_reward:Hostile'}",
        "rewards.executor=isolated",
        "rewards.timeout_s=1",
        "rewards.max_failed_share=1",
        "rewards.preflight=false",
        "eval.controls=[]",
        "eval.limit=4",
        "train.steps=1",
        "train.prompts_per_step=8",
        "data.curriculum=none",
        "seed=2",  # whose first step asks questions of all four kinds
    ]
    env = {**servers.env, "PYTHONPATH": str(ROOT / "tests")}
    run = tmp_path / "run"
    done = launch([*SHORT, *servers.settings, *settings, f"run.dir={run}"], env=env)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [row for file in sorted((run / "rollouts").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("yesno", "numeric", "report", "option")}
    assert all(by_kind.values())
    assert {row["status"] for row in by_kind["yesno"]} == {"error"}
    assert {row["status"] for row in by_kind["numeric"]} == {"timeout"}
    assert {row["status"] for row in by_kind["report"]} <= {"error", "timeout"}
    assert all(
        row["value"] is None and row["advantage"] is None
        for kind in ("yesno", "numeric", "report")
        for row in by_kind[kind]
    )
    assert all(row["value"] is not None for row in by_kind["option"])
    masked = [metrics["reward/masked"] for metrics in metrics_of(run)]
    assert sum(masked) == sum(len(by_kind[kind]) for kind in ("yesno", "numeric", "report"))
