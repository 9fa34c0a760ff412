"""The secret of a run: its servers answer nobody who does not know it."""

from __future__ import annotations

import hmac
import os
from typing import Any

TOKEN_ENV = "LINGSHU_RL_TOKEN"


class RequireToken:
    """ASGI middleware: every route but /health needs `Authorization: Bearer <token of this run>`.

    vLLM's own --api-key guards only /v1; the weight routes are more dangerous than those.
    """

    def __init__(self, app: Any, token: str = "") -> None:
        """token: "" = that of the environment."""
        self.app = app
        token = token or os.environ.get(TOKEN_ENV, "")
        if not token:
            raise RuntimeError(f"{TOKEN_ENV} must be set for the token check")
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            headers = dict(scope["headers"])
            if not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"missing or wrong token"})
                return
        await self.app(scope, receive, send)
