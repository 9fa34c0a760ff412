"""Client of the reference group: token groups out, their log-probs under the frozen reference back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lingshu_rl.failures import RunStopped
from lingshu_rl.processes.pool import Examine, Pool, unwatched
from lingshu_rl.processes.pulse import Counter
from lingshu_rl.types import ProcessorInputs, TokenGroup

if TYPE_CHECKING:
    import torch


class ReferenceRequestError(RunStopped):
    """A reference request failed for good; the message names the server and its answer."""


class ReferenceClient:
    """K replicas share one queue: whichever is free takes the next group."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str,
        timeout_s: float,
        retries: int = 0,
        examine: Examine = unwatched,
        run: str = "",
    ) -> None:
        self.pool = Pool(
            "reference",
            urls,
            token=token,
            timeout_s=timeout_s,
            retries=retries,
            error=ReferenceRequestError,
            most=1,
            counter=Counter("/health", progress_told),
            examine=examine,
            run=run,
        )

    async def logprobs(
        self, groups: Sequence[TokenGroup], inputs: Sequence[ProcessorInputs] = ()
    ) -> list[tuple[torch.Tensor, ...]]:
        """Per group, per completion, float32 log-probs in nats. Raises PromptRefused or ReferenceRequestError.

        inputs: of each group, where groups come without their image tensors.
        """
        from lingshu_rl.reference.wire import decode_logprobs, encode_groups

        found, _ = await self.pool.post(
            "/logprobs",
            lambda: encode_groups(groups, inputs),
            lambda content: decode_logprobs(content, groups),
            prompt_id=groups[0].key,
        )
        return found

    async def close(self) -> None:
        await self.pool.close()


def progress_told(health: str) -> float:
    """What /health says of the work done. Raises ValueError when it says nothing of it."""
    try:
        return float(json.loads(health)["progress"])
    except (KeyError, TypeError):
        raise ValueError(f"/health tells no progress: {health[:100]}") from None
