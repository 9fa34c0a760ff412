"""How a server of ours treats those who connect: whoever says nothing is shown out, so that nobody is kept out.

A connection on which no request is under way is idle: nothing has come, a part of a header, or all is answered. One
that is idle for IDLE_S is closed. Of one peer's idle connections over PER_PEER, and of all over IDLE, the one idle
longest makes room.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Any

IDLE_S = 10.0
PER_PEER = 64
IDLE = 256
LOOK_S = 1.0


def guarded_protocol() -> Any:
    """uvicorn's own HTTP protocol with these rules; made here, so that importing this module imports no server."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Guarded(AutoHTTPProtocol):  # type: ignore[valid-type,misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.idle_since = self.loop.time()
            self._look()
            idle = [one for one in self.connections if one is not self and not one.busy]
            of_peer = [one for one in idle if one.peer == self.peer]
            crowd = of_peer if len(of_peer) >= PER_PEER else idle if len(idle) >= IDLE else []
            if crowd:
                min(crowd, key=lambda one: one.idle_since).transport.abort()

        @property
        def peer(self) -> str:
            return self.client[0] if self.client else ""

        @property
        def busy(self) -> bool:
            return self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete)

        def _look(self) -> None:
            now = self.loop.time()
            if self.busy:
                self.idle_since = now
            elif now - self.idle_since >= IDLE_S:
                self.transport.close()
            if not self.transport.is_closing():
                self.loop.call_later(LOOK_S, self._look)

    return Guarded


def serve(app: Any, *, host: str, port: int, most: int) -> None:
    """Answer until a signal ends the process, at once: there is nothing to bring to an end, and neither a thread that
    computes nor C code that holds the interpreter hears a handler of Python's. most: requests at once; others get 503.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            return contextlib.nullcontext()

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=guarded_protocol(),
        ws="none",
        log_level="warning",
        limit_concurrency=most,
        timeout_keep_alive=int(IDLE_S),
    )
    Server(config).run()
