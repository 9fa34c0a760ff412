"""Client of the rollout group: M vLLM servers, asked over HTTP.

One request carries one prompt and asks for its G samples, so the engine sees prompt and image once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from lingshu_rl.failures import PromptRefused
from lingshu_rl.imaging.images import data_uri
from lingshu_rl.processes.pool import Examine, Pool, unwatched
from lingshu_rl.processes.pulse import Counter
from lingshu_rl.processes.token import TOKEN_ENV
from lingshu_rl.rollout.answers import EngineAnswer, read_answer
from lingshu_rl.rollout.sampler import RolloutError, Sampler
from lingshu_rl.types import Prompt, Rollout
from rewards.chat import bearer

GENERATED = "vllm:generation_tokens_total"
COUNTED = (GENERATED, "vllm:prompt_tokens_total")  # what moves in vLLM's Prometheus metrics while it works


class RolloutClient(Sampler):
    """Talks to M vLLM servers. A group's samples stay on one server, the one with the fewest tokens under way.

    concurrency: completions under way at once on one server; a group that asks for more has a server to itself.
    timeout_s, retries, examine and run: see `Pool`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str,
        decode: Callable[[Sequence[int]], str],
        banned_ids: Sequence[int],
        end_ids: Iterable[int] = (),
        seed: int,
        temperature: float,
        max_tokens: int,
        timeout_s: float,
        retries: int,
        concurrency: int,
        examine: Examine = unwatched,
        run: str = "",
    ) -> None:
        super().__init__(
            decode=decode,
            banned_ids=banned_ids,
            end_ids=end_ids,
            seed=seed,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        self.pool = Pool(
            "rollout",
            urls,
            token=token,
            timeout_s=timeout_s,
            retries=retries,
            error=RolloutError,
            most=concurrency,
            counter=VLLM_COUNTER,
            examine=examine,
            run=run,
        )
        self._context = 0
        self._asking = asyncio.Lock()

    @property
    def weight_version(self) -> int:
        return max(server.version for server in self.pool.servers)

    async def _ask(self, body: Mapping[str, Any], prompt: Prompt) -> tuple[EngineAnswer, int]:
        return await self.pool.post(
            "/v1/chat/completions",
            # The name of the weights when its turn has come: a request may outlive the server that it was made for.
            lambda: msgspec.json.encode(
                {**body, "model": self.sampling["model"], "messages": readable_messages(prompt)}
            ),
            lambda content: read_answer(content, body["n"]),
            kind="application/json",
            prompt_id=prompt.id,
            cost=body["n"] * body["max_tokens"],
            places=body["n"],
        )

    async def context_length(self) -> int:
        """Of the server that takes the fewest, as they say themselves; asked once."""
        async with self._asking:
            if not self._context:
                self._context = min(map(_max_model_len, await self.pool.texts("/v1/models")))
        return self._context

    async def generated_tokens(self) -> int:
        """The servers' own count of generated tokens (vLLM's Prometheus metrics)."""
        try:
            return int(sum(tokens_counted(text, [GENERATED]) for text in await self.pool.texts("/metrics")))
        except ValueError as error:
            raise RolloutError(str(error)) from None

    async def close(self) -> None:
        await self.pool.close()


VLLM_COUNTER = Counter("/metrics", lambda text: tokens_counted(text, COUNTED))


def tokens_counted(metrics: str, names: Sequence[str]) -> float:
    """The sum of these counters over a vLLM server's engines. Raises ValueError when /metrics shows none of them."""
    lines = [line for line in metrics.splitlines() if line.startswith(tuple(names))]
    if not lines:
        raise ValueError(f"/metrics shows no {names[0]}; the server must be a vLLM without disable_log_stats")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


class SilentServer(RolloutError):
    """A given server that does not answer: it is not there, or not yet."""


def served_context(urls: Sequence[str], token: str) -> int:
    """max_model_len of the server that takes the fewest tokens. Raises RolloutError, SilentServer among others."""
    with httpx.Client(headers=bearer(token), timeout=10.0, transport=httpx.HTTPTransport()) as http:  # past any proxy
        return min(_max_model_len(_answer(http, url.rstrip("/") + "/v1/models")) for url in urls)


def _answer(http: httpx.Client, url: str) -> str:
    try:
        return http.get(url).raise_for_status().text
    except httpx.HTTPStatusError as error:
        kind = SilentServer if error.response.is_server_error else RolloutError
        raise kind(
            f"{url} answers {error.response.status_code}: {error.response.text[:200]}; check rollout.urls, and that "
            f"{TOKEN_ENV} is the same here and there"
        ) from error
    except httpx.HTTPError as error:
        raise SilentServer(
            f"{url} does not answer ({type(error).__name__}: {error}); check rollout.urls, and whether the server runs"
        ) from error


def _max_model_len(models: str) -> int:
    try:
        return int(json.loads(models)["data"][0]["max_model_len"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise RolloutError(f"/v1/models names no max_model_len, as a vLLM server does: {models[:200]}") from None


def write_rollouts(path: Path, landed: Mapping[str, tuple[Rollout, ...]]) -> None:
    """One line a rollout, with its prompt's id in place of the prompt."""
    with open(path, "w") as out:
        for group in landed.values():
            for rollout in group:
                fields = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
                out.write(json.dumps({**fields, "prompt": rollout.prompt.id}) + "\n")


def read_rollouts(path: Path, by_id: Mapping[str, Prompt]) -> dict[str, tuple[Rollout, ...]]:
    """What `write_rollouts` wrote, exactly, by prompt id; nothing when there is no such file."""
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
                {"type": "image_url", "image_url": {"url": data_uri(next(images).encoded())}}
                if p["type"] == "image"
                else dict(p)
                for p in content
            ]
        messages.append({"role": message["role"], "content": content})
    return messages


def readable_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """`chat_messages`; a prompt whose image file cannot be read any more is refused like one that the engine
    refuses."""
    try:
        return chat_messages(prompt)
    except OSError as error:
        raise PromptRefused(f"an image of prompt {prompt.id!r} cannot be read: {error}", prompt.id) from error
