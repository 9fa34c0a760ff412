"""Chat completions of any OpenAI-compatible server: what an answer is, what is asked again and when to give up.

Without input or output of its own: callers send with httpx, in threads or in an event loop, and show the outcome here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lingshu_rl.failures import LingshuError

if TYPE_CHECKING:
    import httpx

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
NEVER = {401, 403, 404}  # not this request's fault: every other one would fare alike
LONGEST_WAIT_S = 60.0


class EndpointError(LingshuError, RuntimeError):
    """The server cannot be used. Answers so far are kept by who asked, so the same command goes on from there."""


class Unreachable(EndpointError):
    """No connection could be made."""


class Refused(RuntimeError):
    """This request was refused; others may be answered."""


@dataclass(frozen=True)
class Answer:
    """text: with the model's reasoning in front as a think block where the server returns it apart."""

    text: str
    finish_reason: str

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Attempts:
    """The tries of one request: iterate for the seconds to wait before each, and give `read` what came of it.

    retries: further tries after the first. Where they run out, raise what `gave_up` returns.
    """

    def __init__(self, url: str, retries: int) -> None:
        self.url, self.retries = f"{api_url(url)}/chat/completions", retries
        self.trouble = ""
        self.unreachable = False
        self._wait_s = 0.0

    def __iter__(self) -> Iterator[float]:
        for attempt in range(self.retries + 1):
            yield self._wait_s
            self._wait_s = max(self._wait_s, min(LONGEST_WAIT_S, 0.5 * 2**attempt))

    def read(self, outcome: httpx.Response | httpx.HTTPError) -> list[Answer] | None:
        """The answers, or None to try again. Raises Refused or EndpointError where that is of no use."""
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
            answers = _answers(outcome)
            self.trouble = f"no chat completion: {outcome.text[:200]}"
            return answers or None
        self.trouble = f"HTTP {outcome.status_code}: {outcome.text[:300]}"
        if outcome.status_code in NEVER:
            raise EndpointError(f"{self.url} answers {self.trouble}; check the url, the model's name and the key")
        if outcome.status_code not in AGAIN:
            raise Refused(self.trouble)
        self._wait_s = seconds_to_wait(outcome)
        return None

    def gave_up(self) -> EndpointError:
        kind, what = (Unreachable, "cannot be reached") if self.unreachable else (EndpointError, "gave no answer")
        told = f"{self.url} {what} after {self.retries + 1} tries ({self.trouble})"
        return kind(f"{told}; the same command goes on later")


def seconds_to_wait(response: httpx.Response) -> float:
    """What a server that is busy for now asks for: its Retry-After, at most LONGEST_WAIT_S. A 429 without one means 1."""
    asked = 0.0
    with contextlib.suppress(KeyError, ValueError):  # a date is allowed too, and not worth reading
        asked = max(0.0, float(response.headers["retry-after"]))
    return min(LONGEST_WAIT_S, asked or float(response.status_code == 429))


def api_url(url: str) -> str:
    """A server's address with its version: /v1 where the address names none. Raises EndpointError for what is no address."""
    if not url.startswith(("http://", "https://")):
        raise EndpointError(f"url is an address such as http://127.0.0.1:8000/v1, got {url!r}")
    return url.rstrip("/") if re.search(r"/v\d", url) else f"{url.rstrip('/')}/v1"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _answers(response: httpx.Response) -> list[Answer]:
    """Empty when the response is no chat completion."""
    try:
        choices: Sequence[Mapping[str, Any]] = response.json()["choices"]
        return [Answer(_text(choice["message"]), str(choice.get("finish_reason") or "stop")) for choice in choices]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _text(message: Mapping[str, Any]) -> str:
    thought = message.get("reasoning_content") or message.get("reasoning")
    text = str(message.get("content") or "")
    return f"<think>{thought}</think>{text}" if thought else text
