"""The trainer's model and a running vLLM agree: on what they see, on the weights, on the seeds."""

import asyncio
import itertools
from dataclasses import replace

import httpx
import pytest
import torch
from safetensors.torch import save_file
from stateful_engine import FAULTS

from lingshu_rl.checks.firstbatch import blank_vision
from lingshu_rl.checks.gap import Gap
from lingshu_rl.data.load import load
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.families import model_spec
from lingshu_rl.model.groups import group_logprobs
from lingshu_rl.model.loading import load_model
from lingshu_rl.model.weights import weights
from lingshu_rl.processes.pool import way
from lingshu_rl.rollout.client import VLLM_COUNTER, RolloutClient
from lingshu_rl.rollout.sampler import RolloutError
from lingshu_rl.rollout.transfer import FINISH, START, UPDATE, FileTransfer
from lingshu_rl.types import TokenGroup

pytestmark = pytest.mark.slow
TOKEN = "a-token-for-tests"


class Trainer:
    """The policy's model without DeepSpeed: what FileTransfer reads and what the engine is compared with."""

    def __init__(self):
        self.model = load_model("demo", torch.float32)
        self.encoder = PromptEncoder("demo")
        self.banned = model_spec(self.model).placeholder_ids

    def weights(self):
        return weights(self.model)

    def share(self, value):
        return value

    def client(self, url):
        return RolloutClient([url], token=TOKEN, decode=self.encoder.decode, banned_ids=self.banned, seed=0, temperature=1.0,
                             max_tokens=24, timeout_s=60, retries=0, concurrency=8)  # fmt: skip

    def gap(self, groups, blank=False):
        """Largest log-prob difference to the engine over the sampled tokens."""
        tokens = []
        for rollouts in groups:
            ids, vision = self.encoder.encode(rollouts[0].prompt)
            assert ids == rollouts[0].prompt_ids
            vision = blank_vision(vision) if blank else vision
            tokens.append(TokenGroup(rollouts[0].prompt.id, ids, tuple(r.token_ids for r in rollouts), vision))
        own = group_logprobs(
            self.model, tokens, token_budget=4096, layout="shared", banned_ids=self.banned, temperature=1.0
        )
        return Gap.of(own, [[r.logprobs for r in rollouts] for rollouts in groups]).max


def sample(trainer, url, prompts, step=0):
    async def run():
        client = trainer.client(url)
        try:
            return [g async for g in client.groups(prompts, 4, step)]
        finally:
            await client.close()

    return asyncio.run(run())


def send(trainer, servers):
    async def run():
        client = trainer.client(servers.rollout)
        transfer = FileTransfer(client, servers.transfer)
        await transfer.start()
        await transfer.send(trainer, version=1)
        assert client.weight_version == 1
        await client.close()

    asyncio.run(run())


@pytest.fixture(scope="module", autouse=True)
def demo_weights(servers):
    """The shared server may still hold what another test's run has learnt."""
    send(Trainer(), servers)


@pytest.fixture(scope="module")
def prompts():
    return load("demo:validation", instruction="short").prompts[:6]


def test_trainer_and_engine_see_the_same_image(servers, prompts):
    trainer = Trainer()
    groups = sample(trainer, servers.rollout, prompts)
    assert trainer.gap(groups) < 1e-3
    assert trainer.gap(groups, blank=True) > 1e-2


def test_the_same_seed_gives_the_same_samples(servers, prompts):
    trainer = Trainer()
    first, again, other = (sample(trainer, servers.rollout, prompts[:1], step)[0] for step in (1, 1, 2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again] != [r.token_ids for r in other]
    assert len({r.token_ids for r in first}) > 1


MOMENTS = ("cut before it is carried out", "carried out, answer lost", "error after")  # all of them: test_transfer


class Failing(httpx.AsyncBaseTransport):
    """The way to a server, which fails once on one route, at one moment of the call (`stateful_engine.FAULTS`)."""

    def __init__(self, route, fault):
        self.way, self.route, self.fault = way(), route, fault

    async def handle_async_request(self, request):
        if request.url.path != self.route or self.fault is None:
            return await self.way.handle_async_request(request)
        (carried_out, outcome), self.fault = FAULTS[self.fault], None
        if carried_out:
            await (await self.way.handle_async_request(request)).aread()
        if isinstance(outcome, Exception):
            raise outcome
        return httpx.Response(outcome.status_code, text=outcome.text)


def test_no_failure_of_a_weight_route_at_any_moment_leaves_the_real_engine_with_other_weights(
    servers, prompts, monkeypatch
):
    monkeypatch.setattr("lingshu_rl.rollout.transfer.FILE_BYTES", 1 << 19)  # several files an update
    trainer = Trainer()
    original = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}

    async def story(route, fault):
        client = trainer.client(servers.rollout)
        client.pool.retries = 1
        client.pool.http = httpx.AsyncClient(
            transport=Failing(route, fault), headers=client.pool.http.headers, timeout=60
        )
        await FileTransfer(client, servers.transfer).send(trainer, version=1)
        groups = [g async for g in client.groups(prompts[:1], 4, 0)]
        await client.close()
        return groups

    try:
        for number, (route, fault) in enumerate(itertools.product((START, UPDATE, FINISH), MOMENTS)):
            torch.manual_seed(number)
            with torch.no_grad():
                for name, tensor in trainer.model.named_parameters():
                    tensor.copy_(original[name] + torch.randn_like(tensor) * 0.05 * original[name].std())
            assert trainer.gap(asyncio.run(story(route, fault))) < 1e-3, (route, fault)
    finally:
        send(Trainer(), servers)


