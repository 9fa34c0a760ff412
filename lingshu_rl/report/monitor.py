"""Signs that a policy learns to please the reward instead of answering: rates over a step's completions.

They are read from the stored rollouts, so they cost training nothing and can be had for old runs.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

NAMES = {
    "unparsed": "answers that could not be read",
    "conflict": "answers that contradict themselves",
    "format_right_answer_wrong": "right format, wrong answer",
    "duplicates": "completions that repeat another of their group",
    "letter_entropy": "entropy of the letters chosen (bits)",
    "gold_entropy": "entropy of the right letters (bits)",
    "length_correlation": "correlation of length and reward within a group",
    "all_right": "questions with all completions right",
    "all_wrong": "questions with all completions wrong",
}


def monitors(rows: Sequence[Row]) -> dict[str, float]:
    """Rates over completions (rollout rows of one or more steps); what these rows cannot tell is left out.

    unparsed, conflict: shares of all completions. format_right_answer_wrong: share with a well-formed answer (the
    `format` part at 0.5 or more; without such a part, an answer that was read) and a reward under 0.5.
    duplicates: share of completions whose text another one before it in the group has. letter_entropy: of the letters
    chosen to option questions, in bits. length_correlation: Pearson's, with both centred within the group.
    all_right, all_wrong: shares of groups whose judged rewards are all at least, or all below, 0.5.
    """
    if not rows:
        return {}
    out = {status: sum(r["status"] == status for r in rows) / len(rows) for status in ("unparsed", "conflict")}
    judged = [r for r in rows if r["value"] is not None]
    if judged:
        out["format_right_answer_wrong"] = sum(_well_formed(r) and r["value"] < 0.5 for r in judged) / len(judged)
    groups = grouped(rows)
    many = [group for group in groups if len(group) > 1]
    if many:
        out["duplicates"] = 1 - sum(_distinct(group) for group in many) / sum(map(len, many))
        values = [[r["value"] for r in group if r["value"] is not None] for group in many]
        values = [v for v in values if v]
        if values:
            out["all_right"] = sum(min(v) >= 0.5 for v in values) / len(values)
            out["all_wrong"] = sum(max(v) < 0.5 for v in values) / len(values)
        if (correlation := _length_correlation(many)) is not None:
            out["length_correlation"] = correlation
    options = [r for r in rows if r["kind"] == "option"]
    if letters := given(options):
        out["letter_entropy"] = entropy(letters)
        out["gold_entropy"] = entropy([plain(r["gold"]) for r in options])
    return out


def reward_by_length(rows: Sequence[Row], parts: int = 4) -> list[dict[str, float]]:
    """Judged completions in `parts` equally large parts by length: tokens from and to, how many, mean reward.

    Equal lengths stay together, so parts may be fewer. Empty when lengths are unknown.
    """
    pairs = sorted((r["tokens"], r["value"]) for r in rows if r.get("tokens") is not None and r["value"] is not None)
    out: list[list[tuple[int, float]]] = []
    for i, pair in enumerate(pairs):
        wanted = i * parts // len(pairs)
        if not out or (wanted >= len(out) and pair[0] != out[-1][-1][0]):
            out.append([])
        out[-1].append(pair)
    return [
        {"from": part[0][0], "to": part[-1][0], "n": len(part), "reward": sum(v for _, v in part) / len(part)}
        for part in out
    ]


def entropy(items: Iterable[Any]) -> float:
    """Of the items' frequencies, in bits."""
    counts = Counter(items)
    total = counts.total()
    return -sum(n / total * math.log2(n / total) for n in counts.values()) + 0.0


def given(rows: Iterable[Row]) -> list[str]:
    """The answers that were read, as plain text. A reward need not tell what it read: such a row gives none."""
    read = (plain(row.get("parsed")) for row in rows if row.get("status") == "ok")
    return [answer for answer in read if answer not in ("none", "null", "")]


def plain(parsed: Any) -> str:
    """Parquet holds the parsed answer as JSON text, evaluation rows as a value: both become plain lower-case text."""
    return str(parsed).strip().strip('"').strip().lower()


def parsed_of(row: Row) -> Any:
    """What was read in an answer, as a value; None where parquet's text of it is damaged."""
    parsed = row.get("parsed")
    try:
        return json.loads(parsed) if isinstance(parsed, str) else parsed
    except ValueError:
        return None


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Completions by question and step; a row that names no question is in no group."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if (name := row.get("prompt_id", row.get("id"))) is not None:
            groups[row.get("step"), name].append(row)
    return list(groups.values())


def _distinct(group: Sequence[Row]) -> int:
    return len({" ".join(str(r["completion"]).split()) for r in group})


def _well_formed(row: Row) -> bool:
    components = row.get("components") or {}
    if isinstance(components, str):
        components = json.loads(components)
    shape = [v for name, v in components.items() if name == "format" and v is not None]
    return shape[0] >= 0.5 if shape else row["status"] == "ok"


def _length_correlation(groups: Sequence[Sequence[Row]]) -> float | None:
    lengths, rewards = [], []
    for group in groups:
        own = [(r["tokens"], r["value"]) for r in group if r.get("tokens") is not None and r["value"] is not None]
        if len(own) > 1:
            n, v = np.array(own, float).T
            lengths.append(n - n.mean())
            rewards.append(v - v.mean())
    if not lengths:
        return None
    a, b = np.concatenate(lengths), np.concatenate(rewards)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else None
