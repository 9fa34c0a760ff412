import asyncio
import json

import httpx
import pytest

from lingshu_rl.rollout.client import (
    RolloutClient,
    RolloutError,
    chat_messages,
    read_rollouts,
    request_seed,
    write_rollouts,
)
from lingshu_rl.types import Prompt

PNG = b"\x89PNG not really"


def prompt(name="q1", images=()):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Which?"}]
    return Prompt(name, ({"role": "user", "content": content},), images, "A", ("x", "y"), "option", {})


def client(handler, urls=("http://a",), **changes):
    options = dict(token="t", decode=lambda ids: " ".join(map(str, ids)), banned_ids=[7], seed=1, temperature=1.0, max_tokens=9,
                   timeout_s=5, retries=2, concurrency=8) | changes  # fmt: skip
    made = RolloutClient(list(urls), **options)
    made.pool.http = httpx.AsyncClient(transport=httpx.MockTransport(handler), headers=made.pool.http.headers)
    return made


def answer(request, tokens=(5, 6)):
    body = json.loads(request.content)
    choice = {"token_ids": list(tokens), "logprobs": {"content": [{"logprob": -0.5}] * 2}, "finish_reason": "stop"}
    return httpx.Response(
        200, json={"prompt_token_ids": [1, 2], "choices": [{**choice, "index": i} for i in reversed(range(body["n"]))]}
    )


def test_a_group_is_one_request_with_seed_bans_and_token():
    seen = []

    def handler(request):
        seen.append(request)
        return answer(request)

    rollouts = asyncio.run(client(handler).sample(prompt(images=(PNG,)), 3, 40))
    body = json.loads(seen[0].content)
    assert len(seen) == 1 and seen[0].headers["authorization"] == "Bearer t"
    assert (body["n"], body["seed"], body["logit_bias"], body["max_tokens"]) == (3, 40, {"7": -100.0}, 9)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert [r.member for r in rollouts] == [0, 1, 2] and rollouts[0].token_ids == (5, 6) and rollouts[0].text == "5 6"


def test_a_failed_request_is_sent_again_with_the_same_seed_and_then_given_up():
    seeds = []

    def flaky(request):
        seeds.append(json.loads(request.content)["seed"])
        return httpx.Response(503, text="busy") if len(seeds) < 3 else answer(request)

    assert len(asyncio.run(client(flaky).sample(prompt(), 2, 40))) == 2
    assert seeds == [40, 40, 40]
    with pytest.raises(RolloutError, match=r"http://a failed 3 times on prompt 'q1'; last: HTTP 503: down"):
        asyncio.run(client(lambda r: httpx.Response(503, text="down")).sample(prompt(), 2, 40))


def test_a_refused_request_is_not_repeated():
    calls = []

    def refuse(request):
        calls.append(1)
        return httpx.Response(400, text="prompt too long")

    with pytest.raises(RolloutError, match="refused prompt 'q1': HTTP 400: prompt too long"):
        asyncio.run(client(refuse).sample(prompt(), 2, 40))
    assert len(calls) == 1


def test_a_lost_group_of_servers_is_named_instead_of_a_connection_error():
    def broken(request):
        raise httpx.ConnectError("refused")

    async def lost(server):
        raise RuntimeError("rollout server 0 was killed by SIGKILL")

    with pytest.raises(RuntimeError, match="rollout server 0 was killed"):
        asyncio.run(client(broken, examine=lost).sample(prompt(), 2, 40))


def test_a_request_whose_server_died_goes_to_another_with_the_same_seed_and_costs_no_retry():
    seen = []

    def handler(request):
        seen.append((request.url.host, json.loads(request.content)["seed"]))
        if request.url.host == "a":
            raise httpx.ReadError("reset")
        return answer(request)

    async def ask():
        async def down(server):
            made.pool.mark(server, alive=False, up=False)
            return True

        made = client(handler, ("http://a", "http://b"), retries=0, examine=down)
        return await made.sample(prompt(), 2, 40)

    assert len(asyncio.run(ask())) == 2
    assert seen == [("a", 40), ("b", 40)]


