"""The carriers: one frozen dataclass a stage, `Prompt -> Rollout -> Scored -> Group -> TokenGroup`.

No field is filled in later: a new stage makes a new object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lingshu_rl.imaging.images import Picture
from rewards.base import RewardInput, RewardResult
from rewards.kinds import find_or_plain

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prompt:
    """One question as the policy sees it.

    messages: chat messages; an image stands as `{"type": "image"}` in a content list, in the order of `images`.
    images: decoded only where pixels are needed.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Picture, ...]
    gold: Any
    options: tuple[str, ...]
    kind: str
    meta: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The text of the last user turn."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return "\n".join(part["text"] for part in content if part["type"] == "text")

    def reward_input(self, completion: str = "", truncated: bool = False) -> RewardInput:
        """What a reward sees of this question and a completion of it; images as the row gave them.

        Raises UnreadablePicture where its kind needs an image's size that can no longer be read.
        """
        sizes = {}
        if self.images and find_or_plain(self.kind).sized:
            sizes = {"file_size": [*self.images[0].file_size], "seen_size": [*self.images[0].size]}
        return RewardInput(
            completion=completion,
            gold=self.gold,
            options=self.options,
            prompt=self.text,
            images=tuple(picture.source for picture in self.images),
            kind=self.kind,
            truncated=truncated,
            meta={**self.meta, **sizes} if sizes else self.meta,
        )


@dataclass(frozen=True)
class Rollout:
    """One sampled completion. logprobs: nats under the sampling policy, one a completion token."""

    prompt: Prompt
    member: int
    text: str
    prompt_ids: tuple[int, ...]  # image placeholder tokens already expanded
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str  # "stop" or "length"
    weight_version: int

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def reward_input(self) -> RewardInput:
        return self.prompt.reward_input(self.text, self.truncated)


@dataclass(frozen=True)
class Scored:
    """A rollout with its reward. `result.value is None` means masked: out of the group's mean and of the loss."""

    rollout: Rollout
    result: RewardResult


@dataclass(frozen=True)
class Group:
    """The G completions of one prompt."""

    prompt: Prompt
    members: tuple[Scored, ...]


@dataclass(frozen=True)
class ProcessorInputs:
    """What a model's processor reads of one prompt. text: as the template writes it. images: encoded
    (`Picture.encoded`)."""

    text: str
    images: tuple[bytes, ...]


@dataclass(frozen=True)
class TokenGroup:
    """One prompt and its completions as tokens: the unit that packing shares and that travels to the reference.

    vision: the processor's tensors for this prompt's images (pixel_values, image_grid_thw, ...), empty without images.
    None where they are left out: they are large, and who computes the group makes them, from its own prompt of that key
    or from the `ProcessorInputs` that came along.
    """

    key: str
    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    vision: Mapping[str, torch.Tensor] | None


@dataclass(frozen=True)
class TrainGroup:
    """What the update needs of one group. Masked members are already left out; all tuples run over the rest.

    advantages: one a completion. rollout_logprobs: nats, one a completion token, from the engine that sampled.
    reference_logprobs: float32 tensors of the completions' lengths, or None without a KL term. credit: by how much the
    advantage of each completion token differs from its completion's, or None without advantage.spans.
    """

    tokens: TokenGroup
    advantages: tuple[float, ...]
    rollout_logprobs: tuple[tuple[float, ...], ...]
    reference_logprobs: tuple[torch.Tensor, ...] | None
    credit: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Experience:
    """One step's completions: `groups` and their advantages for the log, `train` for the update.

    drawn: prompts taken from the stream; the next step goes on after them. refused: those that engine or reference
    would not have, by id, with the reason.
    """

    groups: tuple[Group, ...]
    advantages: tuple[tuple[float | None, ...], ...]
    train: tuple[TrainGroup, ...]
    drawn: int
    refused: Mapping[str, str] = field(default_factory=dict)

    def __add__(self, more: Experience) -> Experience:
        return Experience(
            groups=self.groups + more.groups,
            advantages=self.advantages + more.advantages,
            train=self.train + more.train,
            drawn=self.drawn + more.drawn,
            refused={**self.refused, **more.refused},
        )
