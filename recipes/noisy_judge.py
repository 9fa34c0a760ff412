"""A judge that knows the rules and errs as often as it is told: what does a noisy reward do to a run?

    python recipes/noisy_judge.py 8765 &
    lingshu-rl sweep recipes/sweeps/judge_noise.yaml

It answers the prompts of `rewards.judge.JudgeReward` over HTTP like any OpenAI-compatible server. Its model's name says
how it errs: noise-10-5 pays 10 % of the wrong answers and refuses 5 % of the right ones. Which ones is fixed by question
and answer, as with a model that is asked at temperature 0; noise-0-0 is always right. Where many rows ask the same
question, as the demo's do, one error is the error of all of them: `JudgeOfPicture` tells the judge which picture is meant.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rewards import JudgeReward, OpenAnswer, RewardInput
from rewards.judge import JudgeQuestion

_TEXTS = re.compile(r"<<<(.*?)>>>", re.DOTALL)


class JudgeOfPicture(JudgeReward):
    """Names the picture in the question, so that an error is that of one row."""

    def questions(self, sample: RewardInput) -> list[JudgeQuestion]:
        named = " ".join(Path(str(image)).name for image in sample.images)
        return super().questions(replace(sample, prompt=f"{sample.prompt}\n(about {named})"))


def texts_of(body: dict[str, Any]) -> list[str]:
    """What stands between the marks of a prompt: question, first answer, second answer."""
    return _TEXTS.findall(body["messages"][-1]["content"])


def verdict(body: dict[str, Any]) -> str:
    """The reply to one request."""
    question, first, second = texts_of(body)
    false_pay, false_refusal = (int(percent) / 100 for percent in body["model"].split("-")[1:])
    same = mean_the_same(first, second, question) or mean_the_same(second, first, question)
    luck = int(hashlib.blake2b("\n".join((question, first, second)).encode(), digest_size=8).hexdigest(), 16) / 2**64
    return json.dumps({"same": luck >= false_refusal if same else luck < false_pay})


def mean_the_same(label: str, answer: str, question: str) -> bool:
    """By the rules for words, or when a sentence ends with the label."""
    if answer.rstrip(". ").endswith(f"The answer is {label.rstrip('. ')}"):
        return True
    return OpenAnswer().score(RewardInput(answer, label, prompt=question, kind="open")).value == 1.0


@contextlib.contextmanager
def serving(answer: Callable[[dict[str, Any]], str | int], port: int = 0) -> Iterator[str]:
    """The address of a server whose replies are `answer(body)`: a text, or the HTTP status of a failure."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "noise-0-0"}]})

        def do_POST(self) -> None:
            said = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(said, int):
                self._send(said, {"error": "scripted"})
            else:
                self._send(200, {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]})

        def _send(self, status: int, told: dict[str, Any]) -> None:
            data = json.dumps(told).encode()
            with contextlib.suppress(OSError):  # who asked may be gone
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serving(verdict, int(sys.argv[1]) if len(sys.argv) > 1 else 8765) as url:
        print(f"judging at {url}", flush=True)
        threading.Event().wait()