def test_an_update_that_broke_off_in_the_middle_is_nothing_to_the_next_run(servers, prompts):
    """The engine is told of one layer's first tensor, then of a file that is not there; then a run begins."""
    trainer = Trainer()
    name, tensor = next((n, t) for n, t in trainer.weights() if "q_proj" in n and n.endswith("weight"))

    async def break_off():
        pool = trainer.client(servers.rollout).pool
        save_file({name: torch.full_like(tensor, 7.0)}, servers.transfer / "part.safetensors")
        await pool.post_to(pool.servers, START)
        await pool.post_to(pool.servers, UPDATE, json={"update_info": {"file": "part.safetensors"}})
        with pytest.raises(RolloutError, match="500"):
            await pool.post_to(pool.servers, UPDATE, json={"update_info": {"file": "none.safetensors"}})
        await pool.close()

    asyncio.run(break_off())
    (servers.transfer / "part.safetensors").unlink()
    send(trainer, servers)
    assert trainer.gap(sample(trainer, servers.rollout, prompts)) < 1e-3


def test_after_a_sync_the_engine_has_the_trainers_weights_head_included(servers, prompts):
    trainer = Trainer()
    assert trainer.model.config.tie_word_embeddings
    original = {name: tensor.detach().clone() for name, tensor in trainer.weights()}
    stale = sample(trainer, servers.rollout, prompts)
    with torch.no_grad():
        for tensor in trainer.model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05 * tensor.std())
    assert trainer.gap(stale) > 1e-2
    send(trainer, servers)
    assert trainer.gap(sample(trainer, servers.rollout, prompts)) < 1e-4
    with torch.no_grad():
        for name, tensor in trainer.weights():
            tensor.copy_(original[name])
    send(trainer, servers)
    assert trainer.gap(sample(trainer, servers.rollout, prompts)) < 1e-4
    assert list(servers.transfer.iterdir()) == []


def test_every_route_but_health_wants_the_token(servers):
    assert httpx.get(f"{servers.rollout}/health").status_code == 200
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(servers.rollout + path).status_code == 401
    for path in ("/start_weight_update", "/update_weights", "/collective_rpc", "/pause"):
        assert httpx.post(servers.rollout + path, json={}).status_code == 401
    assert httpx.get(f"{servers.rollout}/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_vllm_shortens_what_does_not_fit_and_the_client_refuses_it(servers, prompts):
    """The answer looks like any that reached its limit: only the lengths tell that it was cut before rollout.max_tokens."""
    from lingshu_rl.failures import PromptRefused
    from lingshu_rl.rollout.client import chat_messages

    question = replace(prompts[0], messages=({"role": "user", "content": "Is it? " * 500},), images=())
    headers = {"Authorization": f"Bearer {TOKEN}"}
    (model,) = httpx.get(f"{servers.rollout}/v1/models", headers=headers).json()["data"]
    context = model["max_model_len"]
    body = {"model": "policy", "messages": chat_messages(question), "max_tokens": context - 100, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    answer = httpx.post(f"{servers.rollout}/v1/chat/completions", json=body, headers=headers, timeout=300).json()
    (choice,), length = answer["choices"], len(answer["prompt_token_ids"])
    assert length > 100 and choice["finish_reason"] == "length" and len(choice["token_ids"]) == context - length

    async def ask(max_tokens):
        client = Trainer().client(servers.rollout)
        try:
            return await client.sample(question, 1, 0, max_tokens=max_tokens)
        finally:
            await client.close()

    assert len(asyncio.run(ask(context - length))) == 1
    with pytest.raises(PromptRefused, match=rf"has {length} tokens; .*max_model_len={context}"):
        asyncio.run(ask(context - length + 1))


def test_vllms_counts_move_by_what_was_asked_and_answered(servers, prompts):
    """By them a busy server is told from a stuck one."""

    async def counts():
        client = Trainer().client(servers.rollout)
        try:
            before = [await client.generated_tokens(), sum(map(VLLM_COUNTER.read, await client.pool.texts("/metrics")))]
            (group,) = [g async for g in client.groups(prompts[:1], 4, step=0)]
            after = [await client.generated_tokens(), sum(map(VLLM_COUNTER.read, await client.pool.texts("/metrics")))]
        finally:
            await client.close()
        return group, [b - a for a, b in zip(before, after, strict=True)]

    group, (generated, worked) = asyncio.run(counts())
    assert generated == sum(len(r.token_ids) for r in group) and worked >= generated


def test_weight_files_cannot_leave_their_folder(servers, tmp_path):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    outside = tmp_path / "weights.safetensors"
    outside.write_bytes(b"x")
    for name in (str(outside), f"../{outside.name}", "a/../../etc/passwd"):
        httpx.post(f"{servers.rollout}/init_weight_transfer_engine", json={"init_info": {}}, headers=headers)
        answer = httpx.post(f"{servers.rollout}/update_weights", json={"update_info": {"file": name}}, headers=headers)
        assert answer.status_code >= 400


def test_prompts_without_an_image_work_too(servers, prompts):
    trainer = Trainer()
    text = [replace(p, messages=({"role": "user", "content": p.text},), images=()) for p in prompts[:2]]
    assert trainer.gap(sample(trainer, servers.rollout, text)) < 1e-3
