"""`lingshu-rl watch RUN`: a run in the terminal while it trains, read from its folder alone; also for a sweep's
folder."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lingshu_rl.progress import Terminal
from lingshu_rl.report.alarms import find_alarms
from lingshu_rl.report.html import RunData, load_run
from lingshu_rl.report.plots import finite, short
from lingshu_rl.report.text import duration, percent
from lingshu_rl.storage.folders import holder

REFRESH_S = 2.0
BLOCKS = " ▁▂▃▄▅▆▇█"
SHOWN = (
    ("reward", "reward/mean"),
    ("KL", "policy/kl"),
    ("entropy", "policy/entropy"),
    ("tokens a completion", "completion/tokens_mean"),
    ("gradient norm", "policy/grad_norm"),
)
RECENT = 10  # steps that speeds are taken over
FINISHED, UNDER_WAY, STOPPED = "finished", "running", "stopped"


def watch(folder: str | Path, *, once: bool = False, console: Console | None = None) -> int:
    """Show the run until it ends or Ctrl-C. Exit code 0; 2 when `once` finds no run there."""
    path = Path(folder)
    console = console or Terminal(highlight=False)
    if once:
        try:
            console.print(view(path))
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    try:
        with Live(console=console, refresh_per_second=4, transient=False) as live:
            while True:
                began = time.monotonic()
                try:
                    live.update(view(path))
                except FileNotFoundError:
                    live.update(Text(f"waiting for {path} to become a run folder; Ctrl-C stops"))
                if ended(path):
                    return 0
                time.sleep(max(REFRESH_S, 4 * (time.monotonic() - began)))
    except KeyboardInterrupt:
        return 0


def ended(path: Path) -> bool:
    """A run with its summary; a sweep all of whose runs have ended."""
    if (path / "plan.json").exists():
        return all(row["state"] in ("done", "failed", "pruned") for row in sweep_rows(path))
    return (path / "summary.json").exists()


def view(path: Path) -> RenderableType:
    """Raises FileNotFoundError when the folder holds neither a run nor a sweep."""
    return sweep_view(path) if (path / "plan.json").exists() else run_view(load_run(path, scores=False))


def run_view(run: RunData) -> RenderableType:
    now = standing(run)
    head = Table.grid(padding=(0, 2))
    head.add_row(
        f"step {now['step']} of {now['steps'] or '?'}",
        ProgressBar(total=now["steps"] or 1, completed=now["step"], width=30),
        now["left"],
    )
    curves = Table(show_edge=False, pad_edge=False)
    for name in ("", "now", "at first", "over the run"):
        curves.add_column(name)
    for label, key in SHOWN:
        values = [v for m in run.metrics if (v := finite(m.get(key))) is not None]
        if values:
            curves.add_row(label, short(values[-1]), short(values[0]), sparkline(values))
    parts: list[RenderableType] = [head, Text()]
    parts += [curves, Text()] if run.metrics else [Text("no step is logged yet\n")]
    facts = [f"held-out accuracy: {now['accuracy']}"] if now["accuracy"] else []
    facts += [f"a step: {duration(now['step_s'])} ({now['phases']})"] if now["step_s"] else []
    facts += [f"{now['tokens_s']:,.0f} tokens/s generated"] if now["tokens_s"] else []
    parts += [Text(fact) for fact in facts]
    for alarm in now["alarms"]:
        parts.append(Text(f"! {alarm.name}: {alarm.text}", style="bold red"))
    return Panel(Group(*parts), title=str(run.path), title_align="left", subtitle=now["state"], subtitle_align="right")


def standing(run: RunData) -> dict[str, Any]:
    """Where a run stands: step, speed, accuracy, alarms, time left in words."""
    metrics, recent = run.metrics, run.metrics[-RECENT:]
    steps = (run.config.get("train") or {}).get("steps")
    step = metrics[-1]["step"] if metrics else 0
    seconds = [v for m in recent if (v := finite(m.get("time/step"))) is not None]
    usual = statistics.median(seconds) if seconds else None
    tokens = sum(m.get("tokens/generated", 0) for m in recent)
    phases = {
        name: statistics.fmean(values)
        for name in {key[5:] for m in recent for key in m if key.startswith("time/") and key.count("/") == 1} - {"step"}
        if (values := [v for m in recent if (v := finite(m.get(f"time/{name}"))) is not None])
    }
    slowest = sorted(phases.items(), key=lambda item: -item[1])
    state = _state(run)
    left = state if state == FINISHED else ""
    if state.startswith(UNDER_WAY) and usual and steps:
        left = f"about {duration(usual * max(0, steps - step))} of training left"
    return {
        "step": step,
        "steps": steps,
        "step_s": usual,
        "tokens_s": tokens / sum(seconds) if seconds and sum(seconds) else None,
        "phases": ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in slowest),
        "accuracy": accuracy_text(run.evals),
        "alarms": find_alarms(metrics, run.evals, run.late),
        "left": left,
        "state": state,
    }


def accuracy_text(evals: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Held-out accuracy before, on the way and after."""
    named = [n for n in ("before", *sorted(n for n in evals if n.startswith("step-")), "after") if n in evals]
    out = []
    for name in named:
        values = [r["value"] for r in evals[name] if r["value"] is not None]
        if values:
            label = f"step {int(name[5:])}" if name[5:].isdigit() else name
            out.append(f"{percent(statistics.fmean(values))} {label}")
    return ", ".join(out if len(out) <= 4 else [out[0], *out[-3:]])


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The values as a line of blocks, each the mean of its part of the run."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 2) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[1 + round((m - low) * scale)] for m in means)


