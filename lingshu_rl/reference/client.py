"""Client of the reference group: token groups out, their log-probs under the frozen reference back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import httpx

from lingshu_rl.types import TokenGroup

if TYPE_CHECKING:
    import torch


class ReferenceRequestError(RuntimeError):
    """A reference request failed for good; the message names the server and its answer."""


class ReferenceClient:
    """K replicas share one queue: whichever is free takes the next group."""

    def __init__(
        self, urls: Sequence[str], *, token: str, timeout_s: float, on_error: Callable[[], None] = lambda: None
    ) -> None:
        self.on_error = on_error
        self.http = httpx.AsyncClient(timeout=timeout_s, headers={"Authorization": f"Bearer {token}"})
        self.free: asyncio.Queue[str] = asyncio.Queue()
        for url in urls:
            self.free.put_nowait(url.rstrip("/"))

    async def logprobs(self, groups: Sequence[TokenGroup]) -> list[tuple[torch.Tensor, ...]]:
        """Per group, per completion, float32 log-probs in nats."""
        from lingshu_rl.reference.wire import decode_logprobs, encode_groups

        body = encode_groups(groups)
        url = await self.free.get()
        try:
            response = await self.http.post(f"{url}/logprobs", content=body)
        except httpx.HTTPError as error:
            self.on_error()
            raise ReferenceRequestError(
                f"the reference server {url} failed: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.free.put_nowait(url)
        if response.status_code != 200:
            raise ReferenceRequestError(
                f"the reference server {url} answered {response.status_code}: {response.text[:500]}"
            )
        return decode_logprobs(response.content, groups)

    async def close(self) -> None:
        await self.http.aclose()
