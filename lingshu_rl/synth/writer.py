"""Asks any OpenAI-compatible chat endpoint: bounded, retried, and every reply kept in a file, so that nothing is paid
twice.

A request's file is named after what was asked (model, messages, image bytes, sampling), not after the server: the same
question to the same model is answered from disk, in this run or the next.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from lingshu_rl.imaging.images import data_uri, opened
from lingshu_rl.storage.runfolder import write_text
from rewards.chat import KEY_ENV, Attempts, ChatAnswer, EndpointError, Patience, api_url, bearer

CHARACTERS_PER_TOKEN = 4  # of English; good for a cost estimate, not for a limit
PIXELS_PER_IMAGE_TOKEN = 28 * 28  # Qwen2.5-VL; other families differ


@dataclass(frozen=True)
class WriterConfig:
    """url: of the server, see chat.api_url. prices: in any currency, a million tokens."""

    url: str
    model: str
    cache: Path
    concurrency: int = 32
    retries: int = 5
    timeout_s: float = 300.0
    temperature: float = 0.7
    max_tokens: int = 1024
    key_env: str = KEY_ENV
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise EndpointError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        api_url(self.url)


@dataclass(frozen=True)
class Reply(ChatAnswer):
    """request: name of the cache file, the reply's provenance."""

    request: str


class Asker(Protocol):
    async def ask(
        self, messages: Sequence[dict[str, str]], *, images: Sequence[bytes] = (), seed: int = 0, example: str = ""
    ) -> Reply:
        """One reply. images go before the last message's text. example: a reply as it may look, for the estimate."""
        ...


class Writer:
    """The endpoint with its cache. Use as an async context manager."""

    def __init__(self, config: WriterConfig) -> None:
        import httpx

        self.config = config
        self.sent = self.from_cache = 0
        self._http = httpx.AsyncClient(
            timeout=config.timeout_s,
            headers=bearer(os.environ.get(config.key_env, "")),
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._patience = Patience()

    async def __aenter__(self) -> Writer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(
        self, messages: Sequence[dict[str, str]], *, images: Sequence[bytes] = (), seed: int = 0, example: str = ""
    ) -> Reply:
        name = request_name(self.config, messages, images, seed)
        if (reply := read_cached(self.config.cache, name)) is not None:
            self.from_cache += 1
            return reply
        async with self._slots:
            answer = await self._post(request_body(self.config, messages, images, seed))
        self.sent += 1
        write_text(cache_file(self.config.cache, name), json.dumps(asdict(answer), ensure_ascii=False))
        return Reply(answer.text, answer.finish_reason, name)

    async def _post(self, body: dict[str, Any]) -> ChatAnswer:
        import httpx

        attempts = Attempts(self.config.url, self.config.retries)
        for wait_s in attempts:
            await asyncio.sleep(wait_s)
            outcome: httpx.Response | httpx.HTTPError
            try:
                outcome = await self._http.post(attempts.url, json=body)
            except httpx.HTTPError as error:
                outcome = error
            if answers := attempts.read(outcome):
                self._patience.answered()
                return answers[0]
        raise self._patience.gave_up(attempts)


class Estimator:
    """Counts what a run would ask at most, without asking: known replies come from the cache, others are the step's
    example.

    An example is the reply that leads to the most further requests; output tokens are max_tokens a request. So the sums
    are upper bounds, but for the tokens of earlier replies that later requests quote.
    """

    def __init__(self, config: WriterConfig) -> None:
        self.config = config
        self.requests = self.from_cache = 0
        self.tokens_in = self.tokens_out = 0

    async def ask(
        self, messages: Sequence[dict[str, str]], *, images: Sequence[bytes] = (), seed: int = 0, example: str = ""
    ) -> Reply:
        name = request_name(self.config, messages, images, seed)
        if (reply := read_cached(self.config.cache, name)) is not None:
            self.from_cache += 1
            return reply
        self.requests += 1
        self.tokens_in += sum(len(m["content"]) for m in messages) // CHARACTERS_PER_TOKEN
        self.tokens_in += sum(image_tokens(image) for image in images)
        self.tokens_out += self.config.max_tokens
        return Reply(example, "stop", name)

    @property
    def cost(self) -> float:
        return (self.tokens_in * self.config.price_in + self.tokens_out * self.config.price_out) / 1e6

    def __str__(self) -> str:
        money = f", at most {self.cost:,.2f}" if self.config.price_in or self.config.price_out else ""
        return (
            f"at most {self.requests:,} requests to {self.config.model}, about {self.tokens_in:,} tokens in, at most "
            f"{self.tokens_out:,} out{money}; {self.from_cache:,} more are answered from {self.config.cache}"
        )


def image_tokens(image: bytes) -> int:
    with opened(image) as picture:
        return math.ceil(picture.width * picture.height / PIXELS_PER_IMAGE_TOKEN)


def request_name(config: WriterConfig, messages: Sequence[dict[str, str]], images: Sequence[bytes], seed: int) -> str:
    """A hash of everything that the reply depends on."""
    told = {
        "model": config.model,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "seed": seed,
        "messages": list(messages),
        "images": [hashlib.sha256(image).hexdigest() for image in images],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


def request_body(
    config: WriterConfig, messages: Sequence[dict[str, str]], images: Sequence[bytes], seed: int
) -> dict[str, Any]:
    *before, last = messages
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    content: Any = [*parts, {"type": "text", "text": last["content"]}] if parts else last["content"]
    return {
        "model": config.model,
        "messages": [*before, {"role": last["role"], "content": content}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "seed": seed,
    }


def cache_file(cache: Path, name: str) -> Path:
    return cache / name[:2] / f"{name}.json"


def read_cached(cache: Path, name: str) -> Reply | None:
    try:
        answer = json.loads(cache_file(cache, name).read_text())
        return Reply(answer["text"], answer["finish_reason"], name)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError) as error:
        raise EndpointError(f"{cache_file(cache, name)} is damaged ({error}); delete it to ask again") from None
