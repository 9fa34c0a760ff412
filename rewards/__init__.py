"""Verifiable rewards for medical question answering and reports. Importing this package loads no torch."""

from rewards.base import Reward, RewardInput, RewardResult

__all__ = ["Reward", "RewardInput", "RewardResult"]
