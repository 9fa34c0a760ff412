"""What became of the rows: a table for people, JSON for machines, a picture of the funnel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingshu_rl.curate.items import REASONS
from lingshu_rl.text.markup import as_markdown, table_line


def funnel_table(steps: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row a step with what came in, what stayed and why the rest went."""
    lines = ["| step | in | kept | dropped | reasons |", "|---|--:|--:|--:|---|"]
    for step in steps:
        reasons = ", ".join(f"{name} {n:,}" for name, n in sorted(step["reasons"].items(), key=lambda pair: -pair[1]))
        counts = (f"{step[key]:,}" for key in ("in", "kept", "dropped"))
        lines.append(table_line([step["step"], *counts, reasons]))
    return "\n".join(lines)


def report_text(report: Mapping[str, Any]) -> str:
    """The page beside the rows."""
    lines = [
        "# Curation",
        "",
        funnel_table(report["steps"]),
        "",
        "Every dropped row stands in `dropped/` with its reason code:",
        "",
    ]
    used = sorted({reason for step in report["steps"] for reason in step["reasons"]})
    lines += [f"* `{name}`: {REASONS[name]}" for name in used] or ["* nothing was dropped"]
    lines += ["", "| source | read | left | kept |", "|---|--:|--:|--:|"]
    for name, counts in report["sources"].items():
        share = counts["left"] / counts["read"] if counts["read"] else 0.0
        lines.append(table_line([name, f"{counts['read']:,}", f"{counts['left']:,}", f"{share:.1%}"]))
    lines += ["", "| file | rows |", "|---|--:|"]
    lines += [table_line([name, f"{n:,}"]) for name, n in report["files"].items()]
    for step in report["steps"]:
        if step["notes"]:
            lines += ["", f"## {as_markdown(step['step'])}", ""]
            lines += [
                "* " + as_markdown(f"{key.replace('_', ' ')}: {_shown(value)}") for key, value in step["notes"].items()
            ]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def draw_funnel(steps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A bar a step: what stayed, and what went by reason."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reasons = list(dict.fromkeys(reason for step in steps for reason in step["reasons"]))
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(steps)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [step["step"] for step in steps]
    axes.barh(names, [step["kept"] for step in steps], color="#3b6ea5", label="kept")
    left = [step["kept"] for step in steps]
    colours = ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#c97b63", "#7f8fa6", "#b0a990", "#4f5d75")
    for i, reason in enumerate(reasons):
        widths = [step["reasons"].get(reason, 0) for step in steps]
        axes.barh(names, widths, left=left, color=colours[i % len(colours)], label=reason)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, step in enumerate(steps):
        axes.text(left[i], i, f" {step['kept']:,}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    axes.set_xlim(0, 1.12 * max([*left, 1]))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=130, metadata={"Software": None})
    part.replace(path)
