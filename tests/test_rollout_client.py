import asyncio
import base64
import inspect
import io
import json
import pickle
import tracemalloc

import httpx
import pytest
from PIL import Image

from lingshu_rl.failures import PromptRefused
from lingshu_rl.imaging.images import Picture
from lingshu_rl.rollout.client import RolloutClient, chat_messages, read_rollouts, tokens_counted, write_rollouts
from lingshu_rl.rollout.sampler import RolloutError, request_seed
from lingshu_rl.types import Prompt


def png(size=(60, 60), kind="PNG"):
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).save(buffer, kind)
    return buffer.getvalue()


def prompt(name="q1", images=()):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Which?"}]
    return Prompt(
        name, ({"role": "user", "content": content},), tuple(map(Picture, images)), "A", ("x", "y"), "option", {}
    )


def client(handler, urls=("http://a",), max_model_len=99, **changes):
    """handler: answers the completions, sync or async; limits and counts are answered for it."""

    async def all_routes(request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "policy", "max_model_len": max_model_len}]})
        if request.url.path == "/metrics":
            return httpx.Response(200, text="vllm:generation_tokens_total 0")
        answered = handler(request)
        return await answered if inspect.isawaitable(answered) else answered

    options = dict(token="t", decode=lambda ids: " ".join(map(str, ids)), banned_ids=[7], seed=1, temperature=1.0, max_tokens=9,
                   timeout_s=5, retries=2, concurrency=8) | changes  # fmt: skip
    made = RolloutClient(list(urls), **options)
    made.pool.http = httpx.AsyncClient(transport=httpx.MockTransport(all_routes), headers=made.pool.http.headers)
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

    rollouts = asyncio.run(client(handler).sample(prompt(images=(png(),)), 3, 40))
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
    with pytest.raises(
        RolloutError, match=r"http://a failed on prompt 'q1', which was sent 3 times .*; last: HTTP 503: down"
    ):
        asyncio.run(client(lambda r: httpx.Response(503, text="down")).sample(prompt(), 2, 40))


def test_a_refused_request_is_not_repeated():
    calls = []

    def refuse(request):
        calls.append(1)
        return httpx.Response(400, text="prompt too long")

    with pytest.raises(PromptRefused, match="refused prompt 'q1': HTTP 400: prompt too long") as refused:
        asyncio.run(client(refuse).sample(prompt(), 2, 40))
    assert len(calls) == 1 and refused.value.prompt_id == "q1"
    over_the_wire = pickle.loads(pickle.dumps(refused.value))  # as other ranks get it
    assert (str(over_the_wire), over_the_wire.prompt_id) == (str(refused.value), "q1")


def test_what_every_prompt_would_be_refused_for_is_no_refusal_of_this_one():
    with pytest.raises(RolloutError, match="HTTP 401: who are you; check its URL, token and model"):
        asyncio.run(client(lambda r: httpx.Response(401, text="who are you")).sample(prompt(), 2, 40))


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
        made = client(handler, ("http://a", "http://b"), concurrency=64)
        long = made.sample(prompt("long"), 4, 0, max_tokens=90)
        await asyncio.gather(long, *(made.sample(prompt(f"s{i}"), 4, 0, max_tokens=30) for i in range(3)))
        assert [s.load for s in made.pool.servers] == [0, 0]

    asyncio.run(ask())
    assert hosts == ["a", "b", "b", "b"]


def test_more_than_a_server_can_run_waits_here_and_goes_to_whichever_is_free_first():
    """Places are completions: at 8 a server and 4 a prompt two prompts are under way, and a slow server gets fewer."""
    under_way, most, hosts = {"a": 0, "b": 0}, {"a": 0, "b": 0}, []

    async def handler(request):
        host = request.url.host
        hosts.append(host)
        under_way[host] += 1
        most[host] = max(most[host], under_way[host])
        await asyncio.sleep(0.4 if host == "a" else 0.01)
        under_way[host] -= 1
        return answer(request)

    async def ask():
        made = client(handler, ("http://a", "http://b"), concurrency=8)
        return [g[0].prompt.id async for g in made.groups([prompt(f"q{i}") for i in range(12)], 4, step=0)]

    assert sorted(asyncio.run(ask())) == sorted(f"q{i}" for i in range(12))
    assert most == {"a": 2, "b": 2} and hosts.count("b") == 10


