"""Adapters under ZeRO-2 and ZeRO-3: whatever way they leave the trainer, the same model arrives."""

import json
import os
import sys

import pytest
import torch
from launching import ROOT, launch
from lora_cases import SETTINGS, own
from peft import PeftModel

from lingshu_rl.checks.gap import Gap
from lingshu_rl.model.loading import load_model
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
    assert not list(servers.transfer.iterdir())
    for stage in ("2", "3"):
        folder, untouched = tmp_path / stage, load_model("demo", torch.float32)
        found = torch.load(folder / "found.pt")
        assert all(torch.equal(found["base"][name], tensor) for name, tensor in untouched.named_parameters())
        assert Gap.of(found["trained"], own(untouched)).max > 0.1
        saved = {
            "checkpoint": own(load_model(str(folder / "hf"), torch.float32)),
            "saved adapter": own(PeftModel.from_pretrained(untouched, folder / "adapter")),
        }
        for way, logprobs in {"file": found["file"], "adapter": found["adapter"], **saved}.items():
            assert Gap.of(found["trained"], logprobs).max < 1e-4, (stage, way)
