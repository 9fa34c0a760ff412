"""Roles on different nodes of a Ray cluster of three, all on this machine; a lost node's server comes back elsewhere."""

import asyncio
import os
import subprocess
import sys
import time

import pytest
from launching import ROOT, launch_command
from machines import machine

from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes.placement import place
from lingshu_rl.processes.workers import Supervisor, WorkerError, stop_all


def test_ray_decides_which_devices():
    p = place(load_config(None, ["cluster=ray", "rollout.servers=3", "rollout.vllm.tensor_parallel_size=4", "reference.tensor_parallel=2"]), machine(8), 8)  # fmt: skip
    assert [len(d.gpus) for d in p.rollout_servers] == [4, 4, 4] and [len(d.gpus) for d in p.reference_replicas] == [2]
    assert p.policy.numbers == tuple(range(8))
    p = place(load_config(None, ["cluster=ray", "devices.rollout=cpu", "loss.kl_coef=0"]), machine(1), 1)
    assert [str(d) for d in p.rollout_servers] == ["cpu"] and not p.reference_replicas
    for wrong in (["cluster=ray", "devices.rollout=[1]"], ["rollout.ray={num_cpus: 1}"], ["cluster=slurm"]):
        with pytest.raises(ConfigError, match="ray"):
            load_config(None, wrong)


SERVER = """
import http.server, sys
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
print("hello from", sys.argv[1], flush=True)
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Ok).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason='the Ray tests need pip install "lingshu-rl[ray]"')
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    small = {"object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"policy": 1}, **small})
    made.small = small
    made.rollout_node = made.add_node(num_cpus=1, resources={"rollout": 1}, **small)
    made.add_node(num_cpus=1, resources={"reference": 1}, **small)
    made.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = made.address
    yield made
    del os.environ["RAY_ADDRESS"]
    made.shutdown()


def lose_the_rollout_node(cluster):
    """Its processes are killed and another node with the same resource joins."""
    cluster.remove_node(cluster.rollout_node, allow_graceful=False)
    cluster.rollout_node = cluster.add_node(num_cpus=1, resources={"rollout": 1}, **cluster.small)


def ray_worker(tmp_path, code=SERVER, **resources):
    from lingshu_rl.processes.cluster import HOST, PORT, RayWorker

    return RayWorker("rollout server 0", [sys.executable, "-c", code, HOST, PORT], log=tmp_path / "w.log", env={}, stop_timeout_s=2,
                     options={"resources": resources})  # fmt: skip


@pytest.mark.slow
def test_a_server_comes_back_on_another_node(cluster, tmp_path):
    from lingshu_rl.processes.cluster import join_cluster, leave_cluster

    join_cluster()
    events = []
    try:
        homeless = ray_worker(tmp_path, nowhere=1)
        with pytest.raises(WorkerError, match=r"Ray found no node for rollout server 0.*'nowhere': 1"):
            homeless.wait_healthy(1)
        homeless.kill()
        broken = ray_worker(tmp_path, "print('no weights'); raise SystemExit(3)", rollout=0.1)
        with pytest.raises(WorkerError, match=r"(?s)ended with exit code 3.*no weights"):
            broken.wait_healthy(60)
        broken.kill()
        w = ray_worker(tmp_path, rollout=1)
        w.wait_healthy(60)
        first = w.url

        async def survive():
            supervisor = Supervisor([w], max_restarts=1, lost=lambda w: events.append("lost"),
                                    revive=lambda w: events.append("back"), say=events.append)  # fmt: skip
            lose_the_rollout_node(cluster)
            assert await supervisor.examine(w.name, patience_s=60)
            while "back" not in events and not supervisor.failure.done():
                await asyncio.sleep(0.1)
            await supervisor.close()

        asyncio.run(survive())
        assert "back" in events and w.url != first and w.healthy()
        stop_all([w])
        assert not w.healthy()
    finally:
        leave_cluster()


@pytest.mark.endurance
def test_the_demo_trains_over_the_cluster_and_survives_the_loss_of_the_rollout_node(cluster, tmp_path):
    folder = tmp_path / "run"
    settings = ["cluster=ray", "rollout.ray={resources: {rollout: 1}}", "reference.ray={resources: {reference: 1}}", "train.steps=4",
                "train.prompts_per_step=4", "train.group_size=4", "eval.limit=4", "eval.controls=[]", "run.trackers=[]"]  # fmt: skip
    log = tmp_path / "out.txt"
    with open(log, "w") as out:
        process = subprocess.Popen(
            launch_command([*settings, f"run.dir={folder}"]), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
    while "step 2/4" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    lose_the_rollout_node(cluster)
    assert process.wait(600) == 0, log.read_text()
    assert "rollout server 0 is back" in log.read_text() and (folder / "summary.json").exists()
