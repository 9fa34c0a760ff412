"""Chat completions of any OpenAI-compatible server: what an answer is, what is asked again and when to give up.

`Attempts` is without input or output of its own: who sends in an event loop shows the outcome there. `Endpoint` sends
from threads and keeps every answer in a database, so that nothing is asked, or paid, twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rewards.base import LingshuError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
R = TypeVar("R")

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
NEVER = {401, 403, 404, 423}  # not this request's fault: every other one would fare alike
LONGEST_WAIT_S = 60.0
MOST_IN_A_ROW = 8  # requests without an answer until it is the server's fault and not theirs


class EndpointError(LingshuError, RuntimeError):
    """The server cannot be used. Answers so far are kept by who asked, so the same command goes on from there."""


class Unreachable(EndpointError):
    """No connection could be made."""


class CostReached(RuntimeError):
    """The answers so far cost what they may cost in all."""


class RequestRefused(RuntimeError):
    """This request was refused; others may be answered. reason: in a phrase, under which such ones are counted."""

    reason = "request refused"


class Unanswered(RequestRefused):
    """The server is there and gave this request no answer, however often it was asked."""

    reason = "no answer"


@dataclass(frozen=True)
class ChatAnswer:
    """text: with the model's reasoning in front as a think block where the server returns it apart."""

    text: str
    finish_reason: str

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Attempts:
    """The tries of one request: iterate for the seconds to wait before each, and give `read` what came of it.

    retries: further tries after the first. Where they run out, raise what `gave_up` returns, or `Patience.gave_up`.
    """

    def __init__(self, url: str, retries: int) -> None:
        self.url, self.retries = f"{api_url(url)}/chat/completions", retries
        self.shown = address(self.url)
        self.trouble = ""
        self.unreachable = False
        self.usage: tuple[int, int] | None = None  # tokens in and out of the answer, where the server counts them
        self._wait_s = 0.0

    def __iter__(self) -> Iterator[float]:
        for attempt in range(self.retries + 1):
            yield self._wait_s
            self._wait_s = max(self._wait_s, min(LONGEST_WAIT_S, 0.5 * 2**attempt))

    def read(self, outcome: httpx.Response | httpx.HTTPError) -> list[ChatAnswer] | None:
        """The answers, or None to try again. Raises RequestRefused or EndpointError where that is of no use."""
        import httpx

        self._wait_s = 0.0
        self.unreachable = isinstance(outcome, httpx.ConnectError)
        if isinstance(outcome, httpx.TimeoutException):
            self.trouble = (
                f"{type(outcome).__name__}: no answer within {outcome.request.extensions['timeout']['read']:g} s"
            )
            return None
        if isinstance(outcome, httpx.HTTPError):
            self.trouble = f"{type(outcome).__name__}: {outcome}"
            return None
        if outcome.status_code == 200:
            answers, self.usage = _answers(outcome), _usage(outcome)
            self.trouble = f"no chat completion: {outcome.text[:200]}"
            return answers or None
        self.trouble = f"HTTP {outcome.status_code}: {outcome.text[:300]}"
        if outcome.status_code in NEVER:
            raise EndpointError(f"{self.shown} answers {self.trouble}; check the url, the model's name and the key")
        if outcome.status_code not in AGAIN:
            raise RequestRefused(self.trouble)
        self._wait_s = seconds_to_wait(outcome)
        return None

    def gave_up(self) -> Unreachable | Unanswered:
        tries = f"after {self.retries + 1} tries ({self.trouble})"
        if self.unreachable:
            return Unreachable(f"{self.shown} cannot be reached {tries}; the same command goes on later")
        return Unanswered(f"{self.shown} gave no answer {tries}")


