"""Adapters under ZeRO-2 and ZeRO-3: whatever way they leave the trainer, the same model arrives."""

import json
import os
import sys

import pytest
from launching import ROOT, TOKEN, launch
from lora_cases import SETTINGS

from lingshu_rl.processes.workers import Worker, free_port

pytestmark = pytest.mark.slow


def test_after_three_updates_engines_and_saved_folders_hold_what_was_trained(servers, tmp_path):
    """File, adapter and checkpoint, two ranks. Under ZeRO-3 the base alone was sent and saved, without a word."""
    port = free_port()
    serve = [sys.executable, "-m", "lingshu_rl.cli", "serve", "rollout", "--port", str(port)]
    command = [*serve, SETTINGS[0], "rollout.weight_transfer=adapter"]
    worker = Worker("rollout", command, url=f"http://127.0.0.1:{port}", log=tmp_path / "vllm.log", env=servers.env, stop_timeout_s=10)  # fmt: skip
    try:
        worker.wait_healthy(600)
        told = {
            "folder": str(tmp_path),
            "transfer": str(servers.transfer),
            "file": servers.rollout,
            "adapter": worker.url,
        }
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
        done = launch([json.dumps(told)], processes=2, script=str(ROOT / "tests" / "lora_cases.py"), env=env)
    finally:
        worker.stop()
    assert done.returncode == 0, done.stdout
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
    assert [one["stage"] for one in found] == [2, 3], done.stdout
    for one in found:
        assert one["moved"] > 0.1 and not one["drifted"]
        assert set(one["gaps"]) == {"file", "adapter", "hf", "peft"}
        assert max(one["gaps"].values()) < 1e-4, one
    assert TOKEN and not list(servers.transfer.iterdir())
