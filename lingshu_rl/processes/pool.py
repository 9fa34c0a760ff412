"""The HTTP servers of one group (rollout or reference): which are up, which takes the next request, and retries.

Requests wait here, not in the servers: one is built when a server has room for it and freed when it is answered. It is
waited for as long as its server makes progress (`pulse`). A request that failed because its server died is sent again
elsewhere, or when the server is back; it does not count as a retry. The request itself holds the seed, so that
whichever server answers gives the same answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpcore
import httpx

from lingshu_rl.failures import PromptRefused
from lingshu_rl.processes.lease import RUN, TAKEN, Taken, held_by
from lingshu_rl.processes.pulse import Counter, Pulse
from lingshu_rl.processes.threads import in_thread
from rewards.chat import AGAIN, NEVER, bearer, seconds_to_wait

T = TypeVar("T")

# An answer has megabytes. Read in httpcore's own pieces of 64 KiB, they take a sixth of a step's processor time.
httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = 1 << 20


class BadAnswer(ValueError):
    """A server's 200 holds something other than what was asked for; the text says what."""


@dataclass(eq=False)
class Server:
    """alive: its process answers. up: it also holds the current weights, so requests may go there.

    load: what is under way there (tokens, or requests). taken: its places that are. version: of the weights it holds.
    """

    url: str
    name: str = ""  # of the process behind it, where this run started it; the URL may change when it is started again
    alive: bool = True
    up: bool = True
    load: int = 0
    taken: int = 0
    version: int = 0


@dataclass(frozen=True, eq=False)
class Ticket:
    """A request in the queue. cost: its load. places: of a server's. failed_at: where it is not sent again if
    avoidable."""

    cost: int
    places: int
    failed_at: Collection[Server]
    server: asyncio.Future[Server]


# Asked after a failed request: True when the server is down and will come back, False when it is alive and the request
# may be tried again. Raises when the group is lost.
Examine = Callable[[Server], Awaitable[bool]]


async def unwatched(server: Server) -> bool:
    """For servers that nobody watches."""
    return False


async def _once(body: bytes) -> AsyncIterator[bytes]:
    """A body that nobody holds once it is sent; httpx would keep the bytes until the next garbage collection."""
    yield body


