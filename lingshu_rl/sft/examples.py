"""Rows as supervised examples: the prompt that a run would ask, and the ideal completion of it.

The prompt is the run's own (`PromptEncoder.render`: system prompt, history, the model's template), so a stage teaches
the question in the form in which RL, evaluation and the engine put it. Rows are made when a batch asks for them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.data.mixing import Part, epoch_order, is_weighed
from lingshu_rl.data.sources import Source
from lingshu_rl.model.lengths import Counted, Lengths, Limit, PictureTokens
from lingshu_rl.types import Prompt
from rewards.kinds import find

if TYPE_CHECKING:
    from lingshu_rl.data.load import Prompts
    from lingshu_rl.model.encoder import PromptEncoder

TARGETS = ("auto", "think", "answer", "plain")
UNTRAINED = -100  # a label that no loss counts


class Examples(Sequence[Mapping[str, Any]]):
    """What TRL trains on, by number.

    sees: some row has an image; then a row is {prompt, completion, images}, texts and pixels, else {input_ids, labels}.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        sources: Sequence[tuple[Source, Prompts]],
        kinds: Sequence[str],
        limit: int,
        target: str,
        seed: int,
    ) -> None:
        self.encoder, self.target = encoder, target
        self.prompts = [prompts for _, prompts in sources]
        self.ends = list(accumulate(map(len, self.prompts), initial=0))
        parts = [
            Part(source.label, range(start, end), source.epochs, source.share)
            for (source, _), start, end in zip(sources, self.ends, self.ends[1:], strict=False)
        ]
        self.end = encoder.end_of_turn()
        self.sees = False
        self.places: list[int] = []
        for place in epoch_order(parts, seed, 0) if is_weighed(parts) else range(self.ends[-1]):
            if limit and len(self.places) == limit:
                break
            prompt = self._prompt(place)
            if not kinds or prompt.kind in kinds:
                self.places.append(place)
                self.sees |= bool(prompt.images)

    def _prompt(self, place: int) -> Prompt:
        source = bisect_right(self.ends, place) - 1
        return self.prompts[source][place - self.ends[source]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prompt = self._prompt(self.places[index])
        text, completion = self.encoder.render(prompt), completion_of(prompt, self.target) + self.end
        if self.sees:
            return {"prompt": text, "completion": completion, "images": [p.pixels() for p in prompt.images]}
        asked, answered = (self.encoder.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, completion))
        return {"input_ids": asked + answered, "labels": [UNTRAINED] * len(asked) + answered}

    def as_dataset(self, packed_in: Path | None = None) -> Any:
        """As TRL wants it: rows by their numbers. packed_in: a folder for the tokens of rows that TRL packs
        beforehand."""
        import datasets

        if packed_in is not None:
            return datasets.Dataset.from_generator(lambda: iter(self), cache_dir=str(packed_in), fingerprint="packed")

        def rows(batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
            made = [self[number] for number in batch["number"]]
            return {key: [row[key] for row in made] for key in made[0]}

        return datasets.Dataset.from_dict({"number": range(len(self))}).with_transform(rows)


class ExampleLengths(Lengths):
    """Tokens of prompts with their completions; over the limit an example is cut, and what is cut is the answer."""

    has = "its prompt with its answer has"
    advice = (
        "Rows that are too long: raise trainer.max_length, lower max_pixels, shorten their text, or leave them out "
        "with too_long=drop."
    )

    def __init__(self, pictures: PictureTokens, limit: Limit | None, kinds: Sequence[str], target: str) -> None:
        """kinds: those that are trained on, of which alone the length matters; empty = all."""
        super().__init__(pictures, limit)
        self.kinds, self.target, self.end = kinds, target, self.encoder.end_of_turn()

    def look(self, prompts: Sequence[Prompt]) -> None:
        super().look([prompt for prompt in prompts if not self.kinds or prompt.kind in self.kinds])

    def _stand_ins(self, prompt: Prompt, text: str) -> Counted:
        counted = super()._stand_ins(prompt, text)
        (answer,) = self.encoder.text_lengths([completion_of(prompt, self.target) + self.end])
        return replace(counted, more=counted.more + answer)


def completion_fault(encoder: PromptEncoder, prompt: Prompt, target: str) -> str | None:
    """Why a row has no completion of this target that the model could be taught, or None."""
    if target == "think" and not chain_of(prompt):
        return "it has no meta.think; make chains with `lingshu-rl synth thoughts`, or use target=answer or auto"
    if found := encoder.special.search(completion_of(prompt, target)):
        return f"its answer holds {found[0]!r}, which this model reads as a control token and not as text: reword it"
    return None


def chain_of(prompt: Prompt) -> str:
    return str(prompt.meta.get("think") or "").strip()


def completion_of(prompt: Prompt, target: str) -> str:
    """The ideal completion. Blanks beside the tags, so that a word is the same token here and in the question."""
    answer = prompt.gold if isinstance(prompt.gold, str) else find(prompt.kind).write(prompt.reward_input())[0]
    if target == "plain":
        return answer
    think = chain_of(prompt) if target != "answer" else ""
    return f"<think> {think} </think><answer> {answer} </answer>" if think else f"<answer> {answer} </answer>"
