"""What samples for the run, whichever engine does it: prompts go in, groups of completions with tokens and log-probs
come out.

A new engine subclasses `Sampler` and says how one request is answered; the run knows no more of it than this class.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from lingshu_rl.failures import PromptRefused, RunStopped
from lingshu_rl.processes.threads import in_thread
from lingshu_rl.rollout.answers import EngineAnswer
from lingshu_rl.types import Prompt, Rollout


class RolloutError(RunStopped):
    """The rollout engine failed for good; the message names server, prompt and the server's answer."""


class Sampler(ABC):
    """decode: token ids -> text. banned_ids: tokens that must not be sampled (image placeholders).

    end_ids: all tokens that end a completion; an engine by itself stops at the tokenizer's alone.
    """

    def __init__(
        self,
        *,
        decode: Callable[[Sequence[int]], str],
        banned_ids: Sequence[int],
        end_ids: Iterable[int] = (),
        seed: int,
        temperature: float,
        max_tokens: int,
    ) -> None:
        self.decode, self.seed = decode, seed
        self.sampling: dict[str, Any] = {
            "model": "policy",
            "temperature": temperature,
            "max_tokens": max_tokens,
            "logprobs": True,
            "return_token_ids": True,
            "stop_token_ids": sorted(end_ids),
            "logit_bias": {str(i): -100.0 for i in banned_ids},
        }
        self.landed: dict[int, dict[str, tuple[Rollout, ...]]] = {}  # by step, then prompt id
        self.refused: dict[str, str] = {}  # prompt id -> why the engine would not have it, the last time it was asked

    @property
    @abstractmethod
    def weight_version(self) -> int:
        """Of the weights that it holds."""

    @abstractmethod
    async def _ask(self, body: Mapping[str, Any], prompt: Prompt) -> tuple[EngineAnswer, int]:
        """The answer (`read_answer`) to a request for body["n"] completions, and the version of the weights that gave
        it.

        body: the request but its messages, which are made of the prompt (`chat_messages`) when its turn has come.
        """

    @abstractmethod
    async def context_length(self) -> int:
        """Most tokens of a prompt and its completion together."""

    @abstractmethod
    async def generated_tokens(self) -> int:
        """The engine's own count of generated tokens, since it was started."""

    @abstractmethod
    async def close(self) -> None:
        """Release what it holds."""

    async def groups(self, prompts: Sequence[Prompt], n: int, step: int) -> AsyncIterator[tuple[Rollout, ...]]:
        """Yield the n rollouts of each prompt as soon as they are complete, in any order of prompts.

        A prompt that the engine refuses is left out and stands in `refused`.
        They stay in `landed` until a later step asks, so that a checkpoint can keep them and a resumed run need not
        sample them again (from other weights, if they were sampled ahead).
        """
        self.landed = {kept: groups for kept, groups in self.landed.items() if kept >= step}
        landed = self.landed.setdefault(step, {})

        async def group(prompt: Prompt) -> tuple[Rollout, ...]:
            if prompt.id not in landed:
                landed[prompt.id] = await self.sample(prompt, n, request_seed(self.seed, step, prompt.id))
            return landed[prompt.id]

        tasks = [asyncio.create_task(group(prompt)) for prompt in prompts]
        try:
            for done in asyncio.as_completed(tasks):
                try:
                    rollouts = await done
                except PromptRefused as refusal:
                    self.refused[refusal.prompt_id] = str(refusal)
                else:
                    yield rollouts
        finally:
            for task in tasks:
                task.cancel()

    async def sample(self, prompt: Prompt, n: int, seed: int, **changes: Any) -> tuple[Rollout, ...]:
        """The n rollouts of one prompt. The same seed and weights give the same samples; member i uses seed + i.

        Raises PromptRefused where the engine refuses the prompt or would have cut its completions short.
        """
        body = {**self.sampling, "n": n, "seed": seed, **changes}
        room = await self.prompt_room(body["max_tokens"])
        answer, version = await self._ask(body, prompt)
        length = len(answer.prompt_token_ids)
        if length > room:
            raise PromptRefused(_too_long(prompt.id, length, body["max_tokens"], room), prompt.id)
        return await in_thread(self._rollouts, prompt, answer, version)

    def _rollouts(self, prompt: Prompt, answer: EngineAnswer, version: int) -> tuple[Rollout, ...]:
        return tuple(
            Rollout(
                prompt=prompt,
                member=choice.index,
                text=self.decode(choice.token_ids),
                prompt_ids=answer.prompt_token_ids,
                token_ids=choice.token_ids,
                logprobs=choice.values,
                finish_reason=choice.finish_reason,
                weight_version=version,
            )
            for choice in answer.choices
        )

    async def prompt_room(self, max_tokens: int) -> int:
        """Tokens that a prompt may have beside `max_tokens` of completion. Raises RolloutError when there are none."""
        context = await self.context_length()
        if context <= max_tokens:
            raise RolloutError(
                f"the rollout engine takes {context} tokens of prompt and completion together (max_model_len), and "
                f"rollout.max_tokens={max_tokens} leaves none of them to the prompt: raise rollout.vllm.max_model_len, "
                "or lower rollout.max_tokens"
            )
        return context - max_tokens


def _too_long(name: str, length: int, max_tokens: int, room: int) -> str:
    """An engine does not refuse such a prompt: it shortens the completions, and no overlong penalty ever fires."""
    context = room + max_tokens
    fits = f" or rollout.max_tokens to at most {context - length}" if length < context else ", or leave the prompt out"
    return (
        f"prompt {name!r} has {length} tokens; with rollout.max_tokens={max_tokens} that is over the engine's "
        f"max_model_len={context}, and its completions would be cut short unseen: set rollout.vllm.max_model_len to at "
        f"least {length + max_tokens}{fits}"
    )


def request_seed(run_seed: int, step: int, prompt_id: str) -> int:
    """A seed below 2**31 that depends on nothing but its arguments; members use the numbers after it."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1 & 0x7FFFFF00