def sweep_view(path: Path) -> RenderableType:
    table = Table(title=f"sweep {path}", title_justify="left")
    for head in ("run", "state", "step", "reward", "accuracy", "time"):
        table.add_column(head)
    for row in sweep_rows(path):
        table.add_row(row["run"], row["state"], row["step"], row["reward"], row["accuracy"], row["time"])
    return table


def sweep_rows(path: Path) -> list[dict[str, str]]:
    """One row a planned run: its state and, as far as it has come, step, reward and accuracy."""
    from lingshu_rl.sweep import status as states
    from lingshu_rl.sweep.plan import reread
    from lingshu_rl.sweep.search import all_variants

    sweep = reread(path)
    out = []
    under_way = holder(sweep.folder)[1]
    for variant in all_variants(sweep):
        for run in sweep.runs_of(variant):
            status = states.read(sweep.folder, run)
            state = (
                status.state if under_way is not False or status.state != UNDER_WAY else STOPPED
            )  # left so by a sweep that was killed
            last = _last_metrics(run.folder)
            summary = _json(run.folder / "summary.json")
            score = (summary.get("after") or {}).get("accuracy")
            reward = finite(last.get("reward/mean"))
            out.append(
                {
                    "run": run.name,
                    "state": state,
                    "step": str(last.get("step", "")),
                    "reward": "" if reward is None else f"{reward:.3f}",
                    "accuracy": "" if score is None else percent(score),
                    "time": duration(status.seconds) if status.seconds else "",
                }
            )
    return out


def _last_metrics(folder: Path) -> dict[str, Any]:
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines[-2:]):  # the last may be half written
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError):
            continue
    return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _state(run: RunData) -> str:
    """Whether the run has ended, is under way, or is left by its process, in words."""
    if run.stored:
        return FINISHED
    file, (who, lives) = run.path / "metrics.jsonl", holder(run.path)
    state = f"{UNDER_WAY} ({who})" if lives else f"{STOPPED}: {who} is gone; the same command goes on"
    if lives is None or not who:
        state = f"begun by {who}" if who else "no process works on it"
    if not file.exists():
        return f"{state}, no step yet"
    return f"{state}, last step logged {duration(max(0.0, time.time() - file.stat().st_mtime))} ago"
