import asyncio

import httpx
import pytest
import torch
from safetensors.torch import save
from starlette.testclient import TestClient

from lingshu_rl.config import load_config
from lingshu_rl.model import PromptEncoder, load_model
from lingshu_rl.reference.client import ReferenceClient, ReferenceRequestError
from lingshu_rl.reference.server import ReferenceModel, build_app
from lingshu_rl.reference.wire import WireError, decode_groups, decode_logprobs, encode_groups, encode_logprobs
from lingshu_rl.rollout.vllm_plugin import TOKEN_ENV
from lingshu_rl.scoring import group_logprobs
from lingshu_rl.types import TokenGroup

AUTH = {"Authorization": "Bearer secret"}


def groups():
    vision = {"pixel_values": torch.randn(64, 1176), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    return [TokenGroup("a", (1, 2, 3), ((4, 5), (6,)), {}), TokenGroup("b", (7,), ((8, 9, 10),), vision)]


def test_groups_and_logprobs_survive_the_wire():
    back = decode_groups(encode_groups(groups()), vocabulary=11)
    for x, y in zip(groups(), back, strict=True):
        assert (x.key, x.prompt_ids, x.completions, x.vision.keys()) == (
            y.key,
            y.prompt_ids,
            y.completions,
            y.vision.keys(),
        )
    logprobs = [(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])), (torch.tensor([-4.0, -5.0, -6.0]),)]
    answer = decode_logprobs(encode_logprobs(logprobs), groups())
    assert all(torch.equal(a, b) for x, y in zip(answer, logprobs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not a safetensors message"),
        (b"\xff" * 64, "not a safetensors message"),
        (save({"x": torch.ones(1)}), "not a safetensors message"),
        (save({"x": torch.ones(1)}, metadata={"keys": "[]"}), "unknown tensors"),
        (save({"x": torch.ones(1)}, metadata={"keys": '["a"]'}), "lacks '0/prompt'"),
        (save({"x": torch.ones(1)}, metadata={"keys": "7"}), "list of strings"),
    ],
)
def test_bad_bodies_are_refused_by_name(body, message):
    with pytest.raises(WireError, match=message):
        decode_groups(body, vocabulary=10)


def tensors(**changes):
    made = {"prompt": torch.tensor([1]), "lengths": torch.tensor([2]), "completions": torch.tensor([1, 2])} | changes
    return save({f"0/{k}": v for k, v in made.items()}, metadata={"keys": '["a"]'})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": torch.tensor([1.0])}, "int64"),
        ({"prompt": torch.tensor([[1]])}, "int64"),
        ({"prompt": torch.tensor([], dtype=torch.int64)}, "empty"),
        ({"lengths": torch.tensor([0, 2])}, "empty"),
        ({"lengths": torch.tensor([2**60])}, "do not add up"),
        ({"completions": torch.tensor([1, 10])}, r"in \[0, 10\)"),
        ({"prompt": torch.tensor([-1])}, r"in \[0, 10\)"),
    ],
)
def test_impossible_groups_are_refused(changes, message):
    with pytest.raises(WireError, match=message):
        decode_groups(tensors(**changes), vocabulary=10)


@pytest.fixture(scope="module")
def app():
    import os

    os.environ[TOKEN_ENV] = "secret"
    model = ReferenceModel(
        "demo", dtype="float32", device="cpu", layout="shared", token_budget=4096, temperature=1.0, attention="sdpa"
    )
    return model, build_app(model, max_body_bytes=1 << 20)


def demo_group():
    encoder = PromptEncoder("demo")
    from lingshu_rl.data.load import load

    prompt = load("demo:validation", instruction="short").prompts[0]
    ids, vision = encoder.encode(prompt)
    return TokenGroup("g", ids, ((20, 21, 22, 2), (23, 2)), vision)


def test_the_server_answers_what_the_policys_own_code_computes(app):
    model, application = app
    group = demo_group()
    with TestClient(application) as http:
        answer = http.post("/logprobs", content=encode_groups([group]), headers=AUTH)
    served = decode_logprobs(answer.content, [group])[0]
    policy = load_model("demo", torch.float32)
    own = group_logprobs(
        policy, [group], token_budget=4096, layout="dense", banned_ids=model.scoring["banned_ids"], temperature=1.0
    )[0]
    assert max(float((a - b).abs().max()) for a, b in zip(served, own, strict=True)) < 1e-5


def test_the_server_refuses_strangers_junk_and_giants_and_lives_on(app):
    _, application = app
    group = demo_group()
    broken = TokenGroup("g", group.prompt_ids, group.completions, {"pixel_values": torch.ones(4, 1176)})
    with TestClient(application) as http:
        assert http.get("/health").status_code == 200
        assert http.post("/logprobs", content=b"x").status_code == 401
        assert http.post("/logprobs", content=b"x", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert http.post("/logprobs", content=b"x", headers=AUTH).status_code == 400
        assert http.post("/logprobs", content=b"x" * (1 << 21), headers=AUTH).status_code == 413
        assert http.post("/logprobs", content=encode_groups([broken]), headers=AUTH).status_code in (400, 422)
        assert http.post("/logprobs", content=encode_groups([group]), headers=AUTH).status_code == 200


def test_the_client_says_which_server_refused_and_why():
    async def ask():
        client = ReferenceClient(["http://ref"], token="t", timeout_s=5)
        client.pool.http = httpx.AsyncClient(
            transport=httpx.MockTransport(lambda r: httpx.Response(422, text="image tokens"))
        )
        await client.logprobs(groups())

    with pytest.raises(ReferenceRequestError, match=r"http://ref refused group 'a': HTTP 422: image tokens"):
        asyncio.run(ask())


def test_replicas_share_one_queue():
    busy, most = set(), []

    async def handler(request):
        assert request.url.host not in busy
        busy.add(request.url.host)
        most.append(len(busy))
        await asyncio.sleep(0.02)
        busy.discard(request.url.host)
        sent = decode_groups(await request.aread(), vocabulary=100)
        return httpx.Response(
            200, content=encode_logprobs([[torch.zeros(len(c)) for c in g.completions] for g in sent])
        )

    async def ask():
        client = ReferenceClient(["http://a", "http://b"], token="t", timeout_s=5)
        client.pool.http = httpx.AsyncClient(transport=httpx.MockTransport(handler))
        return await asyncio.gather(*(client.logprobs(groups()) for _ in range(6)))

    assert len(asyncio.run(ask())) == 6 and max(most) == 2


def test_reference_options_follow_the_policy():
    from lingshu_rl.placement import DeviceSet
    from lingshu_rl.reference.server import reference_command

    config = load_config(None, ["packing.layout=dense", "packing.token_budget=99", "reference.dtype=bfloat16"])
    command = reference_command(config, "m", DeviceSet(), port=1)
    assert {"--layout", "dense", "--token-budget", "99", "--dtype", "bfloat16"} <= set(command)
