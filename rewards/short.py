"""What all short answers share: the label is read, the answer heard and settled, and the two are compared."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from rewards.answer import Answer
from rewards.base import Reward, RewardInput, RewardResult
from rewards.claims import PROSE, Said, checked_read, heard

_UNJUDGED = ("timeout", "error")


class ShortAnswer(Reward):
    """Subclasses say what a label is, what an answer says, and what it is then worth.

    read: "prose" reads all of a completion, "closed" only marked answers (see `rewards.claims.heard`).
    """

    def __init__(self, read: str = PROSE) -> None:
        self.read = checked_read(read)

    @abstractmethod
    def label(self, sample: RewardInput) -> Any:
        """The label as it is compared. Raises ValueError, which says what is wrong with it."""

    @abstractmethod
    def said(self, answer: Answer, sample: RewardInput, label: Any) -> Said:
        """What an answer says (see `rewards.claims.settle`)."""

    @abstractmethod
    def judged(self, said: Said, label: Any) -> RewardResult:
        """What a settled answer is worth."""

    def written(self, completion: str, label: Any) -> str:
        """The completion before anything is read."""
        return completion

    def check_gold(self, sample: RewardInput) -> str | None:
        try:
            self.label(sample)
        except ValueError as error:
            return str(error)
        return None

    def score(self, sample: RewardInput) -> RewardResult:
        try:
            label = self.label(sample)
        except ValueError as error:
            return RewardResult(None, "gold_invalid", reason=str(error))
        answer = heard(self.written(sample.completion, label), self.read, sample.truncated)
        said = (
            self.said(answer, sample, label)
            if answer.status == "ok"
            else Said(None, None, answer.status, answer.reason)
        )
        if said.status != "ok":
            return RewardResult(None if said.status in _UNJUDGED else 0.0, said.status, reason=said.reason)
        return self.judged(said, label)
