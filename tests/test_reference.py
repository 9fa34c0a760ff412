import asyncio
from dataclasses import replace

import httpx
import pytest
import torch
from safetensors.torch import save
from starlette.testclient import TestClient

from lingshu_rl.failures import PromptRefused
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.groups import group_logprobs
from lingshu_rl.model.loading import load_model
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes.token import TOKEN_ENV
from lingshu_rl.reference.client import ReferenceClient, ReferenceRequestError, progress_told
from lingshu_rl.reference.server import ReferenceModel, body_limit, build_app
from lingshu_rl.reference.wire import WireError, decode_groups, decode_logprobs, encode_groups, encode_logprobs
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


LOGPROBS = {"0": torch.tensor([-1.0, -2.0, -3.0]), "1": torch.tensor([-4.0, -5.0, -6.0])}
HOLE = torch.tensor([-1.0, float("nan"), -3.0])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no safetensors"),
        (b"<html>busy</html>", "no safetensors"),
        (save(LOGPROBS)[:-4], "no safetensors"),
        (save({"0": LOGPROBS["0"]}), "group 'b' does not fit"),
        (save({**LOGPROBS, "1": LOGPROBS["1"][:2]}), "group 'b' does not fit"),
        (save({**LOGPROBS, "1": LOGPROBS["1"].double()}), "group 'b' does not fit"),
        (save({**LOGPROBS, "0": HOLE}), "group 'a' holds log-probs that are no numbers"),
        (save({**LOGPROBS, "0": HOLE.nan_to_num(float("-inf"))}), "group 'a' holds log-probs that are no numbers"),
    ],
)
def test_reference_answers_that_are_none_are_asked_for_again_and_then_named(content, told):
    answers = [content, save(LOGPROBS), content]

    async def ask():
        client = ReferenceClient(["http://a"], token="t", timeout_s=5, retries=1)
        transport = httpx.MockTransport(lambda request: httpx.Response(200, content=answers.pop(0)))
        client.pool.http = httpx.AsyncClient(transport=transport)
        found = await client.logprobs(groups())
        client.pool.retries = 0
        with pytest.raises(ReferenceRequestError, match=f"'a', which was sent 1 times .*that is none: .*{told}"):
            await client.logprobs(groups())
        return found

    found = asyncio.run(ask())
    assert [[len(piece) for piece in group] for group in found] == [[2, 1], [3]] and not answers


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
    with pytest.MonkeyPatch.context() as small:
        small.setattr("lingshu_rl.reference.server.TOKEN_BYTES", 512)  # of 2,048 tokens: bodies of 1 MiB
        return model, build_app(model)


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

    with pytest.raises(PromptRefused, match=r"http://ref refused prompt 'a': HTTP 422: image tokens"):
        asyncio.run(ask())


def film(height, width):
    """What Qwen2.5-VL's processor makes of a film within its published limits: float32 patches of 14 x 14, and their grid."""
    rows, columns = 2 * round(height / 28), 2 * round(width / 28)
    return torch.rand(rows * columns, 1176), [1, rows, columns]


def test_an_ordinary_study_of_three_films_passes_with_the_default_limits(monkeypatch):
    """Three films of 7.5, 3.1 and 1.0 megapixels are 271 MiB, and arrive to the bit."""
    monkeypatch.setenv(TOKEN_ENV, "secret")
    pixels, grids = zip(*(film(*size) for size in ((3000, 2500), (1760, 1760), (1120, 900))), strict=True)
    vision = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
    study = TokenGroup("study", tuple(range(9)), ((1, 2), (3,)), vision)
    body = encode_groups([study])
    seen = []

    class Frozen:
        progress, max_body_bytes = 0, body_limit(32_768)

        def score(self, body):
            seen.extend(decode_groups(body, vocabulary=10))
            return encode_logprobs([[torch.zeros(2), torch.zeros(1)]])

    with TestClient(build_app(Frozen())) as http:
        answer = http.post("/logprobs", content=body, headers=AUTH)
    assert answer.status_code == 200, answer.text
    assert len(body) > 256 << 20 and torch.equal(seen[0].vision["pixel_values"], vision["pixel_values"])


