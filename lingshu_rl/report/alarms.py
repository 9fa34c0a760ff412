"""What can go wrong in an RL run while its reward still rises, looked for in what the run wrote, and said in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from lingshu_rl.eval.stats import gain_between
from lingshu_rl.report.monitor import given, monitors, parsed_of, plain
from rewards.kinds import find_or_plain

Row = Mapping[str, Any]

LENGTH_RATIO = 1.5  # mean completion length, late over early steps (or early over late)
SHARE_LIMITS = {  # mean over the late steps
    "completion/truncated_share": (0.10, "Truncated answers", "completions were cut off at the token limit"),
    "groups/zero_variance": (0.80, "Groups without contrast", "groups had equal rewards throughout and taught nothing"),
}
UNPARSED_SHARE, MASKED_SHARE = 0.10, 0.05
COLLAPSE_SHARE, COLLAPSE_EXCESS, COLLAPSE_ROWS = 0.60, 0.20, 20
KL_SPIKE_RATIO, KL_SPIKE_FLOOR, KL_SPIKE_STEPS = 5.0, 0.05, 10  # against the median of so many steps before; nats
BLANK_POINTS = 5.0
DUPLICATE_SHARE, CONFLICT_SHARE = 0.90, 0.10  # of the last steps' completions
LENGTH_CORRELATION, LENGTH_ROWS = 0.5, 100  # within groups
RUBRIC_LAG = 0.10  # by which the unpaid criteria of a rubric may fall behind the paid ones over the run
FLAT_STEPS = 2  # a reward that never moves over at least so many steps


@dataclass(frozen=True)
class Alarm:
    name: str
    text: str


def find_alarms(
    metrics: Sequence[Row], evals: Mapping[str, Sequence[Row]], late_rollouts: Sequence[Row]
) -> list[Alarm]:
    """Alarms of one run, empty when there are none.

    metrics: one mapping a step. evals: graded rows by evaluation name (`after`, `after_blank`, ...).
    late_rollouts: completions of the last steps (kind, gold, parsed, status, value).
    """
    found = [
        *_not_finite(metrics),
        *_disagreement(metrics),
        *_refused(metrics),
        *_flat(metrics),
        *_length_drift(metrics),
        *_kl_spikes(metrics),
        *_rubric(metrics),
    ]
    found += [*_late_shares(metrics), *_gaming(late_rollouts)]
    for where, rows in (("the final evaluation", evals.get("after", ())), ("the last training steps", late_rollouts)):
        found += [*_unreadable(rows, where), *_collapse(rows, where), *_doubts(rows, where)]
    return found + _blind(evals)


def _late(metrics: Sequence[Row]) -> Sequence[Row]:
    return metrics[-max(5, len(metrics) // 10) :]


def _values(metrics: Sequence[Row], key: str) -> list[float]:
    return [m[key] for m in metrics if isinstance(m.get(key), int | float) and math.isfinite(m[key])]


def _not_finite(metrics: Sequence[Row]) -> list[Alarm]:
    bad = [
        f"{key} at step {m.get('step')}"
        for m in metrics
        for key, value in m.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return [Alarm("Values that are no numbers", f"{', '.join(bad[:3])}{more}.")] if bad else []


def _disagreement(metrics: Sequence[Row]) -> list[Alarm]:
    """Trainer and engine saw different tokens, images or weights: the steps, and the latest in the run's own words."""
    told = [m for m in metrics if m.get("disagreement")]
    if not told:
        return []
    text = f"{len(told)} of {len(metrics)} steps. The latest: {told[-1]['disagreement']}."
    return [Alarm("Trainer and engine disagree", text)]


def _refused(metrics: Sequence[Row]) -> list[Alarm]:
    """Prompts that the run went without."""
    refused = [(m["step"], reason) for m in metrics for reason in (m.get("refused") or {}).values()]
    if not refused:
        return []
    step, reason = refused[-1]
    return [Alarm("Prompts set aside", f"{len(refused)} so far. The latest, in step {step}: {reason}.")]


def _flat(metrics: Sequence[Row]) -> list[Alarm]:
    """Every completion of every step earned the same: the reward is broken or the task is solved or hopeless."""
    means, spreads = _values(metrics, "reward/mean"), _values(metrics, "reward/std")
    if len(means) < FLAT_STEPS or len(spreads) < len(means) or max(spreads) > 0 or max(means) > min(means):
        return []
    text = f"All completions of all {len(means)} steps earned {means[0]:.2f}: there is nothing to learn from. "
    return [Alarm("Constant reward", text + "Try the reward alone with `lingshu-rl rewards check`.")]


def _gaming(rows: Sequence[Row]) -> list[Alarm]:
    """What the last steps' completions say (see `monitors`)."""
    found, rates = [], monitors(rows)
    if rates.get("duplicates", 0) > DUPLICATE_SHARE:
        text = f"{_percent(rates['duplicates'])} of the last steps' completions repeat another of their group "
        found.append(
            Alarm("Repeated completions", text + f"(limit {_percent(DUPLICATE_SHARE)}): sampling explores little.")
        )
    if rates.get("conflict", 0) > CONFLICT_SHARE:
        text = f"{_percent(rates['conflict'])} of the last steps' completions give two different answers "
        found.append(Alarm("Conflicting answers", text + f"(limit {_percent(CONFLICT_SHARE)})."))
    tie = rates.get("length_correlation", 0.0)
    if abs(tie) > LENGTH_CORRELATION and len(rows) >= LENGTH_ROWS:
        more = "longer" if tie > 0 else "shorter"
        text = f"Within a group {more} completions earn more (correlation {tie:+.2f} in the last steps)"
        found.append(Alarm("Reward follows length", text + ": does the reward pay for length?"))
    return found


