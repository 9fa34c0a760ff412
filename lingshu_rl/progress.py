"""What a person sees while a run goes on: a live bar on a terminal, plain lines in a log; plus accelerate's
trackers."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Terminal(Console):
    """rich's console, to which a reader that is gone is the error that it is elsewhere (see `exits.piped`)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Progress:
    """Quiet on every rank but the main one."""

    def __init__(self, quiet: bool, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Terminal(file=sys.stdout, highlight=False, soft_wrap=True)
        self.bar: Bar | None = None
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(f"[{time.monotonic() - self.started:6.1f} s] {text}", markup=False)
            sys.stdout.flush()

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Begin a counted phase; `step` advances it."""
        self.stop()
        if not self.quiet and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task(title, total=total, completed=done, note="")
            self.bar.start()

    def advance(self, note: str = "", by: int = 1) -> None:
        if self.bar is not None:
            self.bar.update(self.task, advance=by, note=note)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def step_line(step: int, steps: int, metrics: Mapping[str, Any]) -> str:
    """One line a step, for logs and terminals alike."""
    parts = [f"step {step}/{steps}", f"reward {metrics['reward/mean']:.3f}"]
    for key, label, form in (
        ("policy/kl", "kl", ".5f"),
        ("policy/entropy", "entropy", ".3f"),
        ("completion/tokens_mean", "tokens", ".1f"),
        ("policy/grad_norm", "grad", ".2f"),
        ("time/rollout", "rollout", ".1f"),
        ("time/update", "update", ".1f"),
        ("time/weight_sync", "sync", ".1f"),
        ("time/step", "step", ".1f s"),
    ):
        if key in metrics:
            value = format(metrics[key], form.removesuffix(" s"))
            parts.append(f"{label} {value}{' s' if form.endswith(' s') else ''}")
    return "  ".join(parts)
