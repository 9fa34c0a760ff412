"""A server that takes the request and never answers is an error after the configured time, not a hang."""

import asyncio
import time

import pytest

from lingshu_rl.config import load_config
from lingshu_rl.reference.client import ReferenceClient, ReferenceRequestError
from lingshu_rl.rollout.client import RolloutClient, RolloutError
from lingshu_rl.types import Prompt, TokenGroup


async def silent_server():
    async def swallow(reader, writer):
        await reader.read()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_a_silent_rollout_server_times_out():
    config = load_config(None, ["rollout.request_timeout_s=0.3", "rollout.retries=1"])

    async def ask():
        server, url = await silent_server()
        client = RolloutClient([url], token="t", decode=str, banned_ids=[], seed=0, temperature=1.0, max_tokens=4,
                               timeout_s=config.rollout.request_timeout_s, retries=config.rollout.retries, concurrency=2)  # fmt: skip
        try:
            await client.sample(Prompt("q", ({"role": "user", "content": "?"},), (), "A", (), "open", {}), 1, 0)
        finally:
            server.close()
            await client.close()

    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"failed 2 times on prompt 'q'; last: ReadTimeout"):
        asyncio.run(ask())
    assert time.monotonic() - began < 5


def test_a_silent_reference_server_times_out():
    config = load_config(None, ["reference.request_timeout_s=0.3"])

    async def ask():
        server, url = await silent_server()
        client = ReferenceClient([url], token="t", timeout_s=config.reference.request_timeout_s)
        try:
            await client.logprobs([TokenGroup("a", (1,), ((2,),), {})])
        finally:
            server.close()
            await client.close()

    with pytest.raises(ReferenceRequestError, match="ReadTimeout"):
        asyncio.run(ask())