class Patience:
    """Tells a request that a server cannot answer, which costs that request alone, from a server that answers none."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def answered(self) -> None:
        self.in_a_row = 0

    def gave_up(self, attempts: Attempts) -> Exception:
        self.in_a_row += 1
        error = attempts.gave_up()
        if self.in_a_row < MOST_IN_A_ROW or isinstance(error, EndpointError):
            return error
        return EndpointError(
            f"{error}, and none to {self.in_a_row} requests one after another; the same command goes on later"
        )


def seconds_to_wait(response: httpx.Response) -> float:
    """What a server that is busy for now asks for: its Retry-After, at most LONGEST_WAIT_S. A 429 without one means
    1."""
    asked = 0.0
    with contextlib.suppress(KeyError, ValueError):  # a date is allowed too, and not worth reading
        asked = max(0.0, float(response.headers["retry-after"]))
    return min(LONGEST_WAIT_S, asked or float(response.status_code == 429))


HIDDEN = "(hidden)"  # in place of a secret, wherever one is shown
KEY_ENV = "LINGSHU_RL_API_KEY"  # sent as bearer token to the server that is asked for answers or texts
JUDGE_KEY_ENV = "LINGSHU_RL_JUDGE_API_KEY"  # ... to a judge, which may be somebody else's


def api_url(url: str) -> str:
    """A server's address with its version: /v1 where the address names none. Raises EndpointError for what is no
    address."""
    if not url.startswith(("http://", "https://")):
        raise EndpointError(f"url is an address such as http://127.0.0.1:8000/v1, got {url!r}")
    return url.rstrip("/") if re.search(r"/v\d", url) else f"{url.rstrip('/')}/v1"


def address(url: str) -> str:
    """An address as messages and records may show it: without the user, password and query in it."""
    scheme, _, rest = url.partition("://")
    place, query, _ = rest.partition("?")
    host, slash, path = place.partition("/")
    _, at, host = host.rpartition("@")
    return f"{scheme}://{HIDDEN + at if at else ''}{host}{slash}{path}" + (f"?{HIDDEN}" if query else "")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _answers(response: httpx.Response) -> list[ChatAnswer]:
    """Empty when the response is no chat completion."""
    try:
        choices: Sequence[Mapping[str, Any]] = response.json()["choices"]
        return [ChatAnswer(_text(choice["message"]), str(choice.get("finish_reason") or "stop")) for choice in choices]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _usage(response: httpx.Response) -> tuple[int, int] | None:
    try:
        usage = response.json()["usage"]
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return None


def count_tokens(text: str) -> float:
    """About: 4 characters of Latin text, or 1 of others, make a token."""
    return sum(1 if ord(c) > 0x2E80 else 0.25 for c in text)


def _written(content: Any) -> str:
    """The text of a message's content, which may be in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _text(message: Mapping[str, Any]) -> str:
    thought = message.get("reasoning_content") or message.get("reasoning")
    text = str(message.get("content") or "")
    return f"<think>{thought}</think>{text}" if thought else text


