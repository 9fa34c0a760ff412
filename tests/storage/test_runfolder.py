import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lingshu_rl.data.load import load
from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.state import RunState, data_changes, seen
from lingshu_rl.storage.folders import own
from lingshu_rl.storage.runfolder import RunFolder, RunFolderError, write_text
from lingshu_rl.types import Group, Prompt, Rollout, Scored
from rewards.base import RewardResult


def config_for(path, *settings):
    return load_config(None, [f"run.dir={path}", *settings])


def begun(folder, *settings):
    """The folder as a run has it that has just begun, or been gone on with."""
    config = config_for(folder.path, *settings)
    found = folder.open(config)
    folder.begin(config, RunState.read(found).step if found else 0)
    return found


def checkpoint(folder, step, keep_last=2, keep_best=False, **state):
    folder.save_checkpoint(step, {"step": step, **state}, lambda p: (p / "weights").write_text("weights"), is_main=True,
                           barrier=lambda: None, keep_last=keep_last, keep_best=keep_best)  # fmt: skip


def names(folder):
    return sorted(p.name for p in folder.checkpoints.iterdir())


def test_the_newest_whole_checkpoint_is_found_and_old_ones_are_removed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert begun(folder) is None
    for step in (10, 20, 30):
        checkpoint(folder, step)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-000020", "step-000030"]
    # A save that was cut off leaves a .part folder, or one without run.json: neither is resumed from.
    (folder.checkpoints / "step-000040.part").mkdir()
    (folder.checkpoints / "step-000050").mkdir()
    assert folder.open(config_for(folder.path)).name == "step-000030"


def test_a_checkpoint_that_fails_leaves_the_last_good_one(tmp_path):
    folder = RunFolder(tmp_path / "run")
    begun(folder)
    checkpoint(folder, 10)

    def full_disk(path):
        raise OSError("No space left on device")

    with pytest.raises(
        RunFolderError,
        match=r"step-000020 could not be written \(OSError: No space.*last good checkpoint is .*step-000010",
    ):
        folder.save_checkpoint(20, {}, full_disk, is_main=True, barrier=lambda: None, keep_last=1)
    assert folder.newest_checkpoint().name == "step-000010"


def test_other_settings_are_refused_and_harmless_ones_are_not(tmp_path):
    folder = RunFolder(tmp_path / "run")
    begun(folder)
    checkpoint(folder, 10)
    with pytest.raises(ConfigError, match=r"train.lr: 0.0004 -> 0.1.*resume=never"):
        folder.open(config_for(folder.path, "train.lr=0.1"))
    assert (
        folder.open(config_for(folder.path, "train.steps=500", "checkpoint.every=3", "rollout.retries=5")).name
        == "step-000010"
    )


def test_never_resuming_keeps_the_old_folder_aside(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with own(folder.path, "a run", "run.dir", afresh=True):
        begun(folder)
        checkpoint(folder, 10)
    with own(folder.path, "a run", "run.dir", afresh=True):
        assert folder.open(config_for(folder.path, "resume=never")) is None
    assert (tmp_path / "run.old-1" / "checkpoints" / "step-000010").is_dir()


def test_a_named_checkpoint_must_be_one(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="is not a checkpoint folder"):
        folder.open(config_for(folder.path, f"resume={tmp_path}"))


def test_metrics_after_the_checkpoint_and_a_cut_line_are_dropped(tmp_path):
    folder = RunFolder(tmp_path / "run")
    begun(folder)
    for step in (1, 2, 3):
        folder.log_metrics({"step": step})
    with open(folder.metrics, "a") as out:
        out.write('{"step": 4, "rew')
    (complaint,) = folder.cut_metrics(2)
    assert "ended in unreadable text (line 4)" in complaint
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]


def test_rollouts_keep_masked_samples_and_reasons(tmp_path):
    prompt = Prompt(
        "q1", ({"role": "user", "content": "Which?"},), (), "B", ("CT", "MR"), "option", {"task": "modality"}
    )
    results = [
        RewardResult(1.0, "ok", "B", components={"answer": 1.0}, spans={"answer": [(8, 9, 1.0)]}),
        RewardResult(None, "timeout", reason="no result"),
    ]
    members = tuple(
        Scored(Rollout(prompt, i, "<answer>B</answer>", (1,), (2, 3), (-0.1, -0.2), "stop", 4), r)
        for i, r in enumerate(results)
    )
    folder = RunFolder(tmp_path)
    folder.write_rollouts(7, [Group(prompt, members)], [(0.5, None)])
    rows = pq.read_table(tmp_path / "rollouts" / "step-000007.parquet").to_pylist()
    assert [(r["value"], r["status"], r["advantage"], r["tokens"]) for r in rows] == [
        (1.0, "ok", 0.5, 2),
        (None, "timeout", None, 2),
    ]
    assert rows[0]["options"] == ["CT", "MR"] and json.loads(rows[0]["components"]) == {"answer": 1.0}
    assert [json.loads(row["spans"]) for row in rows] == [{"answer": [[8, 9, 1.0]]}, {}]


