"""Two nodes on one machine: the shipped launcher settings in two network namespaces, or on loopback where there are none."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from launching import ROOT
from short_runs import SHORT, metrics_of

from lingshu_rl.processes.workers import free_port


@dataclass(frozen=True)
class Nodes:
    """What goes before a command to run it on node 0 or 1, and node 0's address. apart: they have networks of their own."""

    prefixes: tuple[list[str], list[str]]
    main: str

    @property
    def apart(self) -> bool:
        return bool(self.prefixes[0])


def ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    names = [f"lingshu{os.getpid()}n{n}" for n in (0, 1)]
    wires = [f"lr{os.getpid() % 100_000}n{n}" for n in (0, 1)]
    try:
        if shutil.which("ip") is None:
            yield Nodes(([], []), "127.0.0.1")
            return
        try:
            for name in names:
                ip(f"netns add {name}")
            ip(f"link add {wires[0]} netns {names[0]} type veth peer name {wires[1]} netns {names[1]}")
            for n, (name, wire) in enumerate(zip(names, wires, strict=True)):
                ip(f"-n {name} addr add 10.77.0.{n + 1}/24 dev {wire}")
                for device in ("lo", wire):
                    ip(f"-n {name} link set {device} up")
        except subprocess.CalledProcessError:  # needs root
            yield Nodes(([], []), "127.0.0.1")
        else:
            yield Nodes(tuple(["ip", "netns", "exec", name] for name in names), "10.77.0.1")  # type: ignore[arg-type]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def launched(nodes: Nodes, folder, script, arguments, timeout_s):
    """One process on either node, as a user starts them; both outputs. HOME and the working folder are empty ones."""
    port, processes = free_port(), []
    home, here = folder / "home", folder / "here"
    home.mkdir(parents=True)
    here.mkdir()
    env = {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LINGSHU_RL_TOKEN": "secret",
    }
    for rank in (0, 1):
        command = [
            *nodes.prefixes[rank], sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ROOT / "recipes" / "accelerate" / "two_nodes.yaml"), "--machine_rank", str(rank),
            "--main_process_ip", nodes.main, "--main_process_port", str(port), "--num_processes", "2",
            str(ROOT / script), *arguments,
        ]  # fmt: skip
        with open(folder / f"node{rank}.txt", "w") as out:
            processes.append(subprocess.Popen(command, cwd=here, env=env, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [(folder / f"node{rank}.txt").read_text() for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(outputs)
    # accelerate's other launchers write the environment, and so the token, to a file in one of these.
    written = [
        p for p in (*home.rglob("*"), *here.rglob("*")) if p.is_file() and "secret" in p.read_text(errors="ignore")
    ]
    assert not written
    return outputs


@pytest.mark.slow
def test_two_launches_are_one_world_and_leave_no_secret(nodes, tmp_path):
    told = tmp_path / "told"
    told.mkdir()
    launched(nodes, tmp_path / "launch", "tests/node_case.py", [str(told)], 200)
    found = sorted((json.loads(file.read_text()) for file in told.iterdir()), key=lambda one: one["RANK"])
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in found] == [("0", "0", "2"), ("1", "0", "2")]
    assert found[0]["heard"] == found[1]["heard"]
    assert all(name.startswith("lr" if nodes.apart else "lo") for name in found[0]["at"])


@pytest.mark.endurance
def test_two_nodes_train_as_one_run(nodes, tmp_path):
    """One folder, written by rank 0, whose servers are on its own node."""
    if not nodes.apart:
        pytest.skip("two nodes need two network namespaces (root and iproute2)")
    folder = tmp_path / "run"
    settings = [*SHORT, "eval.controls=[]", "eval.limit=8", "run.trackers=[]", f"run.dir={folder}"]
    outputs = launched(nodes, tmp_path / "launch", "recipes/grpo_medvqa.py", settings, 900)
    assert [row["step"] for row in metrics_of(folder)] == [1, 2]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    assert "2 rank(s)" in outputs[0] and "rollout server 0 is ready" in outputs[0] and "server" not in outputs[1]
    assert len(list((folder / "checkpoints" / "step-000002" / "state" / "pytorch_model").glob("zero_pp_rank_*"))) == 2
