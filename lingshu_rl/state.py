"""What a checkpoint keeps of a run beside the policy's own state: written and read in one place, as run.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingshu_rl.data.load import Loaded

FILE = "run.json"


@dataclass
class RunState:
    """step: completed and logged. cursor: prompts drawn so far, over all epochs.

    accuracy: held-out, of the latest evaluation. reference: folder in RunFolder.references, "" = the model at the
    start.
    seconds, seconds_total: see `Timeline`. first_batch: what its checks measured. stream: see `PromptStream.state`.
    refused: prompts drawn so far that engine or reference would not have.
    unjudged: the reward executor's window of samples that could not be judged. data: see `seen`.
    judge_costs: what each judge of the rewards has cost.
    """

    step: int = 0
    cursor: int = 0
    refused: int = 0
    accuracy: float | None = None
    reference: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_total: float = 0.0
    first_batch: dict[str, float] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    unjudged: list[Any] = field(default_factory=list)
    judge_costs: list[float] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RunState:
        """What is stored beside it (the sizes of the checkpoint's files) is left out."""
        return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        return cls.from_json(json.loads((checkpoint / FILE).read_text()))


def seen(loaded: Mapping[str, Loaded]) -> dict[str, dict[str, Any]]:
    """What tells the rows of "train" and "test" from others."""
    return {name: {"rows": len(one.prompts), "fingerprint": one.fingerprint} for name, one in loaded.items()}


def data_changes(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The differences in words. A checkpoint of an earlier release knows nothing of its data, so nothing is said."""
    return [
        f"data.{name}: {old[name]['rows']} rows -> {now['rows']} rows"
        + (" of other content" if old[name]["rows"] == now["rows"] else "")
        for name, now in new.items()
        if name in old and old[name]["fingerprint"] != now["fingerprint"]
    ]
