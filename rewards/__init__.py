"""Verifiable rewards for medical question answering and reports.

Importing this package loads no torch, no sympy and no lingshu_rl: names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rewards.base import STATUSES, Reward, RewardInput, RewardResult

if TYPE_CHECKING:
    from rewards.answer import Answer, Candidate, extract
    from rewards.compose import Compose, Part, Route, build, default_reward
    from rewards.executor import Executor
    from rewards.format import Overlong, Repetition, ThinkAnswerFormat
    from rewards.judge import JudgeReward, RubricReward
    from rewards.kinds import Kind
    from rewards.labels import LabelSet
    from rewards.numeric import NumericUnits
    from rewards.open_answers import OpenAnswer
    from rewards.option import OptionLetter
    from rewards.report import ReportEntities
    from rewards.yesno import YesNo

_HOME = {
    "Answer": "rewards.answer",
    "Candidate": "rewards.answer",
    "Compose": "rewards.compose",
    "Executor": "rewards.executor",
    "JudgeReward": "rewards.judge",
    "Kind": "rewards.kinds",
    "LabelSet": "rewards.labels",
    "NumericUnits": "rewards.numeric",
    "OpenAnswer": "rewards.open_answers",
    "OptionLetter": "rewards.option",
    "Overlong": "rewards.format",
    "Part": "rewards.compose",
    "Repetition": "rewards.format",
    "ReportEntities": "rewards.report",
    "Route": "rewards.compose",
    "RubricReward": "rewards.judge",
    "ThinkAnswerFormat": "rewards.format",
    "YesNo": "rewards.yesno",
    "build": "rewards.compose",
    "default_reward": "rewards.compose",
    "extract": "rewards.answer",
}

__all__ = [
    "STATUSES",
    "Answer",
    "Candidate",
    "Compose",
    "Executor",
    "JudgeReward",
    "Kind",
    "LabelSet",
    "NumericUnits",
    "OpenAnswer",
    "OptionLetter",
    "Overlong",
    "Part",
    "Repetition",
    "ReportEntities",
    "Reward",
    "RewardInput",
    "RewardResult",
    "Route",
    "RubricReward",
    "ThinkAnswerFormat",
    "YesNo",
    "build",
    "default_reward",
    "extract",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
