"""The benchmarks as a table (benchmarks.yaml), what they ask, and which are meant by their names.

An entry is data: how its records are read is said by a preset, as for training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lingshu_rl.data.rows import instruction_text
from lingshu_rl.data.sources import Source
from lingshu_rl.failures import LingshuError
from rewards.imports import hint
from rewards.kinds import KINDS, find


class EvalError(LingshuError, ValueError):
    """An evaluation that cannot be run; the message names what is wrong and what to do."""


@dataclass(frozen=True)
class Benchmark:
    """One entry of benchmarks.yaml, whose head says what its keys mean."""

    name: str
    title: str
    kinds: tuple[str, ...]
    files: Mapping[str, str]
    expected: int
    licence: str
    tried: str
    hub: str = ""
    archives: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    second: str = "rows"
    held_out: str = ""
    unanswered: str = ""
    all_files: bool = False
    images: bool = False
    folder: str = ""
    where: str = ""
    map: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    prompt: str = "direct"
    metric: str = "accuracy"
    note: str = ""

    def source(self, file: str, preset: str) -> Source:
        """How the records of one of its files become rows."""
        groups = {f"meta.{name}": column for name, column in self.groups.items()}
        return Source(
            file, format=preset, split="test", map={**groups, **self.map}, values=dict(self.values), where=self.where
        )


# What the last line of a prompt asks for. "direct" suits models of any training; "think" is the training prompt.
PROMPT_NAMES = ("auto", "direct", "think", "short")


def instruction_named(prompt: str, kind: str, meta: Mapping[str, object]) -> str:
    """`row_to_prompt`'s instruction. prompt: "direct", "direct_zh", "think" or "short" (the training prompts), or own
    text."""
    if prompt in ("direct", "direct_zh"):
        return find(kind).prompt(prompt, meta)
    return {"think": "full"}.get(prompt, prompt)


def prompt_hash(prompt: str) -> str:
    """Changes when any wording of this prompt changes."""
    lines = [
        instruction_text(instruction_named(prompt, kind, meta), kind, meta, images=images, language=language)
        for kind in KINDS
        for meta in ({"multi": False}, {"multi": True})
        for images in (True, False)
        for language in ("en", "zh")
    ]
    return hashlib.sha256(json.dumps(lines, ensure_ascii=False).encode()).hexdigest()[:16]


def _table() -> dict[str, Benchmark]:
    import yaml

    told: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    entries: dict[str, Any] = {}
    for name, own in told.items():
        entries[name] = {
            **entries.get(own.get("like", ""), {}),
            **{key: value for key, value in own.items() if key != "like"},
        }
    return {name: _entry(name, **entry) for name, entry in entries.items()}


def _entry(name: str, **told: Any) -> Benchmark:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    return Benchmark(name, **values)


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(_table())


def choose(names: str) -> list[Benchmark]:
    """The entries of "vqa_rad,slake". Raises EvalError with the nearest name for an unknown one."""
    chosen: list[Benchmark] = []
    for name in (part.strip() for part in names.split(",")):
        if name not in BENCHMARKS:
            near = hint(name.lower().replace("-", "_"), BENCHMARKS)
            raise EvalError(f"unknown benchmark {name!r}{near}; `lingshu-rl eval --list` shows all {len(BENCHMARKS)}")
        if name in {b.name for b in chosen}:
            raise EvalError(f"benchmark {name!r} is named twice")
        chosen.append(BENCHMARKS[name])
    return chosen