def test_requests_wait_while_no_server_is_up():
    async def ask():
        made = client(answer)
        (server,) = made.pool.servers
        made.pool.mark(server, alive=True, up=False)
        sampling = asyncio.create_task(made.sample(prompt(), 2, 40))
        await asyncio.sleep(0.05)
        assert not sampling.done()
        server.version = 7
        made.pool.mark(server, alive=True, up=True)
        return await sampling

    assert {r.weight_version for r in asyncio.run(ask())} == {7}


def test_load_is_counted_in_tokens():
    """Behind one long group the short ones all go to the other server until they weigh as much."""
    hosts = []

    async def handler(request):
        hosts.append(request.url.host)
        await asyncio.sleep(0.05)
        return answer(request)

    async def ask():
        made = client(handler, ("http://a", "http://b"))
        long = made.sample(prompt("long"), 4, 0, max_tokens=90)
        await asyncio.gather(long, *(made.sample(prompt(f"s{i}"), 4, 0, max_tokens=30) for i in range(3)))
        assert [s.load for s in made.pool.servers] == [0, 0]

    asyncio.run(ask())
    assert hosts == ["a", "b", "b", "b"]


def test_landed_groups_are_not_sampled_again_and_survive_a_file(tmp_path):
    calls = []

    def handler(request):
        calls.append(1)
        return answer(request)

    prompts = [prompt("q1"), prompt("q2")]

    async def ask():
        first = client(handler)
        groups = [g async for g in first.groups(prompts, 2, step=5)]
        assert [g async for g in first.groups(prompts, 2, step=5)] == groups and len(calls) == 2
        write_rollouts(tmp_path / "landed.jsonl", first.landed[5])
        second = client(handler)
        second.landed[5] = read_rollouts(tmp_path / "landed.jsonl", prompts)
        assert {g[0].prompt.id: g async for g in second.groups(prompts, 2, step=5)} == {
            g[0].prompt.id: g for g in groups
        }
        assert len(calls) == 2
        _ = [g async for g in second.groups(prompts, 2, step=6)]
        assert len(calls) == 4 and set(second.landed) == {6}

    asyncio.run(ask())
    assert read_rollouts(tmp_path / "none.jsonl", prompts) == {}


def test_a_server_without_token_ids_is_refused():
    with pytest.raises(RolloutError, match="return_token_ids"):
        asyncio.run(client(lambda r: answer(r, tokens=(5,))).sample(prompt(), 1, 40))


def test_groups_go_to_the_least_busy_server_and_land_as_they_finish():
    hosts = []

    async def handler(request):
        hosts.append(request.url.host)
        await asyncio.sleep(0.2 if "q0" in request.content.decode() else 0.01)
        return answer(request)

    async def collect():
        prompts = [Prompt(f"q{i}", ({"role": "user", "content": f"q{i}"},), (), "A", (), "open", {}) for i in range(4)]
        return [g[0].prompt.id async for g in client(handler, ("http://a", "http://b")).groups(prompts, 2, step=3)]

    order = asyncio.run(collect())
    assert sorted(order) == ["q0", "q1", "q2", "q3"] and order[-1] == "q0"
    assert sorted(hosts) == ["a", "a", "b", "b"]


def test_seeds_depend_on_run_step_and_prompt_alone_and_leave_room_for_members():
    seeds = {request_seed(run, step, p) for run in (0, 1) for step in (0, 1) for p in ("a", "b")}
    assert len(seeds) == 8 and all(0 <= s < 2**31 and s % 256 == 0 for s in seeds)
    assert request_seed(0, 5, "demo-train-0001") == request_seed(0, 5, "demo-train-0001")


def test_images_stand_where_their_placeholders_were(tmp_path):
    file = tmp_path / "x.jpg"
    file.write_bytes(b"\xff\xd8jpeg")
    parts = chat_messages(prompt(images=(PNG, str(file))))[0]["content"]
    assert [p["type"] for p in parts] == ["image_url", "image_url", "text"]
    assert "image/png" in parts[0]["image_url"]["url"] and "image/jpeg" in parts[1]["image_url"]["url"]
