"""A reward that any model can earn at once, as tests name it by import path: the shorter, the better."""

from rewards import Reward, RewardInput, RewardResult


class Length(Reward):
    name = "length"

    def score(self, sample: RewardInput) -> RewardResult:
        return RewardResult(1 / (1 + len(sample.completion)))
