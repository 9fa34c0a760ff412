"""What a rollout server answers, read and judged before anything else sees it: only the fields that a run needs."""

from __future__ import annotations

import math

import msgspec

from lingshu_rl.processes.pool import BadAnswer

SLACK = 1e-3  # nats that rounding may put a log-prob above 0


# gc=False: nothing here can hold itself, and a step's answers have millions of tokens, which each collection would
# visit.
class Token(msgspec.Struct, gc=False):
    logprob: float


class Tokens(msgspec.Struct, gc=False):
    content: list[Token]


class Choice(msgspec.Struct, gc=False):
    """One completion. logprobs: nats under the sampling policy, one a token."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: Tokens
    finish_reason: str

    @property
    def values(self) -> tuple[float, ...]:
        """The log-probs as numbers."""
        return tuple([token.logprob for token in self.logprobs.content])


class EngineAnswer(msgspec.Struct, gc=False):
    """A chat completion with `return_token_ids`, as vLLM's server gives it."""

    prompt_token_ids: tuple[int, ...]
    choices: list[Choice]


_DECODER = msgspec.json.Decoder(EngineAnswer)


def read_answer(content: bytes, n: int) -> EngineAnswer:
    """The answer to a request for n completions, in the order of their indices. Raises BadAnswer for any other."""
    try:
        answer = _DECODER.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadAnswer(f"{error}; it must be a vLLM that knows return_token_ids") from None
    answer.choices.sort(key=lambda choice: choice.index)
    if (indices := [choice.index for choice in answer.choices]) != list(range(n)):
        raise BadAnswer(f"completions {indices} for a group of {n}")
    if not answer.prompt_token_ids:
        raise BadAnswer("a prompt without tokens")
    for choice in answer.choices:
        tokens, given = choice.token_ids, choice.values
        if len(tokens) != len(given) or not tokens:
            raise BadAnswer(
                f"{len(tokens)} tokens with {len(given)} log-probs; it must be a vLLM that knows return_token_ids"
            )
        if min(tokens) < 0 or not math.isfinite(sum(given)) or max(given) > SLACK:
            raise BadAnswer(f"completion {choice.index} holds what is no token or no log-prob")
    return answer
