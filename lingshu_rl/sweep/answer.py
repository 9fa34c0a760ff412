"""Did it matter? Every variant against the baseline, paired over seeds and test questions, in one structure and in
words.

`compare` reads run folders and returns plain data (the content of sweep.json); `write_answers` also writes the table as
markdown, CSV and HTML. Points are hundredths of accuracy.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.data.sources import is_demo
from lingshu_rl.eval.seeds import Difference, aligned, difference, items_needed, seeds_needed, smallest_visible
from lingshu_rl.eval.stats import holm
from lingshu_rl.report.alarms import find_alarms
from lingshu_rl.report.html import RunData, load_run
from lingshu_rl.report.monitor import monitors
from lingshu_rl.report.plots import finite
from lingshu_rl.storage.runfolder import write_text
from lingshu_rl.sweep import status as states
from lingshu_rl.sweep.plan import Sweep, Variant, differences
from lingshu_rl.sweep.search import all_variants
from lingshu_rl.sweep.status import Status
from lingshu_rl.sweep.words import ALPHA, CURVES, LATE_MEANS, markdown, table_csv, title, visible, words

Values = dict[str, float | None]  # by question


@dataclass
class Member:
    """One run of a variant, as far as it has come."""

    variant: Variant
    seed: int
    folder: Path
    status: Status
    data: RunData | None = None
    values: Values = field(default_factory=dict)  # graded alike for all runs
    own: Values = field(default_factory=dict)  # by the reward it was trained with
    alarms: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.status.state == "done" and bool(self.own)


def write_answers(sweep: Sweep) -> dict[str, Any]:
    """Write sweep.json, table.md, table.csv and sweep.html into the sweep's folder; returns what sweep.json holds."""
    variants = all_variants(sweep)
    members = [
        Member(v, run.seed, run.folder, states.read(sweep.folder, run)) for v in variants for run in sweep.runs_of(v)
    ]
    return write_comparison(
        members,
        sweep.baseline,
        sweep.folder,
        name=sweep.name,
        question=sweep.question,
        axes=sweep.axes,
        searched=sweep.search is not None,
    )


def write_comparison(
    members: Sequence[Member],
    baseline: str,
    folder: Path,
    *,
    name: str,
    question: str = "",
    axes: Mapping[str, Sequence[str]] | None = None,
    searched: bool = False,
    stem: str = "sweep",
) -> dict[str, Any]:
    from lingshu_rl.report.sweep_page import render

    answer = compare(members, baseline, name=name, question=question, axes=axes or {}, searched=searched)
    table = "table" if stem == "sweep" else f"{stem}-table"
    write_text(folder / f"{stem}.json", json.dumps(answer, indent=1))
    write_text(folder / f"{table}.md", markdown(answer))
    write_text(folder / f"{table}.csv", table_csv(answer))
    write_text(folder / f"{stem}.html", render(answer))
    return answer


def compare(
    members: Sequence[Member],
    baseline: str,
    *,
    name: str = "",
    question: str = "",
    axes: Mapping[str, Sequence[str]] | None = None,
    searched: bool = False,
) -> dict[str, Any]:
    """Everything a reader wants of these runs. `baseline`: the variant that the others are held against."""
    for member in members:
        _read(member)
    by_variant: dict[str, list[Member]] = {}
    for member in members:
        by_variant.setdefault(member.variant.name, []).append(member)
    base = by_variant[baseline]
    notes, regraded = _grade_alike(members, base)
    images = {row["id"]: row.get("image") for m in members if m.data for row in m.data.evals.get("after", ())}
    rows = [_row(group, base, images, regraded, is_base=name_ == baseline) for name_, group in by_variant.items()]
    for key in ("difference", "own_difference"):
        compared = [row for row in rows if row[key]]
        for row, p in zip(compared, holm([row[key]["p"] for row in compared]), strict=True):
            row[key]["p_corrected"] = p
        alpha = ALPHA / max(1, len(compared))
        for row in compared:
            _judge(row[key], alpha)
    for row in rows:
        row["verdict"] = _verdict(row)
    if searched:
        rows = rows[:1] + sorted(rows[1:], key=lambda row: -(row["score"] if row["score"] is not None else -1.0))
    effects = _axis_effects(by_variant, axes or {}, base[0].variant, images)
    answer = {
        "name": name,
        "question": question,
        "baseline": baseline,
        "searched": searched,
        "seeds": sorted({m.seed for m in members}),
        "regraded": regraded,
        "rows": rows,
        "axes": {axis: list(labels) for axis, labels in (axes or {}).items()},
        "axis_effects": effects,
        "curves": _curves(by_variant),
        "notes": notes,
        "runs": [_run_row(m) for m in members],
    }
    return {"title": title(answer), "words": words(answer), **answer}


def _read(member: Member) -> None:
    """Load the run folder, as far as it is there."""
    try:
        member.data = data = load_run(member.folder, scores=False)
    except FileNotFoundError:
        return
    member.own = member.values = {row["id"]: row["value"] for row in data.evals.get("after", ())}
    member.alarms = [alarm.name for alarm in find_alarms(data.metrics, data.evals, data.late)]
    member.rates = monitors(data.late)


