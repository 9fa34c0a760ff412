"""Servers that no pool knows, as the judge's: watched like the others, and whoever asks them learns their new address."""

import asyncio
import os
import signal
import time

import pytest
from test_workers import SERVER

from lingshu_rl.launches import launches
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes.fleet import JUDGE, ROLLOUT, Fleet, Launch
from lingshu_rl.processes.placement import Machine, place
from lingshu_rl.processes.workers import PORT, python


def test_a_judge_that_dies_is_started_again_and_its_address_told(tmp_path):
    command = [python(), "-c", SERVER, PORT]
    launch = Launch(JUDGE, 0, command, {}, start_timeout_s=20, stop_timeout_s=2)
    said, moved = [], []

    async def run():
        fleet = Fleet()
        fleet.start([launch], tmp_path)
        try:
            await fleet.ready(said.append)
            fleet.supervise({}, 1, said.append, moved=lambda worker: moved.append(worker.url))
            [worker] = fleet.of(JUDGE)
            os.kill(worker.process.pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while not moved:
                assert time.monotonic() < deadline, said
                await asyncio.sleep(0.05)
            assert moved == [worker.url] and worker.healthy()
            os.kill(worker.process.pid, signal.SIGKILL)
            with pytest.raises(Exception, match="started again 1 times"):
                await asyncio.wait_for(next(iter(fleet.failure)), 20)
        finally:
            await fleet.close()

    asyncio.run(run())
    assert any("judge server 0 is ready" in line for line in said)


def test_the_judges_server_has_its_own_options_and_shares_the_cores(tmp_path):
    config = load_config(
        None,
        ["model=demo", "judge.model=demo", "judge.vllm={max_model_len: 1024}", "rollout.vllm={max_model_len: 97}", "judge.start_timeout_s=7", "loss.kl_coef=0"],
    )  # fmt: skip
    found = launches(
        config, place(config, Machine()), transfer="file", token="t", transfer_dir=tmp_path, reference="demo"
    )
    rollout, judge = found
    assert (rollout.role, judge.role, judge.start_timeout_s) == (ROLLOUT, JUDGE, 7)

    def option(launch, flag):
        return launch.command[launch.command.index(flag) + 1]

    assert (option(rollout, "--served-model-name"), option(judge, "--served-model-name")) == ("policy", "demo")
    assert (option(rollout, "--max-model-len"), option(judge, "--max-model-len")) == ("97", "1024")
    assert judge.env["LINGSHU_RL_TOKEN"] == "t" and judge.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
