"""The secret of a run: its servers answer nobody who does not know it."""

from __future__ import annotations

import hmac
import os
from typing import Any

from lingshu_rl.processes.lease import OneRun

TOKEN_ENV = "LINGSHU_RL_TOKEN"


class RequireToken:
    """ASGI middleware: every route but /health needs `Authorization: Bearer <token of this run>`, websockets as well.

    vLLM's own --api-key guards only /v1; the weight routes are more dangerous than those. Behind it stands `OneRun`.
    """

    def __init__(self, app: Any, token: str = "") -> None:
        """token: "" = that of the environment."""
        self.app = OneRun(app)
        token = token or os.environ.get(TOKEN_ENV, "")
        if not token:
            raise RuntimeError(f"{TOKEN_ENV} must be set for the token check")
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._may_pass(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "missing or wrong token"})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"missing or wrong token"})

    def _may_pass(self, scope: Any) -> bool:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == "/health"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self.expected)
