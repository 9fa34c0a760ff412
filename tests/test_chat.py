"""Tries of one chat request: what is asked again, how long after, and when to give up."""

import httpx
import pytest

from rewards.chat import Attempts, ChatAnswer, EndpointError, RequestRefused, Unanswered, Unreachable, api_url

URL = "http://127.0.0.1:8000/v1"


def reply(status, headers=None, **body):
    return httpx.Response(status, json=body, headers=headers)


def play(outcomes, retries=3):
    """(answers, waits) of the given outcomes, one a try."""
    attempts, waits = Attempts(URL, retries), []
    for wait_s, outcome in zip(attempts, outcomes, strict=False):
        waits.append(wait_s)
        if answers := attempts.read(outcome):
            return answers, waits
    raise attempts.gave_up()


GOOD = reply(200, choices=[{"message": {"content": "a"}, "finish_reason": "length"}])


def test_waits_grow_and_a_server_may_ask_for_longer():
    assert play([GOOD]) == ([ChatAnswer("a", "length")], [0.0])
    assert play([reply(503), reply(500), GOOD])[1] == [0.0, 0.5, 1.0]
    assert play([reply(429, {"retry-after": "7"}), GOOD])[1] == [0.0, 7.0]
    assert play([reply(429, {"retry-after": "90000"}), GOOD])[1] == [0.0, 60.0]
    assert play([reply(429, {"retry-after": "Fri, 27 Nov 2026 10:00:00 GMT"}), GOOD])[1] == [0.0, 1.0]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [null]}', b'{"choices": [{"message": 3}]}'])  # fmt: skip
def test_what_is_no_completion_is_asked_again_and_shown(body):
    odd = httpx.Response(200, content=body)
    assert play([odd, GOOD])[0] == [ChatAnswer("a", "length")]
    with pytest.raises(Unanswered, match=r"after 2 tries.*no chat completion"):
        play([odd, odd], retries=1)


def test_who_is_to_blame_decides_what_is_raised():
    with pytest.raises(RequestRefused, match="400"):
        play([reply(400)])
    with pytest.raises(EndpointError, match=r"HTTP 401.*the key"):
        play([reply(401)])
    with pytest.raises(Unreachable, match="cannot be reached after 1 tries"):
        play([httpx.ConnectError("no route")], retries=0)
    late = httpx.ReadTimeout("", request=httpx.Request("POST", URL, extensions={"timeout": {"read": 5.0}}))
    with pytest.raises(Unanswered, match="no answer within 5 s") as raised:
        play([late], retries=0)
    assert not isinstance(raised.value, Unreachable)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai"),
        ("http://h/proxy", "http://h/proxy/v1"),
    ],
)
def test_an_address_without_a_version_means_the_first(given, meant):
    assert api_url(given) == meant


def test_what_is_no_address_is_refused():
    with pytest.raises(EndpointError, match="address"):
        api_url("localhost:8000")
