"""A broken reward, as tests name it by import path: nothing ever earns anything."""

from rewards import Reward, RewardInput, RewardResult


class Zero(Reward):
    name = "zero"

    def score(self, sample: RewardInput) -> RewardResult:
        return RewardResult(0.0, reason="always 0")