def _row(
    group: Sequence[Member], base: Sequence[Member], images: Mapping[str, Any], regraded: bool, *, is_base: bool
) -> dict[str, Any]:
    done = [m for m in group if m.done]
    scores = [score for m in done if (score := _mean(m.values.values())) is not None]
    own = [score for m in done if (score := _mean(m.own.values())) is not None]
    changed = regraded and not is_base and _spec(group) != _spec(base)
    read = [m for m in group if m.data is not None]
    rates = {key: [m.rates[key] for m in done if key in m.rates] for m in done for key in m.rates}
    late = {name: _mean([_late(m.data, key) for m in done if m.data]) for name, key in LATE_MEANS.items()}
    return {
        "name": group[0].variant.name,
        "settings": group[0].variant.settings,
        "changes": differences(group[0].variant, base[0].variant),
        "point": group[0].variant.point,
        "is_baseline": is_base,
        "seeds_planned": len(group),
        "seeds_done": len(done),
        "seeds_read": len(read),
        "score": _mean(scores),
        "score_sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "score_by_seed": {m.seed: _mean(m.values.values()) for m in done},
        "own_score": _mean(own) if changed else None,
        "difference": None if is_base else _difference(base, group, images, "values"),
        "own_difference": _difference(base, group, images, "own") if changed else None,
        **late,
        "rates": {key: statistics.fmean(values) for key, values in sorted(rates.items())},
        "alarms": dict(Counter(alarm for m in read for alarm in dict.fromkeys(m.alarms)).most_common()),
        "errors": {m.seed: m.status.error for m in group if m.status.state == "failed"},
        "pruned": {m.seed: m.status.error for m in group if m.status.state == "pruned"},
        "seconds": round(sum(m.status.seconds for m in group), 1),
        "device_seconds": round(sum(m.status.seconds * m.status.device_count for m in group), 1),
        "devices": sorted({m.status.devices for m in group if m.status.devices}),
        "generated_tokens": int(sum(x.get("tokens/generated", 0) for m in read if m.data for x in m.data.metrics)),
    }


def _difference(
    base: Sequence[Member], group: Sequence[Member], images: Mapping[str, Any], which: str
) -> dict[str, Any] | None:
    """Variant minus baseline over the seeds and questions that both have; None when there are none."""
    one, other = ({m.seed: getattr(m, which) for m in side if m.done} for side in (base, group))
    return _measured(one, other, images)


def _measured(
    one: Mapping[int, Values], other: Mapping[int, Values], images: Mapping[str, Any]
) -> dict[str, Any] | None:
    seeds, items, d, left_out = aligned(one, other)
    if not d.size:
        return None
    found = difference(d, [images.get(i) for i in items], alpha=ALPHA, bound=1.0)
    return {
        "points": 100 * found.mean,
        "low": 100 * found.low,
        "high": 100 * found.high,
        "p": found.p,
        "p_corrected": found.p,
        "seeds": len(seeds),
        "items": len(items),
        "clusters": found.clusters,
        "left_out": left_out,
        "by_seed": {s: 100 * float(row.mean()) for s, row in zip(seeds, d, strict=True)},
        "identical": bool((d == 0).all()),
        "found": asdict(found),
    }


def _judge(measured: dict[str, Any], alpha: float) -> None:
    """What would be needed to see a difference of this size at the corrected level."""
    found = Difference(**measured.pop("found"))
    least = smallest_visible(found, alpha=alpha)
    measured["seeds_needed"] = seeds_needed(found, alpha=alpha)
    measured["items_needed"] = items_needed(found, alpha=alpha)
    measured["smallest_visible"] = None if least is None or measured["identical"] else 100 * least


def _verdict(row: Mapping[str, Any]) -> str:
    if row["is_baseline"]:
        return "baseline"
    found, own = row["difference"], row["own_difference"]
    if found and visible(found):
        return "better" if found["points"] > 0 else "worse"
    if own and visible(own):
        return "other reward"
    if not found:
        return "none"
    return "same" if found["identical"] else "noise"


