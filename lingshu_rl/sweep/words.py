"""What a sweep found, in sentences for people and in tables for papers and programs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lingshu_rl.report.text import NBSP, percent, signed
from lingshu_rl.text.markup import as_markdown, table_line

ALPHA = 0.05
CURVES = {
    "reward/mean": "Mean training reward",
    "policy/kl": "KL to the reference (nats a token)",
    "policy/entropy": "Entropy (nats a token)",
    "completion/tokens_mean": "Completion length (tokens)",
    "groups/zero_variance": "Groups of equal rewards",
    "completion/truncated_share": "Truncated completions",
}
LATE_MEANS = {
    "train_reward": "reward/mean",
    "kl": "policy/kl",
    "tokens": "completion/tokens_mean",
    "truncated": "completion/truncated_share",
    "flat_groups": "groups/zero_variance",
}
VERDICTS = {
    "better": "better",
    "worse": "worse",
    "other reward": "different by its own reward",
    "noise": "not told from noise",
    "same": "same answers",
    "none": "not compared",
    "baseline": "baseline",
}


def title(answer: Mapping[str, Any]) -> str:
    """How many changes differ, in a line."""
    changes = [row for row in answer["rows"] if not row["is_baseline"]]
    compared = [row for row in changes if row["difference"] or row["own_difference"]]
    told = sum(row["verdict"] in ("better", "worse", "other reward") for row in compared)
    if not compared:
        return "Nothing can be compared yet"
    one, one_seed = len(compared) == 1, all((r["difference"] or r["own_difference"])["seeds"] == 1 for r in compared)
    if all(row["verdict"] == "same" for row in compared):
        return f"{'The change' if one else 'Every change'} gave the same answers as the baseline"
    with_seed = " with the one seed that was run" if one_seed else ""
    if not told:
        return f"{'The change cannot' if one else 'No change can'} be told from noise{with_seed}"
    seen = f"differ{'s' if told == 1 else ''}{with_seed}" if one_seed else "can be told from noise"
    return f"{'The change' if one else f'{told} of {len(compared)} changes'} {seen}"


def words(answer: Mapping[str, Any]) -> list[str]:
    """The result in sentences: what can be told from noise, what would be needed for the rest, alarms, failures."""
    out = []
    rows = [row for row in answer["rows"] if not row["is_baseline"]]
    compared = [row for row in rows if row["difference"]]
    base = next(row for row in answer["rows"] if row["is_baseline"])
    if base["score"] is not None:
        out.append(
            f"The baseline, {_quoted(base)}, scores {percent(base['score'])} on the held-out questions, "
            f"{_seeds(base['seeds_done'])}."
        )
    if answer["searched"] and compared:
        out.append(
            f"The best of {len(compared)} trials looks better than it is, because it was picked; its corrected p-value "
            f"allows for that, its score does not."
        )
    for row in rows:
        if row["verdict"] in ("better", "worse"):
            found = row["difference"]
            out.append(" ".join([f"{_quoted(row)} is {row['verdict']}: {_points(found)}.", *_unknown(found)]))
    for row in rows:
        own = row["own_difference"]
        if own and visible(own):
            alike = (
                "its answers graded by the baseline's reward differ too"
                if row["verdict"] in ("better", "worse")
                else "its answers graded by the baseline's reward cannot be told apart"
            )
            out.append(f"{_quoted(row)} is different by its own reward: {_points(own)}; {alike}.")
    for row in compared:
        if row["verdict"] == "noise":
            out.append(
                f"{_quoted(row)} cannot be told from noise: {_points(row['difference'])}. {_needs(row['difference'])}"
            )
        elif row["verdict"] == "same":
            out.append(f"{_quoted(row)} gave the same answers as the baseline to every question with every seed.")
    if len(compared) > 1 or (compared and compared[0]["difference"]["seeds"] > 1):
        found = [row["difference"]["smallest_visible"] for row in compared if row["difference"]["smallest_visible"]]
        if found:
            out.append(
                f"With these seeds and questions a true difference of about {statistics.median(found):.1f} points "
                f"would be seen four times in five."
            )
    for row in answer["rows"]:
        if row["alarms"]:
            said = ", ".join(f"{alarm} ({_of(n, row['seeds_read'])})" for alarm, n in row["alarms"].items())
            out.append(f"Alarms in {_quoted(row)}: {said}.")
    for row in answer["rows"]:
        if row["errors"]:
            first = next(iter(row["errors"].values())).split(" (log: ")[0]
            out.append(
                f"{_quoted(row)} failed in {_of(len(row['errors']), row['seeds_planned'])}: {first.rstrip('.')}."
            )
    return out + list(answer["notes"])


def markdown(answer: Mapping[str, Any]) -> str:
    """The words and the table, for a README or an issue."""
    head = [
        "variant",
        "seeds",
        "accuracy",
        "difference",
        "95 % interval",
        "p (Holm)",
        "verdict",
        "train reward",
        "GPU-s" if _gpus(answer) else "wall s",
        "tokens",
        "alarms",
    ]
    lines = [as_markdown(f"# {answer['name']}: {answer['title']}"), ""]
    lines += [as_markdown(answer["question"]), ""] if answer["question"] else []
    lines += [f"* {as_markdown(sentence)}" for sentence in answer["words"]] + [""]
    lines += [table_line(head), "|" + "---|" * len(head)]
    for row in answer["rows"]:
        found = row["difference"] or row["own_difference"] or {}
        cells = [
            row["name"],
            f"{row['seeds_done']}/{row['seeds_planned']}",
            _with_sd(row),
            signed(found["points"]) if found else "",
            f"{signed(found['low'])} to {signed(found['high'])}" if found else "",
            p_text(found["p_corrected"]) if found else "",
            "baseline" if row["is_baseline"] else VERDICTS[row["verdict"]],
            "" if row["train_reward"] is None else f"{row['train_reward']:.3f}",
            f"{row['device_seconds']:,.0f}",
            f"{row['generated_tokens']:,}",
            "; ".join([*row["alarms"], *row["errors"].values()]),
        ]
        lines.append(table_line(cells))
    return "\n".join(lines) + "\n"


def table_csv(answer: Mapping[str, Any]) -> str:
    """One line a variant; shares and rates as numbers, points as numbers."""
    rates = sorted({key for row in answer["rows"] for key in row["rates"]})
    lines = [_csv_line(row, rates) for row in answer["rows"]]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [])
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(row: Mapping[str, Any], rates: Sequence[str]) -> dict[str, Any]:
    found, own = row["difference"] or {}, row["own_difference"] or {}
    return {
        "variant": row["name"],
        "seeds_done": row["seeds_done"],
        "seeds_planned": row["seeds_planned"],
        "accuracy": row["score"],
        "accuracy_sd": row["score_sd"],
        "points": found.get("points"),
        "ci95_low": found.get("low"),
        "ci95_high": found.get("high"),
        "p": found.get("p"),
        "p_corrected": found.get("p_corrected"),
        "verdict": row["verdict"],
        "seeds_needed": found.get("seeds_needed"),
        "own_points": own.get("points"),
        "own_ci95_low": own.get("low"),
        "own_ci95_high": own.get("high"),
        "own_p_corrected": own.get("p_corrected"),
        **{key: row[key] for key in LATE_MEANS},
        **{key: row["rates"].get(key) for key in rates},
        "wall_seconds": row["seconds"],
        "device_seconds": row["device_seconds"],
        "generated_tokens": row["generated_tokens"],
        "alarms": "; ".join(row["alarms"]),
        "errors": "; ".join(row["errors"].values()),
    }


def p_text(p: float) -> str:
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _points(found: Mapping[str, Any]) -> str:
    p = p_text(found["p_corrected"])
    return (
        f"{signed(found['points'])} points (95{NBSP}% interval {signed(found['low'])} to {signed(found['high'])}, "
        f"p{NBSP}{p if found['p_corrected'] < 0.001 else '= ' + p}, "
        f"{_seeds(found['seeds'])}, {found['items']} questions)"
    )


ONE_SEED = "One seed cannot tell a setting's doing from a seed's: run at least three."
ONE_IMAGE = (
    "All questions are about one image, and nobody knows how it is with others: more seeds do not tell, other images "
    "do."
)


def _unknown(found: Mapping[str, Any]) -> list[str]:
    """What these runs say nothing about, whatever they show."""
    return [ONE_SEED] * (found["seeds"] == 1) + [ONE_IMAGE] * (found["clusters"] == 1)


def _needs(found: Mapping[str, Any]) -> str:
    if unknown := _unknown(found):
        return " ".join(unknown)
    if found["points"] == 0:
        return "No number of seeds shows a difference of zero."
    if found["seeds_needed"]:
        return (
            f"If the difference is as large as measured, {found['seeds_needed']} seeds would show it (four times in "
            "five)."
        )
    if found["items_needed"]:
        return (
            f"If the difference is as large as measured, more seeds alone would not show it: it takes about "
            f"{found['items_needed']:,} test questions."
        )
    return "A difference as small as measured would need more than 100 seeds."


def _quoted(row: Mapping[str, Any]) -> str:
    return f"“{row['name']}”"


def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n != 1 else ''}"


def _of(n: int, total: int) -> str:
    return f"{n} of {total} run{'s' if total != 1 else ''}"


def _gpus(answer: Mapping[str, Any]) -> bool:
    return any("cuda" in devices for row in answer["rows"] for devices in row["devices"])


def _with_sd(row: Mapping[str, Any]) -> str:
    if row["score"] is None:
        return "–"
    return percent(row["score"]) + (f" ± {100 * row['score_sd']:.1f}" if row["score_sd"] is not None else "")


def visible(found: Mapping[str, Any]) -> bool:
    return found["p_corrected"] <= ALPHA
