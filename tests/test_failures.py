"""A failure with a known cause ends the command with its message and exit code 1, without a traceback."""

import importlib

import pytest

from lingshu_rl.checks.firstbatch import CheckError
from lingshu_rl.cli import run_training
from lingshu_rl.config import Config
from lingshu_rl.failures import KNOWN_FAILURES, PromptRefused
from lingshu_rl.processes.workers import WorkerError
from lingshu_rl.reference.client import ReferenceRequestError
from lingshu_rl.rollout.sampler import RolloutError
from rewards.executor import RewardFailure

LOOP = importlib.import_module("lingshu_rl.train")  # the package's own name of it is the function


@pytest.mark.parametrize(
    "kind", [PromptRefused, RolloutError, ReferenceRequestError, WorkerError, CheckError, RewardFailure]
)
def test_a_known_failure_is_a_line_and_exit_code_1(kind, monkeypatch, capsys):
    async def train(config):
        raise kind("what happened")

    monkeypatch.setattr(LOOP, "train", train)
    assert run_training(Config()) == 1
    assert "the run stopped: what happened" in capsys.readouterr().err
    # It can be raised again with more to say, as the run does once it has saved.
    assert issubclass(kind, KNOWN_FAILURES) and str(kind("more")) == "more"


def test_an_unknown_one_keeps_its_traceback(monkeypatch):
    async def train(config):
        raise KeyError("a bug")

    monkeypatch.setattr(LOOP, "train", train)
    with pytest.raises(KeyError, match="a bug"):
        run_training(Config())
