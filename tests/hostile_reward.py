"""A reward with every fault an author can make, as tests name it by import path: which one, the question's kind says."""

import re

from lingshu_rl.demo.reward import demo_spec
from rewards import Reward, RewardInput, RewardResult, build


class Hostile(Reward):
    name = "hostile"

    def __init__(self) -> None:
        self.honest = build(demo_spec())

    def score(self, sample: RewardInput) -> RewardResult:
        if sample.kind == "yesno":
            raise KeyError("no such finding")
        if sample.kind == "numeric":
            re.fullmatch(r"(a+)+b", "a" * 60)  # hangs in C, where no timer of Python's gets in
        if sample.kind == "report":
            _ = [bytearray(2**28) for _ in range(10**6)]
        return self.honest.score(sample)
