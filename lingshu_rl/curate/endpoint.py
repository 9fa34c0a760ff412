"""Chat completions of any OpenAI-compatible server, each answer kept in a database so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from lingshu_rl.chat import Answer, Attempts, Patience, Refused, api_url, bearer
from lingshu_rl.curate.image_index import open_database

T = TypeVar("T")
R = TypeVar("R")


class Endpoint:
    """url: of the server, see chat.api_url. cache: database of answers, keyed by all that an answer depends on but the server."""

    def __init__(
        self, url: str, cache: Path, *, key_env: str = "OPENAI_API_KEY", timeout_s: float = 300.0, retries: int = 4, concurrency: int = 16
    ) -> None:  # fmt: skip
        import httpx

        self.url, self.retries, self.concurrency = api_url(url), retries, concurrency
        self.http = httpx.Client(timeout=timeout_s, headers=bearer(os.environ.get(key_env, "")),
                                 limits=httpx.Limits(max_connections=concurrency))  # fmt: skip
        self.lock = threading.Lock()
        self.base = open_database(cache, scratch=False)
        self.base.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answers TEXT) WITHOUT ROWID")
        self.sent = self.from_cache = 0
        self.patience = Patience()

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

        attempts = Attempts(self.url, self.retries)
        for wait_s in attempts:
            time.sleep(wait_s)
            outcome: httpx.Response | httpx.HTTPError
            try:
                outcome = self.http.post(attempts.url, json=body)
            except httpx.HTTPError as error:
                outcome = error
            if answers := attempts.read(outcome):
                self.patience.answered()
                return answers
        raise self.patience.gave_up(attempts)

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