class Endpoint:
    """A server and the database of its answers, keyed by all that an answer depends on. May be shared by threads.

    url: see api_url. cache: file of the database, ":memory:" for none that stays. scope: what else tells this server's
    answers from another's, such as its host; without one the same question to the same model is the same anywhere.
    token: instead of the variable `key_env`. price: of a million tokens in and out; once the answers that were sent for
    cost `max_cost` (0 = no end) further ones raise CostReached. spent: what was paid before and counts as well.
    """

    def __init__(
        self,
        url: str,
        cache: Path | str,
        *,
        key_env: str = KEY_ENV,
        token: str = "",
        timeout_s: float = 300.0,
        retries: int = 4,
        concurrency: int = 16,
        scope: str = "",
        price: Sequence[float] = (0.0, 0.0),
        max_cost: float = 0.0,
        spent: float = 0.0,
    ) -> None:
        import httpx

        self.url, self.retries, self.concurrency = api_url(url), retries, concurrency
        self.scope, self.price, self.max_cost, self.spent = scope, price, max_cost, spent
        self.http = httpx.Client(
            timeout=timeout_s,
            headers=bearer(token or os.environ.get(key_env, "")),
            limits=httpx.Limits(max_connections=concurrency),
        )
        self.timeout_s = timeout_s
        self.lock, self.closed = threading.Lock(), threading.Event()
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        self.base = sqlite3.connect(cache, isolation_level=None, check_same_thread=False, timeout=60.0)
        self.base.execute("PRAGMA journal_mode = WAL")
        self.base.execute("PRAGMA synchronous = NORMAL")
        self.base.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answers TEXT) WITHOUT ROWID")
        self.sent = self.from_cache = 0
        self.patience = Patience()
        self.tokens_in = self.tokens_out = 0.0

    def move(self, url: str) -> None:
        """The same server at another address."""
        self.url = api_url(url)

    @property
    def cost(self) -> float:
        """Of what was sent for so far, in the price's currency."""
        return self.spent + (self.tokens_in * self.price[0] + self.tokens_out * self.price[1]) / 1e6

    def sample(self, body: Mapping[str, Any], n: int, seed: int) -> list[ChatAnswer]:
        """n samples of one conversation. Servers that give fewer at a time are asked again, with another seed.

        Raises RequestRefused for a request that this server will never answer, EndpointError when it answers none,
        CostReached.
        """
        told = json.dumps([body, n, seed, *filter(None, [self.scope])], sort_keys=True)
        name = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        with self.lock:
            row = self.base.execute("SELECT answers FROM answers WHERE request = ?", (name,)).fetchone()
            if row is not None:
                self.from_cache += 1
                return [ChatAnswer(*pair) for pair in json.loads(row[0])]
        found: list[ChatAnswer] = []
        while len(found) < n:
            found += self._post({**body, "n": n - len(found), "seed": seed + len(found)})
        found = found[:n]
        with self.lock:
            self.sent += 1
            kept = json.dumps([[a.text, a.finish_reason] for a in found], ensure_ascii=False)
            self.base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (name, kept))
        return found

    def _post(self, body: Mapping[str, Any]) -> list[ChatAnswer]:
        import httpx

        if self.max_cost and self.cost >= self.max_cost:
            raise CostReached(
                f"{address(self.url)}: {self.sent} answers cost {self.cost:.2f}, the limit is {self.max_cost:g}"
            )
        attempts = Attempts(self.url, self.retries)
        for wait_s in attempts:
            if self.closed.wait(wait_s):
                raise EndpointError(f"{attempts.shown}: closed before it answered")
            outcome: httpx.Response | httpx.HTTPError
            try:
                outcome = self._send(attempts.url, body)
            except httpx.HTTPError as error:
                outcome = error
            if answers := attempts.read(outcome):
                self.patience.answered()
                self._count(body, answers, attempts.usage)
                return answers
        raise self.patience.gave_up(attempts)

    def _send(self, url: str, body: Mapping[str, Any]) -> httpx.Response:
        """The whole response. httpx's own limit starts anew with every byte, so that a server could drip for ever."""
        import httpx

        until = time.monotonic() + self.timeout_s
        with self.http.stream("POST", url, json=body) as response:
            parts = []
            for part in response.iter_raw():
                parts.append(part)
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("the answer drips", request=response.request)
        content = b"".join(parts)
        return httpx.Response(response.status_code, headers=response.headers, content=content, request=response.request)

    def _count(self, body: Mapping[str, Any], answers: Sequence[ChatAnswer], usage: tuple[int, int] | None) -> None:
        if usage is None:  # counted here where the server does not; images are left out
            asked = sum(count_tokens(_written(message["content"])) for message in body.get("messages", ()))
            usage = round(asked), round(sum(count_tokens(answer.text) for answer in answers))
        with self.lock:
            self.tokens_in += usage[0]
            self.tokens_out += usage[1]

    def served_model(self) -> str:
        """The name of the model that the server names first. Raises EndpointError when it names none."""
        import httpx

        try:
            return str(self.http.get(f"{self.url}/models").json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise EndpointError(
                f"{address(self.url)}/models names no model ({type(error).__name__}: {error}); give its name"
            ) from None

    def each(self, things: Iterable[T], ask: Callable[[T], R]) -> Iterator[tuple[T, R | RequestRefused]]:
        """(thing, ask(thing)) in order, `concurrency` at a time; a refusal comes back as the result."""

        def one(thing: T) -> R | RequestRefused:
            try:
                return ask(thing)
            except RequestRefused as error:
                return error

        waiting: deque[tuple[T, Future[R | RequestRefused]]] = deque()
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
        """Requests that wait for their next try give up."""
        self.closed.set()
        self.http.close()
        with self.lock:
            self.base.close()