def test_writing_is_all_or_nothing(tmp_path):
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_metrics_that_lost_steps_say_so_and_a_broken_middle_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"step": 4}\n\x00\x00\x00')
    complaints = folder.cut_metrics(5)
    assert "line 3" in complaints[0] and "lacks the metrics of step(s) 2-3, 5" in complaints[1]
    folder.metrics.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"line 2 of .*metrics.jsonl"):
        folder.cut_metrics(3)


@pytest.mark.parametrize("damage", ["cut", "missing", "changed", "run.json"])
def test_a_damaged_checkpoint_is_passed_over_loudly_for_the_one_before(tmp_path, damage):
    folder = RunFolder(tmp_path / "run")
    begun(folder)
    for step in (10, 20):
        checkpoint(folder, step)
    file = folder.checkpoint(20) / ("run.json" if damage == "run.json" else "weights")
    file.unlink() if damage == "missing" else file.write_text(
        "Weights" if damage == "changed" else file.read_text()[:3]
    )
    assert folder.open(config_for(folder.path)).name == "step-000010"
    assert len(folder.complaints) == 1 and "step-000020 is damaged" in folder.complaints[0]
    with pytest.raises(ConfigError, match=r"weights|run\.json"):
        folder.open(config_for(folder.path, f"resume={folder.checkpoint(20)}"))
    (folder.checkpoint(10) / "weights").unlink()
    with pytest.raises(ConfigError, match=r"(?s)no checkpoint is whole.*resume=never"):
        RunFolder(folder.path).open(config_for(folder.path))


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    folder = RunFolder(tmp_path / "run")
    begun(folder, "checkpoint.keep_best=true")
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.7), (5, 0.6), (6, 0.6)):
        checkpoint(folder, step, keep_last=2, keep_best=True, accuracy=accuracy)
    assert names(folder) == ["best", "step-000003", "step-000005", "step-000006"]
    assert (folder.checkpoints / "best").resolve().name == "step-000003"
    assert folder.open(config_for(folder.path)).name == "step-000006"
    checkpoint(folder, 7, keep_last=2, keep_best=True, accuracy=None)
    assert names(folder) == ["best", "step-000003", "step-000006", "step-000007"]


def test_a_full_disk_is_seen_before_it_is_written_on(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    begun(folder)
    checkpoint(folder, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3})())
    with pytest.raises(
        RunFolderError, match=r"0\.0 MB are free, a checkpoint takes 0\.0 MB.*last good checkpoint is .*step-000010"
    ):
        checkpoint(folder, 20)
    assert names(folder) == ["step-000010"]


def test_writing_past_a_real_limit_keeps_what_was_there(tmp_path):
    """The kernel's file size limit stands in for a disk that fills up in the middle of a file."""
    script = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from lingshu_rl.storage.runfolder import RunFolder, RunFolderError
from lingshu_rl.state import data_changes, seen
from lingshu_rl.planning.given import load_config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = RunFolder(sys.argv[1])
folder.begin(load_config(None, ["run.dir=" + sys.argv[1]]), 0)
def save(step, size):
    folder.save_checkpoint(step, {"step": step}, lambda p: (p / "w").write_bytes(b"x" * size), is_main=True, barrier=lambda: None, keep_last=1)
save(1, 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for work in (lambda: save(2, 50_000), lambda: [folder.log_metrics({"step": i, "x": "y" * 3000}) for i in range(9)]):
    try:
        work()
        print("written")
    except RunFolderError as error:
        print(error)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(root)], capture_output=True, text=True
    )
    checkpoint_line, metrics_line = done.stdout.splitlines()
    assert "step-000002 could not be written (OSError" in checkpoint_line and "step-000001" in checkpoint_line
    assert "metrics.jsonl could not be written (OSError" in metrics_line
    folder = RunFolder(tmp_path / "run")
    assert names(folder) == ["step-000001"] and folder.newest_checkpoint().name == "step-000001"
    assert len(folder.cut_metrics(0)) == 1  # the line that was cut off


def other_run(path, step, **state):
    """A folder with a run of so many steps, its evaluations, rollouts and a checkpoint."""
    folder = RunFolder(path)
    begun(folder)
    for done in range(1, step + 3):
        folder.log_metrics({"step": done})
        (path / "rollouts").mkdir(exist_ok=True)
        (path / "rollouts" / f"step-{done:06d}.parquet").write_text(str(done))
        folder.write_eval(f"step-{done:06d}", [{"id": "a", "value": 1.0}])
    for name in ("before", "before_blank", "after"):
        folder.write_eval(name, [{"id": "a", "value": 1.0}])
    (folder.references / "step-000001").mkdir(parents=True)
    (folder.references / "step-000001" / "weights").write_text("w")
    checkpoint(folder, step, reference="step-000001", **state)
    return folder


