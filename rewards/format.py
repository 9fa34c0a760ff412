"""Form, length and repetition. None of these pays a wrong answer: use them as a gate, a multiplier or a metric."""

from __future__ import annotations

import re

from rewards.answer import cut_at_end_of_turn, extract
from rewards.base import Reward, RewardInput, RewardResult
from rewards.text import normalise

_LAYOUT = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)
_MARKS = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)
_WORD = re.compile(r"\w+|[^\w\s]")


class ThinkAnswerFormat(Reward):
    """1 for exactly `<think>reasoning</think> <answer>answer</answer>` and nothing around it, else 0.

    Each mark stands once, the reasoning has at least `min_think_words` words and the answer is not empty. When the
    prompt ends with `<think>` (as some chat templates do) the completion begins inside the think block.
    """

    name = "format"

    def __init__(self, min_think_words: int = 3) -> None:
        if min_think_words < 1:
            raise ValueError(
                f"min_think_words must be at least 1 (an empty think block is no reasoning), got {min_think_words}"
            )
        self.min_think_words = min_think_words

    def score(self, sample: RewardInput) -> RewardResult:
        text = cut_at_end_of_turn(normalise(sample.completion)).strip()
        if sample.prompt.rstrip().endswith("<think>") and not text.startswith("<think>"):
            text = f"<think>{text}"
        if sample.truncated and not text.endswith("</answer>"):
            return RewardResult(0.0, "truncated", reason="cut at the length limit before the answer was closed")
        layout = _LAYOUT.fullmatch(text) if text.endswith("</answer>") else None
        if layout is None or len(_MARKS.findall(text)) != 4:
            return RewardResult(0.0, reason="not one think block followed by one answer tag and nothing else")
        if len(layout.group(1).split()) < self.min_think_words:
            return RewardResult(0.0, reason=f"the think block has fewer than {self.min_think_words} words")
        if extract(f"<answer>{layout.group(2)}</answer>").status != "ok" or not re.search(r"\w", layout.group(2)):
            return RewardResult(0.0, reason="the answer is empty")
        return RewardResult(1.0)


class Overlong(Reward):
    """1 up to `limit - buffer` characters, falling evenly to 0 at `limit`. A multiplier of a right answer.

    The character form of the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), for trainers that do not
    hand token counts to rewards.
    """

    name = "overlong"

    def __init__(self, limit: int, buffer: int) -> None:
        if not 0 < buffer <= limit:
            raise ValueError(
                f"buffer must be in (0, limit], got buffer {buffer} and limit {limit} (both in characters)"
            )
        self.limit = limit
        self.buffer = buffer

    def score(self, sample: RewardInput) -> RewardResult:
        length = len(sample.completion)
        value = min(1.0, max(0.0, (self.limit - length) / self.buffer))
        return RewardResult(value, reason="" if value == 1.0 else f"{length} characters of {self.limit}")


class Repetition(Reward):
    """1 while at most `free_share` of the n-grams of `ngram` words are repeats, falling evenly to 0 when all are.

    A multiplier of a right answer. Texts shorter than two n-grams do not repeat.
    """

    name = "repetition"

    def __init__(self, ngram: int = 6, free_share: float = 0.2) -> None:
        if ngram < 1 or not 0 <= free_share < 1:
            raise ValueError(f"ngram must be at least 1 and free_share in [0, 1), got {ngram} and {free_share}")
        self.ngram = ngram
        self.free_share = free_share

    def score(self, sample: RewardInput) -> RewardResult:
        tokens = _WORD.findall(sample.completion.lower())
        grams = [tuple(tokens[i : i + self.ngram]) for i in range(len(tokens) - self.ngram + 1)]
        if len(grams) <= self.ngram:
            return RewardResult(1.0)
        share = 1.0 - len(set(grams)) / len(grams)
        value = min(1.0, (1.0 - share) / (1.0 - self.free_share))
        return RewardResult(value, reason="" if value == 1.0 else f"{share:.0%} of the {self.ngram}-grams repeat")