def test_a_prompt_that_asks_for_more_than_a_servers_places_has_the_server_to_itself():
    under_way, most = [0], [0]

    async def handler(request):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        await asyncio.sleep(0.01)
        under_way[0] -= 1
        return answer(request)

    async def ask():
        made = client(handler, concurrency=8)
        return await asyncio.gather(*(made.sample(prompt(f"q{i}"), 20, 0) for i in range(3)))

    assert [len(group) for group in asyncio.run(ask())] == [20, 20, 20] and most == [1]


def test_who_gives_up_in_the_queue_or_under_way_leaves_its_place():
    async def handler(request):
        await asyncio.sleep(0.05)
        return answer(request)

    async def ask():
        made = client(handler, concurrency=2)
        tasks = [asyncio.create_task(made.sample(prompt(f"q{i}"), 2, 0)) for i in range(4)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks[2:]), 5)
        assert [(s.load, s.taken) for s in made.pool.servers] == [(0, 0)]

    asyncio.run(ask())


def test_images_are_encoded_when_their_turn_has_come_and_freed_after(tmp_path):
    """The requests of 200 pictures of 1 MB are never in memory as a whole."""
    file = tmp_path / "plate.png"
    file.write_bytes(png((1024, 1024)))
    choice = {"index": 0, "token_ids": [5], "logprobs": {"content": [{"logprob": -0.5}]}, "finish_reason": "stop"}
    routes = {
        "/v1/models": {"data": [{"max_model_len": 99}]},
        "/v1/chat/completions": {"prompt_token_ids": [1], "choices": [choice]},
    }

    async def server(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(routes[scope["path"]]).encode()})

    async def ask():
        made = client(answer, concurrency=2)
        made.pool.http = httpx.AsyncClient(transport=httpx.ASGITransport(server))
        return await asyncio.gather(*(made.sample(prompt(f"q{i}", [str(file)]), 1, 0) for i in range(200)))

    tracemalloc.start()
    try:
        assert len(asyncio.run(ask())) == 200
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_failed_request_is_not_sent_to_the_same_server_again_while_there_is_another():
    hosts = []

    def handler(request):
        hosts.append(request.url.host)
        return httpx.Response(500, text="out of order") if request.url.host == "a" else answer(request)

    asyncio.run(client(handler, ("http://a", "http://b")).sample(prompt(), 2, 0))
    assert hosts == ["a", "b"]


@pytest.mark.parametrize(("max_tokens", "refusal"), [(97, ""), (98, "least 100 or rollout.max_tokens to at most 97")])
def test_a_prompt_that_leaves_no_room_for_whole_completions_is_refused(max_tokens, refusal):
    """vLLM shortens them without a word: the prompt of 2 tokens and 98 more are over its 99."""
    sampling = client(answer, max_tokens=max_tokens).sample(prompt(), 2, 0)
    if not refusal:
        assert len(asyncio.run(sampling)) == 2
        return
    with pytest.raises(PromptRefused, match=r"prompt 'q1' has 2 tokens.*max_model_len=99.*" + refusal) as refused:
        asyncio.run(sampling)
    assert refused.value.prompt_id == "q1"


def test_a_context_that_leaves_no_room_for_any_prompt_is_refused_before_one_is_asked():
    calls = []
    with pytest.raises(RolloutError, match=r"takes 99 tokens .*rollout.max_tokens=99 leaves none"):
        asyncio.run(client(calls.append, max_tokens=99).sample(prompt(), 2, 0))
    assert not calls


def test_vllms_counts_are_summed_over_its_engines():
    text = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="policy"} 120.0
vllm:generation_tokens_total{engine="1",model_name="policy"} 3.0
vllm:generation_tokens_created{engine="0",model_name="policy"} 1.7e+09
vllm:prompt_tokens_total{engine="0",model_name="policy"} 1000.0
"""
    assert tokens_counted(text, ["vllm:generation_tokens_total"]) == 123
    assert tokens_counted(text, ["vllm:generation_tokens_total", "vllm:prompt_tokens_total"]) == 1123
    with pytest.raises(ValueError, match="disable_log_stats"):
        tokens_counted("# nothing\n", ["vllm:generation_tokens_total"])


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
        second.landed[5] = read_rollouts(tmp_path / "landed.jsonl", {p.id: p for p in prompts})
        assert {g[0].prompt.id: g async for g in second.groups(prompts, 2, step=5)} == {
            g[0].prompt.id: g for g in groups
        }
        assert len(calls) == 2
        _ = [g async for g in second.groups(prompts, 2, step=6)]
        assert len(calls) == 4 and set(second.landed) == {6}

    asyncio.run(ask())
    assert read_rollouts(tmp_path / "none.jsonl", {}) == {}


def spoilt(change):
    """A good answer's JSON, changed by `change(answer)`, which may return text in its place."""

    def handler(request):
        content = json.loads(answer(request).content)
        told = change(content)
        return httpx.Response(200, text=told if isinstance(told, str) else json.dumps(content))

    return handler


