"""The servers that a run starts, by role: started together, watched, started again, stopped; and their place in the
pools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.processes.cluster import RayWorker, join_cluster, leave_cluster
from lingshu_rl.processes.pool import Pool, Server
from lingshu_rl.processes.workers import HOST, PORT, Supervisor, Worker, WorkerError, free_port, stop_all

ROLLOUT, REFERENCE, JUDGE = "rollout", "reference", "judge"


@dataclass(frozen=True)
class Launch:
    """One server to start. command: its argv, with HOST and PORT where its address belongs.

    ray: actor options, for a server that Ray places; None for a child process.
    """

    role: str
    number: int
    command: Sequence[str]
    env: Mapping[str, str]
    start_timeout_s: float
    stop_timeout_s: float
    ray: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.role} server {self.number}"

    def start(self, logs: Path) -> Worker:
        common: dict[str, Any] = {
            "role": self.role,
            "log": logs / f"{self.role}-{self.number}.log",
            "env": self.env,
            "start_timeout_s": self.start_timeout_s,
            "stop_timeout_s": self.stop_timeout_s,
        }
        if self.ray is not None:
            return RayWorker(self.name, self.command, options=self.ray, **common)
        port = str(free_port())
        command = [word.replace(HOST, "127.0.0.1").replace(PORT, port) for word in self.command]
        return Worker(self.name, command, url=f"http://127.0.0.1:{port}", **common)


@dataclass
class Fleet:
    """Empty on ranks other than the main one, and where all servers are given by URLs.

    wanted: rollout servers that were started again and wait for weights.
    """

    workers: list[Worker] = field(default_factory=list)
    wanted: asyncio.Queue[Worker] = field(default_factory=asyncio.Queue)
    supervisor: Supervisor | None = None
    pools: dict[str, Pool] = field(default_factory=dict)  # by role
    servers: dict[str, Server] = field(default_factory=dict)  # by the worker's name
    moved: Callable[[Worker], None] = lambda worker: None  # told of a server that no pool knows, at its new address
    on_ray: bool = False

    def start(self, launches: Sequence[Launch], logs: Path) -> None:
        """Start all of them; `ready` waits. Call it from the main thread, see `Worker.start`."""
        self.on_ray = any(launch.ray is not None for launch in launches)
        if self.on_ray:
            join_cluster()
        for launch in launches:
            self.workers.append(launch.start(logs))

    def of(self, role: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.role == role]

    async def ready(self, say: Callable[[str], None]) -> None:
        """Until every server answers. Raises WorkerError."""

        async def one(worker: Worker) -> None:
            await asyncio.to_thread(worker.wait_healthy)
            say(f"{worker.name} is ready at {worker.url}")

        await asyncio.gather(*map(one, self.workers))

    def supervise(
        self,
        pools: Mapping[str, Pool],
        max_restarts: int,
        say: Callable[[str], None],
        moved: Callable[[Worker], None] = lambda worker: None,
    ) -> None:
        """From here on a server that dies is taken out of its pool and started again."""
        self.pools, self.moved = dict(pools), moved
        for worker in self.workers:
            if worker.role not in self.pools:
                continue
            server = self.servers[worker.name] = self.pools[worker.role].by_url(worker.url)
            server.name = worker.name
        self.supervisor = Supervisor(
            self.workers, max_restarts=max_restarts, lost=self._lost, revive=self._revive, say=say
        )

    def _lost(self, worker: Worker) -> None:
        if worker.role in self.pools:
            self.pools[worker.role].mark(self.servers[worker.name], alive=False, up=False)

    def _revive(self, worker: Worker) -> None:
        """A rollout server comes up with the weights of the start: it takes no requests until it got the present
        ones."""
        if worker.role not in self.pools:
            self.moved(worker)
            return
        server = self.servers[worker.name]
        server.url = worker.url
        waits = worker.role == ROLLOUT
        self.pools[worker.role].mark(server, alive=True, up=not waits)
        if waits:
            self.wanted.put_nowait(worker)

    async def examine(self, server: Server) -> bool:
        """Is this server down and coming back? See `pool`."""
        return self.supervisor is not None and await self.supervisor.examine(server.name)

    async def restart(self, server: Server) -> bool:
        """Kill it and start it again; False for a server of others. It gets the weights when it is back."""
        return self.supervisor is not None and await self.supervisor.restart(server.name)

    @property
    def failure(self) -> set[asyncio.Future[None]]:
        """Done, with a WorkerError, once a server is lost for good."""
        return {self.supervisor.failure} if self.supervisor is not None else set()

    def death(self, role: str) -> str:
        """What ended one of the role's servers, or "" when all live."""
        for worker in self.of(role):
            try:
                worker.check_alive()
            except WorkerError as error:
                return str(error)
        return ""

    async def close(self) -> None:
        if self.supervisor is not None:
            await self.supervisor.close()
        stop_all(self.workers)
        if self.on_ray and self.workers:
            leave_cluster()