@pytest.mark.parametrize(
    ("pixels", "tokens"), [(14 * 14 * 2 * 4, 1), (32 * 32 * 2, 1), (896 * 896, 256), (512 * 512, 64)]
)
def test_no_study_within_the_models_context_is_over_the_limit(pixels, tokens):
    """Float32 RGB values of an image and its tokens: Qwen2.5-VL, Qwen3-VL (two frames each), Gemma 3, SmolVLM."""
    assert pixels * 3 * 4 * (1000 // tokens) < body_limit(1000)


def test_health_shows_how_many_layers_were_computed_also_in_the_middle_of_one_request(app):
    """By that a large group is told from a stuck server: the count moves layer by layer, in one forward pass as well."""
    model, application = app
    counts = []
    hooks = [
        layer.register_forward_hook(lambda *_: counts.append(model.progress))
        for layers in model.model.modules()
        if isinstance(layers, torch.nn.ModuleList)
        for layer in layers
    ]
    try:
        with TestClient(application) as http:
            before = http.get("/health").json()["progress"]
            assert http.post("/logprobs", content=encode_groups([demo_group()]), headers=AUTH).status_code == 200
            after = http.get("/health").json()["progress"]
    finally:
        for hook in hooks:
            hook.remove()
    assert len(hooks) == len(counts) > 2 and counts == sorted(set(counts))
    assert progress_told(http.get("/health").text) == after > before + len(counts)  # the body's bytes count too


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
    from lingshu_rl.processes.placement import DeviceSet
    from lingshu_rl.reference.server import reference_command

    config = load_config(None, ["packing.layout=dense", "packing.token_budget=99", "reference.dtype=bfloat16"])
    command = reference_command(config, "m", DeviceSet(), port=1)
    assert {"--layout", "dense", "--token-budget", "99", "--dtype", "bfloat16"} <= set(command)


def test_sizes_are_checked_before_anything_is_made_of_them():
    group = demo_group()
    limits = {"vocabulary": 640, "max_sequence": len(group.prompt_ids) + 4}
    assert decode_groups(encode_groups([group]), **limits)
    with pytest.raises(WireError, match="over the model's"):
        decode_groups(encode_groups([group]), vocabulary=640, max_sequence=len(group.prompt_ids) + 3)
    with pytest.raises(WireError, match="tokens in one request, the limit is 10"):
        decode_groups(encode_groups([group]), max_tokens=10, **limits)
    header = (1 << 40).to_bytes(8, "little")
    with pytest.raises(WireError, match="a header of 1099511627776 bytes"):
        decode_groups(header + b"{}", vocabulary=640)
    for grid, message in (
        ([[1, 2**40, 2**40]], "must be in"),
        ([[1, -8, 8]], "must be in"),
        ([[1, 60000, 60000]], "does not describe the"),
        ([[1, 8]], "int64 rows of 3"),
    ):
        broken = TokenGroup(
            "g", group.prompt_ids, group.completions, {**group.vision, "image_grid_thw": torch.tensor(grid)}
        )
        with pytest.raises(WireError, match=message):
            decode_groups(encode_groups([broken]), **limits)
    overflow = {"lengths": torch.tensor([2**62] * 3 + [2**62 + 2])}
    with pytest.raises(WireError, match="do not add up"):
        decode_groups(tensors(**overflow), vocabulary=10)


def grids(*rows):
    return torch.tensor(rows, dtype=torch.int64)


HOSTILE = {
    "a side of 0": ({"image_grid_thw": grids([1, 0, 8])}, r"in \[1, 65536\]"),
    "a side below 0": ({"image_grid_thw": grids([-1, 8, -8])}, r"in \[1, 65536\]"),
    "sides whose product wraps around": ({"image_grid_thw": grids(*[[1 << 16] * 3] * (1 << 16), [1, 8, 8])}, "does not describe"),
    "fewer patches than pixels": ({"image_grid_thw": grids([1, 8, 6])}, "does not describe"),
    "a grid without pixels": ({"pixel_values": None}, "beside its pixels"),
    "a side that does not merge": ({"image_grid_thw": grids([1, 64, 1])}, "does not make the 16 image tokens"),
    "another number of images": ({"image_grid_thw": grids([1, 8, 4], [1, 4, 8], [1, 4, 8]), "pixel_values": torch.zeros(96, 1176)}, "does not make"),
    "a video": ({"video_grid_thw": grids([1, 8, 8]), "pixel_values_videos": torch.zeros(64, 1176)}, "'pixel_values_videos' is nothing that this model takes"),
    "a video of 6 GB": ({"video_grid_thw": grids([1 << 16] * 3), "pixel_values_videos": torch.zeros(1, 1176)}, "does not describe"),
    "a video grid alone": ({"video_grid_thw": grids([9, 9, 9])}, "beside its pixels"),
    "another argument of the model": ({"past_key_values": torch.zeros(1)}, "'past_key_values' is nothing"),
    "positions of its own": ({"position_ids": torch.zeros(3, 1, 1 << 16)}, "'position_ids' is nothing"),
    "no image for the prompt's tokens": ({"pixel_values": None, "image_grid_thw": None}, "16 image tokens in the prompt beside 0"),
    "a grid of halves": ({"image_grid_thw": torch.tensor([[1.0, 8.0, 8.0]])}, "int64 rows of 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_images_that_are_none_are_refused_at_once_and_in_no_memory(name, app):
    """Before anything is made of them: by the checks alone, in milliseconds and less than a MiB."""
    import time
    import tracemalloc

    changes, told = HOSTILE[name]
    group = demo_group()
    assert [list(row) for row in group.vision["image_grid_thw"].tolist()] == [[1, 8, 8]]
    vision = {key: value for key, value in {**group.vision, **changes}.items() if value is not None}
    body = encode_groups([TokenGroup("g", group.prompt_ids, group.completions, vision)])
    model, _ = app
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(WireError, match=told):
        decode_groups(body, **model.limits)
    assert time.monotonic() - began < 1 and tracemalloc.get_traced_memory()[1] < len(body) + (1 << 20)
    tracemalloc.stop()


def test_images_for_a_prompt_without_any_are_refused(app):
    group = demo_group()
    blind = TokenGroup("g", (20, 21, 22), group.completions, group.vision)
    with pytest.raises(WireError, match="0 image tokens in the prompt beside 2 image tensors"):
        decode_groups(encode_groups([blind]), **app[0].limits)


@pytest.mark.parametrize("seed", range(2))
def test_no_mutation_of_a_request_brings_the_server_down(app, seed):
    """Random bytes, cut bodies, flipped bytes in header and data, swapped dtypes: an answer each time, 200 only for sense."""
    import random

    _, application = app
    draw = random.Random(seed)
    good = encode_groups([demo_group()])
    header = int.from_bytes(good[:8], "little")
    with TestClient(application, raise_server_exceptions=True) as http:
        for _ in range(40):
            body = bytearray(good)
            kind = draw.randrange(4)
            if kind == 0:
                body = bytearray(draw.randbytes(draw.randrange(400)))
            elif kind == 1:
                del body[draw.randrange(len(body)) :]
            elif kind == 2:
                for _ in range(draw.randrange(1, 6)):
                    body[draw.randrange(8 + header)] = draw.randrange(256)
            else:
                start = 8 + header
                for _ in range(draw.randrange(1, 40)):
                    body[draw.randrange(start, len(body))] = draw.randrange(256)
            answer = http.post("/logprobs", content=bytes(body), headers=AUTH)
            assert answer.status_code in (200, 400, 422), answer.text
            assert http.post("/logprobs", content=bytes(body)).status_code == 401
        assert http.post("/logprobs", content=good, headers=AUTH).status_code == 200


def test_a_body_announced_too_large_is_refused_unread(app):
    _, application = app

    async def ask():
        async def receive():
            raise AssertionError("the body was read")

        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", b"Bearer secret"), (b"content-length", str(1 << 50).encode())]
        scope = {"type": "http", "method": "POST", "path": "/logprobs", "headers": headers, "query_string": b"",
                 "raw_path": b"/logprobs", "root_path": "", "scheme": "http", "http_version": "1.1"}  # fmt: skip
        await application(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(ask()) == 413


def test_the_reference_can_be_refreshed_from_its_own_folder_only(tmp_path):
    import shutil

    from lingshu_rl.model.loading import model_path

    model = ReferenceModel("demo", dtype="float32", device="cpu", layout="shared", token_budget=4096, temperature=1.0)
    new = load_model("demo", torch.float32)
    with torch.no_grad():
        new.get_input_embeddings().weight.mul_(1.5)
    shutil.copytree(model_path("demo"), tmp_path / "step-000002")
    new.save_pretrained(tmp_path / "step-000002")
    group = demo_group()
    before = decode_logprobs(model.score(encode_groups([group])), [group])[0]
    with TestClient(build_app(model, tmp_path)) as http:
        assert http.post("/refresh", json={"folder": "step-000002"}).status_code == 401
        for name in ("../step-000002", str(tmp_path / "step-000002"), "step-000009", "", "..", "."):
            assert http.post("/refresh", json={"folder": name}, headers=AUTH).status_code == 400
        assert http.post("/refresh", json=[1], headers=AUTH).status_code == 422
        assert http.post("/refresh", json={"folder": "step-000002"}, headers=AUTH).status_code == 200
        answer = http.post("/logprobs", content=encode_groups([group]), headers=AUTH)
    after = decode_logprobs(answer.content, [group])[0]
    scoring = {k: v for k, v in model.scoring.items() if k != "layout"}
    own = group_logprobs(new, [group], layout="dense", **scoring)[0]
    assert max(float((a - b).abs().max()) for a, b in zip(after, own, strict=True)) < 1e-5
    assert max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-3
    with TestClient(build_app(model)) as http:
        assert "no --refresh-dir" in http.post("/refresh", json={"folder": "x"}, headers=AUTH).text


@pytest.mark.endurance
def test_two_hundred_clients_at_once_slow_and_large_ones_among_them(servers):
    """Every good one is answered, memory stays under the stated bound, and strangers get nothing."""
    from urllib.parse import urlsplit

    import psutil
    from launching import TOKEN

    from lingshu_rl.reference.server import ADMITTED

    good, mine = encode_groups([demo_group()]), {"Authorization": f"Bearer {TOKEN}"}
    where = urlsplit(servers.reference)
    process = next(
        p for p in psutil.process_iter(["cmdline"])
        if str(where.port) in (p.info["cmdline"] or []) and "lingshu_rl.reference.server" in p.info["cmdline"]
    )  # fmt: skip
    megabytes = 64

    async def slow():
        """Announces a body, sends a byte of it, and hangs up after a while."""
        _, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(
            f"POST /logprobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 900\r\n\r\nx".encode()
        )
        await writer.drain()
        await asyncio.sleep(1)
        writer.close()

    async def all_at_once():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=servers.reference, timeout=120, limits=limits) as http:
            post = lambda content, headers: http.post("/logprobs", content=content, headers=headers)  # noqa: E731
            slow_ones = [asyncio.create_task(slow()) for _ in range(20)]
            jobs = [post(good, mine) for _ in range(60)] + [post(b"x" * (megabytes << 20), mine) for _ in range(20)]
            jobs += [post(good, {"Authorization": "Bearer wrong"}) for _ in range(100)]
            answers = await asyncio.gather(*jobs)
            await asyncio.gather(*slow_ones)
        return [a.status_code for a in answers]

    before = process.memory_info().rss
    codes = asyncio.run(all_at_once())
    most = process.memory_info().rss - before
    assert codes == [200] * 60 + [400] * 20 + [401] * 100
    assert most < 3 * ADMITTED * (megabytes << 20) + (200 << 20)
    assert httpx.get(f"{servers.reference}/health").status_code == 200


@pytest.mark.slow
def test_a_sharded_reference_gives_the_log_probs_of_a_whole_one(tmp_path):
    """Two processes with half of each layer (reference.tensor_parallel=2), started as a run starts them."""
    import os

    from lingshu_rl.model.loading import model_path
    from lingshu_rl.processes.placement import DeviceSet
    from lingshu_rl.processes.workers import Worker, free_port, stop_all
    from lingshu_rl.reference.server import reference_command

    config, port = load_config(None, ["reference.tensor_parallel=2"]), free_port()
    command = reference_command(config, model_path("demo"), DeviceSet(), port=port)
    env = {TOKEN_ENV: "secret", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    url = f"http://127.0.0.1:{port}"
    worker = Worker("reference server 0", command, url=url, log=tmp_path / "log", env=env, stop_timeout_s=10)
    try:
        worker.wait_healthy(240)
        group = demo_group()
        assert httpx.post(f"{url}/logprobs", content=b"junk", headers=AUTH, timeout=60).status_code == 400
        answer = httpx.post(f"{url}/logprobs", content=encode_groups([group]), headers=AUTH, timeout=60)
    finally:
        stop_all([worker])
    served = decode_logprobs(answer.content, [group])[0]
    whole = ReferenceModel("demo", dtype="float32", device="cpu", layout="dense", token_budget=4096, temperature=1.0)
    own = decode_logprobs(whole.score(encode_groups([group])), [group])[0]
    assert max(float((a - b).abs().max()) for a, b in zip(served, own, strict=True)) < 1e-5


# ------------------------------------------------------------------------------ images as files, processed by the server


@pytest.fixture(scope="module")
def reading():
    """A reference that processes images itself, with a prompt as the trainer sends it, and the same as tensors."""
    from lingshu_rl.data.load import load

    model = ReferenceModel(
        "demo", dtype="float32", device="cpu", layout="shared", token_budget=4096, temperature=1.0, processor="demo"
    )
    inputs = PromptEncoder("demo").inputs(load("demo:validation", instruction="short").prompts[0])
    return model, replace(demo_group(), vision=None), inputs


def test_images_sent_as_files_give_the_log_probs_of_their_tensors_to_the_bit(reading):
    model, light, inputs = reading
    with_tensors, with_files = encode_groups([demo_group()]), encode_groups([light], [inputs])
    assert len(with_files) < len(with_tensors) / 10
    (read,) = decode_groups(with_files, **model.limits)
    assert all(read.vision[name].equal(tensor) for name, tensor in demo_group().vision.items())
    (own,), (served,) = (decode_logprobs(model.score(body), [light]) for body in (with_tensors, with_files))
    assert all(a.equal(b) for a, b in zip(own, served, strict=True))


def film_of(width, height, kind="PNG"):
    """A file of few bytes that says that it is so large."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1" if kind == "PNG" else "L", (width, height)).save(buffer, kind)
    return buffer.getvalue()


def as_tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


SENT_WRONG = {
    "a file of 100 megapixels": (lambda one: replace(one, images=(film_of(10_000, 10_000),)), "image 0 of 10000 x 10000 pixels is over what"),
    "many small files": (lambda one: replace(one, images=one.images * 1000), "pixels is over what"),
    "no image": (lambda one: replace(one, images=(b"no image",)), "image 0: unreadable image .* it is no PNG or JPEG file"),
    "a file cut off": (lambda one: replace(one, images=(one.images[0][:500],)), "group 0: .*unreadable image"),
    "another format": (lambda one: replace(one, images=(film_of(8, 8, "TIFF"),)), "it is no PNG or JPEG file"),
    "another text": (lambda one: replace(one, text=one.text + "?"), "tokens came, and this server's processor makes"),
    "another size": (lambda one: replace(one, images=(film_of(56, 112),)), "tokens came, and this server's processor makes"),
    "one image more": (lambda one: replace(one, images=one.images * 2), "image_grid_thw does not make the 16 image tokens"),
    "no image for the placeholder": (lambda one: replace(one, text="hello"), "group 0: "),
}  # fmt: skip


@pytest.mark.parametrize("name", SENT_WRONG)
def test_files_that_are_none_or_too_many_are_refused_before_anything_is_made_of_them(name, reading):
    import tracemalloc

    model, light, inputs = reading
    change, told = SENT_WRONG[name]
    body = encode_groups([light], [change(inputs)])
    tracemalloc.start()
    with pytest.raises(WireError, match=told):
        decode_groups(body, **model.limits)
    assert tracemalloc.get_traced_memory()[1] < 2 * len(body) + (4 << 20)
    tracemalloc.stop()


TEXT_WRONG = {
    "a text without an image": ({"0/text": as_tensor(b"hello")}, "a text comes with its images"),
    "an image without a text": ({"0/image/0": as_tensor(b"x")}, "unknown tensors"),
    "an image of another number": ({"0/text": as_tensor(b"hello"), "0/image/7": as_tensor(b"x")}, "numbered from 0"),
    "a text of numbers": ({"0/text": torch.ones(3), "0/image/0": as_tensor(b"x")}, "must be bytes"),
    "a text that is none": ({"0/text": as_tensor(b"\xff\xfe"), "0/image/0": as_tensor(b"x")}, "not UTF-8"),
    "a text of 5 MB": ({"0/text": torch.zeros(5 << 20, dtype=torch.uint8), "0/image/0": as_tensor(b"x")}, "at most"),
    "tensors beside it": (
        {"0/text": as_tensor(b"a"), "0/image/0": as_tensor(b"x"), "0/vision/pixel_values": torch.ones(4, 1176)}, "without image tensors"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_WRONG)
def test_a_text_and_its_images_come_whole_and_alone(name, reading):
    more, told = TEXT_WRONG[name]
    made = {"0/prompt": torch.tensor([1]), "0/lengths": torch.tensor([1]), "0/completions": torch.tensor([1])}
    with pytest.raises(WireError, match=told):
        decode_groups(save(made | more, metadata={"keys": '["a"]'}), **reading[0].limits)


def test_a_server_without_a_processor_says_so(app, reading):
    with pytest.raises(WireError, match="images must come as tensors here"):
        decode_groups(encode_groups([reading[1]], [reading[2]]), **app[0].limits)


@pytest.mark.parametrize("seed", range(2))
def test_no_mutation_of_a_request_with_files_brings_the_server_down(reading, seed):
    import random

    model, light, inputs = reading
    draw, good = random.Random(seed), encode_groups([light], [inputs])
    with TestClient(build_app(model), raise_server_exceptions=True) as http:
        for _ in range(40):
            body = bytearray(good)
            for _ in range(draw.randrange(1, 40)):
                body[draw.randrange(8, len(body))] = draw.randrange(256)
            assert http.post("/logprobs", content=bytes(body), headers=AUTH).status_code in (200, 400, 422)
        assert http.post("/logprobs", content=good, headers=AUTH).status_code == 200
