"""Shared fixtures. The engines are real; one server of each kind serves all tests that only need a running one."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT, TOKEN, Servers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several tests would wait for each other's cores, spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public data beside the checkout; tests that want it are skipped elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("no shared data beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    from lingshu_rl.processes.token import TOKEN_ENV
    from lingshu_rl.processes.workers import Worker, free_port, stop_all
    from lingshu_rl.rollout.vllm_plugin import TRANSFER_DIR_ENV

    logs = tmp_path_factory.mktemp("servers")
    workers = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as transfer:
        env = {TOKEN_ENV: TOKEN, TRANSFER_DIR_ENV: transfer, "PYTHONPATH": str(ROOT)}
        for role in ("rollout", "reference"):
            port = free_port()
            command = [sys.executable, "-m", "lingshu_rl.cli", "serve", role, "--port", str(port)]
            url = f"http://127.0.0.1:{port}"
            workers.append(Worker(role, command, url=url, log=logs / f"{role}.log", env=env, stop_timeout_s=10))
        try:
            for worker in workers:
                worker.wait_healthy(900)
            yield Servers(workers[0].url, workers[1].url, Path(transfer))
        finally:
            stop_all(workers)
