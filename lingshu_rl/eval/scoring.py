"""Graded rows and what they come to: accuracy with intervals, by sub-group, with what could not be read counted
apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lingshu_rl.eval.engines import Reply
from lingshu_rl.eval.stats import mean_ci, paired_gain
from lingshu_rl.types import Prompt
from rewards.base import RewardInput, RewardResult

Row = dict[str, Any]
ENGINE_ERROR = "engine_error"  # status of a row without an answer; its value is None, neither right nor wrong
UNREAD = ("unparsed", "conflict", "truncated")  # an answer that names nothing, several things, or was cut off: 0
MAIN = "main"  # the condition that is scored; the others are its controls
GROUPS = tuple(
    "modality organ question_type answer_type language subject step task system source calculator difficulty exam "
    "discipline theme answer".split()
)


def reward_input(prompt: Prompt, reply: Reply) -> RewardInput:
    return prompt.reward_input(reply.text, reply.truncated)


def make_row(prompt: Prompt, reply: Reply, result: RewardResult) -> Row:
    """One graded answer as it is stored. `image`: the cluster of the question, "" for one without an image."""
    return {
        "id": prompt.id,
        "kind": prompt.kind,
        "task": str(prompt.meta.get("task", "")),
        "modality": str(prompt.meta.get("modality", "")),
        "groups": {g: str(prompt.meta[g]) for g in GROUPS if g in prompt.meta and g not in ("task", "modality")},
        "image": cluster_name(prompt),
        "question": prompt.text,
        "options": list(prompt.options),
        "gold": prompt.gold,
        "completion": reply.text,
        "finish_reason": reply.finish_reason,
        "value": None if reply.error else result.value,
        "status": ENGINE_ERROR if reply.error else result.status,
        "parsed": None if reply.error else result.parsed,
        "reason": reply.error or result.reason,
        "components": {} if reply.error else dict(result.components),
    }


def cluster_name(prompt: Prompt) -> str:
    """Questions with the same images, or slices of the same volumes, share it: paths as they are, bytes by their
    hash."""
    return "|".join(dict.fromkeys(picture.file or picture.name for picture in prompt.images))


def score(rows: Sequence[Row]) -> dict[str, Any]:
    """`mean_ci` over the rows' values, with the share of unread answers and the counts of rows without a value.

    A rubric's item may be worth less than 0; its mean is then taken over the raw values and cut at 0 (as HealthBench
    does), which `raw` holds.
    """
    raw = [r.get("raw", r["value"]) for r in rows]
    values = [r["value"] for r in rows]
    out = mean_ci(values, [r["image"] for r in rows])
    if any(v is not None and v < 0 for v in raw):
        kept = [v for v in raw if v is not None]
        out["accuracy"] = max(0.0, sum(kept) / len(kept))
        out["ci95"] = [min(out["ci95"][0], out["accuracy"]), max(out["ci95"][1], out["accuracy"])]
    statuses = Counter(r["status"] for r in rows)
    return {
        **out,
        "errors": statuses[ENGINE_ERROR],
        "unread": sum(statuses[s] for s in UNREAD),
        "statuses": dict(sorted(statuses.items())),
    }


def by_group(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The score of every sub-group of every grouping that splits these rows."""
    out: dict[str, dict[str, Any]] = {}
    for group in ("kind", "modality", *GROUPS):
        names = [group_of(r, group) for r in rows]
        found = sorted(set(names) - {""})
        if len(found) > 1:
            out[group] = {n: score([r for r, own in zip(rows, names, strict=True) if own == n]) for n in found}
    return out


def group_of(row: Row, group: str) -> str:
    return str(row.get(group) or row.get("groups", {}).get(group) or "")


def beats(main: Sequence[Row], control: Sequence[Row]) -> dict[str, Any]:
    """Points that the main condition is above a control, paired by question: `paired_gain` and whether it is above 0.

    beaten: None where no question of both was judged, so that nothing is known.
    """
    old = {r["id"]: r["value"] for r in control}
    gain = paired_gain([old[r["id"]] for r in main], [r["value"] for r in main], [r["image"] for r in main])
    return {**gain, "beaten": gain["ci95"][0] > 0 if gain["n"] else None}


def summarise_conditions(conditions: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The main condition's score and sub-groups, every control's score and by how much the main one is above it."""
    main = conditions[MAIN]
    controls = {name: {**score(rows), "above": beats(main, rows)} for name, rows in conditions.items() if name != MAIN}
    not_beaten = sorted(name for name, found in controls.items() if found["above"]["beaten"] is False)
    return {**score(main), "by": by_group(main), "controls": controls, "not_beaten": not_beaten}
