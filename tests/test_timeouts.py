"""A busy server is waited for as long as its own count moves; one that is stuck is given up after the configured time."""

import asyncio
import socket

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lingshu_rl.eval.engines import ChatClient
from lingshu_rl.planning.given import load_config
from lingshu_rl.reference.client import ReferenceClient, ReferenceRequestError
from lingshu_rl.reference.wire import decode_groups, encode_logprobs
from lingshu_rl.rollout.client import VLLM_COUNTER, RolloutClient
from lingshu_rl.rollout.sampler import RolloutError
from lingshu_rl.types import Prompt, TokenGroup

LIMIT_S = 0.5


class SlowServer:
    """vLLM's and the reference's routes, one request at a time of `parts` pieces of work, after each of which the count
    moves. parts None: it takes the request, answers everything else and never gets on.
    """

    def __init__(self, parts, part_s=0.1):
        self.parts, self.part_s, self.count, self.seeds = parts, part_s, 0, []
        self.turn = asyncio.Lock()

    def app(self):
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/logprobs", self.score, methods=["POST"]),
                Route("/refresh", self.refresh, methods=["POST"]),
            ]
        )

    async def health(self, request):
        return JSONResponse({"progress": self.count})

    async def metrics(self, request):
        return PlainTextResponse(f'vllm:generation_tokens_total{{engine="0"}} {self.count}\n')

    async def models(self, request):
        return JSONResponse({"data": [{"id": "policy", "max_model_len": 64}]})

    async def complete(self, request):
        body = await request.json()
        self.seeds.append(body["seed"])
        await self.work()
        choice = {"token_ids": [5], "logprobs": {"content": [{"logprob": -0.5}]}, "finish_reason": "stop",
                  "message": {"content": "yes"}}  # fmt: skip
        choices = [{**choice, "index": i} for i in range(body["n"])]
        return JSONResponse({"prompt_token_ids": [1, 2], "choices": choices})

    async def score(self, request):
        groups = decode_groups(await request.body(), vocabulary=10)
        await self.work()
        zeros = [[torch.zeros(len(c)) for c in group.completions] for group in groups]
        return Response(encode_logprobs(zeros))

    async def refresh(self, request):
        await self.work()
        return Response()

    async def work(self):
        async with self.turn:
            if self.parts is None:
                await asyncio.Event().wait()
            for _ in range(self.parts):
                await asyncio.sleep(self.part_s)
                self.count += 1


def rollout_client(url):
    config = load_config(None, [f"rollout.request_timeout_s={LIMIT_S}", "rollout.retries=1"]).rollout
    return RolloutClient([url], token="t", decode=str, banned_ids=[], seed=0, temperature=1.0, max_tokens=4, concurrency=64,
                         timeout_s=config.request_timeout_s, retries=config.retries)  # fmt: skip


def reference_client(url):
    config = load_config(None, [f"reference.request_timeout_s={LIMIT_S}", "reference.retries=0"]).reference
    return ReferenceClient([url], token="t", timeout_s=config.request_timeout_s, retries=config.retries)


def chat_client(url):
    return ChatClient(url, sampling={"seed": 0, "n": 1}, timeout_s=LIMIT_S, retries=0, counter=VLLM_COUNTER)


