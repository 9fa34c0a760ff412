"""Charts as inline SVG, drawn by hand: no library and no network. Colours are the page's CSS variables, so that the
same picture follows light mode, dark mode and print."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 180  # viewBox units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 22
COLOURS = 8  # the page defines --s0 ... --s7

Values = Sequence[float | None]


def finite(value: Any) -> float | None:
    """The value as float, or None when it is no finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def short(value: float) -> str:
    """Three significant digits: 0.0312, 4.1e-6, 1,230, 98.2."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def line_chart(
    steps: Sequence[int], series: Mapping[str, Values], *, percent: bool = False, log: bool = False
) -> Markup:
    """Lines over steps: the raw values faint, their moving average (a 15th of the run) strong. None leaves a gap.

    log: a logarithmic axis when all values are positive and span at least two decades. The axis starts at 0 otherwise.
    """
    clean = {name: [finite(v) for v in values] for name, values in series.items()}
    shown = [v for values in clean.values() for v in values if v is not None]
    if not shown:
        return Markup('<p class="muted">nothing was logged</p>')
    low, high = min(shown), max(shown)
    as_log = log and low > 0 and high / low >= 100
    if as_log:
        marks = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    else:
        marks = ticks(min(low, 0.0), max(high, 0.0) or (low == high == 0) * 1.0)

    def height(value: float) -> float:
        a, b, v = (math.log10(x) for x in (marks[0], marks[-1], value)) if as_log else (marks[0], marks[-1], value)
        return HEIGHT - BOTTOM - (v - a) / (b - a) * (HEIGHT - TOP - BOTTOM)

    span = max(1, steps[-1] - steps[0])
    across = [LEFT + (s - steps[0]) / span * (WIDTH - LEFT - RIGHT) for s in steps]
    out = [_grid(marks if len(marks) < 8 else marks[:: len(marks) // 4], height, percent), _step_labels(steps, across)]
    window = max(1, len(steps) // 15)
    for n, values in enumerate(clean.values()):
        style = f"stroke:var(--s{n % COLOURS})" + (";stroke-dasharray:5 3" if n >= COLOURS else "")
        if window > 1:
            out.append(_path(across, values, height, "raw", style))
        out.append(_path(across, moving_average(values, window), height, "mean", style))
    out.append(f'<line class="rule" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return _chart(out, steps, across, clean, percent)


def column_chart(steps: Sequence[int], series: Mapping[str, Values], *, percent: bool = False) -> Markup:
    """Stacked columns over steps, in at most 60 columns (each the mean of its steps). Missing values count as 0."""
    count = min(60, len(steps))
    edges = [round(i * len(steps) / count) for i in range(count + 1)]
    means = {
        name: [sum(finite(v) or 0.0 for v in values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        for name, values in series.items()
    }
    marks = (
        [0.0, 0.25, 0.5, 0.75, 1.0] if percent else ticks(0.0, max(sum(c) for c in zip(*means.values(), strict=True)))
    )
    scale = (HEIGHT - TOP - BOTTOM) / (marks[-1] or 1.0)
    width = (WIDTH - LEFT - RIGHT) / count
    out = [_grid(marks, lambda mark: HEIGHT - BOTTOM - mark * scale, percent)]
    floor = [HEIGHT - BOTTOM + 0.0] * count
    for n, values in enumerate(means.values()):
        boxes = []
        for i, value in enumerate(values):
            floor[i] -= value * scale
            boxes.append(
                f"M{LEFT + i * width:.1f} {floor[i]:.1f}h{width * 0.86:.1f}v{value * scale:.1f}h-{width * 0.86:.1f}z"
            )
        out.append(f'<path style="fill:var(--s{n % COLOURS})" d="{"".join(boxes)}"/>')
    out.append(_step_labels(steps, [LEFT + width / 2, WIDTH - RIGHT - width / 2]))
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(out)}</svg>')


def band_chart(curves: Mapping[str, Mapping[str, Sequence[float]]], *, percent: bool = False) -> Markup:
    """One line a variant, the mean over its seeds, with a band from the lowest to the highest seed.

    curves: name -> {"step", "mean", "low", "high"}, all of one length.
    """
    shown = [v for c in curves.values() for key in ("mean", "low", "high") for v in c[key]]
    steps = sorted({s for c in curves.values() for s in c["step"]})
    if not shown:
        return Markup('<p class="muted">nothing was logged</p>')
    marks = ticks(min(min(shown), 0.0), max(max(shown), 0.0) or (min(shown) == 0) * 1.0)
    scale, span = (HEIGHT - TOP - BOTTOM) / (marks[-1] - marks[0]), max(1, steps[-1] - steps[0])

    def at(step: float, value: float) -> str:
        x = LEFT + (step - steps[0]) / span * (WIDTH - LEFT - RIGHT)
        return f"{x:.1f} {HEIGHT - BOTTOM - (value - marks[0]) * scale:.1f}"

    out = [_grid(marks, lambda value: HEIGHT - BOTTOM - (value - marks[0]) * scale, percent)]
    for n, c in enumerate(curves.values()):
        edge = [at(s, v) for s, v in zip(c["step"], c["high"], strict=True)]
        edge += [at(s, v) for s, v in reversed(list(zip(c["step"], c["low"], strict=True)))]
        out.append(f'<path class="band" style="fill:var(--s{n % COLOURS})" d="M{"L".join(edge)}z"/>')
    for n, c in enumerate(curves.values()):
        style = f"stroke:var(--s{n % COLOURS})" + (";stroke-dasharray:5 3" if n >= COLOURS else "")
        line = "L".join(at(s, v) for s, v in zip(c["step"], c["mean"], strict=True)) + (
            "h0" if len(c["step"]) == 1 else ""
        )
        out.append(f'<path class="mean" style="{style}" d="M{line}"/>')
    across = [float(at(s, marks[0]).split()[0]) for s in steps]
    out.append(_step_labels(steps, across))
    out.append(f'<line class="rule" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    means = {name: dict(zip(c["step"], c["mean"], strict=True)) for name, c in curves.items()}
    series = {name: [by_step.get(s) for s in steps] for name, by_step in means.items()}
    return _chart(out, steps, across, series, percent)


def span_chart(spans: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, int]) -> Markup:
    """One lane a phase with a bar from each start to each end, in seconds. Lanes are ordered by their first start.

    colours: the place of each phase in the page's colours.
    """
    lanes = sorted(spans.items(), key=lambda item: (item[1][0][0], item[0]))
    lane, left, top, width = 20, 78, 6, 2 * WIDTH
    bottom = top + lane * len(lanes)
    marks = ticks(0.0, max((b for _, pairs in lanes for _, b in pairs), default=1.0) or 1.0)
    scale = (width - left - RIGHT) / marks[-1]
    out = []
    for mark in marks:
        x = left + mark * scale
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        out.append(
            f'<text x="{x:.1f}" y="{bottom + 14}" '
            f'text-anchor="{"end" if mark == marks[-1] else "middle"}">{mark:g}</text>'
        )
    for n, (name, pairs) in enumerate(lanes):
        y = top + n * lane
        out.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name.replace("_", " "))}</text>')
        out += [
            f'<rect style="fill:var(--s{colours[name] % COLOURS})" x="{left + a * scale:.1f}" y="{y + 3}" rx="2" '
            f'width="{max(1.0, (b - a) * scale):.1f}" height="{lane - 6}"/>'
            for a, b in pairs
        ]
    return Markup(f'<svg class="chart" viewBox="0 0 {width} {bottom + 20}" role="img">{"".join(out)}</svg>')


def difference_plot(found: Mapping[str, Any], reach: float) -> Markup:
    """A difference in points with its interval on an axis from -reach to +reach; small marks are the single seeds."""
    y, bottom = 12, 24

    def x(points: float) -> str:
        return f"{min(100.0, max(0.0, 50 + 50 * points / reach)):.2f}%"

    side = "up" if found["low"] > 0 else "down" if found["high"] < 0 else "none"
    out = [f'<line class="zero" x1="50%" x2="50%" y1="0" y2="{bottom}"/>']
    out += [f'<circle class="seed" cx="{x(v)}" cy="{y}" r="2.2"/>' for v in found["by_seed"].values()]
    out.append(f'<line class="ci {side}" x1="{x(found["low"])}" x2="{x(found["high"])}" y1="{y}" y2="{y}"/>')
    out.append(f'<circle class="dot {side}" cx="{x(found["points"])}" cy="{y}" r="4.5"/>')
    return Markup(f'<svg class="intervals" height="{bottom}" role="img">{"".join(out)}</svg>')


def axis_plot(labels: Sequence[str], scores: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """Final score over the values of one axis: single runs as marks, a line through the means.

    scores: series -> one list of runs' scores a label, in [0, 1].
    """
    shown = [v for lists in scores.values() for values in lists for v in values]
    if not shown:
        return Markup('<p class="muted">no run has ended</p>')
    room = max(0.02, (max(shown) - min(shown)) * 0.15)
    marks = ticks(max(0.0, min(shown) - room), min(1.0, max(shown) + room))
    scale = (HEIGHT - TOP - BOTTOM) / (marks[-1] - marks[0])

    def height(value: float) -> float:
        return HEIGHT - BOTTOM - (value - marks[0]) * scale

    width = (WIDTH - LEFT - RIGHT) / len(labels)
    out = [_grid(marks, height, True)]
    for n, lists in enumerate(scores.values()):
        shift = (n - (len(scores) - 1) / 2) * min(9.0, 0.5 * width / max(1, len(scores)))
        across = [LEFT + (i + 0.5) * width + shift for i in range(len(labels))]
        for x, values in zip(across, lists, strict=True):
            out += [
                f'<circle class="seed" style="fill:var(--s{n % COLOURS})" cx="{x:.1f}" cy="{height(v):.1f}" r="2.6"/>'
                for v in values
            ]
        means = [sum(values) / len(values) if values else None for values in lists]
        out.append(_path(across, means, height, "mean", f"stroke:var(--s{n % COLOURS})"))
    for i, label in enumerate(labels):
        text = label if len(label) <= 60 // len(labels) else label[: max(3, 60 // len(labels) - 1)] + "…"
        out.append(
            f'<text x="{LEFT + (i + 0.5) * width:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(text)}</text>'
        )
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(out)}</svg>')


def interval_plot(scores: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Markup:
    """One lane a score on an axis from 0 to 100 %: a marker at the accuracy, a line over its interval.

    scores: (label, CSS class, {"accuracy", "ci95"}, which may be empty). Positions are percentages, so that the plot
    fills any width undistorted.
    """
    lane, top = 11, 4
    bottom = top + lane * len(scores)
    out = [f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="{bottom + 2}"/>' for x in (0, 25, 50, 75, 100)]
    for n, (_, name, score) in enumerate(scores):
        if score.get("accuracy") is None:
            continue
        y, x = top + lane * (n + 0.5), 100 * score["accuracy"]
        low, high = (100 * v for v in score["ci95"])
        out.append(f'<line class="ci {name}" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>')
        out.append(f'<circle class="dot {name}" cx="{x:.2f}%" cy="{y}" r="4"/>')
    return Markup(f'<svg class="intervals" height="{bottom + 4}" role="img">{"".join(out)}</svg>')


def moving_average(values: Values, window: int) -> list[float | None]:
    """Centred mean over `window` neighbours, over fewer at the ends and beside gaps; a gap stays a gap."""
    out: list[float | None] = []
    for i, value in enumerate(values):
        around = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if v is not None]
        out.append(sum(around) / len(around) if value is not None else None)
    return out


def ticks(low: float, high: float) -> list[float]:
    """Round marks from at or below `low` to at or above `high`, about five of them."""
    raw = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _path(across: Sequence[float], values: Values, height: Any, name: str, style: str) -> str:
    parts, pen = [], "M"
    for x, value in zip(across, values, strict=True):
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {height(value):.1f}")
        pen = "L"
    if len(parts) == 1:  # a single point has no line; draw a dot with a round cap
        parts.append("h0")
    return f'<path class="{name}" style="{style}" d="{"".join(parts)}"/>'


def _grid(marks: Sequence[float], height: Any, percent: bool) -> str:
    out = []
    for mark in marks:
        y, text = height(mark), f"{100 * mark:g} %" if percent else short(mark)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    return "".join(out)


def _chart(
    parts: Sequence[str], steps: Sequence[float], across: Sequence[float], series: Mapping[str, Values], percent: bool
) -> Markup:
    """The figure with what report.js reads under the pointer."""
    data = escape(json.dumps({"x": list(steps), "px": [round(x, 1) for x in across], "y": series, "percent": percent}))
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-chart="{data}">{"".join(parts)}</svg>'
    )


def _step_labels(steps: Sequence[float], across: Sequence[float]) -> str:
    y = HEIGHT - 6
    last = f'<text x="{across[-1]:.1f}" y="{y}" text-anchor="end">{steps[-1]:g}</text>' if len(steps) > 1 else ""
    return f'<text x="{across[0]:.1f}" y="{y}">step {steps[0]:g}</text>{last}'
