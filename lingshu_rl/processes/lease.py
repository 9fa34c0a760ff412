"""A server that several runs could reach is one run's at a time: two that send it weights would wreck its engine.

The server keeps who holds it and until when; the run renews its hold from a thread of its own, because an update keeps
its event loop busy. Whoever else asks for work, or for a change, is told the holder's name. A hold that is not renewed
ends by itself, so a run that was killed leaves none behind; the same run, started again, goes on with it at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from lingshu_rl.failures import RunStopped
from rewards.chat import bearer

ROUTE, RUN = "/lease", "x-lingshu-run"
LEASE_S = 15.0  # from the last renewal to the end
BEAT_S = 3.0  # between renewals
TAKEN = 423  # HTTP: locked
_READING = ("GET", "HEAD", "OPTIONS")


class Taken(RunStopped):
    """Another run holds the server; the message names the server and its holder."""


class OneRun:
    """ASGI middleware. PUT /lease {"run", "holder"} takes or renews the hold, DELETE gives it back; a request says
    whose it is by the header x-lingshu-run. While a run holds the server, other runs may read and not more.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.run, self.holder, self.until = "", "", 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        run, left_s = request.headers.get(RUN, ""), self.until - time.monotonic()
        if self.run != run and left_s > 0 and request.method not in _READING:
            told = {"holder": self.holder, "left_s": round(left_s, 1)}
            await JSONResponse(told, TAKEN)(scope, receive, send)
        elif scope["path"] != ROUTE:
            await self.app(scope, receive, send)
        else:
            status = 405 if request.method in _READING else 200 if await self._note(run, request) else 400
            await JSONResponse({}, status)(scope, receive, send)

    async def _note(self, run: str, request: Any) -> bool:
        """Take, renew or give back; False for a request that names no run, or itself in no words."""
        try:
            holder = str((await request.json())["holder"]) if request.method == "PUT" else ""
        except (ValueError, KeyError, TypeError):
            return False
        if run:
            self.run, self.holder = run, holder
            self.until = time.monotonic() + LEASE_S if holder else 0.0
        return bool(run)


class Lease:
    """A run's hold on servers that it did not start. run: the same whenever this run is started again. holder: in
    words."""

    def __init__(self, urls: Sequence[str], *, run: str, holder: str, token: str) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.holder = holder
        self.http = httpx.Client(headers={**bearer(token), RUN: run}, timeout=10.0, transport=httpx.HTTPTransport())
        self._end = threading.Event()

    @contextmanager
    def held(self) -> Iterator[list[str]]:
        """Take the servers and keep them; yields those that keep no leases, which any run may take as well.

        Waits LEASE_S for a holder that may have died. Raises Taken for one that lives.
        """
        open_to_all = [url for url in self.urls if not self._take(url)]
        beat = threading.Thread(target=self._renew, daemon=True, name="lease")
        beat.start()
        try:
            yield open_to_all
        finally:
            self._end.set()
            beat.join()
            for url in self.urls:
                self._ask("DELETE", url)
            self.http.close()

    def _take(self, url: str) -> bool:
        """Whether this server keeps leases; one that cannot be asked is left to the first request, which can say
        more."""
        last_s = float("inf")
        while (answer := self._ask("PUT", url)) is not None and answer.status_code == TAKEN:
            told = answer.json()
            if told["left_s"] > last_s:  # it was renewed meanwhile
                raise Taken(f"{url} is in use by {told['holder']}: wait for it, stop it, or name another server")
            last_s = told["left_s"]
            time.sleep(0.5)
        return answer is None or answer.status_code == 200

    def _renew(self) -> None:
        while not self._end.wait(BEAT_S):
            for url in self.urls:
                self._ask("PUT", url)

    def _ask(self, method: str, url: str) -> httpx.Response | None:
        try:
            return self.http.request(method, url + ROUTE, json={"holder": self.holder})
        except httpx.HTTPError:
            return None


def held_by(response: httpx.Response) -> str:
    """What a refusal with TAKEN says, in words."""
    try:
        return f"is in use by {response.json()['holder']}"
    except (ValueError, KeyError, TypeError):
        return "is in use by another run"