def _length_drift(metrics: Sequence[Row]) -> list[Alarm]:
    lengths = _values(metrics, "completion/tokens_mean")
    if len(lengths) < 10:
        return []
    share = max(5, len(lengths) // 10)
    early, late = mean(lengths[:share]), mean(lengths[-share:])
    if min(early, late) <= 0 or 1 / LENGTH_RATIO <= late / early <= LENGTH_RATIO:
        return []
    way = "grew" if late > early else "shrank"
    text = f"Completions {way} from {early:.0f} to {late:.0f} tokens on average: does the reward pay for length?"
    return [Alarm("Length drift", text)]


def _kl_spikes(metrics: Sequence[Row]) -> list[Alarm]:
    points = [(m["step"], m["policy/kl"]) for m in metrics if _values([m], "policy/kl")]
    spikes = []
    for i in range(5, len(points)):
        before = [kl for _, kl in points[max(0, i - KL_SPIKE_STEPS) : i]]
        if points[i][1] > max(KL_SPIKE_FLOOR, KL_SPIKE_RATIO * median(before)):
            spikes.append((*points[i], f"{median(before):.3g}, the median of the {len(before)} steps before it"))
    if not spikes:
        return []
    step, kl, usual = max(spikes, key=lambda spike: spike[1])
    steps = ", ".join(str(spike[0]) for spike in spikes[:5]) + (" ..." if len(spikes) > 5 else "")
    return [Alarm("KL spikes", f"Step {steps}: at step {step} the KL was {kl:.3g} nats, against {usual}.")]


def _rubric(metrics: Sequence[Row]) -> list[Alarm]:
    """The criteria of a rubric that are paid rise, those that were held out do not (see
    `rewards.judge.RubricReward`)."""
    found = []
    for key in sorted({key for m in metrics for key in m if key.endswith("/held_out")}):
        paid, other = _values(metrics, key.removesuffix("held_out") + "paid"), _values(metrics, key)
        if len(other) < 10 or len(paid) != len(other):
            continue
        share = max(5, len(other) // 10)
        rise, other_rise = (mean(values[-share:]) - mean(values[:share]) for values in (paid, other))
        if rise > 0 and rise - other_rise > RUBRIC_LAG:
            text = f"The paid criteria rose by {rise:.2f}, those held out by {other_rise:+.2f} ({key})"
            found.append(Alarm("Rubric learnt by heart", text + ": the policy pleases the rubric, not the task."))
    return found


def _late_shares(metrics: Sequence[Row]) -> list[Alarm]:
    late, found = _late(metrics), []
    for key, (limit, name, what) in SHARE_LIMITS.items():
        values = _values(late, key)
        if values and mean(values) > limit:
            found.append(
                Alarm(
                    name, f"{_percent(mean(values))} of {what} in the last {len(late)} steps (limit {_percent(limit)})."
                )
            )
    return found


def _unreadable(rows: Sequence[Row], where: str) -> list[Alarm]:
    found, total = [], max(1, len(rows))
    unparsed = sum(row.get("status") == "unparsed" for row in rows) / total
    masked = sum(row.get("value") is None for row in rows) / total
    if unparsed > UNPARSED_SHARE:
        text = f"In {where} {_percent(unparsed)} of the answers could not be read (limit {_percent(UNPARSED_SHARE)})."
        found.append(Alarm("Parse failures", text))
    if masked > MASKED_SHARE:
        text = f"In {where} {_percent(masked)} of the answers could not be judged (limit {_percent(MASKED_SHARE)})."
        found.append(Alarm("Masked samples", text))
    return found


def _collapse(rows: Sequence[Row], where: str) -> list[Alarm]:
    """One answer given most of the time, to questions whose right answers are spread."""
    found = []
    for kind in sorted({str(row.get("kind")) for row in rows if find_or_plain(str(row.get("kind"))).collapse}):
        mine = [row for row in rows if row.get("kind") == kind]
        answers = given(mine)
        if len(answers) < COLLAPSE_ROWS:
            continue
        answer, count = Counter(answers).most_common(1)[0]
        share, gold = count / len(answers), sum(plain(row.get("gold")) == answer for row in mine) / len(mine)
        if share > COLLAPSE_SHARE and share > gold + COLLAPSE_EXCESS:
            text = f"In {where} {_percent(share)} of the {kind} answers are “{answer.upper()}”, "
            text += f"which is right for {_percent(gold)} of them."
            found.append(Alarm(find_or_plain(kind).collapse, text))
    return found


def _doubts(rows: Sequence[Row], where: str) -> list[Alarm]:
    """What a kind finds odd about many answers together, such as numbers in another scale than was asked for."""
    found = []
    for name in sorted({str(row.get("kind")) for row in rows}):
        parsed = [parsed_of(row) for row in rows if str(row.get("kind")) == name]
        found += [Alarm("Odd answers", f"In {where}: {doubt}.") for doubt in find_or_plain(name).doubts(parsed)]
    return found


def _blind(evals: Mapping[str, Sequence[Row]]) -> list[Alarm]:
    if not evals.get("after") or not evals.get("after_blank"):
        return []
    sight = gain_between(evals["after_blank"], evals["after"])
    if sight["points"] is None or (sight["points"] >= BLANK_POINTS and sight["ci95"][0] > 0):
        return []
    low, high = sight["ci95"]
    text = (
        f"With a blank image the trained policy loses only {sight['points']:.1f} points "
        f"(95 % interval {low:.1f} to {high:.1f}): it answers mostly without looking."
    )
    return [Alarm("Answers without looking", text)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
