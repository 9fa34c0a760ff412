"""Servers on the nodes of a Ray cluster (`cluster: ray`): thin actors that hold the same processes as `workers`.

The policy stays with `accelerate launch`; Ray only decides where the rollout and reference servers run. `rollout.ray`
and `reference.ray` are Ray's own actor options ({num_cpus: 8, resources: {big: 1}}); num_gpus is filled in. A server
whose node is lost is started again where Ray finds room, under another address.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lingshu_rl.processes.workers import HOST, PORT, Worker, WorkerError, free_port


class ServerActor:
    """Lives on a node and holds one server process there; if the node's actor dies, so does the process."""

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str], stop_timeout_s: float) -> str:
        """Start the server at this node's address and return its URL. HOST and PORT are filled in here."""
        from ray.util import get_node_ip_address

        host, port = get_node_ip_address(), free_port(get_node_ip_address())
        argv = [word.replace(HOST, host).replace(PORT, str(port)) for word in command]
        log = Path(tempfile.mkdtemp(prefix="lingshu-rl-")) / "server.log"
        self.worker = Worker(name, argv, url=f"http://{host}:{port}", log=log, env=env, stop_timeout_s=stop_timeout_s)
        return self.worker.url

    def death(self) -> str:
        """Why the process ended, or "" while it runs."""
        try:
            self.worker.check_alive()
        except WorkerError as error:
            return str(error)
        return ""

    def tail(self) -> str:
        return self.worker.tail()

    def stop(self) -> None:
        self.worker.stop()


class RayWorker(Worker):
    """What the run sees of a server on the cluster: the same as of a child process."""

    def __init__(self, name: str, command: Sequence[str], *, options: Mapping[str, Any], **common: Any) -> None:
        self.options = dict(options)
        super().__init__(name, command, url="", **common)

    def start(self) -> None:
        import ray

        # Its methods have a `.remote` of which a type checker knows nothing.
        self.actor = cast(Any, ray.remote(ServerActor).options(**self.options).remote())
        self.starting = self.actor.start.remote(self.name, self.command, self.env, self.stop_timeout_s)
        self.asked = self.actor.death.remote()

    def wait_healthy(self, timeout_s: float | None = None) -> None:
        import ray

        timeout_s = self.start_timeout_s if timeout_s is None else timeout_s
        began = time.monotonic()
        try:
            self.url = ray.get(self.starting, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise WorkerError(
                f"Ray found no node for {self.name} in {timeout_s:.0f} s; it asked for {self.options}, the cluster has "
                f"{ray.available_resources()} free"
            ) from None
        except ray.exceptions.RayError as error:
            raise WorkerError(f"{self.name} could not be started: {error}") from error
        super().wait_healthy(timeout_s - (time.monotonic() - began))

    def check_alive(self) -> None:
        """Looks at the answer to the last question and asks the next one, so it never waits for the network."""
        import ray

        ready, _ = ray.wait([self.asked], timeout=0)
        if not ready:
            return
        try:
            death = ray.get(self.asked)
        except ray.exceptions.RayError as error:
            raise WorkerError(f"{self.name} was lost with its node or actor: {str(error).splitlines()[0]}") from None
        if death:
            raise WorkerError(death)
        self.asked = self.actor.death.remote()

    def ask_to_stop(self) -> None:
        self.stopping = self.actor.stop.remote()

    def stop(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.get(getattr(self, "stopping", None) or self.actor.stop.remote(), timeout=self.stop_timeout_s + 5)
        self.stopping = None
        self.kill()

    def kill(self) -> None:
        """The actor's end is the process's end: the kernel tells it when its parent is gone."""
        import ray

        ray.kill(self.actor)

    def tail(self, lines: int = 15) -> str:
        import ray

        with contextlib.suppress(Exception):
            return str(ray.get(self.actor.tail.remote(), timeout=5))
        return " (out of reach)"


def join_cluster() -> None:
    """Connect to the cluster of RAY_ADDRESS, or to the one that runs on this machine. Raises ConfigError."""
    from lingshu_rl.failures import ConfigError

    try:
        import ray
    except ImportError:
        raise ConfigError('cluster=ray needs Ray: pip install "lingshu-rl[ray]"') from None
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as error:
        raise ConfigError(
            f"cluster=ray found no cluster ({error}); start one with `ray start --head`, or set RAY_ADDRESS"
        ) from None


def leave_cluster() -> None:
    import ray

    ray.shutdown()
