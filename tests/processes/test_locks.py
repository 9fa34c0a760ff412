"""A GPU is held by one command at a time, for as long as its process lives. The GPUs are names; the locks are real."""

import os
import subprocess
import sys

import pytest
from launching import ROOT
from machines import machine

from lingshu_rl.failures import ConfigError
from lingshu_rl.processes import locks
from lingshu_rl.processes.locks import hold, release, unheld
from lingshu_rl.processes.placement import DeviceSet


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "lock_folder", lambda: tmp_path)
    return tmp_path


def test_a_gpu_in_use_is_refused_by_the_name_of_who_uses_it_and_nothing_else_is_kept():
    gpus = machine(4).gpus
    held = hold(DeviceSet(gpus[1:2]), "lingshu-rl serve rollout --port 8100")
    with pytest.raises(
        ConfigError, match=rf"GPU 1 is in use by process {os.getpid()} on .* \(lingshu-rl serve rollout --port 8100\)"
    ):
        hold(DeviceSet(gpus[:2]), "lingshu-rl serve reference --port 8200")
    assert unheld(gpus) == (gpus[0], *gpus[2:])
    release(held)
    assert unheld(gpus) == gpus


def test_a_card_is_one_whatever_it_is_called():
    by_number, by_uuid = machine(1, "0").gpus, machine(1, "GPU-uuid-0").gpus
    held = hold(DeviceSet(by_number), "a")
    with pytest.raises(ConfigError, match="in use"):
        hold(DeviceSet(by_uuid), "b")
    release(held)


def test_the_cpu_is_shared():
    assert hold(DeviceSet(), "a") == hold(DeviceSet(cores=(0,)), "b") == []


SERVE = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from machines import machine
from lingshu_rl import cli
from lingshu_rl.planning import plan
from lingshu_rl.processes import locks
locks.lock_folder = lambda: Path({folder!r})
plan.this_machine = lambda: machine(2)
def become(name, command, env):
    print(" ".join(command), env["CUDA_VISIBLE_DEVICES"], flush=True)
    os.execvpe("sleep", ["sleep", "60"], env)
real, os.execvpe = os.execvpe, lambda name, command, env: (setattr(os, "execvpe", real), become(name, command, env))
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""


def test_two_serve_commands_on_one_host_do_not_take_the_same_gpu(folder):
    """`serve` becomes the server process, here `sleep`, and holds its GPUs until that ends."""
    code = SERVE.format(tests=str(ROOT / "tests"), folder=str(folder))
    env = {**os.environ, "LINGSHU_RL_TOKEN": "t", "PYTHONPATH": str(ROOT)}
    started = []

    def serve(*words):
        child = subprocess.Popen([sys.executable, "-c", code, *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        started.append(child)
        return child

    try:
        assert serve("rollout", "--port", "8100", "devices.rollout=[0]").stdout.readline().endswith(" 0\n")
        refused = serve("reference", "--port", "8200", "devices.reference=[0]")
        out, error = refused.communicate(timeout=60)
        assert refused.returncode == 2 and "GPU 0 is in use by process" in error and "--port 8100" in error, out + error
        assert serve("reference", "--port", "8200").stdout.readline().endswith(" 1\n")  # auto: what is free
        full = serve("reference", "--port", "8300")
        assert full.wait(timeout=60) == 2 and "0 of 2 GPU(s) of 80 GB are free" in full.stderr.read()
        started[0].kill()
        started[0].wait()
        assert serve("reference", "--port", "8400", "--dry-run").stdout.readline().startswith("CUDA_VISIBLE_DEVICES=0 ")
    finally:
        for child in started:
            child.kill()
            child.wait()
