"""Full disks, folders that may not be written, files in place of folders, damaged files: one line each, and what was good stays.

In mounts of a namespace of their own; root of a container may not make them everywhere, so such tests are skipped there.
"""

import json
import os
import subprocess
import sys

import pytest
from launching import ROOT

from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.storage.disk import said
from lingshu_rl.storage.runfolder import RunFolder, RunFolderError

# A checkpoint and some steps; then the disk changes (sys.argv[2]); then everything that a run writes is tried.
WRITES = """
import os, sys
from pathlib import Path
import torch
from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.storage.disk import DiskError
from lingshu_rl.storage.folders import own
from lingshu_rl.rollout.transfer import FileTransfer
from lingshu_rl.storage.runfolder import RunFolder, RunFolderError
from lingshu_rl.types import Group, Prompt, Rollout, Scored
from rewards.base import RewardResult
import asyncio

place, change = Path(sys.argv[1]), sys.argv[2]
config = load_config(None, [f"run.dir={place / 'run'}"])
folder = RunFolder(config.run.dir)
def save(step, size):
    folder.save_checkpoint(step, {"step": step}, lambda p: (p / "w").write_bytes(os.urandom(size)), is_main=True, barrier=lambda: None, keep_last=9)
with own(folder.path, "a run", "run.dir"):
    folder.begin(config, 0)
    folder.log_metrics({"step": 1})
    save(1, 1000)
if change == "full":
    with open(place / "filler", "wb", 0) as filler:
        try:
            while True: filler.write(bytes(4096))
        except OSError: pass
elif change == "read-only":
    assert os.system(f"mount -o remount,ro {place}") == 0
else:
    for name in ("rollouts", "eval", "logs", "reference"):
        (folder.path / name).write_text("a file")
prompt = Prompt("q", ({"role": "user", "content": "?"},), (), "B", (), "open", {})
group = Group(prompt, (Scored(Rollout(prompt, 0, "x" * 99999, (1,), (2,), (-0.1,), "stop", 4), RewardResult(1.0)),))
def new_folder():
    with own(place / "run" / "logs" / "new" if change == "file" else place / "new", "a run", "run.dir"):
        raise OSError(28, "No space left on device") if change == "full" else AssertionError  # an empty file fits still
async def weights():
    transfer = FileTransfer(None, place / "run" / "logs" if change == "file" else place)
    await transfer._send_part(None, {"a": torch.rand(99999)}, [])
tries = {
    "metrics": lambda: [folder.log_metrics({"step": 2, "x": "y" * 9000}) for _ in range(9)],
    "rollouts": lambda: folder.write_rollouts(2, [group], [(0.0,)]),
    "eval": lambda: folder.write_eval("before", [{"id": "a" * 9999}]),
    "checkpoint": lambda: save(2, 99999),
    "begin": lambda: folder.begin(load_config(None, [f"run.dir={place / 'run'}", "data.instruction=" + "x" * 9999]), 1),
    "weights": lambda: asyncio.run(weights()),
    "folder": new_folder,
}
for name, work in tries.items():
    try:
        work()
        print(f"{name}\\twritten")
    except (RunFolderError, ConfigError, DiskError, OSError) as error:
        print(f"{name}\\t{type(error).__name__}\\t{error}")
good = folder.newest_checkpoint()
print("left", sorted(p.name for p in folder.checkpoints.iterdir()) if change != "read-only" else [good.name])
"""
MAY = {"file": {"metrics": "written", "checkpoint": "written", "begin": "written"}}  # where nothing is in the way
SPEAKS = {
    "full": "No space left on device",
    "read-only": "Read-only file system|is not writable",
    "file": "ot a directory|File exists",
}


def in_small_disk(tmp_path, words):
    """A command in a namespace with an own disk of 256 KiB at the folder."""
    mounts = f"mount -t tmpfs -o size=256k none {tmp_path}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", f'{mounts}; exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)


@pytest.mark.parametrize("change", SPEAKS)
def test_all_that_a_run_writes_fails_in_one_line_that_names_it(change, tmp_path):
    import re

    done = in_small_disk(tmp_path, [sys.executable, "-c", WRITES, str(tmp_path), change])
    *lines, left = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 7, done.stdout + done.stderr
    for line in lines:
        name, kind, *told = line.split("\t")
        if MAY.get(change, {}).get(name) == kind:
            continue
        assert kind in ("RunFolderError", "ConfigError", "DiskError"), line
        assert str(tmp_path) in told[0] and re.search(SPEAKS[change], told[0]), line
        assert change != "full" or re.search(
            r"\d MB of [\d.]+ MB are free|\d MB are free, a checkpoint takes", told[0]
        ), line
    assert "step-000001" in left and "part" not in left


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "read-only", "a file"])
@pytest.mark.parametrize("command", ["train", "sft", "curate"])
def test_a_command_that_cannot_write_says_so_in_a_line(command, how, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "images": [], "question": "Q", "answer": "yes", "kind": "yesno"}) + "\n")  # fmt: skip
    disk = tmp_path / "disk"
    disk.mkdir()
    out = disk / "out"
    (tmp_path / "curate.yaml").write_text(json.dumps({"out": str(out), "sources": [{"path": str(tmp_path / "rows.jsonl")}], "steps": []}))  # fmt: skip
    (tmp_path / "empty.yaml").write_text("{}")
    words = {
        "train": ["train", f"run.dir={out}", "model=demo"],
        "sft": ["sft", str(tmp_path / "empty.yaml"), f"dir={out}", "stages.a.data=[demo:train]", "stages.a.lr.language=1e-4", "model=demo"],
        "curate": ["curate", str(tmp_path / "curate.yaml")],
    }[command]  # fmt: skip
    before = {
        "full": f"dd if=/dev/zero of={disk}/filler 2>/dev/null || true; for i in $(seq 2000); do : > {disk}/$i || break; done 2>/dev/null",
        "read-only": f"mount -o remount,ro {disk}",
        "a file": f": > {out}",
    }[how]
    script = f'{before}; exec {sys.executable} -m lingshu_rl.cli "$@"'
    done = in_small_disk(disk, ["sh", "-c", script, "sh", *words])
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if str(out) in line]
    assert len(told) == 1, done.stderr[-2000:]