WRONG = {
    "garbage": (lambda a: "<html>busy</html>", "malformed"),
    "nothing": (lambda a: "", "truncated"),
    "cut": (lambda a: json.dumps(a)[:-9], "truncated"),
    "another thing": (lambda a: '{"error": null}', "prompt_token_ids"),
    "no token ids": (lambda a: a["choices"][0].pop("token_ids") and None, "return_token_ids"),
    "null token ids": (lambda a: a["choices"][0].update(token_ids=None), "return_token_ids"),
    "other numbers of tokens and log-probs": (lambda a: a["choices"][0]["token_ids"].pop() and None, "1 tokens with 2 log-probs"),
    "no tokens": (lambda a: a["choices"][0].update(token_ids=[], logprobs={"content": []}), "0 tokens with 0"),
    "a token that is none": (lambda a: a["choices"][1]["token_ids"].insert(0, -1) or (a["choices"][1]["token_ids"].pop() and None), "no token"),
    "no log-probs": (lambda a: a["choices"][0].update(logprobs=None), "logprobs"),
    "a null log-prob": (lambda a: a["choices"][0]["logprobs"]["content"][0].update(logprob=None), "logprob"),
    "NaN": (lambda a: a["choices"][0]["logprobs"]["content"][0].update(logprob=float("nan")), "malformed"),
    "infinity": (lambda a: json.dumps(a).replace("-0.5", "-1e999", 1), "out of range"),
    "a log-prob over 0": (lambda a: a["choices"][0]["logprobs"]["content"][0].update(logprob=0.5), "no log-prob"),
    "too few": (lambda a: a["choices"].pop() and None, "completions \\[1\\] for a group of 2"),
    "too many": (lambda a: a["choices"].append({**a["choices"][0], "index": 2}), "\\[0, 1, 2\\]"),
    "one twice": (lambda a: a["choices"][0].update(index=0), "\\[0, 0\\]"),
    "an index from elsewhere": (lambda a: a["choices"][0].update(index=7), "\\[0, 7\\]"),
    "no prompt": (lambda a: a["prompt_token_ids"].clear(), "prompt without tokens"),
    "no reason to end": (lambda a: a["choices"][0].update(finish_reason=None), "finish_reason"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_none_is_asked_for_again_and_then_named(name):
    change, told = WRONG[name]
    tried = []

    def once(request):
        tried.append(1)
        return spoilt(change)(request) if len(tried) == 1 else answer(request)

    rollouts = asyncio.run(client(once).sample(prompt(), 2, 40))
    assert len(tried) == 2 and [r.member for r in rollouts] == [0, 1] and rollouts[0].logprobs == (-0.5, -0.5)
    with pytest.raises(
        RolloutError, match=rf"'q1', which was sent 2 times .*HTTP 200 with an answer that is none: .*{told}"
    ):
        asyncio.run(client(spoilt(change), retries=1).sample(prompt(), 2, 40))


@pytest.mark.parametrize("headers", [{"Retry-After": "0.05"}, {"Retry-After": "0"}, {"Retry-After": "soon"}, {}])
def test_a_server_that_is_full_for_now_is_waited_for_and_that_is_no_failed_try(headers):
    tried = []

    def full(request):
        tried.append(1)
        return httpx.Response(429, headers=headers) if len(tried) < 3 else answer(request)

    assert len(asyncio.run(client(full, retries=0).sample(prompt(), 2, 40))) == 2 and len(tried) == 3


def test_a_server_that_stays_full_is_given_up():
    with pytest.raises(RolloutError, match="HTTP 429"):
        asyncio.run(client(lambda r: httpx.Response(429), timeout_s=1, retries=0).sample(prompt(), 2, 40))


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
    file.write_bytes(png(kind="JPEG"))
    parts = chat_messages(prompt(images=(png((80, 60)), str(file))))[0]["content"]
    assert [p["type"] for p in parts] == ["image_url", "image_url", "text"]
    kinds, sent = zip(*(p["image_url"]["url"].split(";base64,") for p in parts[:2]), strict=True)
    assert kinds == ("data:image/png", "data:image/jpeg")
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size for data in sent] == [(80, 60), (60, 60)]
