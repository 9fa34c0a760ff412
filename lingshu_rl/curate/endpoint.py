"""Chat completions of any OpenAI-compatible server, each answer kept in a database so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lingshu_rl.curate.image_index import open_database

T = TypeVar("T")
R = TypeVar("R")
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_WAIT_S = 30.0


class EndpointError(RuntimeError):
    """The server cannot be used; answers so far are kept, so the same command goes on from there."""


class Refused(RuntimeError):
    """This request was refused; others may be answered."""


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Endpoint:
    """url: up to and with /v1. cache: database of answers, keyed by all that an answer depends on but the server."""

    def __init__(
        self, url: str, cache: Path, *, key_env: str = "OPENAI_API_KEY", timeout_s: float = 300.0, retries: int = 4, concurrency: int = 16
    ) -> None:  # fmt: skip
        import httpx

        if not url.startswith(("http://", "https://")):
            raise EndpointError(f"url is an address such as http://127.0.0.1:8000/v1, got {url!r}")
        self.url, self.retries, self.concurrency = url.rstrip("/"), retries, concurrency
        key = os.environ.get(key_env, "")
        self.http = httpx.Client(timeout=timeout_s, headers={"Authorization": f"Bearer {key}"} if key else {},
                                 limits=httpx.Limits(max_connections=concurrency))  # fmt: skip
        self.lock = threading.Lock()
        self.base = open_database(cache, scratch=False)
        self.base.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answers TEXT) WITHOUT ROWID")
        self.sent = self.from_cache = 0

    def sample(self, body: Mapping[str, Any], n: int, seed: int) -> list[Answer]:
        """n samples of one conversation. Servers that give fewer at a time are asked again, with another seed.

        Raises Refused for a request that this server will never answer, EndpointError when it answers none.
        """
        told = json.dumps([body, n, seed], sort_keys=True)
        name = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        with self.lock:
            row = self.base.execute("SELECT answers FROM answers WHERE request = ?", (name,)).fetchone()
            if row is not None:
                self.from_cache += 1
                return [Answer(*pair) for pair in json.loads(row[0])]
        found: list[Answer] = []
        while len(found) < n:
            found += self._post({**body, "n": n - len(found), "seed": seed + len(found)})
        found = found[:n]
        with self.lock:
            self.sent += 1
            kept = json.dumps([[a.text, a.finish_reason] for a in found], ensure_ascii=False)
            self.base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (name, kept))
        return found

    def _post(self, body: Mapping[str, Any]) -> list[Answer]:
        import httpx

        url, trouble = f"{self.url}/chat/completions", ""
        for attempt in range(self.retries + 1):
            try:
                response = self.http.post(url, json=body)
            except httpx.HTTPError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return _answers(response, url)
                trouble = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code in (401, 403, 404):
                    raise EndpointError(f"{url} answers {trouble}; check url, model and the key")
                if response.status_code not in AGAIN:
                    raise Refused(trouble)
            if attempt < self.retries:
                time.sleep(min(MAX_WAIT_S, 0.5 * 2**attempt))
        raise EndpointError(
            f"{url} gave no answer after {self.retries + 1} tries ({trouble}); the same command goes on later"
        )

    def each(self, things: Iterable[T], ask: Callable[[T], R]) -> Iterator[tuple[T, R | Refused]]:
        """(thing, ask(thing)) in order, `concurrency` at a time; a refusal comes back as the result."""

        def one(thing: T) -> R | Refused:
            try:
                return ask(thing)
            except Refused as error:
                return error

        waiting: deque[tuple[T, Future[R | Refused]]] = deque()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for thing in things:
                    waiting.append((thing, pool.submit(one, thing)))
                    if len(waiting) >= 2 * self.concurrency:
                        first, future = waiting.popleft()
                        yield first, future.result()
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    def close(self) -> None:
        self.http.close()
        self.base.close()


def _answers(response: Any, url: str) -> list[Answer]:
    try:
        choices: Sequence[Mapping[str, Any]] = response.json()["choices"]
        found = []
        for choice in choices:
            message = choice["message"]
            thought = message.get("reasoning_content") or message.get("reasoning") or ""
            text = message.get("content") or ""
            found.append(
                Answer(f"<think>{thought}</think>{text}" if thought else text, choice.get("finish_reason") or "stop")
            )
    except (ValueError, KeyError, TypeError) as error:
        raise EndpointError(f"{url} does not speak the chat completions protocol: {response.text[:200]}") from error
    if not found:
        raise EndpointError(f"{url} returned no choices")
    return found