def begun(tmp_path):
    config = load_config(None, [f"run.dir={tmp_path / 'run'}"])
    folder = RunFolder(config.run.dir)
    folder.begin(config, 0)
    for step in (1, 2):
        folder.log_metrics({"step": step})
        folder.write_eval(f"step-{step:06d}", [{"id": "a", "value": 1.0}, {"id": "b", "value": 0.0}])
        folder.save_checkpoint(step, {"step": step}, lambda p: (p / "w").write_text("w"), is_main=True, barrier=lambda: None, keep_last=9)  # fmt: skip
    return folder, config


@pytest.mark.parametrize("damage", ["cut", "zeros", "letters"])
@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "eval/step-000001.jsonl", "fork.json", ".id", "checkpoints/step-000002/run.json", "versions.json"])  # fmt: skip
def test_a_damaged_file_of_a_run_costs_a_line_at_the_most(file, damage, tmp_path):
    folder, config = begun(tmp_path)
    (folder.path / "fork.json").write_text(json.dumps({"checkpoint": str(tmp_path / "other"), "step": 1}))
    identity = folder.identity
    place = folder.path / file
    good = place.read_bytes()
    place.write_bytes(
        {"cut": good[: len(good) * 2 // 3], "zeros": bytes(len(good)), "letters": b"\xff{" + good[2:]}[damage]
    )
    told = []
    try:
        again = RunFolder(folder.path)
        checkpoint = again.open(config)
        again.begin(config, int(checkpoint.name[5:]))
        again._forked_from(tmp_path / "other")
        again.read_evals()
        assert again.identity in (identity, again.identity) and again.identity
        told = again.complaints
    except (ConfigError, RunFolderError) as error:
        told = [str(error)]
    assert len(told) <= 2 and all("\n" not in line for line in told)
    silent = file in ("versions.json", ".id") or (damage == "letters" and file == "config.yaml")
    # A configuration that was cut between two lines is one with fewer settings.
    named = (place.name, "run.json", "holds a run with other settings")
    assert silent or any(name in line for line in told for name in named), told


def test_what_the_system_says_is_a_line_with_the_file():
    assert said(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    assert said(ValueError("a\nb")) == "a b" and said(KeyError()) == "KeyError"
    full = said(OSError(122, "Disk quota exceeded", "/tmp/x"))
    assert full.startswith("/tmp/x: Disk quota exceeded (") and "MB are free; a quota may leave less" in full


def test_the_folder_of_a_shortened_resume_tells_of_what_was_done(tmp_path):
    """Ten steps are done; then the run goes on from the fourth under train.steps=5, and is looked at on the way."""
    folder, _ = begun(tmp_path)
    for name in ("after", "after_blank", "before"):
        folder.write_eval(name, [{"id": "a"}])
    folder.summary.write_text(json.dumps({"steps": 2}))
    (folder.path / "report.html").write_text("ten steps")
    (folder.checkpoints / "step-000009.part").mkdir()
    shorter = load_config(None, [f"run.dir={folder.path}", "train.steps=5", f"resume={folder.checkpoint(1)}"])
    wrong = load_config(None, [f"run.dir={folder.path}", "train.steps=1", "train.lr=9"])
    stored = (folder.path / "config.yaml").read_text()
    with pytest.raises(ConfigError):  # what does not start changes nothing
        folder.open(wrong)
    assert folder.open(shorter) == folder.checkpoint(1) and (folder.path / "config.yaml").read_text() == stored
    folder.begin(shorter, 1)
    assert "steps: 5" in (folder.path / "config.yaml").read_text()
    assert not folder.summary.exists() and not (folder.path / "report.html").exists()
    assert sorted(folder.read_evals()) == ["before", "step-000001"]
    assert len(folder.metrics.read_text().splitlines()) == 1
    assert sorted(p.name for p in folder.checkpoints.iterdir() if p.name != "best") == [
        "step-000001",
        "step-000002.aside",
    ]
    assert any("step-000002 is set aside" in line for line in folder.complaints)
    assert folder.newest_checkpoint() == folder.checkpoint(1)
