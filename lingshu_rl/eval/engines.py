"""Where answers come from: a vLLM server started here, any OpenAI-compatible URL, or a file of outputs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lingshu_rl.data.tables import UnreadableSource, json_rows
from lingshu_rl.eval.benchmarks import EvalError
from lingshu_rl.processes.pulse import Counter, Pulse
from lingshu_rl.types import Prompt
from rewards.chat import Attempts, RequestRefused, address, api_url, bearer


@dataclass(frozen=True)
class Reply:
    """What came back for one question: a text, or why there is none."""

    text: str = ""
    finish_reason: str = ""
    error: str = ""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Engine(Protocol):
    """ask: the reply to one question of one condition ("main", "blank", ...); an engine's error is a Reply too."""

    async def ask(self, prompt: Prompt, condition: str) -> Reply: ...

    async def close(self) -> None: ...


class ChatClient:
    """Chat completions of one OpenAI-compatible server, for answers and for judging.

    sampling: the body's other fields (temperature, seed, max_tokens ...). A request that fails is sent again `retries`
    times; then it is a Reply with an error. EndpointError where no other question would fare better. on_error: asked
    when a connection broke; raises if the cause is known (a dead server process). timeout_s: the limit of one answer
    or, of a server whose `counter` is known, of its time without progress.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        token: str = "",
        sampling: Mapping[str, Any],
        timeout_s: float = 300.0,
        retries: int = 2,
        concurrency: int = 64,
        on_error: Callable[[], None] = lambda: None,
        counter: Counter | None = None,
        transport: Any = None,
    ) -> None:
        import httpx

        self.url = api_url(url)
        self.model, self.sampling, self.retries, self.on_error = model, dict(sampling), retries, on_error
        self.gate = asyncio.Semaphore(concurrency)
        self.http = httpx.AsyncClient(
            timeout=timeout_s,
            headers=bearer(token),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            transport=transport,
        )
        self.counter, self.pulse = counter, Pulse(self._count, timeout_s)
        self.timeout = httpx.Timeout(None if counter else timeout_s, connect=timeout_s)

    async def _count(self) -> float:
        assert self.counter is not None
        response = await self.http.get(f"{self.url.removesuffix('/v1')}{self.counter.path}")
        return self.counter.read(response.raise_for_status().text)

    async def ask(self, prompt: Prompt, condition: str) -> Reply:
        from lingshu_rl.rollout.client import chat_messages

        async with self.gate:  # images are encoded only when their turn has come
            return await self._complete([_plain_text(m) for m in chat_messages(prompt)], {})

    async def complete(self, messages: Sequence[Mapping[str, Any]], **changes: Any) -> Reply:
        async with self.gate:
            return await self._complete(messages, changes)

    async def _complete(self, messages: Sequence[Mapping[str, Any]], changes: Mapping[str, Any]) -> Reply:
        import httpx

        body = {"model": self.model, "messages": list(messages), **self.sampling, **changes}
        attempts = Attempts(self.url, self.retries)
        for wait_s in attempts:
            await asyncio.sleep(wait_s)
            outcome: httpx.Response | httpx.HTTPError
            try:
                sending = self.http.post(attempts.url, json=body, timeout=self.timeout)
                outcome = await (self.pulse.wait(sending) if self.counter else sending)
            except httpx.HTTPError as error:
                if not isinstance(error, httpx.TimeoutException):
                    self.on_error()
                outcome = error
            try:
                if answers := attempts.read(outcome):
                    return Reply(answers[0].text, answers[0].finish_reason)
            except RequestRefused as error:
                return Reply(error=str(error))
        if attempts.unreachable:
            raise attempts.gave_up()
        return Reply(error=attempts.trouble)

    async def served_model(self) -> str:
        """The name of the model that the server names first. Raises EvalError when it names none."""
        import httpx

        try:
            response = await self.http.get(f"{self.url}/models")
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise EvalError(
                f"{address(self.url)}/models names no model ({type(error).__name__}: {error}); is it an "
                "OpenAI-compatible server? Its model can be given by name (--served-model, --judge-model)"
            ) from None

    async def close(self) -> None:
        await self.http.aclose()


def _plain_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message of text alone with a string for content: servers of text models may know no other form."""
    content = message["content"]
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def outputs_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """`json_rows`. Raises EvalError."""
    try:
        return json_rows(path)
    except UnreadableSource as error:
        raise EvalError(str(error)) from None


class FileEngine:
    """Outputs that another program wrote: JSONL rows of id, completion (or output, response) and maybe condition."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str], Reply] = {}
        for place, row in outputs_of(path):
            text = next((row[key] for key in ("completion", "output", "response") if key in row), ...)
            if text is ... or "id" not in row:
                raise EvalError(f"{place}: an output is an object with `id` and `completion`, one a line")
            name = str(row["id"])
            key = (str(row.get("condition", "main")), name)
            if key in self.found:
                raise EvalError(f"{place}: id {name!r} has an output already")
            self.found[key] = Reply(str(text or ""), str(row.get("finish_reason", "")), str(row.get("error") or ""))

    async def ask(self, prompt: Prompt, condition: str) -> Reply:
        return self.found.get((condition, prompt.id), Reply(error=f"{self.path.name} has no output for it"))

    async def close(self) -> None:
        pass


def kind_of(model: str) -> str:
    """ "url", "file" or "local", from how --model is written."""
    if model.startswith(("http://", "https://")):
        return "url"
    return "file" if model.endswith(".jsonl") else "local"


def takes_images(model: str) -> bool:
    """Whether a local model's configuration speaks of a vision tower or image tokens; a Hub id's file is fetched."""
    from lingshu_rl.model.loading import model_path

    file = Path(model_path(model)) / "config.json"
    if not file.is_file():
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(model, "config.json"))
        except Exception as error:  # the Hub's errors share no base class
            raise EvalError(
                f"{model} is no model folder and cannot be fetched: {type(error).__name__}: {error}"
            ) from None
    return any(mark in key for key in json.loads(file.read_text()) for mark in ("vision", "image_token"))


@contextlib.contextmanager
def serve(
    model: str, *, seed: int, vllm: Mapping[str, Any], log: Path, start_timeout_s: float = 600.0
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """A vLLM server of `model` on this machine's devices: (url, token, a check that it still lives). Stopped at the
    end.

    vllm: vLLM's own options. The server is the rollout worker that training uses.
    """
    from lingshu_rl.config import Config
    from lingshu_rl.model.loading import model_path
    from lingshu_rl.planning.plan import server_layout
    from lingshu_rl.processes.placement import this_machine
    from lingshu_rl.processes.workers import Worker, free_port
    from lingshu_rl.rollout.server import vllm_command, vllm_env
    from lingshu_rl.rollout.transfer import remove_folder, transfer_folder

    config = Config(model=model, seed=seed)
    config.rollout.vllm = dict(vllm)
    devices, copies = server_layout(config, this_machine())
    config.rollout.vllm = {**copies, **vllm}
    port, token, shared = free_port(), secrets.token_urlsafe(24), transfer_folder()
    worker = Worker(
        f"vLLM of {model}",
        vllm_command(config, model_path(model), devices, port=port),
        url=f"http://127.0.0.1:{port}",
        log=log,
        env=vllm_env(devices, token=token, transfer_dir=shared, extra={}),
        stop_timeout_s=config.run.stop_timeout_s,
    )
    try:
        worker.wait_healthy(start_timeout_s)
        yield worker.url, token, worker.check_alive
    finally:
        worker.stop()
        remove_folder(shared)
