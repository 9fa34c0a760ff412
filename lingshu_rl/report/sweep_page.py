"""The page of a sweep: what `sweep.answer.compare` found, as tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lingshu_rl.report import plots
from lingshu_rl.report.monitor import NAMES as RATES
from lingshu_rl.report.page import render as render_page

Answer = Mapping[str, Any]

LATE = {
    "kl": ("KL", "short"),
    "tokens": ("Tokens", "short"),
    "truncated": ("Truncated", "pct"),
    "flat_groups": ("Flat groups", "pct"),
}
SHOWN_RATES = tuple("unparsed conflict format_right_answer_wrong duplicates letter_entropy length_correlation".split())
PERCENT = ("groups/zero_variance", "completion/truncated_share")
MOST_CURVES = 8  # more lines than colours cannot be told apart


def render(answer: Answer) -> str:
    """The HTML page."""
    from lingshu_rl.sweep.words import CURVES, VERDICTS, p_text

    differences = [row[key] for row in answer["rows"] for key in ("difference", "own_difference") if row[key]]
    reach = max(
        (
            abs(v)
            for d in [*differences, *answer["axis_effects"]]
            for v in (d["low"], d["high"], *d["by_seed"].values())
        ),
        default=1.0,
    )
    return render_page(
        "sweep.html",
        answer=answer,
        reach=(marks := plots.ticks(0.0, min(100.0, reach)))[-1],
        half=plots.short(marks[-1]),
        difference_plot=plots.difference_plot,
        verdicts=VERDICTS,
        p_text=p_text,
        curves=curve_figures(answer, CURVES),
        axes=axis_figures(answer),
        changes=change_text,
        late=LATE,
        rates={key: RATES[key] for key in SHOWN_RATES if any(key in row["rates"] for row in answer["rows"])},
        gpu=any("cuda" in devices for row in answer["rows"] for devices in row["devices"]),
    )


def change_text(row: Mapping[str, Any]) -> str:
    """The settings in which a variant differs, in a line."""
    return ", ".join(
        f"{key}={value if value is not None else '(as in the base)'}" for key, value in row["changes"].items()
    )


def curve_figures(answer: Answer, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """One figure a metric. With many variants: the baseline and those with the best final scores."""
    rows = sorted(answer["rows"], key=lambda r: (not r["is_baseline"], -(r["score"] if r["score"] is not None else -1)))
    chosen = {row["name"] for row in rows[:MOST_CURVES]}
    shown = [row["name"] for row in answer["rows"] if row["name"] in chosen]
    figures = []
    for key, title in titles.items():
        all_curves = answer["curves"].get(key, {})
        curves = {name: all_curves[name] for name in shown if name in all_curves}
        if curves and any(any(c["high"]) or any(c["low"]) for c in curves.values()):
            svg = plots.band_chart(curves, percent=key in PERCENT)
            figures.append({"title": title, "legend": list(curves), "svg": svg})
    return figures


def axis_figures(answer: Answer) -> list[dict[str, Any]]:
    """Final score over each axis; the other axis, if there is exactly one, makes the lines."""
    figures = []
    for axis, labels in answer["axes"].items():
        if axis == "variant" and len(answer["axes"]) == 1:
            continue  # the table says it all
        others = [a for a in answer["axes"] if a != axis]
        series: dict[str, list[list[float]]] = {}
        for row in answer["rows"]:
            name = f"{_short(others[0])}={row['point'][others[0]]}" if len(others) == 1 else "all runs"
            lists = series.setdefault(name, [[] for _ in labels])
            lists[labels.index(row["point"][axis])] += [v for v in row["score_by_seed"].values() if v is not None]
        if any(values for lists in series.values() for values in lists):
            legend: Sequence[str] = list(series) if len(series) > 1 else []
            figures.append(
                {"title": f"Final accuracy over {axis}", "legend": legend, "svg": plots.axis_plot(labels, series)}
            )
    return figures


def _short(axis: str) -> str:
    return axis.rsplit(".", 1)[-1]
