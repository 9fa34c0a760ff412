"""How figures are written for people, in pages, tables and lines alike."""

from __future__ import annotations

NBSP = "\N{NO-BREAK SPACE}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}{NBSP}%"


def signed(points: float, digits: int = 1) -> str:
    return f"{points:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
