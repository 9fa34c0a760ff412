"""A folder is one command's at a time, whichever commands they are."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lingshu_rl.failures import ConfigError
from lingshu_rl.storage import folders
from lingshu_rl.storage.folders import InUse, own
from lingshu_rl.synth.rows import write_outcomes

ROOT = Path(__file__).resolve().parents[2]
HOLD = "import sys, time\nfrom pathlib import Path\nfrom lingshu_rl.storage.folders import own\nwith own(Path(sys.argv[1]), 'a run', 'run.dir'):\n    print('held', flush=True)\n    time.sleep(600)\n"


@pytest.fixture
def at_once(monkeypatch):
    """A holder that lives is not waited for."""
    monkeypatch.setattr(folders, "PATIENCE_S", 0.0)


@pytest.fixture
def held(tmp_path):
    """A folder in which another process works."""
    folder = tmp_path / "taken"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    yield folder, holder
    holder.kill()
    holder.wait()


def test_the_holder_is_named_and_a_killed_one_holds_nothing(held, at_once):
    folder, holder = held
    with (
        pytest.raises(InUse, match=rf"in use by process {holder.pid} on .* \(a run\): .*\(run\.dir\)"),
        own(folder, "a run", "run.dir"),
    ):
        raise AssertionError
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):
        with own(folder, "a run", "run.dir"):
            pass


def test_a_holder_that_is_just_ending_is_waited_for(held):
    folder, holder = held
    threading.Timer(0.5, holder.kill).start()
    with own(folder, "a run", "run.dir"):
        assert holder.poll() is not None or holder.wait() is not None


def test_a_folder_in_use_is_not_kept_aside(held, at_once):
    folder, _ = held
    (folder / "metrics.jsonl").write_text("{}")
    with pytest.raises(InUse), own(folder, "a run", "run.dir", afresh=True):
        raise AssertionError
    assert (folder / "metrics.jsonl").exists() and not folder.with_name("taken.old-1").exists()


def test_an_old_folder_is_kept_aside_and_an_empty_one_is_not(tmp_path, at_once):
    folder = tmp_path / "run"
    with own(folder, "a run", "run.dir", afresh=True):
        (folder / "a").write_text("old")
    with own(folder, "a run", "run.dir", afresh=True):
        assert not (folder / "a").exists() and (tmp_path / "run.old-1" / "a").read_text() == "old"
        with pytest.raises(InUse), own(folder, "a run", "run.dir"):
            raise AssertionError
    with own(folder, "a run", "run.dir", afresh=True):
        assert not (tmp_path / "run.old-2").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"run\.dir=.*file/run cannot be written"),
        own(tmp_path / "file" / "run", "a run", "run.dir"),
    ):
        raise AssertionError


def test_every_command_that_writes_a_folder_refuses_one_in_use(held, tmp_path):
    folder, holder = held
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "images": [], "question": "Q", "answer": "yes", "kind": "yesno"}) + "\n")  # fmt: skip
    (tmp_path / "curate.yaml").write_text(json.dumps({"out": str(folder), "sources": [{"path": str(tmp_path / "rows.jsonl")}], "steps": []}))  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(
        json.dumps({"dir": str(folder), "steps": {"a": {"run": "true", "outputs": ["x"]}}})
    )
    (tmp_path / "empty.yaml").write_text("{}")
    sft = ["stages.a.data=[demo:train]", "stages.a.lr.language=1e-4", "model=demo"]
    commands = [
        ["curate", str(tmp_path / "curate.yaml")],
        ["pipeline", str(tmp_path / "pipeline.yaml")],
        ["sft", str(tmp_path / "empty.yaml"), f"dir={folder}", *sft],
        ["eval", "--model", "demo", "--benchmarks", "pubmedqa", "--data", str(tmp_path), "--out", str(folder)],
        ["train", f"run.dir={folder}", "model=demo"],
    ]
    tried = [
        subprocess.Popen([sys.executable, "-m", "lingshu_rl.cli", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for words in commands
    ]
    for words, process in zip(commands, tried, strict=True):
        _, told = process.communicate(timeout=300)
        assert process.returncode in (1, 2), (words, told)
        assert f"is in use by process {holder.pid}" in told and "Traceback" not in told, (words, told)
    assert sorted(p.name for p in folder.iterdir()) == [".lock"]


def test_two_syntheses_do_not_write_one_file(tmp_path, at_once):
    out = tmp_path / "rows.jsonl"
    with own(out, "synthesis", "--out", file=True), pytest.raises(InUse, match=r"rows\.jsonl is in use"):
        asyncio.run(write_outcomes([], out))
    asyncio.run(write_outcomes([], out))
    assert out.read_text() == ""
