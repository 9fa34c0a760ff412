"""The HTTP servers of one group (rollout or reference): which are up, which takes the next request, and retries.

A request that failed because its server died is sent again elsewhere, or when the server is back; it does not count as
a retry. The request itself holds the seed, so that whichever server answers gives the same answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(eq=False)
class Server:
    """alive: its process answers. up: it also holds the current weights, so requests may go there.

    load: what is under way there (tokens, or requests). version: of the weights it holds.
    """

    url: str
    name: str = ""  # of the process behind it, where this run started it; the URL may change when it is started again
    alive: bool = True
    up: bool = True
    load: int = 0
    version: int = 0


# Asked after a failed request: True when the server is down and will come back, False when it is alive and the request
# may be tried again. Raises when the group is lost.
Examine = Callable[[Server], Awaitable[bool]]


async def unwatched(server: Server) -> bool:
    """For servers that nobody watches."""
    return False


class Pool:
    def __init__(
        self,
        role: str,
        urls: Sequence[str],
        *,
        token: str,
        timeout_s: float,
        retries: int,
        error: type[Exception],
        connections: int | None = None,
        most: int | None = None,
        examine: Examine = unwatched,
    ) -> None:
        """role: for messages. error: what is raised when a request fails for good. most: load of a busy server."""
        self.role, self.retries, self.error, self.most, self.examine = role, retries, error, most, examine
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.http = httpx.AsyncClient(
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {token}"},
            # The servers close a connection after 5 idle seconds; one that is taken up at that moment would fail.
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=2.0
            ),
        )
        self._changed = asyncio.Event()

    @property
    def up(self) -> list[Server]:
        return [server for server in self.servers if server.up]

    def by_url(self, url: str) -> Server:
        return next(server for server in self.servers if server.url == url)

    def mark(self, server: Server, *, alive: bool, up: bool) -> None:
        server.alive, server.up = alive, up
        self._changed.set()

    async def take(self, cost: int) -> Server:
        """The least loaded server that is up; waits until there is one. `give` it back."""
        while True:
            free = [s for s in self.up if self.most is None or s.load + cost <= self.most]
            if free:
                server = min(free, key=lambda s: s.load)
                server.load += cost
                return server
            self._changed.clear()
            await self._changed.wait()

    def give(self, server: Server, cost: int) -> None:
        server.load -= cost
        self._changed.set()

    async def post(self, path: str, *, what: str, cost: int = 1, **body: Any) -> tuple[httpx.Response, int]:
        """A 200 answer from any server, and the version of the weights that gave it. Raises `error`."""
        failures = 0
        while True:
            server = await self.take(cost)
            version = server.version
            try:
                response = await self.http.post(server.url + path, **body)
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return response, version
                last = f"HTTP {response.status_code}: {response.text[:500]}"
                if 400 <= response.status_code < 500:
                    raise self.error(f"the {self.role} server {server.url} refused {what}: {last}")
            finally:
                self.give(server, cost)
            if await self.examine(server):
                continue
            failures += 1
            if failures > self.retries:
                raise self.error(f"the {self.role} server {server.url} failed {failures} times on {what}; last: {last}")
            await asyncio.sleep(0.1 * 2**failures)

    async def post_to(self, servers: Sequence[Server], path: str, **body: Any) -> dict[Server, httpx.Response]:
        """Post to each of these at once, once; their answers. One that died is left out; other failures raise `error`."""
        answers: dict[Server, httpx.Response] = {}

        async def one(server: Server) -> None:
            try:
                response = await self.http.post(server.url + path, **body)
            except httpx.HTTPError as error:
                if not await self.examine(server):
                    raise self.error(f"{server.url}{path} failed: {type(error).__name__}: {error}") from error
            else:
                if response.status_code == 200:
                    answers[server] = response
                elif not await self.examine(server):
                    raise self.error(f"{server.url}{path} answered {response.status_code}: {response.text[:500]}")

        await asyncio.gather(*(one(server) for server in servers if server.alive))
        return answers

    async def texts(self, path: str) -> list[str]:
        """What each server answers to GET; waits for one that is down."""

        async def one(server: Server) -> str:
            while True:
                try:
                    return (await self.http.get(server.url + path)).text
                except httpx.HTTPError as error:
                    if not await self.examine(server):
                        raise self.error(f"{server.url}{path} failed: {type(error).__name__}: {error}") from error
                await asyncio.sleep(0.5)

        return list(await asyncio.gather(*map(one, self.servers)))

    async def close(self) -> None:
        await self.http.aclose()