def way() -> httpx.AsyncHTTPTransport:
    """A connection for each call.

    Servers close one that was idle for 5 seconds, and right after an error that their handlers did not foresee; a call
    that takes it up at that moment is lost, and nobody knows whether it was carried out.
    """
    return httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))


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
        most: int | None = None,
        counter: Counter | None = None,
        examine: Examine = unwatched,
        run: str = "",
    ) -> None:
        """role: for messages. error: what is raised when a request fails for good. most: places of a server, None = no
        end.

        timeout_s: how long a server may make no progress before a request there is given up, and the limit of one
        control call. counter: shows progress; without one only answers do. run: as whose requests they are sent, where
        servers are held (`lease`).
        """
        self.role, self.retries, self.error, self.most, self.examine = role, retries, error, most, examine
        self.timeout_s, self.counter = timeout_s, counter
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.http = httpx.AsyncClient(
            timeout=timeout_s,
            headers={**bearer(token), RUN: run},
            # Named, so that no proxy of the environment comes between: the token is for these servers alone.
            transport=way(),
        )
        self._queue: deque[Ticket] = deque()
        self._pulses = {server: self._pulse(server) for server in self.servers}

    @property
    def up(self) -> list[Server]:
        return [server for server in self.servers if server.up]

    def by_url(self, url: str) -> Server:
        return next(server for server in self.servers if server.url == url)

    def mark(self, server: Server, *, alive: bool, up: bool) -> None:
        server.alive, server.up = alive, up
        self._admit()

    async def take(self, cost: int, places: int = 1, failed_at: Collection[Server] = ()) -> Server:
        """The least loaded server that is up and has `places` free (or is idle), first come first served. `give` it
        back."""
        ticket = Ticket(cost, places, failed_at, asyncio.get_running_loop().create_future())
        self._queue.append(ticket)
        self._admit()
        try:
            return await ticket.server
        except asyncio.CancelledError:
            if ticket.server.done() and not ticket.server.cancelled():
                self.give(ticket.server.result(), cost, places)
            raise

    def give(self, server: Server, cost: int, places: int = 1) -> None:
        server.load -= cost
        server.taken -= places
        self._admit()

    def _admit(self) -> None:
        """Let those at the head of the queue go, as far as there is room."""
        while self._queue:
            ticket = self._queue[0]
            if not ticket.server.cancelled():
                server = self._place_for(ticket)
                if server is None:
                    return
                server.load += ticket.cost
                server.taken += ticket.places
                ticket.server.set_result(server)
            self._queue.popleft()

    def _place_for(self, ticket: Ticket) -> Server | None:
        most = self.most if self.most is not None else float("inf")
        free = [s for s in self.up if not s.taken or s.taken + ticket.places <= most]
        return min(free, key=lambda s: (s in ticket.failed_at, s.load), default=None)

    async def post(
        self,
        path: str,
        make: Callable[[], bytes],
        read: Callable[[bytes], T],
        *,
        prompt_id: str,
        cost: int = 1,
        places: int = 1,
        kind: str = "application/octet-stream",
    ) -> tuple[T, int]:
        """What any server answers, and the version of the weights that gave it.

        make: builds the body once a server has room for it. read: takes the content of a 200 answer, or raises
        BadAnswer, which is a failed try. Both in threads. kind: the body's media type. A server that answers 429 is
        waited for, as long as one without progress. Raises PromptRefused when the server refuses this prompt, else
        `error`.
        """
        failed_at: list[Server] = []
        told_to_wait_s = 0.0
        while True:
            server = await self.take(cost, places, failed_at)
            version, wait_s = server.version, 0.0
            try:
                try:
                    response = await self._send(server, path, make, kind)
                finally:  # the next request goes out while this one's answer is read
                    self.give(server, cost, places)
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    try:
                        return await in_thread(read, response.content), version
                    except BadAnswer as error:
                        last = f"HTTP 200 with an answer that is none: {error}"
                else:
                    last = f"HTTP {response.status_code}: {response.text[:500]}"
                    self._check_refusal(server, response, last, prompt_id)
                    wait_s = seconds_to_wait(response)
            if wait_s and told_to_wait_s < self.timeout_s:
                told_to_wait_s += wait_s
                await asyncio.sleep(wait_s)
                continue
            if await self.examine(server):
                continue
            failed_at.append(server)
            if len(failed_at) > self.retries:
                raise self.error(
                    f"the {self.role} server {server.url} failed on prompt {prompt_id!r}, which was sent "
                    f"{len(failed_at)} times ({self.role}.retries={self.retries}); last: {last}"
                )
            await asyncio.sleep(0.1 * 2 ** len(failed_at))

    async def _send(self, server: Server, path: str, make: Callable[[], bytes], kind: str) -> httpx.Response:
        body = await in_thread(make)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))}
        # No limit on reading or writing: the pulse tells whether to wait on.
        limits = httpx.Timeout(None, connect=self.timeout_s)
        sending = self.http.post(server.url + path, content=_once(body), headers=headers, timeout=limits)
        del body
        return await self._pulses[server].wait(sending)

    def _check_refusal(self, server: Server, response: httpx.Response, told: str, prompt_id: str) -> None:
        """Raise for an answer that would be the same another time."""
        status = response.status_code
        if status == TAKEN:
            raise Taken(f"the {self.role} server {server.url} {held_by(response)}")
        if status in NEVER:
            raise self.error(f"the {self.role} server {server.url} answers {told}; check its URL, token and model")
        if 400 <= status < 500 and status not in AGAIN:
            raise PromptRefused(f"the {self.role} server {server.url} refused prompt {prompt_id!r}: {told}", prompt_id)

    def _pulse(self, server: Server) -> Pulse:
        async def look() -> float:
            if self.counter is None:
                raise ValueError("nothing was answered")
            response = await self.http.get(server.url + self.counter.path, timeout=pulse.patience_s)
            return self.counter.read(response.raise_for_status().text)

        pulse = Pulse(look, self.timeout_s)
        return pulse

    async def post_to(
        self, servers: Sequence[Server], path: str, *, timeout_s: float | None = None, repeat: bool = False, **body: Any
    ) -> dict[Server, httpx.Response]:
        """A control call to each of these at once; their answers. One that died is left out; others raise `error`.

        timeout_s: its limit, where the pool's does not fit. repeat: it may be made twice, so one that failed is tried
        again as often as a request is.
        """
        answers: dict[Server, httpx.Response] = {}

        async def one(server: Server) -> None:
            for left in range(self.retries if repeat else 0, -1, -1):
                sending = self.http.post(server.url + path, timeout=timeout_s or self.timeout_s, **body)
                if (answer := await self._answer(server, path, sending, last=not left)) is not None:
                    answers[server] = answer
                    return
                if not server.alive:
                    return

        await asyncio.gather(*(one(server) for server in servers if server.alive))
        return answers

    async def texts(self, path: str) -> list[str]:
        """What each server answers to GET; waits for one that is down. Raises `error`."""

        async def one(server: Server) -> str:
            left = self.retries
            while True:
                answer = await self._answer(server, path, self.http.get(server.url + path), last=not left)
                if answer is not None:
                    return answer.text
                left = max(0, left - server.alive)
                await asyncio.sleep(0.5)

        return list(await asyncio.gather(*map(one, self.servers)))

    async def _answer(
        self, server: Server, path: str, sending: Awaitable[httpx.Response], *, last: bool
    ) -> httpx.Response | None:
        """A 200, or None where there was another answer or none. On the last try of a server that lives, raises
        `error`."""
        try:
            response = await sending
        except httpx.HTTPError as error:
            told = f"{server.url}{path} failed: {type(error).__name__}: {error}"
        else:
            if response.status_code == 200:
                return response
            if response.status_code == TAKEN:
                raise Taken(f"{server.url} {held_by(response)}")
            told = f"{server.url}{path} answered {response.status_code}: {response.text[:500]}"
            last = last or response.status_code in NEVER
        if not await self.examine(server) and last:
            raise self.error(told)
        return None

    async def close(self) -> None:
        await self.http.aclose()
