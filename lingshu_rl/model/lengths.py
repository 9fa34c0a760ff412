"""Tokens of prompts before any is asked: pictures from their headers' sizes, texts by the tokenizer, nothing decoded.

What is counted is what `PromptEncoder.encode` would make. A picture stands in the text as the processor writes it, with
each run of one placeholder token cut to a single one, so that a text of a few hundred characters is read and not
thousands of placeholders, and whatever its neighbours merge with is still there.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from lingshu_rl.model.encoder import PROBE, PromptEncoder, TemplateError
from lingshu_rl.types import Prompt

Size = tuple[int, int]  # width, height

# Texts of each set that are read in full when no limit asks for it, those of most bytes: some seconds' work. No token
# is shorter than a byte, so the others are known to have at most so many tokens.
KEPT = 20_000
AT_ONCE = 512  # texts in the tokenizer's hands
SLACK = 8  # tokens over a text's bytes: a vocabulary may put a space before the text, or spell a character longer


@dataclass(frozen=True)
class StandIn:
    """What counts for a picture. text: in place of its placeholder, None = the placeholder stays. more: tokens besides.

    tokens: of the picture itself, for messages.
    """

    text: str | None
    more: int
    tokens: int


class PictureTokens:
    """Stand-ins of pictures by size, from the processor's own arithmetic (`_get_num_multimodal_tokens`).

    The arithmetic is held against the processor on blank pictures of every size that is the largest, smallest, widest
    or tallest so far. Where it is off (crops that it does not count), or there is none, a blank of each size is
    encoded.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder
        self.known: dict[Size, StandIn | str] = {}  # or why the processor cannot read such a picture
        self.placeholder = ""
        self.around = 0  # tokens that the processor puts around any text with images, as PaliGemma's does
        self._runs = re.compile(rf"({encoder.special.pattern})\1+")
        self._probe = ""
        self._extremes: dict[str, float] = {}
        self._by_count: dict[tuple[int, int], StandIn] = {}
        self._texts: set[str | None] = set()
        self._beside: set[int] = set()  # tokens of the probe outside the arithmetic: one number if it is right

    def look(self, sizes: Iterable[Size]) -> None:
        new = [size for size in dict.fromkeys(sizes) if size not in self.known]
        for size in self._new_extremes(new):
            self.known[size] = self._encode(size)
        for size in new:
            if size not in self.known:
                self.known[size] = self._of(size)

    def _of(self, size: Size) -> StandIn | str:
        counted = self._counted(size)
        if counted is None or len(self._beside) != 1:
            return self._encode(size)
        if len(self._texts) == 1:
            one, known = next(iter(self._by_count.items()))
            more = counted[0] - one[0]
            return StandIn(known.text, known.more + more, known.tokens + more)
        return self._by_count.get(counted) or self._encode(size)

    def _new_extremes(self, sizes: Sequence[Size]) -> list[Size]:
        """Of these sizes, those that go beyond all before in area or shape."""
        found = []
        for name, measure in MEASURES.items():
            size = max(sizes, key=measure, default=None)
            if size is not None and measure(size) > self._extremes.get(name, float("-inf")):
                self._extremes[name] = measure(size)
                found.append(size)
        return list(dict.fromkeys(found))

    def _counted(self, size: Size) -> tuple[int, int] | None:
        """Tokens and patches of a picture by the processor's arithmetic; None where it has none, or none for this
        size."""
        width, height = size
        try:
            found = self.encoder.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
            return int(found["num_image_tokens"][0]), int((found.num_image_patches or [0])[0])
        except Exception:  # each family's own code; the processor itself will say what is wrong with the size
            return None

    def _encode(self, size: Size) -> StandIn | str:
        """The stand-in as the processor makes it of a blank picture, or why it makes none."""
        try:
            found, total = self._measured(size)
        except Exception as error:
            width, height = size
            return (
                f"the model's processor cannot read an image of {width} x {height} pixels (after data.max_pixels and "
                f"data.min_pixels): {type(error).__name__}: {error}"
            )
        self._texts.add(found.text)
        if (counted := self._counted(size)) is not None:
            self._by_count[counted] = found
            self._beside.add(total - counted[0])
        return found

    def _measured(self, size: Size) -> tuple[StandIn, int]:
        """The stand-in, and all tokens of the probe with this picture."""
        from PIL import Image

        self._probe = self._probe or self.encoder.render(probe())
        read = partial(
            self.encoder.processor,
            text=[self._probe],
            images=[Image.new("RGB", size)],
            add_special_tokens=False,
            return_tensors="pt",
        )
        try:
            encoded = read(return_text_replacement_offsets=True)
        except Exception:  # one that does not know the word, which a model's own code may be
            encoded = read()
        total = int(encoded["input_ids"].shape[1])
        (replaced,) = encoded.get("text_replacement_offsets") or [[]]
        if len(replaced) == 1:
            self.placeholder = replaced[0]["text"]
            found = self._shortened(replaced[0]["replacement"])
            assert found.text is not None
            (short,) = self.encoder.text_lengths([self._probe.replace(self.placeholder, found.text)])
            self.around = total - short - found.more
            return found, total
        (plain,) = self.encoder.text_lengths([self._probe])
        return StandIn(None, total - plain, total - plain + 1), total

    def _shortened(self, text: str) -> StandIn:
        """Each run of one special token in the text becomes a single one."""
        runs = [len(run[0]) // len(run[1]) for run in self._runs.finditer(text)]
        return StandIn(self._runs.sub(r"\1", text), sum(runs) - len(runs), sum(runs) or 1)


MEASURES = {
    "largest": lambda size: size[0] * size[1],
    "smallest": lambda size: -size[0] * size[1],
    "widest": lambda size: size[0] / size[1],
    "tallest": lambda size: size[1] / size[0],
}


def probe() -> Prompt:
    """The shortest question about an image, which stands in it as a placeholder."""
    content = ({"type": "image"}, {"type": "text", "text": PROBE})
    return Prompt(PROBE, ({"role": "user", "content": content},), (), None, (), "", {})


@dataclass(frozen=True)
class Limit:
    """Most tokens of a prompt. why: where that comes from, to be read after the number."""

    tokens: int
    why: str


@dataclass(frozen=True)
class Length:
    """Tokens of one prompt. images: those of its pictures; text: all others."""

    id: str
    total: int
    images: int

    @property
    def text(self) -> int:
        return self.total - self.images

    def __str__(self) -> str:
        return f"{self.total:,} tokens (text {self.text:,}, images {self.images:,})"


@dataclass(frozen=True)
class Counted:
    """A prompt before its text is read. more: tokens besides the text's. bound: tokens that it cannot exceed."""

    id: str
    text: str
    more: int
    images: int

    @property
    def bound(self) -> int:
        return len(self.text.encode()) + SLACK + self.more


class Lengths:
    """Lengths of a set's prompts, batch by batch, and which are over the limit. One object a set.

    Without a limit, and for prompts that are within it whatever their text holds, only the KEPT of most bytes are read.
    """

    has = "its prompt has"
    advice = (
        "Rows that are too long: shorten their text, lower data.max_pixels or rollout.max_tokens, raise the engine's "
        "max_model_len (rollout.vllm.max_model_len), or leave them out with data.too_long=drop."
    )

    def __init__(self, pictures: PictureTokens, limit: Limit | None = None) -> None:
        """pictures: may be of several sets, whose sizes are then looked at once."""
        self.pictures, self.encoder, self.limit = pictures, pictures.encoder, limit
        self.most_text = self.most_images = 0  # of any prompt's text, and of any prompt's images
        self.bound = 0  # tokens that no unread prompt exceeds
        self._longest: Length | None = None
        self._rendered: dict[int, str] = {}
        self._faults: dict[str, str] = {}
        self._kept: list[tuple[int, int, Counted]] = []  # a heap: bound, order of arrival
        self._arrival = count()

    def fault(self, prompt: Prompt) -> str | None:
        """`PromptEncoder.fault`; the text is kept until the next `look`."""
        try:
            self._rendered[id(prompt)] = self.encoder.checked_text(prompt)
        except TemplateError as error:
            return str(error)
        return None

    def look(self, prompts: Sequence[Prompt]) -> None:
        """Count these; what the last call said of others is forgotten. Their images' headers must be readable."""
        self._faults = {}
        self.pictures.look(picture.size for prompt in prompts for picture in prompt.images)
        found = [self._counted(prompt) for prompt in prompts]
        self._rendered = {}
        near = [c for c in found if c is not None and self.limit is not None and c.bound > self.limit.tokens]
        for length in self._read(near):
            self._judge(length)
        for counted in found:
            if counted is not None and (self.limit is None or counted.bound <= self.limit.tokens):
                self._keep(counted)

    def of(self, prompt: Prompt) -> str | None:
        """Why a prompt of the last batch cannot be asked, or None."""
        return self._faults.get(prompt.id)

    def longest(self) -> Length | None:
        """The longest prompt within the limit that was read; None without a prompt. `bound` says what others may
        have."""
        for length in self._read([counted for _, _, counted in self._kept]):
            self._note(length)
        self._kept = []
        return self._longest

    def count(self, prompts: Sequence[Prompt]) -> list[Length]:
        """Of each, exactly. Raises TemplateError for one whose image the processor cannot read."""
        self.pictures.look(picture.size for prompt in prompts for picture in prompt.images)
        counted = [self._stand_ins(prompt, self.encoder.render(prompt)) for prompt in prompts]
        return self._read(counted)

    def _counted(self, prompt: Prompt) -> Counted | None:
        text = self._rendered.get(id(prompt))
        try:
            return self._stand_ins(prompt, self.encoder.render(prompt) if text is None else text)
        except TemplateError as error:
            self._faults[prompt.id] = str(error)
            return None

    def _stand_ins(self, prompt: Prompt, text: str) -> Counted:
        """The text with a stand-in for each picture. Raises TemplateError."""
        if not prompt.images:
            return Counted(prompt.id, text, 0, 0)
        found = []
        for picture in prompt.images:
            known = self.pictures.known[picture.size]
            if isinstance(known, str):
                raise TemplateError(known)
            found.append(known)
        if placeholder := self.pictures.placeholder:
            texts = text.split(placeholder)
            if len(texts) != len(found) + 1:
                raise TemplateError(
                    f"the model's chat template writes {len(texts) - 1} image placeholders for {len(found)} images"
                )
            instead = [placeholder if f.text is None else f.text for f in found]
            text = "".join(part for pair in zip(texts, [*instead, ""], strict=True) for part in pair)
        more = self.pictures.around + sum(f.more for f in found)
        return Counted(prompt.id, text, more, sum(f.tokens for f in found))

    def _read(self, counted: Sequence[Counted]) -> list[Length]:
        lengths: list[int] = []
        for start in range(0, len(counted), AT_ONCE):
            lengths += self.encoder.text_lengths([c.text for c in counted[start : start + AT_ONCE]])
        return [Length(c.id, n + c.more, c.images) for c, n in zip(counted, lengths, strict=True)]

    def _judge(self, length: Length) -> None:
        assert self.limit is not None
        if length.total > self.limit.tokens:
            self._faults[length.id] = f"{self.has} {length}, over the {self.limit.tokens:,} that {self.limit.why}"
        else:
            self._note(length)

    def _note(self, length: Length) -> None:
        self.most_text = max(self.most_text, length.text)
        self.most_images = max(self.most_images, length.images)
        if self._longest is None or length.total > self._longest.total:
            self._longest = length

    def _keep(self, counted: Counted) -> None:
        entry = (counted.bound, next(self._arrival), counted)
        if len(self._kept) < KEPT:
            heapq.heappush(self._kept, entry)
        else:
            self.bound = max(self.bound, heapq.heappushpop(self._kept, entry)[0])
