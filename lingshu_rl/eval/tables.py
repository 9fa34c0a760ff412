"""The table of an evaluation, and of a comparison: for a terminal, as Markdown, HTML and LaTeX."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingshu_rl.storage.runfolder import write_text
from lingshu_rl.text.markup import as_latex, encodable, table_line

Cells = list[list[str]]
SHORT = {
    "blank": "blank image",
    "shuffled": "other image",
    "text_only": "text only",
    "majority": "majority",
    "normal_report": "normal report",
}
NEVER_JUDGED = "n/a"  # a control without a judged answer: beaten or not, nobody knows
MARK = "†"
NOT_TRIED = "‡"
LEGEND = (
    f"Scores in %, with 95 % intervals (bootstrap over images). {MARK} not above this control: the interval of the "
    "paired difference reaches 0. Unread: answers that name nothing, several things, or were cut off; they count as "
    f"wrong. Errors: questions without an answer, out of the score. {NOT_TRIED} this benchmark's loader was written "
    "from its documentation and not tried on its own data."
)


def percent(score: Mapping[str, Any] | None, interval: bool = True) -> str:
    if not score or score.get("accuracy") is None:
        return "–"
    text = f"{100 * score['accuracy']:.1f}"
    if interval:
        text += f" [{100 * score['ci95'][0]:.1f}, {100 * score['ci95'][1]:.1f}]"
    return text


def score_table(summary: Mapping[str, Any]) -> Cells:
    """Header and one line a benchmark. A column of controls is there when some benchmark has it."""
    found = summary["benchmarks"]
    controls = [c for c in SHORT if any(c in scores["controls"] for scores in found.values())]
    judged = any("judge" in scores and "accuracy" in scores["judge"] for scores in found.values())
    header = [
        "benchmark",
        "n",
        "score",
        *(SHORT[c] for c in controls),
        *(["open, by judge"] if judged else []),
        "unread",
        "errors",
    ]
    cells = [header]
    for name, scores in found.items():
        tried = "" if not scores.get("tried", "").startswith("rows of the documented") else NOT_TRIED
        line = [name + tried, str(scores["n"]), percent(scores)]
        for control in controls:
            own = scores["controls"].get(control)
            mark = MARK if own and control in scores["not_beaten"] else ""
            asked = own is None or own["above"]["n"]
            line.append(percent(own, interval=False) + mark if asked else NEVER_JUDGED)
        if judged:
            line.append(percent(scores.get("judge")))
        unread = f"{100 * scores['unread'] / scores['n']:.0f} %" if scores["n"] else "–"
        cells.append([*line, unread, str(scores["errors"])])
    return cells


def report_table(summary: Mapping[str, Any]) -> Cells:
    """The further report metrics, the model's and the constant normal report's; empty without report benchmarks."""
    lines: Cells = []
    keys: list[str] = []
    for name, scores in summary["benchmarks"].items():
        for condition, values in scores.get("report", {}).items():
            keys += [k for k, v in values.items() if k not in keys and k != "n" and isinstance(v, int | float)]
            label = f"{name}" if condition == "main" else f"{name}: {SHORT[condition]} (control)"
            lines.append(
                [label, *(f"{values[k]:.3f}" if isinstance(values.get(k), int | float) else "–" for k in keys)]
            )
    return [["reports", *keys], *lines] if lines else []


def label_table(summary: Mapping[str, Any]) -> Cells:
    """Precision, recall and F1 of each label of the benchmarks whose answers are sets of labels; empty without any."""
    lines = [
        [name, label, str(found["n"]), *(f"{found[key]:.3f}" for key in ("precision", "recall", "f1"))]
        for name, scores in summary["benchmarks"].items()
        for label, found in scores.get("labels", {}).items()
    ]
    return [["benchmark", "label", "n", "precision", "recall", "F1"], *lines] if lines else []


def group_table(summary: Mapping[str, Any]) -> Cells:
    """Scores of the sub-groups (modality, organ, question type ...), one line each; empty without any.

    Groupings with more than 20 parts (MedCalc's calculators) are in scores.json alone.
    """
    lines = [
        [name, group.replace("_", " "), part, str(found["n"]), percent(found), str(found["unread"])]
        for name, scores in summary["benchmarks"].items()
        for group, parts in scores["by"].items()
        if len(parts) <= 20
        for part, found in parts.items()
    ]
    return [["benchmark", "by", "group", "n", "score", "unread"], *lines] if lines else []


def text(cells: Cells) -> str:
    """Aligned columns for a terminal."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * sum([*widths, 2 * (len(widths) - 1)]), *lines[1:]])


def markdown(cells: Cells) -> str:
    lines = [table_line(line) for line in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]) + "\n"


def latex(cells: Cells, caption: str = "") -> str:
    body = [" & ".join(map(as_latex, line)) + r" \\" for line in cells]
    spec = "l" + "r" * (len(cells[0]) - 1)
    lines = [
        rf"\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if caption:
        lines = [r"\begin{table}", r"\centering", *lines, rf"\caption{{{as_latex(caption)}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def html_page(title: str, tables: Sequence[Cells], legend: str) -> str:
    parts = []
    for cells in tables:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in cells[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in cells[1:]
        )
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 "
        "1rem}table{border-collapse:collapse;margin:1.5rem 0}th,td{padding:.3rem "
        ".8rem;text-align:right;border-bottom:1px solid "
        "#ddd}th:first-child,td:first-child{text-align:left}p{color:#555}"
    )
    return encodable(
        f'<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}<p>{html.escape(legend)}</p></html>\n"
    )


def write_tables(folder: Path, summary: Mapping[str, Any]) -> None:
    tables = [
        cells
        for cells in (score_table(summary), report_table(summary), label_table(summary), group_table(summary))
        if cells
    ]
    write_text(folder / "table.md", "\n".join(map(markdown, tables)) + f"\n{LEGEND}\n")
    write_text(folder / "table.html", html_page(f"Evaluation of {summary['model']}", tables, LEGEND))
    write_text(folder / "table.tex", "\n".join(latex(t) for t in tables))
