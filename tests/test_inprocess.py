"""The engine inside the policy's process: one device for two, weights that arrive, requests answered one by one."""

import asyncio
import threading
from types import SimpleNamespace

import httpx
import pytest
import torch
from launching import TOKEN

from lingshu_rl.data.load import load
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.loading import model_path
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes.placement import DeviceSet
from lingshu_rl.rollout.inprocess import InProcessEngine, InProcessTransfer


class FakeLLM:
    """Keeps the order of calls; a request is finished after as many steps as its prompt says."""

    def __init__(self):
        self.calls, self.left, self.names = [], {}, iter(range(1000))
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=64),
            has_unfinished_requests=lambda: bool(self.left),
            step=self.step,
            reset_encoder_cache=lambda: self.calls.append("reset_encoder_cache"),
        )

    def __getattr__(self, name):
        return lambda *words, **options: self.calls.append((name, *words, *options.values())) or True

    def enqueue_chat(self, conversations, params, use_tqdm):
        steps = conversations[0][0]["content"]
        if steps == "refused":
            raise ValueError("longer than the model")
        name = str(next(self.names))
        self.left[name] = steps if steps == "crash" else int(steps)
        return [f"{name}-5eed"]

    def step(self):
        if "crash" in self.left.values():
            raise RuntimeError("out of memory")
        self.left = {name: left - 1 for name, left in self.left.items()}
        done = [name for name, left in self.left.items() if not left]
        for name in done:
            del self.left[name]
        choice = SimpleNamespace(
            index=0, token_ids=[7], finish_reason="stop", logprobs=[{7: SimpleNamespace(logprob=-0.5)}]
        )
        return [SimpleNamespace(request_id=n, finished=True, prompt_token_ids=[1], outputs=[choice]) for n in done]


@pytest.fixture
def engine(monkeypatch):
    """The real engine's code on one CPU rank, over a stand-in for vLLM."""
    import vllm

    made = FakeLLM()
    monkeypatch.setattr(vllm, "LLM", lambda **options: made)
    policy = SimpleNamespace(ranks=1, rank=0, use_device=lambda: None)
    return InProcessEngine(load_config(None, []), "m", DeviceSet(), 0.5, policy, token="secret", host="127.0.0.1")


def body(steps):
    return {"messages": [{"role": "user", "content": str(steps)}], "n": 1, "seed": 0, "temperature": 1.0, "max_tokens": 4, "stop_token_ids": [], "logit_bias": {}}  # fmt: skip


def ask(engine, *steps):
    """Statuses and times of arrival of the answers, asked for together."""
    answered, order = threading.Event(), []

    def reply_to(n):
        def reply(status, answer):
            order.append((n, status, answer))
            if len(order) == len(steps):
                answered.set()

        return reply

    for n in steps:
        engine.submit(body(n), reply_to(n))
    assert answered.wait(10), order
    return order


def test_groups_land_as_they_are_finished_and_a_refused_one_fails_alone(engine):
    order = ask(engine, 300, "refused", 2)
    assert [(n, status) for n, status, _ in order] == [("refused", 400), (2, 200), (300, 200)]
    assert "longer than the model" in order[0][2]["error"]["message"]
    assert order[1][2]["choices"][0] == {"index": 0, "token_ids": [7], "finish_reason": "stop", "logprobs": {"content": [{"logprob": -0.5}]}}  # fmt: skip


def test_an_engine_that_fails_answers_everybody_with_its_error(engine):
    assert [(n, status) for n, status, _ in ask(engine, "crash", 9)] == [("crash", 500), (9, 500)]


def test_an_engine_whose_thread_dies_answers_everybody_also_later(engine, monkeypatch):
    stranger = SimpleNamespace(request_id="nobody's", finished=True)
    monkeypatch.setattr(engine.llm.llm_engine, "step", lambda: [stranger])
    assert [status for _, status, _ in ask(engine, 3, 4)] == [500, 500]
    assert [status for _, status, _ in ask(engine, 5)] == [500]


def test_the_routes_want_the_runs_token(engine):
    def get(path, **headers):
        return httpx.get(engine.url + path, headers=headers)

    assert get("/health").status_code == 200
    mine = {"Authorization": "Bearer secret"}
    assert get("/metrics").status_code == 401 and get("/metrics", **mine).status_code == 200
    assert get("/v1/models", **mine).json()["data"][0]["max_model_len"] == 64


def test_nothing_is_computed_from_sleep_to_load(engine):
    engine.sleep()
    engine.sleep()
    landed = []
    engine.submit(body(1), lambda status, answer: landed.append(status))
    threading.Event().wait(0.2)
    assert landed == []
    engine.load(iter([]))
    assert ask(engine, 1)[0][1] == 200 and landed == [200]


def test_on_a_gpu_weights_wake_first_and_the_cache_after_they_were_loaded(engine):
    """The order that vLLM's sleep mode asks for; every weight is taken although the stand-in's model takes none."""
    engine.sleeps = True
    engine.sleep()
    weights = iter([("a", torch.ones(1)), ("b", torch.ones(1))])
    engine.load(weights)
    names = [call[0] if isinstance(call, tuple) else call for call in engine.llm.calls]
    assert names == ["sleep", "wake_up", "apply_model", "wake_up", "reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]  # fmt: skip
    assert engine.llm.calls[0] == ("sleep", 2)
    assert [c[1] for c in engine.llm.calls if c[0] == "wake_up"] == [["weights"], ["kv_cache"]]


def test_ranks_that_do_not_divide_are_refused(monkeypatch):
    policy = SimpleNamespace(ranks=3, rank=0, use_device=lambda: None)
    config = load_config(None, ["rollout.vllm={tensor_parallel_size: 2}"])
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 does not divide the 3 policy ranks"):
        InProcessEngine(config, "m", DeviceSet(), 0.5, policy, token="t", host="127.0.0.1")


@pytest.mark.slow
def test_weights_really_arrive_after_sleep_and_wake():
    """What was in the engine is destroyed while it sleeps, as level 2 does on CUDA; then it samples the policy's."""
    from test_engine import Trainer

    trainer = Trainer()
    policy = SimpleNamespace(ranks=1, rank=0, use_device=lambda: None, weights=trainer.weights)
    config = load_config(None, ["rollout.vllm={max_model_len: 512}"])
    engine = InProcessEngine(config, model_path("demo"), DeviceSet(), 0.5, policy, token=TOKEN, host="127.0.0.1")

    def destroy(model):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))

    async def after_sleep():
        client = trainer.client(engine.url)
        engine.sleep()
        engine.llm.apply_model(destroy)
        await InProcessTransfer(engine, client).send(policy, version=3)
        assert client.weight_version == 3
        try:
            return [
                group async for group in client.groups(load("demo:validation", instruction="short").prompts[:4], 4, 0)
            ]
        finally:
            await client.close()

    with torch.no_grad():
        for tensor in trainer.model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05 * tensor.std())
    assert trainer.gap(asyncio.run(after_sleep())) < 1e-4
    engine.close()
