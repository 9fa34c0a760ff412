"""The verifier: the rewards that train and evaluate also decide which synthetic answers are kept. Never the writer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from lingshu_rl.types import Prompt
from rewards.compose import DEFAULT_SPEC, build


class Verifier:
    """least: the lowest value that counts as right; below 1 only reports can be partly right."""

    def __init__(self, spec: Any = None, least: float = 1.0) -> None:
        if not 0 < least <= 1:
            raise ValueError(f"--least must be in (0, 1], got {least}")
        self.reward, self.least = build(spec or DEFAULT_SPEC), least
        try:
            self.name = f"rewards {metadata.version('lingshu-rl')}"
        except metadata.PackageNotFoundError:  # run from a checkout
            self.name = "rewards"

    def label_fault(self, prompt: Prompt) -> str | None:
        """Why the label itself cannot be judged, or None."""
        return self.reward.check_gold(prompt.reward_input())

    def judge(self, prompt: Prompt, completion: str, truncated: bool = False) -> dict[str, Any]:
        """What is stored with the row: value, status, what was read, the reason, and whether it is kept."""
        result = self.reward.score(prompt.reward_input(completion, truncated))
        return {
            "verifier": self.name,
            "kept": result.value is not None and result.value >= self.least,
            "value": result.value,
            "status": result.status,
            "parsed": str(result.parsed)[:200],
            "reason": result.reason,
        }


def reason_of(verdict: Mapping[str, Any]) -> str:
    """The phrase under which a dropped row is counted."""
    if verdict["value"] is None:
        return "could not be judged"
    return "wrong answer" if verdict["status"] == "ok" else f"answer {verdict['status']}"
