"""Client of the reference group: token groups out, their log-probs under the frozen reference back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lingshu_rl.processes.pool import Examine, Pool, unwatched
from lingshu_rl.types import TokenGroup

if TYPE_CHECKING:
    import torch


class ReferenceRequestError(RuntimeError):
    """A reference request failed for good; the message names the server and its answer."""


class ReferenceClient:
    """K replicas share one queue: whichever is free takes the next group."""

    def __init__(
        self, urls: Sequence[str], *, token: str, timeout_s: float, retries: int = 0, examine: Examine = unwatched
    ) -> None:
        self.pool = Pool(
            "reference",
            urls,
            token=token,
            timeout_s=timeout_s,
            retries=retries,
            error=ReferenceRequestError,
            most=1,
            examine=examine,
        )

    async def logprobs(self, groups: Sequence[TokenGroup]) -> list[tuple[torch.Tensor, ...]]:
        """Per group, per completion, float32 log-probs in nats."""
        from lingshu_rl.reference.wire import decode_logprobs, encode_groups

        what = f"group {groups[0].key!r}"
        response, _ = await self.pool.post("/logprobs", content=encode_groups(groups), what=what)
        return decode_logprobs(response.content, groups)

    async def close(self) -> None:
        await self.pool.close()
