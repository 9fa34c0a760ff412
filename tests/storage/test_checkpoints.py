"""A checkpoint that would run code is not loaded; what the libraries themselves write is."""

import json
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from lingshu_rl.storage import checkpoints


class Calls:
    """Unpickled, it calls something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(folder, name, value, dump=torch.save):
    path = folder / "state" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:
        dump(value, out)
    (folder / checkpoints.SEAL).write_text(checkpoints.seal(folder, {"step": 1}))
    return folder


@pytest.mark.parametrize("name", ["random_states_0.pkl", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer.bin"])
@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
@pytest.mark.parametrize("function", [os.system, subprocess.Popen, eval, torch.load, np.load])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, name, dump, function):
    mark = tmp_path / "mark"
    asked = {os.system: f"touch {mark}", subprocess.Popen: ["touch", str(mark)], eval: f"open({str(mark)!r}, 'w')"}
    inside = {"optimizer": [torch.ones(2), Calls(function, asked.get(function, str(mark)))]}
    told = checkpoints.fault(saved(tmp_path / "step-000001", name, inside, dump))
    assert name in told and not mark.exists()
    if dump is torch.save:
        assert "would run code when it is loaded" in told


def test_what_the_libraries_write_is_let_through(tmp_path):
    state = {
        "step": torch.ones(3),
        "loss_scaler": LossScaler(1.0),
        "rng": np.random.get_state(),
        "lr": [1e-3, None, "x"],
    }
    folder = saved(tmp_path / "step-000001", "states.pt", state)
    assert checkpoints.fault(folder) == ""


def test_a_pickle_that_cannot_be_read_without_running_it_is_refused(tmp_path):
    folder = saved(
        tmp_path / "step-000001", "random_states_0.pkl", b"\x00\x01 no pickle", lambda value, out: out.write(value)
    )
    assert "random_states_0.pkl cannot be read without running it" in checkpoints.fault(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"step": 1}', '{"step": 1, "files": {"a": 3}}', '{"files": {}}', "\x00"])
def test_a_seal_that_says_nothing_is_no_seal(tmp_path, text):
    (tmp_path / checkpoints.SEAL).write_text(text)
    assert "run.json is unreadable" in checkpoints.fault(tmp_path)


def test_lengths_alone_are_looked_at_where_nothing_is_loaded(tmp_path):
    folder = saved(tmp_path / "step-000001", "states.pt", {"a": torch.ones(3)})
    file = folder / "state" / "states.pt"
    file.write_bytes(b"\x00" * file.stat().st_size)
    assert checkpoints.fault(folder, contents=False) == "" and "CRC-32" in checkpoints.fault(folder)
    assert json.loads((folder / checkpoints.SEAL).read_text())["step"] == 1