def contents(path):
    return {str(f.relative_to(path)): (f.read_bytes(), f.stat().st_mtime_ns) for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("named", ["", "checkpoints/step-000002"])
def test_a_fork_takes_over_what_was_done_and_leaves_the_old_folder_alone(tmp_path, named):
    old = other_run(tmp_path / "old", 2)
    before = contents(old.path)
    new, resume = RunFolder(tmp_path / "new"), f"resume={old.path / named}"
    settings = [resume, "train.lr=0.5", "train.group_size=4"]
    assert new.open(config_for(new.path, *settings)) == old.checkpoint(2)
    assert new.forked and "train.group_size: 8 -> 4; train.lr: 0.0004 -> 0.5" in new.complaints[0]
    new.begin(config_for(new.path, *settings), 2)
    assert len(new.complaints) == 1 and len(new.metrics.read_text().splitlines()) == 2
    assert sorted(new.read_evals()) == ["before", "before_blank", "step-000001", "step-000002"]
    assert len(list(new.path.glob("rollouts/*"))) == 2 and (new.references / "step-000001" / "weights").exists()
    checkpoint(new, 3)
    assert contents(old.path) == before
    again = RunFolder(new.path)  # the same command goes on in the new folder, under its own settings
    assert again.open(config_for(new.path, *settings)) == new.checkpoint(3) and not again.forked
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        RunFolder(new.path).open(config_for(new.path, resume, "train.lr=0.7", "train.group_size=4"))
    third = other_run(tmp_path / "third", 2)
    with pytest.raises(ConfigError, match="holds a run that did not go on from"):
        third.open(config_for(third.path, resume))


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    folder = other_run(tmp_path / "run", 5)
    with pytest.raises(ConfigError, match=r"train.steps=4 is fewer than the 5 done"):
        folder.open(config_for(folder.path, "train.steps=4"))
    assert folder.open(config_for(folder.path, "train.steps=5")) == folder.checkpoint(5)
    with pytest.raises(ConfigError, match=r"train.group_size: 8 -> 4"):
        folder.open(config_for(folder.path, "train.group_size=4"))


def test_other_rows_are_refused_in_the_same_folder_and_named_in_a_fork(tmp_path):
    rows = [{"id": f"r{n}", "images": [], "question": "?", "answer": "yes", "kind": "yesno"} for n in range(3)]
    now = seen({"train": load(rows), "test": load(rows[:1])})
    assert data_changes(now, seen({"train": load(rows), "test": load(rows[:1])})) == data_changes({}, now) == []
    other = {"train": load([*rows[:2], {**rows[2], "answer": "no"}]), "test": load(rows[1:])}
    changed = data_changes(now, seen(other))
    assert changed == ["data.train: 3 rows -> 3 rows of other content", "data.test: 1 rows -> 2 rows"]
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"other rows \(data.train: 3 rows .*resume=never"):
        folder.judge_changes(changed, "rows")
    folder.forked = True
    folder.judge_changes(changed, "rows")
    assert "data.test: 1 rows -> 2 rows" in folder.complaints[0]


def test_what_a_start_finds_out_is_not_asked_for_again_when_the_run_goes_on(tmp_path, monkeypatch):
    """The engine's max_model_len and the token budget follow from prompts and machine; the same command must go on."""
    import asyncio
    import contextlib
    from types import SimpleNamespace

    from lingshu_rl import run as runs
    from lingshu_rl.processes.mainrank import Stop

    config, started = load_config(None, [f"run.dir={tmp_path}", "rewards.preflight=false"]), []

    def policy(config, on_gpu):
        return SimpleNamespace(
            accelerator=SimpleNamespace(is_main_process=True), share=lambda value: value, know=lambda *_: None, ranks=1,
            parameters=0, zero_stage=0, layout_note="", start_trackers=lambda _: None,
        )  # fmt: skip

    def launches(config, *_, **__):
        started.append((config.rollout.vllm["max_model_len"], config.packing.token_budget))
        return []

    async def connected(run, *_):
        started.append((run.config.rollout.vllm["max_model_len"], run.policy.token_budget))

    async def begin():
        async with contextlib.AsyncExitStack() as closing:
            run = await runs._open(config, Stop(), closing)
            run.folder.save_checkpoint(
                1, replace(run.state, step=1).to_json(), lambda folder: None, is_main=True, barrier=lambda: None, keep_last=1
            )  # fmt: skip

    for name, stand_in in {"Policy": policy, "launches": launches, "_connect": connected}.items():
        monkeypatch.setattr(runs, name, stand_in)
    asyncio.run(begin())
    assert started[0] == started[1] and started[0][0] > config.rollout.max_tokens and started[0][1] == 4096
    assert RunFolder(tmp_path).open(config) == RunFolder(tmp_path).checkpoint(1)
