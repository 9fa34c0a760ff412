"""Short real runs: real vLLM, real DeepSpeed, a real reference process, real images."""

import itertools
import json
import os
import signal
import time

import httpx
import pyarrow.parquet as pq
import pytest
from launching import TOKEN, launch
from short_runs import SHORT, engines_of, metrics_of, started

from lingshu_rl.demo.build import build_demo
from lingshu_rl.rollout.client import GENERATED, tokens_counted

pytestmark = pytest.mark.slow
REFILLS = "train.max_refills=1"


def untimed(metrics):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics]


@pytest.fixture(scope="module")
def whole_run(servers, tmp_path_factory):
    """Four steps in one go, with evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    timeouts = ["rollout.start_timeout_s=99", "reference.start_timeout_s=99", "rollout.concurrency=16"]
    done = launch([*SHORT, REFILLS, *servers.settings, *timeouts, "train.steps=4", "checkpoint.every=2", "eval.every=2", f"run.dir={folder}"], env=servers.env, processes=1)  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def test_a_run_leaves_everything_a_reader_needs(whole_run):
    folder, output = whole_run
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("before", "after"):
        assert set(summary[key]) >= {"accuracy", "ci95", "n"} and summary[key]["n"] == 24
    assert set(summary["gain"]) >= {"points", "ci95"} and summary["steps"] == 4
    assert {"accuracy", "ci95"} <= set(summary["blank_image"]) and {"accuracy", "ci95"} <= set(
        summary["shuffled_image"]
    )
    assert set(summary["seconds_by_phase"]) >= {"rollout", "reward", "reference", "update", "weight_sync"}
    assert set(summary["versions"]) >= {"vllm", "deepspeed", "trl", "transformers", "accelerate", "torch"}
    assert summary["kl_first_step"] < 1e-5 and summary["max_logprob_gap_first_step"] < 1e-3
    assert summary["engine_generated_tokens"] > 0 and summary["zero_stage"] == 0
    assert "ZeRO stage 0" in output and "step 4/4" in output
    assert summary["by_kind"] and all("before" in v and "blank_image" in v for v in summary["by_kind"].values())
    assert (folder / "report.html").stat().st_size > 10_000
    for name in ("before", "after", "before_blank", "after_shuffled", "step-000002"):
        assert (folder / "eval" / f"{name}.jsonl").exists()
    rows = pq.read_table(folder / "rollouts" / "step-000001.parquet").to_pylist()
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert len(rows) == 4 * first["prompts/drawn"] and 4 <= first["prompts/drawn"] == first["cursor"] <= 8
    assert first["groups/trained"] <= 4 and {r["weight_version"] for r in rows} == {0}
    rows = pq.read_table(folder / "rollouts" / "step-000002.parquet").to_pylist()
    assert {r["weight_version"] for r in rows} == {1}
    assert list(folder.glob("events.out.tfevents*")) or list(folder.rglob("events.out.tfevents*"))


def test_the_checkpoint_is_an_ordinary_hugging_face_folder(whole_run):
    import torch

    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.model.loading import load_model

    hf = whole_run[0] / "checkpoints" / "step-000004" / "hf"
    trained, start = load_model(str(hf), torch.float32), load_model("demo", torch.float32)
    PromptEncoder(str(hf))
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(whole_run, servers, tmp_path):
    folder = tmp_path / "run"
    settings = [*SHORT, REFILLS, *servers.settings, "checkpoint.every=2", "eval.every=2", f"run.dir={folder}"]
    assert launch([*settings, "train.steps=2"], env=servers.env).returncode == 0
    done = launch([*settings, "train.steps=4"], env=servers.env)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    straight, resumed = untimed(metrics_of(whole_run[0])), untimed(metrics_of(folder))
    assert [m["step"] for m in resumed] == [1, 2, 3, 4]
    assert resumed == straight


def test_a_reference_that_dies_is_started_again_and_changes_no_number(whole_run, servers, tmp_path):
    folder = tmp_path / "run"
    process, log = started([REFILLS, f"rollout.urls=[{servers.rollout}]", "train.steps=4", "checkpoint.every=2", "eval.every=2"], folder,
                           servers.env, "step 1/4")  # fmt: skip
    os.kill(engines_of(folder)[0], signal.SIGKILL)
    assert process.wait(600) == 0, log.read_text()
    assert "reference server 0 was killed by SIGKILL" in log.read_text()
    assert untimed(metrics_of(folder)) == untimed(metrics_of(whole_run[0]))


def test_rollouts_one_step_ahead_survive_a_preemption_to_the_last_digit(servers, tmp_path):
    """Uninterrupted against stopped by SIGTERM in the middle and gone on with."""
    settings = [*servers.settings, "train.max_staleness=1", "data.curriculum=none", "train.steps=5", "eval.controls=[]"]
    straight = launch([*SHORT, *settings, f"run.dir={tmp_path / 'straight'}"], env=servers.env)
    assert straight.returncode == 0, straight.stdout
    rows = metrics_of(tmp_path / "straight")
    assert [r["staleness"] for r in rows] == [0, 1, 1, 1, 1] and rows[-1]["policy/rollout_gap_max"] > 1e-3
    assert all(a["time/start/update"] < b["time/start/rollout"] < a["time/end/update"] for a, b in itertools.pairwise(rows) if b["staleness"])  # fmt: skip
    process, log = started(settings, tmp_path / "run", servers.env, "step 2/5")
    process.terminate()
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while "goes on from there" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    done = launch([*SHORT, *settings, f"run.dir={tmp_path / 'run'}"], env=servers.env)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    assert untimed(metrics_of(tmp_path / "run")) == untimed(rows)


def test_engines_in_the_processes_of_two_ranks_give_the_same_numbers_as_a_server(whole_run, servers, tmp_path):
    folder = tmp_path / "run"
    env = {**servers.env, "OMP_NUM_THREADS": "1"}
    settings = [REFILLS, f"reference.urls=[{servers.reference}]", "rollout.placement=colocate", "eval.controls=[]"]  # fmt: skip
    done = launch([*SHORT, *settings, f"run.dir={folder}"], env=env, processes=2)
    assert done.returncode == 0, done.stdout
    assert len(metrics_of(folder)) == 2 and "Traceback" not in done.stdout
    assert done.stdout.count("max_seq_len=104") == 2  # each engine's: the longest prompt, 64 tokens, and 40
    for one, other in zip(untimed(metrics_of(whole_run[0])), untimed(metrics_of(folder)), strict=False):
        assert one["tokens/generated"] == other["tokens/generated"] and one["reward/mean"] == other["reward/mean"]
        assert other["policy/rollout_gap_max"] < 1e-3 and one["policy/kl"] == pytest.approx(
            other["policy/kl"], rel=1e-3, abs=1e-8
        )
    assert json.loads((folder / "summary.json").read_text())["engine_generated_tokens"] > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_two_policy_ranks_train_and_do_what_one_does(stage, whole_run, servers, tmp_path):
    folder = tmp_path / "run"
    env = {**servers.env, "OMP_NUM_THREADS": "1"}
    settings = [
        *SHORT,
        REFILLS,
        *servers.settings,
        f"run.dir={folder}",
        f"deepspeed.zero_optimization.stage={stage}",
        "eval.limit=8",
    ]
    done = launch(settings, env=env, processes=2, timeout_s=900)
    assert done.returncode == 0, done.stdout
    assert f"ZeRO stage {stage}" in done.stdout and "2 rank(s)" in done.stdout
    one, two = metrics_of(whole_run[0])[:2], metrics_of(folder)
    # The second step runs on weights that the first step's ranks made together.
    for a, b in zip(one, two, strict=True):
        for key in ("reward/mean", "policy/loss", "policy/grad_norm", "policy/kl", "tokens/generated"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), key


LORA = ["train.lora={r: 4, target_modules: [q_proj, v_proj]}", "loss.kl_coef=0", "run.trackers=[]"]


def as_llava(folder):
    """Some of the demo's rows as another project would have them."""
    demo = build_demo()
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()]
    records = [
        {"id": n, "image": str(demo / row["images"][0]), "conversations": [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]}
        for n, row in enumerate(row for row in rows if row["kind"] == "yesno")
    ]  # fmt: skip
    (folder / "others.json").write_text(json.dumps(records[:20]))
    return {"path": str(folder / "others.json"), "name": "others", "format": "llava", "share": 1}