def _axis_effects(
    by_variant: Mapping[str, Sequence[Member]],
    axes: Mapping[str, Sequence[str]],
    base: Variant,
    images: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Each value of an axis against the baseline's, averaged over all places of the other axes (grids of two or
    more)."""
    if len(axes) < 2:
        return []
    place = {tuple(group[0].variant.point.values()): group for group in by_variant.values()}
    effects = []
    for n, (axis, labels) in enumerate(axes.items()):
        for label in labels:
            if label == base.point[axis]:
                continue
            pairs = [
                (place[(*at[:n], base.point[axis], *at[n + 1 :])], group)
                for at, group in place.items()
                if at[n] == label
            ]
            found = _measured(_averaged([p[0] for p in pairs]), _averaged([p[1] for p in pairs]), images)
            if found:
                effects.append(
                    {"axis": axis, "label": label, "against": base.point[axis], "places": len(pairs), **found}
                )
    for effect, p in zip(effects, holm([e["p"] for e in effects]), strict=True):
        effect["p_corrected"] = p
    for effect in effects:
        _judge(effect, ALPHA / len(effects))
    return effects


def _averaged(groups: Sequence[Sequence[Member]]) -> dict[int, Values]:
    """Mean value by seed and question over variants; None where one of them could not be judged."""
    by_seed = [{m.seed: m.values for m in group if m.done} for group in groups]
    out: dict[int, Values] = {}
    for seed in set.intersection(*(set(runs) for runs in by_seed)):
        runs = [r[seed] for r in by_seed]
        out[seed] = {i: _mean_of_all([r.get(i) for r in runs]) for i in runs[0]}
    return out


def _grade_alike(members: Sequence[Member], base: Sequence[Member]) -> tuple[list[str], bool]:
    """Where rewards differ between variants, grade all held-out answers with the baseline's: (notes, was it done)."""
    specs = {name: _spec([m]) for m in members if m.data is not None for name in [m.variant.name]}
    theirs = _spec(base)
    if theirs is None or all(spec == theirs for spec in specs.values()):
        return [], False
    grader = next(m.data for m in base if m.data is not None)
    assert grader is not None
    try:
        for member in members:
            if member.data is not None and _spec([member]) != theirs:
                member.values = regrade(member.data, grader.config)
    except Exception as error:
        for member in members:
            member.values = member.own
        return [
            f"The rewards differ between variants, and grading all answers alike failed ({type(error).__name__}: "
            f"{error}); accuracies here are each by its own reward."
        ], False
    return ["Variants were trained with different rewards; accuracies are by the baseline's reward for all."], True


def regrade(data: RunData, config: Mapping[str, Any]) -> Values:
    """A run's held-out answers by the rewards of another run's config. Raises when its test set cannot be loaded."""
    from lingshu_rl.planning.given import load_config
    from lingshu_rl.rewarding import instruction_of, read_of, reward_of

    theirs = load_config(
        None, [f"{key}={json.dumps(config[key])}" for key in ("model", "data", "rewards") if key in config]
    )
    prompts = _prompts(theirs.data.test, instruction_of(theirs), theirs.data.skip_bad_rows)
    answered = data.evals.get("after", [])
    rows = [row for row in answered if row["id"] in prompts]
    if answered and not rows:
        raise ValueError(f"none of its {len(answered)} questions is in {theirs.data.test}")
    graded = reward_of(theirs.rewards.spec, theirs.data.train, theirs.data.test, read=read_of(theirs)).score_batch(
        [prompts[row["id"]].reward_input(row["completion"], row.get("finish_reason") == "length") for row in rows]
    )
    return {row["id"]: result.value for row, result in zip(rows, graded, strict=True)}


_loaded: dict[str, Any] = {}  # test prompts by id: a sweep grades after every run


def _prompts(source: Any, instruction: str, skip_bad_rows: bool) -> Any:
    from lingshu_rl.data.load import load
    from rewards.rows import unchecked

    key = json.dumps([source, instruction, skip_bad_rows])
    if key not in _loaded:
        # The run whose answers are graded has checked the labels with its own reward.
        prompts = load(source, instruction=instruction, skip_bad_rows=skip_bad_rows, check=unchecked).prompts
        _loaded[key] = {p.id: p for p in prompts}
    return _loaded[key]


def _spec(group: Sequence[Member]) -> Any:
    """The reward a variant was trained with, as the run's own resolved config has it."""
    for m in group:
        if m.data is not None and m.data.config:
            spec = (m.data.config.get("rewards") or {}).get("spec")
            train = (m.data.config.get("data") or {}).get("train", "")
            return (
                json.dumps(spec, sort_keys=True) if spec else f"default for {'the demo' if is_demo(train) else 'data'}"
            )
    return None


def _curves(by_variant: Mapping[str, Sequence[Member]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Metric -> variant -> {step, mean, low, high} over the seeds that have logged the step."""
    out: dict[str, dict[str, dict[str, list[float]]]] = {}
    for key in CURVES:
        for name, group in by_variant.items():
            steps: dict[int, list[float]] = {}
            for member in group:
                for row in member.data.metrics if member.data else ():
                    if (value := finite(row.get(key))) is not None:
                        steps.setdefault(row["step"], []).append(value)
            if steps:
                at = sorted(steps)
                out.setdefault(key, {})[name] = {
                    "step": [float(s) for s in at],
                    "mean": [statistics.fmean(steps[s]) for s in at],
                    "low": [min(steps[s]) for s in at],
                    "high": [max(steps[s]) for s in at],
                }
    return out


def _run_row(member: Member) -> dict[str, Any]:
    return {
        "variant": member.variant.name,
        "seed": member.seed,
        "folder": str(member.folder),
        **{key: getattr(member.status, key) for key in ("state", "error", "seconds", "devices", "attempts")},
        "score": _mean(member.values.values()) if member.done else None,
        "alarms": member.alarms,
    }


def _late(data: RunData, key: str) -> float | None:
    """Mean over the last tenth of the steps, at least five."""
    rows = data.metrics[-max(5, len(data.metrics) // 10) :]
    return _mean([finite(row.get(key)) for row in rows])


def _mean(values: Any) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
