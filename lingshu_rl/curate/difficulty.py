"""How hard a row is for a policy: the share of k rollouts that the rewards pass, stored with the row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lingshu_rl.curate.items import Context, Dropped, Item, rank
from lingshu_rl.imaging.files import UnreadablePicture
from rewards.chat import KEY_ENV, ChatAnswer, RequestRefused


@dataclass(frozen=True)
class Difficulty:
    """Sample k answers a row from a running policy and keep the rows that it sometimes solves.

    url: vLLM or any OpenAI-compatible server, up to /v1. keep: fewest and most passes of k, inclusive; [] keeps 1 to
    k-1; where some rollouts could not be judged the limits hold for the share. pass_value: reward from which on an
    answer is right. rewards: a spec as in the training config, the same graders by default. instruction: see
    data.instruction. Sets meta.pass_rate, meta.rollouts (judged) and meta.pass_rate_policy, which the trainer's
    curriculum reads.
    """

    name: ClassVar[str] = "difficulty"
    url: str = ""
    model: str = ""
    k: int = 8
    keep: tuple[int, ...] = ()
    pass_value: float = 0.5
    temperature: float = 1.0
    max_tokens: int = 1024
    instruction: str = "full"
    rewards: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 16
    timeout_s: float = 300.0
    key_env: str = KEY_ENV

    def __post_init__(self) -> None:
        if not self.url or not self.model:
            raise ValueError("difficulty needs url and model of an OpenAI-compatible server")
        if self.k < 2:
            raise ValueError(f"difficulty.k={self.k}: a pass rate needs at least 2 rollouts")
        low, high = self.limits
        if not 0 <= low <= high <= self.k:
            raise ValueError(
                f"difficulty.keep={list(self.keep)} must be [fewest, most] passes between 0 and k={self.k}"
            )

    @property
    def limits(self) -> tuple[int, int]:
        if self.keep and len(self.keep) != 2:
            raise ValueError(f"difficulty.keep={list(self.keep)} must be [fewest, most] passes of k")
        return (self.keep[0], self.keep[1]) if self.keep else (1, self.k - 1)

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Item | Dropped]:
        from lingshu_rl.data.rows import row_to_prompt
        from lingshu_rl.rollout.client import chat_messages
        from rewards.compose import DEFAULT_SPEC, build

        reward = build(self.rewards or DEFAULT_SPEC)
        endpoint = context.endpoint(self)

        def ask(item: Item) -> list[ChatAnswer] | str | UnreadablePicture:
            """The rollouts, or why the label cannot be judged or a picture not be read."""
            prompt = row_to_prompt(item.row, instruction=self.instruction)
            if fault := reward.check_gold(prompt.reward_input()):
                return fault
            try:
                messages = chat_messages(prompt)
            except UnreadablePicture as error:
                return error
            body = {
                "model": self.model,
                "temperature": self.temperature,
                "max_tokens": self.max_tokens,
                "messages": messages,
            }
            return endpoint.sample(body, self.k, rank(context.seed, "difficulty", str(item.row["id"])) & 0x7FFFFF00)

        try:
            for item, answers in endpoint.each(rows, ask):
                if isinstance(answers, RequestRefused):
                    yield Dropped.item(item, "writer_failed", str(answers))
                elif isinstance(answers, UnreadablePicture):
                    yield Dropped.item(item, "unreadable_image", str(answers))
                elif isinstance(answers, str):
                    yield Dropped.item(item, "label_invalid", answers)
                else:
                    prompt = row_to_prompt(item.row, instruction=self.instruction)
                    samples = [prompt.reward_input(a.text, a.truncated) for a in answers]
                    yield self.judge(item, [r.value for r in reward.score_batch(samples)], context)
        finally:
            context.notes.update(requests_sent=endpoint.sent, answers_from_cache=endpoint.from_cache)
            endpoint.close()

    def judge(self, item: Item, values: list[float | None], context: Context) -> Item | Dropped:
        """values: the reward of each rollout; None could not be judged and counts as neither right nor wrong."""
        judged = [value for value in values if value is not None]
        if not judged:
            return Dropped.item(item, "unjudged", f"none of {self.k} rollouts")
        passes = sum(value >= self.pass_value for value in judged)
        item = item.with_meta(pass_rate=passes / len(judged), rollouts=len(judged), pass_rate_policy=self.model)
        context.count(f"passes_{passes}_of_{len(judged)}")
        low, high = self.limits
        told = f"{passes} of {len(judged)} passed"
        if passes * self.k > high * len(judged):
            return Dropped.item(item, "too_easy", told)
        if passes * self.k < low * len(judged):
            return Dropped.item(item, "too_hard", told)
        return item
