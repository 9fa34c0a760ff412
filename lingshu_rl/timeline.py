"""When the phases of a run ran: one clock behind the metrics, the summary and the report's charts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

Span = tuple[float, float]  # start and end, time.monotonic


class Timeline:
    """Spans by step and phase. A span belongs to the step whose batch it served, also when it ran during the step
    before.

    seconds: by phase, over the whole run, also before it was resumed.
    """

    def __init__(self) -> None:
        self.origin = time.monotonic()
        self.before_s = 0.0  # spent before this process resumed the run
        self.seconds: dict[str, float] = {}
        self._spans: dict[int | None, dict[str, list[Span]]] = {}
        self._began: dict[int, float] = {}

    @property
    def total_s(self) -> float:
        """Of the run, with what went before it was resumed."""
        return self.before_s + time.monotonic() - self.origin

    def resume(self, seconds: Mapping[str, float], total_s: float) -> None:
        self.before_s, self.seconds = total_s, dict(seconds)

    def begin(self, step: int) -> None:
        self._began[step] = time.monotonic()

    @contextmanager
    def of(self, phase: str, step: int | None = None) -> Iterator[None]:
        """step: None for what no step owns (start, evaluation, checkpoint); it shows in the metrics of the next one."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(phase, start, time.monotonic(), step)

    def add(self, phase: str, start: float, end: float, step: int | None = None) -> None:
        self._spans.setdefault(step, {}).setdefault(phase, []).append((start, end))
        if step is None:
            self._count({phase: end - start})

    def take(self, step: int) -> dict[str, float]:
        """The step's metrics: time/PHASE, what the phase added to those begun before it; time/start/ and
        time/end/PHASE, since this process started the run; time/step, since `begin`."""
        own, between = self._spans.pop(step, {}), self._spans.pop(None, {})
        added = seconds_added(own)
        self._count(added)
        metrics = {f"time/{phase}": value for phase, value in added.items()}
        for phase, spans in {**between, **own}.items():
            metrics[f"time/start/{phase}"] = min(start for start, _ in spans) - self.origin
            metrics[f"time/end/{phase}"] = max(end for _, end in spans) - self.origin
        metrics["time/step"] = time.monotonic() - self._began.pop(step)
        return metrics

    def _count(self, seconds: Mapping[str, float]) -> None:
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value


def seconds_added(spans: Mapping[str, Iterable[Span]]) -> dict[str, float]:
    """Seconds of each phase that no phase begun before it covers, so that they add up to the time in which anything
    ran."""
    covered: list[Span] = []
    added: dict[str, float] = {}
    for phase, own in sorted(spans.items(), key=lambda item: min(item[1])):
        before = _length(covered)
        covered = _union([*covered, *own])
        added[phase] = _length(covered) - before
    return added


def _union(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
