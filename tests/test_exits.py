"""How commands end: with a reader that has seen enough, and in a dry run of what would not start."""

import contextlib
import os
import sys

import pytest
import yaml
from launching import ROOT

from lingshu_rl.cli import main, sft_main, train_main
from lingshu_rl.failures import ConfigError
from lingshu_rl.storage.folders import own
from lingshu_rl.storage.runfolder import RunFolder

COMMANDS = ("train", "serve", "rewards", "sweep", "report", "card", "watch", "eval", "curate", "synth", "sft", "pipeline", "data")  # fmt: skip
SHOWN = [
    ["eval", "--list"],
    ["pipeline", str(ROOT / "recipes" / "pipelines" / "miniature.yaml"), "--dry-run"],
    ["rewards", "check", "ROWS"],
    ["data", "look", "ROWS"],
]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": "a", "images": [], "question": "Which?", "answer": "left", "kind": "open"}\n')
    return file


@contextlib.contextmanager
def cut_off(monkeypatch):
    """Standard output whose reader is gone, as behind `| head` when it has its lines."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        yield
        out.flush()  # the interpreter does so at its end, and complains where it fails


@pytest.mark.parametrize("words", [*([name, "--help"] for name in COMMANDS), *SHOWN], ids=" ".join)
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(words, rows, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with cut_off(monkeypatch):
        assert main([str(rows) if word == "ROWS" else word for word in words]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("entry", [train_main, sft_main])
def test_so_do_the_recipes(entry, monkeypatch):
    with cut_off(monkeypatch):
        assert entry(["--help"]) == 0


def test_the_list_of_commands_is_whole(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out.split("{")[1].split("}")[0].split(",")
    assert sorted(listed) == sorted(COMMANDS)


def written(tmp_path, content):
    file = tmp_path / "f.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


DRY = {
    "train": lambda tmp: ["train", "data.train=gone.jsonl", "data.test=gone_too.jsonl", f"run.dir={tmp}/r"],
    "train, a model that is not here": lambda tmp: [
        "train", "--config", str(ROOT / "recipes/configs/lingshu_rl_7b.yaml"), "data.train=gone.jsonl", "data.test=gone_too.jsonl",
        "devices.assume={count: 8, memory_gb: 80}", f"run.dir={tmp}/r",
    ],
    "sft": lambda tmp: ["sft", written(tmp, {"model": "demo", "stages": {"one": {"data": ["gone.jsonl"], "lr": {"language": 1e-5}}}})],
    "sweep": lambda tmp: ["sweep", written(tmp, {"base": {"data.train": "gone.jsonl", "data.test": "gone_too.jsonl"}, "variants": {"a": None, "b": {"train.lr": 1e-5}}, "dir": f"{tmp}/s"})],
    "curate": lambda tmp: ["curate", written(tmp, {"sources": [{"path": "gone.jsonl"}], "steps": ["dedup_text"], "out": f"{tmp}/c"})],
    "pipeline": lambda tmp: ["pipeline", written(tmp, {"dir": f"{tmp}/p", "steps": {"a": {"run": "lingshu-rl curate c.yaml --out {out}", "inputs": ["gone.jsonl"], "outputs": ["x"]}}})],
}  # fmt: skip


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_without_its_data_fails_and_names_the_file(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*DRY[name](tmp_path), "--dry-run"]) != 0
    assert "gone.jsonl: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "sub/.."])
def test_a_run_in_the_present_folder_has_a_name_and_is_not_moved_away(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    assert RunFolder(name).path.name == tmp_path.name  # trackers and pages call it so
    with pytest.raises(ConfigError, match=r"run.dir=.* is where this command runs"), own(RunFolder(name).path, "a run", "run.dir", afresh=True):  # fmt: skip
        pass
    assert (tmp_path / "rows.jsonl").exists() and list(tmp_path.parent.glob(f"{tmp_path.name}.old*")) == []