async def with_server(server, make, ask):
    """What `ask` returns of the client that `make` makes, over a real socket."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        running = uvicorn.Server(uvicorn.Config(server.app(), log_level="critical", lifespan="off"))
        serving = asyncio.create_task(running.serve([listening]))
        client = make(f"http://127.0.0.1:{listening.getsockname()[1]}")
        try:
            return await asyncio.wait_for(ask(client), 60)
        finally:
            await client.close()
            running.should_exit = running.force_exit = True
            await serving


def prompt(name="q"):
    return Prompt(name, ({"role": "user", "content": "?"},), (), "A", (), "open", {})


def group(name="a"):
    return TokenGroup(name, (1,), ((2,),), {})


def test_a_long_queue_on_a_healthy_busy_server_is_waited_for():
    """Twelve prompts of 0.2 s each, one after another, against a limit of 0.5 s: the last is answered after 2.4 s."""
    server = SlowServer(parts=2)

    async def ask(client):
        return [g async for g in client.groups([prompt(f"q{i}") for i in range(12)], 2, step=0)]

    groups = asyncio.run(with_server(server, rollout_client, ask))
    assert len(groups) == 12 and len(server.seeds) == 12, "none was sent twice"


def test_one_answer_longer_than_the_limit_is_waited_for():
    server = SlowServer(parts=15)
    answers = asyncio.run(with_server(server, rollout_client, lambda client: client.sample(prompt(), 2, 7)))
    assert len(answers) == 2 and server.seeds == [7]
    server = SlowServer(parts=15)
    answers = asyncio.run(with_server(server, reference_client, lambda client: client.logprobs([group()])))
    assert len(answers) == 1 and server.count == 15


def test_an_evaluations_own_server_is_waited_for_too():
    server = SlowServer(parts=15)
    reply = asyncio.run(with_server(server, chat_client, lambda client: client.ask(prompt(), "main")))
    assert reply.text == "yes" and len(server.seeds) == 1
    reply = asyncio.run(with_server(SlowServer(None), chat_client, lambda client: client.ask(prompt(), "main")))
    assert "no progress for 0.5 s" in reply.error


def test_a_server_that_answers_but_does_not_get_on_is_given_up_and_named():
    server = SlowServer(parts=None)
    with pytest.raises(
        RolloutError,
        match=r"(?s)http://127.0.0.1:[0-9]+ failed on prompt 'q', which was sent 2 times .*no progress for 0.5 s.*stands at 0",
    ):
        asyncio.run(with_server(server, rollout_client, lambda client: client.sample(prompt(), 1, 7)))
    assert server.seeds == [7, 7]
    with pytest.raises(ReferenceRequestError, match=r"prompt 'a'.*sent 1 times.*no progress for 0.5 s.*stands at 0"):
        asyncio.run(with_server(SlowServer(None), reference_client, lambda client: client.logprobs([group()])))


def test_a_server_that_gets_stuck_on_its_way_is_given_up_too():
    """One answer lands; then the count stands still."""
    server = SlowServer(parts=2)

    async def ask(client):
        await client.sample(prompt("first"), 1, 0)
        server.parts = None
        await client.sample(prompt("second"), 1, 1)

    with pytest.raises(RolloutError, match=r"prompt 'second'.*no progress.*stands at 2"):
        asyncio.run(with_server(server, rollout_client, ask))


async def silent(make, ask):
    """The same with a server that takes connections and requests, and never answers a byte."""

    async def swallow(reader, writer):
        await reader.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    client = make(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        return await asyncio.wait_for(ask(client), 60)
    finally:
        await client.close()
        server.close()


def test_a_server_that_answers_nothing_at_all_is_given_up():
    with pytest.raises(ReferenceRequestError, match=r"no progress for 0.5 s: ReadTimeout"):
        asyncio.run(silent(reference_client, lambda client: client.logprobs([group()])))


def test_a_control_call_has_the_plain_limit():
    with pytest.raises(RolloutError, match=r"/v1/models failed: ReadTimeout"):
        asyncio.run(silent(rollout_client, lambda client: client.prompt_room(4)))
    with pytest.raises(RolloutError, match=r"/pause failed: ReadTimeout"):
        asyncio.run(silent(rollout_client, lambda client: client.pool.post_to(client.pool.servers, "/pause")))


def test_a_control_call_that_loads_a_model_has_the_time_of_a_start():
    """Nothing moves while a model is read from a disk; so it is no request of the usual limit."""

    async def refresh(client, **limit):
        await client.pool.post_to(client.pool.servers, "/refresh", **limit)

    server = SlowServer(parts=1, part_s=2 * LIMIT_S)
    asyncio.run(with_server(server, reference_client, lambda client: refresh(client, timeout_s=30)))
    assert server.count == 1
    with pytest.raises(ReferenceRequestError, match=r"/refresh failed: ReadTimeout"):
        asyncio.run(with_server(server, reference_client, refresh))