def generated(servers):
    """Tokens that the shared rollout server has generated so far."""
    answer = httpx.get(f"{servers.rollout}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).raise_for_status()
    return int(tokens_counted(answer.text, [GENERATED]))


def test_lora_freezing_checkpointing_and_several_optimizer_steps_on_a_mixture(servers, tmp_path):
    folder = tmp_path / "run"
    mixture = json.dumps([{"path": "demo:train", "share": 1}, as_llava(tmp_path)])
    settings = [*LORA, f"data.train={mixture}", "data.test=demo:test", "data.curriculum=none", "train.gradient_checkpointing=true", "train.optimizer_steps=2", "advantage.variant=gdpo",
                "train.lr_schedule=cosine", "train.weight_decay=0.01"]  # fmt: skip
    before = generated(servers)
    done = launch([*SHORT, f"rollout.urls=[{servers.rollout}]", *settings, f"run.dir={folder}"], env=servers.env)
    assert done.returncode == 0, done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["engine_generated_tokens"] == generated(servers) - before > 0  # this run's alone
    assert "kl_first_step" not in summary and "starting" not in done.stdout  # no reference, and no server of its own
    rows = metrics_of(folder)
    assert rows[1]["policy/rollout_gap_max"] < 1e-3  # the merged adapters reached the engine
    assert "policy/kl" not in rows[0] and rows[0]["lr"] > rows[1]["lr"] * 0.5
    assert sum(row.get("prompts/source/others", 0) for row in rows) > 0


def test_adapters_alone_reach_the_engine_also_when_it_was_started_again(tmp_path):
    import torch

    from lingshu_rl.model.loading import load_model

    folder = tmp_path / "run"
    settings = [*LORA, "train.lr=2e-3", "train.steps=4", "eval.controls=[]"]
    process, log = started(settings, folder, os.environ.copy(), "step 2/4")
    os.kill(engines_of(folder)[0], signal.SIGKILL)
    assert process.wait(600) == 0, log.read_text()
    assert "rollout server 0 is back" in log.read_text()
    assert "Loaded new LoRA adapter" in (folder / "logs" / "rollout-0.log").read_text()  # by default, for such a run
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert max(row["policy/rollout_gap_max"] for row in rows) < 1e-3
    assert all(row["policy/grad_norm"] > 0 for row in rows[:2])
    for step, row in enumerate(
        pq.read_table(file).to_pylist()[0] for file in sorted(folder.glob("rollouts/*.parquet"))
    ):
        assert row["weight_version"] == step
    # Far enough from the start that an engine without the adapters would have been seen in the gap.
    start, end = (load_model(m, torch.float32) for m in ("demo", str(folder / "checkpoints" / "step-000004" / "hf")))
    pairs = zip(start.parameters(), end.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-3


def test_a_fork_trains_on_to_its_end_in_its_own_folder_and_other_rows_are_refused(whole_run, servers, tmp_path):
    """From step 2 of the whole run, with another rate and group size; then the same command once more, on other rows."""
    old, folder = whole_run[0], tmp_path / "fork"
    there = {f: f.stat().st_mtime_ns for f in old.rglob("*")}
    rows = [{"id": f"q{n}", "images": [], "question": "?", "options": ["a", "b"], "answer": "A", "kind": "option"} for n in range(8)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*SHORT, *servers.settings, f"resume={old / 'checkpoints' / 'step-000002'}", f"run.dir={folder}",
                "train.lr=1e-5", "train.group_size=2", f"data.train={tmp_path / 'rows.jsonl'}", "data.test=demo:test",
                "data.curriculum=none", "train.steps=3", "eval.controls=[]", "rollout.concurrency=16"]  # fmt: skip
    done = launch(settings, env=servers.env)
    assert done.returncode == 0 and "train.group_size: 4 -> 2" in done.stdout and "data.train:" in done.stdout, (
        done.stdout
    )
    metrics = metrics_of(folder)
    assert [m["step"] for m in metrics] == [1, 2, 3] and metrics[2]["lr"] < metrics[1]["lr"] / 5
    summary = json.loads((folder / "summary.json").read_text())
    asked = [summary[when]["n"] + summary[when]["not_judged"] for when in ("before", "after")]
    assert asked == [24, 24] and (folder / "report.html").exists()
    assert {f: f.stat().st_mtime_ns for f in old.rglob("*")} == there
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    again = launch([*settings, "train.steps=4"], env=servers.env)
    assert again.returncode == 1 and "other rows (data.train: 8 rows -> 7 rows)" in again.stdout, again.stdout
