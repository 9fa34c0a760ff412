"""Client of the rollout group: prompts go out, groups of completions with token ids and log-probs come back.

One request carries one prompt and asks for its G samples, so the engine sees prompt and image once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from lingshu_rl.types import Prompt, Rollout


class RolloutError(RuntimeError):
    """A rollout request failed for good; the message names server, prompt and the server's answer."""


class RolloutClient:
    """Talks to M vLLM servers. A group's samples stay on one server, the one with the fewest samples under way.

    decode: token ids -> text. banned_ids: tokens that must not be sampled (image placeholders).
    on_error: asked after each failed request; raises if the cause is known (a dead worker), so that its name and log
    reach the user instead of a connection error.
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
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.decode, self.on_error, self.seed, self.retries = decode, on_error, seed, retries
        self.weight_version = 0
        self.http = httpx.AsyncClient(
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {token}"},
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self.sampling = {
            "model": "policy",
            "temperature": temperature,
            "max_tokens": max_tokens,
            "logprobs": True,
            "return_token_ids": True,
            "logit_bias": {str(i): -100.0 for i in banned_ids},
        }
        self.under_way = {url: 0 for url in self.urls}
        self.gate = asyncio.Semaphore(concurrency)

    async def groups(self, prompts: Sequence[Prompt], n: int, step: int) -> AsyncIterator[tuple[Rollout, ...]]:
        """Yield the n rollouts of each prompt as soon as they are complete, in any order of prompts."""
        tasks = [asyncio.create_task(self.sample(p, n, request_seed(self.seed, step, p.id))) for p in prompts]
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
            version = self.weight_version
            answer = await self._post_least_busy("/v1/chat/completions", body, weight=n, what=f"prompt {prompt.id!r}")
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

    async def _post_least_busy(self, path: str, body: Mapping[str, Any], *, weight: int, what: str) -> dict[str, Any]:
        last = ""
        for attempt in range(self.retries + 1):
            url = min(self.urls, key=lambda u: self.under_way[u])
            self.under_way[url] += weight
            try:
                response = await self.http.post(url + path, json=body)
            except httpx.HTTPError as error:
                self.on_error()
                last = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return response.json()
                last = f"HTTP {response.status_code}: {response.text[:500]}"
                if 400 <= response.status_code < 500:
                    raise RolloutError(f"the rollout server {url} refused {what}: {last}")
            finally:
                self.under_way[url] -= weight
            await asyncio.sleep(0.2 * 2**attempt)
        raise RolloutError(f"the rollout server {url} failed {self.retries + 1} times on {what}; last: {last}")

    async def post_all(self, path: str, json: Mapping[str, Any] | None = None) -> None:
        """Post to every server at once. Raises RolloutError naming the first that failed."""

        async def one(url: str) -> None:
            try:
                response = await self.http.post(url + path, json=json)
                response.raise_for_status()
            except httpx.HTTPStatusError as error:
                raise RolloutError(
                    f"{url}{path} answered {error.response.status_code}: {error.response.text[:500]}"
                ) from None
            except httpx.HTTPError as error:
                self.on_error()
                raise RolloutError(f"{url}{path} failed: {type(error).__name__}: {error}") from error

        await asyncio.gather(*(one(url) for url in self.urls))

    async def generated_tokens(self) -> int:
        """The servers' own count of generated tokens (vLLM's Prometheus metrics)."""
        total = 0.0
        for url in self.urls:
            for line in (await self.http.get(f"{url}/metrics")).text.splitlines():
                if line.startswith("vllm:generation_tokens_total"):
                    total += float(line.rsplit(" ", 1)[1])
        return int(total)

    async def close(self) -> None:
        await self.http.aclose()


def request_seed(run_seed: int, step: int, prompt_id: str) -> int:
    """A seed below 2**31 that depends on nothing but its arguments; members use the numbers after it."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1 & 0x7FFFFF00


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
