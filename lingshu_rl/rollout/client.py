"""Client of the rollout group: prompts go out, groups of completions with token ids and log-probs come back.

One request carries one prompt and asks for its G samples, so the engine sees prompt and image once.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lingshu_rl.processes.pool import Examine, Pool, unwatched
from lingshu_rl.types import Prompt, Rollout


class RolloutError(RuntimeError):
    """A rollout request failed for good; the message names server, prompt and the server's answer."""


class RolloutClient:
    """Talks to M vLLM servers. A group's samples stay on one server, the one with the fewest tokens under way.

    decode: token ids -> text. banned_ids: tokens that must not be sampled (image placeholders).
    examine: asked after each failed request whether the server died, see `pool`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str,
        decode: Callable[[Sequence[int]], str],
        banned_ids: Sequence[int],
        seed: int,
        temperature: float,
        max_tokens: int,
        timeout_s: float,
        retries: int,
        concurrency: int,
        examine: Examine = unwatched,
    ) -> None:
        self.decode, self.seed = decode, seed
        self.pool = Pool(
            "rollout",
            urls,
            token=token,
            timeout_s=timeout_s,
            retries=retries,
            error=RolloutError,
            connections=concurrency,
            examine=examine,
        )
        self.sampling = {
            "model": "policy",
            "temperature": temperature,
            "max_tokens": max_tokens,
            "logprobs": True,
            "return_token_ids": True,
            "logit_bias": {str(i): -100.0 for i in banned_ids},
        }
        self.gate = asyncio.Semaphore(concurrency)
        self.landed: dict[int, dict[str, tuple[Rollout, ...]]] = {}  # by step, then prompt id

    @property
    def weight_version(self) -> int:
        return max(server.version for server in self.pool.servers)

    async def groups(self, prompts: Sequence[Prompt], n: int, step: int) -> AsyncIterator[tuple[Rollout, ...]]:
        """Yield the n rollouts of each prompt as soon as they are complete, in any order of prompts.

        They stay in `landed` until a later step asks, so that a checkpoint can keep them and a resumed run need not
        sample them again (from other weights, if they were sampled ahead).
        """
        self.landed = {kept: groups for kept, groups in self.landed.items() if kept >= step}
        landed = self.landed.setdefault(step, {})

        async def group(prompt: Prompt) -> tuple[Rollout, ...]:
            if prompt.id not in landed:
                landed[prompt.id] = await self.sample(prompt, n, request_seed(self.seed, step, prompt.id))
            return landed[prompt.id]

        tasks = [asyncio.create_task(group(prompt)) for prompt in prompts]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def sample(self, prompt: Prompt, n: int, seed: int, **changes: Any) -> tuple[Rollout, ...]:
        """The n rollouts of one prompt. The same seed and weights give the same samples; member i uses seed + i."""
        body = {
            **self.sampling,
            "messages": chat_messages(prompt),
            "n": n,
            "seed": seed,
            **changes,
        }
        async with self.gate:
            answer, version = await self._ask(body, prompt)
        prompt_ids = tuple(answer["prompt_token_ids"])
        rollouts = []
        for choice in sorted(answer["choices"], key=lambda c: c["index"]):
            token_ids = tuple(choice["token_ids"])
            logprobs = tuple(item["logprob"] for item in choice["logprobs"]["content"])
            if len(token_ids) != len(logprobs) or not token_ids:
                raise RolloutError(
                    f"the rollout server returned {len(token_ids)} tokens with {len(logprobs)} log-probs for prompt "
                    f"{prompt.id!r}; it must be a vLLM that knows return_token_ids"
                )
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    member=choice["index"],
                    text=self.decode(token_ids),
                    prompt_ids=prompt_ids,
                    token_ids=token_ids,
                    logprobs=logprobs,
                    finish_reason=choice["finish_reason"],
                    weight_version=version,
                )
            )
        return tuple(rollouts)

    async def _ask(self, body: dict[str, Any], prompt: Prompt) -> tuple[dict[str, Any], int]:
        """vLLM's answer, and the version of the weights that gave it."""
        cost = body["n"] * body["max_tokens"]
        response, version = await self.pool.post(
            "/v1/chat/completions", json=body, cost=cost, what=f"prompt {prompt.id!r}"
        )
        return response.json(), version

    async def generated_tokens(self) -> int:
        """The servers' own count of generated tokens (vLLM's Prometheus metrics)."""
        total = 0.0
        for text in await self.pool.texts("/metrics"):
            for line in text.splitlines():
                if line.startswith("vllm:generation_tokens_total"):
                    total += float(line.rsplit(" ", 1)[1])
        return int(total)

    async def close(self) -> None:
        await self.pool.close()


def request_seed(run_seed: int, step: int, prompt_id: str) -> int:
    """A seed below 2**31 that depends on nothing but its arguments; members use the numbers after it."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1 & 0x7FFFFF00


def write_rollouts(path: Path, landed: Mapping[str, tuple[Rollout, ...]]) -> None:
    """One line a rollout, with its prompt's id in place of the prompt."""
    with open(path, "w") as out:
        for group in landed.values():
            for rollout in group:
                fields = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
                out.write(json.dumps({**fields, "prompt": rollout.prompt.id}) + "\n")


def read_rollouts(path: Path, prompts: Sequence[Prompt]) -> dict[str, tuple[Rollout, ...]]:
    """What `write_rollouts` wrote, exactly, by prompt id; nothing when there is no such file."""
    by_id = {prompt.id: prompt for prompt in prompts}
    found: dict[str, list[Rollout]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        fields = json.loads(line)
        lists = {key: tuple(fields[key]) for key in ("prompt_ids", "token_ids", "logprobs")}
        found.setdefault(fields["prompt"], []).append(Rollout(**{**fields, **lists, "prompt": by_id[fields["prompt"]]}))
    return {name: tuple(rollouts) for name, rollouts in found.items()}


def chat_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """OpenAI messages, each image placeholder replaced by a data URI in the order of `prompt.images`."""
    images = iter(prompt.images)
    messages: list[dict[str, Any]] = []
    for message in prompt.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": data_uri(next(images))}} if p["type"] == "image" else dict(p)
                for p in content
            ]
        messages.append({"role": message["role"], "content": content})
    return messages


def data_uri(image: str | bytes) -> str:
    data = Path(image).read_bytes() if isinstance(image, str) else image
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png" if data[:4] == b"\x89PNG" else "*"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
