import json

import pyarrow.parquet as pq
import pytest

from lingshu_rl.config import ConfigError, load_config
from lingshu_rl.runfolder import RunFolder, write_text
from lingshu_rl.types import Group, Prompt, Rollout, Scored
from rewards.base import RewardResult


def config_for(path, *settings):
    return load_config(None, [f"run.dir={path}", *settings])


def checkpoint(folder, step, keep_last=2):
    folder.save_checkpoint(step, {"step": step}, lambda p: (p / "weights").write_text("w"), is_main=True, barrier=lambda: None, keep_last=keep_last)  # fmt: skip


def test_the_newest_whole_checkpoint_is_found_and_old_ones_are_removed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.open(config_for(folder.path)) is None
    for step in (10, 20, 30):
        checkpoint(folder, step)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-000020", "step-000030"]
    # A save that was cut off leaves a .part folder, or one without run.json: neither is resumed from.
    (folder.checkpoints / "step-000040.part").mkdir()
    (folder.checkpoints / "step-000050").mkdir()
    assert folder.open(config_for(folder.path)).name == "step-000030"


def test_a_checkpoint_that_fails_leaves_the_last_good_one(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(config_for(folder.path))
    checkpoint(folder, 10)

    def full_disk(path):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.save_checkpoint(20, {}, full_disk, is_main=True, barrier=lambda: None, keep_last=1)
    assert folder.newest_checkpoint().name == "step-000010"


def test_other_settings_are_refused_and_harmless_ones_are_not(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(config_for(folder.path))
    checkpoint(folder, 10)
    with pytest.raises(ConfigError, match=r"train.lr: 0.0003 -> 0.1.*resume=never"):
        folder.open(config_for(folder.path, "train.lr=0.1"))
    assert (
        folder.open(config_for(folder.path, "train.steps=500", "checkpoint.every=3", "rollout.retries=5")).name
        == "step-000010"
    )


def test_never_resuming_keeps_the_old_folder_aside(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(config_for(folder.path))
    checkpoint(folder, 10)
    assert folder.open(config_for(folder.path, "resume=never")) is None
    assert (tmp_path / "run.old-1" / "checkpoints" / "step-000010").is_dir()


def test_a_named_checkpoint_must_be_one(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="is not a checkpoint folder"):
        folder.open(config_for(folder.path, f"resume={tmp_path}"))


def test_metrics_after_the_checkpoint_and_a_cut_line_are_dropped(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(config_for(folder.path))
    for step in (1, 2, 3):
        folder.log_metrics({"step": step})
    with open(folder.metrics, "a") as out:
        out.write('{"step": 4, "rew')
    folder.cut_metrics(2)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]


def test_rollouts_keep_masked_samples_and_reasons(tmp_path):
    prompt = Prompt(
        "q1", ({"role": "user", "content": "Which?"},), (), "B", ("CT", "MR"), "option", {"task": "modality"}
    )
    results = [
        RewardResult(1.0, "ok", "B", components={"answer": 1.0}),
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


def test_writing_is_all_or_nothing(tmp_path):
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
