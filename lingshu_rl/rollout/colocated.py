"""The rollout engine inside the policy's process (`rollout.placement=colocate`): one device for sampling and training.

On CUDA the engine sleeps while the policy trains: its weights and cache leave the device (level 2) and the weights come
back from the policy. That part was not run on this project's CPU machines, where the engine simply stays.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lingshu_rl.config import Config
from lingshu_rl.policy import Policy
from lingshu_rl.processes.placement import DeviceSet
from lingshu_rl.rollout.client import chat_messages
from lingshu_rl.rollout.sampler import Sampler
from lingshu_rl.rollout.server import vllm_options
from lingshu_rl.rollout.vllm_plugin import retie_heads
from lingshu_rl.types import Prompt


class ColocatedRollout(Sampler):
    """Requests that are asked for together are one batch of the engine, which runs in a thread.

    A batch is of at most rollout.concurrency completions (or one group); its images are read when its turn has come.
    """

    def __init__(self, config: Config, model: str, devices: DeviceSet, *, decode: Callable[[Sequence[int]], str],
                 banned_ids: Sequence[int]) -> None:  # fmt: skip
        super().__init__(
            decode=decode,
            banned_ids=banned_ids,
            seed=config.seed,
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_tokens,
        )
        self.concurrency = config.rollout.concurrency
        # The engine must live in this process, and must not bind its threads, which are the policy's too.
        os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.update(config.rollout.env)
        from vllm import LLM

        self.sleeps, self.asleep = devices.on_gpu, False
        self.llm = LLM(**vllm_options(config, model, devices), enable_sleep_mode=self.sleeps)
        self.version = self.generated = 0
        self.waiting: list[tuple[Mapping[str, Any], Prompt, asyncio.Future[dict[str, Any]]]] = []
        self.turn = asyncio.Lock()

    @property
    def weight_version(self) -> int:
        return self.version

    async def context_length(self) -> int:
        return int(self.llm.llm_engine.model_config.max_model_len)

    async def _ask(self, body: Mapping[str, Any], prompt: Prompt) -> tuple[Mapping[str, Any], int]:
        mine: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.waiting.append((body, prompt, mine))
        await asyncio.sleep(0)  # whoever asks in the same turn of the loop joins the batch
        while not mine.done():
            async with self.turn:
                if not mine.done():
                    await self._answer_some()
        return await mine, self.version

    async def _answer_some(self) -> None:
        """One batch of those that have waited longest."""
        size = max(1, self.concurrency // self.waiting[0][0]["n"])
        batch, self.waiting = self.waiting[:size], self.waiting[size:]
        answers = await asyncio.to_thread(self._generate, [(body, prompt) for body, prompt, _ in batch])
        for (*_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def _generate(self, requests: Sequence[tuple[Mapping[str, Any], Prompt]]) -> list[dict[str, Any]]:
        """What the server would answer to each of these requests."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=body["n"],
                seed=body["seed"],
                temperature=body["temperature"],
                max_tokens=body["max_tokens"],
                logprobs=0,
                logit_bias={int(i): bias for i, bias in body["logit_bias"].items()},
            )
            for body, _ in requests
        ]
        messages: list[Any] = [chat_messages(prompt) for _, prompt in requests]
        found = self.llm.chat(messages, params, use_tqdm=False)
        self.generated += sum(len(choice.token_ids) for answer in found for choice in answer.outputs)
        return [
            {
                "prompt_token_ids": answer.prompt_token_ids,
                "choices": [
                    {
                        "index": choice.index,
                        "token_ids": list(choice.token_ids),
                        "finish_reason": choice.finish_reason,
                        "logprobs": {"content": [{"logprob": x} for x in chosen_logprobs(choice)]},
                    }
                    for choice in answer.outputs
                ],
            }
            for answer in found
        ]

    def load(self, policy: Policy, version: int) -> None:
        """The policy's weights into the engine, tensor by tensor; nothing is written or sent."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        model_config = self.llm.llm_engine.model_config

        def replace(model: Any) -> None:
            initialize_layerwise_reload(model)
            model.load_weights(policy.weights())
            finalize_layerwise_reload(model, model_config)
            retie_heads(model)

        self.llm.apply_model(replace)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.version = version

    def sleep(self) -> None:
        """Give the device to the policy until the next `load`; nothing on CPU."""
        if self.sleeps:
            self.llm.sleep(level=2)
            self.asleep = True

    async def generated_tokens(self) -> int:
        return self.generated

    async def close(self) -> None:
        """The engine ends with this process."""


def chosen_logprobs(choice: Any) -> list[float]:
    """Of the sampled tokens, from vLLM's CompletionOutput."""
    return [places[token].logprob for token, places in zip(choice.token_ids, choice.logprobs, strict=True)]


class ColocatedTransfer:
    def __init__(self, rollout: ColocatedRollout) -> None:
        self.rollout = rollout

    async def start(self, servers: Any = None) -> None:
        """Nothing to open."""

    async def send(self, policy: Policy, version: int, server: str | None = None) -> None:
        self.rollout.load(policy, version)
