"""What a rollout server answers, read and judged before anything else sees it: only the fields that a run needs."""

from __future__ import annotations

import math

import msgspec

from lingshu_rl.processes.pool import BadAnswer

SLACK = 1e-3  # nats that rounding may put a log-prob above 0


class Token(msgspec.Struct):
    logprob: float


class Tokens(msgspec.Struct):
    content: list[Token]


class Choice(msgspec.Struct):
    """One completion. logprobs: nats under the sampling policy, one a token."""

    index: int
    token_ids: list[int]
    logprobs: Tokens
    finish_reason: str


class Answer(msgspec.Struct):
    """A chat completion with `return_token_ids`, as vLLM's server gives it."""

    prompt_token_ids: list[int]
    choices: list[Choice]


_DECODER = msgspec.json.Decoder(Answer)


def read_answer(content: bytes, n: int) -> Answer:
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
        tokens, given = choice.token_ids, [token.logprob for token in choice.logprobs.content]
        if len(tokens) != len(given) or not tokens:
            raise BadAnswer(
                f"{len(tokens)} tokens with {len(given)} log-probs; it must be a vLLM that knows return_token_ids"
            )
        if min(tokens) < 0 or not all(math.isfinite(value) and value <= SLACK for value in given):
            raise BadAnswer(f"completion {choice.index} holds what is no token or no log-prob")
    return answer
