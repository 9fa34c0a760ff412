"""`lingshu-rl sweep FILE`: what a person types and sees."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lingshu_rl.failures import ConfigError
from lingshu_rl.progress import Progress, Terminal
from lingshu_rl.report.text import duration, signed
from lingshu_rl.sweep import status as states
from lingshu_rl.sweep.answer import write_answers
from lingshu_rl.sweep.plan import Sweep, SweepError, differences, load_sweep, select
from lingshu_rl.sweep.run import run_sweep, to_do
from lingshu_rl.sweep.search import all_variants
from lingshu_rl.sweep.words import VERDICTS, p_text


def sweep_main(
    path: str,
    *,
    dry_run: bool = False,
    only: Sequence[str] = (),
    retry_failed: bool = False,
    settings: Sequence[str] = (),
) -> int:
    """Exit code 0: all runs are done; 1: some failed; 2: the file cannot be used; 130: stopped."""
    console = Terminal(highlight=False, width=None if sys.stdout.isatty() else 140)
    try:
        sweep = load_sweep(path, settings)
        if dry_run:
            show_plan(sweep, only, retry_failed, console)
            return 0
        tables = _Tables()
        outcome = run_sweep(
            sweep,
            only=only,
            retry_failed=retry_failed,
            progress=Progress(quiet=False),
            after_run=lambda: tables.write(sweep),
        )
        answer = write_answers(sweep)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show_answer(answer, console)
    console.print(f"table: {sweep.folder / 'table.md'}   page: {sweep.folder / 'sweep.html'}", soft_wrap=True)
    if outcome.stopped:
        print("the sweep was stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    failed = [r for r in answer["runs"] if r["state"] == "failed"]
    if failed:
        print(f"{len(failed)} run(s) failed; --retry-failed tries them again", file=sys.stderr)
    return 1 if failed else 0


class _Tables:
    """Writes the tables while the sweep runs, so that they can be read early; at most a tenth of the time goes
    there."""

    def __init__(self) -> None:
        self.next = 0.0

    def write(self, sweep: Sweep) -> None:
        began = time.monotonic()
        if began >= self.next:
            write_answers(sweep)
            self.next = time.monotonic() + 10 * (time.monotonic() - began)


def show_plan(sweep: Sweep, only: Sequence[str], retry_failed: bool, console: Console) -> None:
    """The runs, in what they differ, what is done already, and how long the rest may take."""
    base = sweep.variant(sweep.baseline)
    variants = all_variants(sweep)
    runs = [run for v in variants for run in sweep.runs_of(v)]
    chosen = select(runs, only)
    seconds = states.usual_seconds(sweep.folder, runs) or sweep.seconds_per_run
    table = Table(title=f"sweep {sweep.name}: {len(chosen)} runs into {sweep.folder}", title_justify="left")
    for head in ("variant", "differs from the baseline in", "seeds", "to do"):
        table.add_column(head)
    todo = 0
    for variant in variants:
        own = [run for run in chosen if run.variant is variant]
        if not own:
            continue
        waiting = [run for run in own if to_do(sweep, run, retry_failed)]
        todo += len(waiting)
        changes = ", ".join(f"{k}={v}" for k, v in differences(variant, base).items())
        mark = "(baseline)" if variant is base else changes or "nothing: a check on noise"
        table.add_row(variant.name, mark, ", ".join(str(run.seed) for run in own), f"{len(waiting)} of {len(own)}")
    console.print(table)
    if sweep.search:
        left = max(0, sweep.search.trials - len(variants) + 1)
        todo += left * len(sweep.seeds)
        console.print(
            f"and up to {left} more trials by {sweep.search.method}, each with {len(sweep.seeds)} seed(s), over "
            f"{', '.join(sweep.search.space)}",
            soft_wrap=True,
        )
    sets = len(sweep.devices)
    if seconds is None:
        told = "no time estimate: no run has been timed here; set seconds_per_run, or look again after the first run"
    else:
        how = (
            "median of this sweep's runs" if states.usual_seconds(sweep.folder, runs) else "the file's seconds_per_run"
        )
        told = (
            f"about {duration(seconds * -(-todo // sets))}: {todo} runs of {duration(seconds)} ({how}) on {sets} "
            f"device set(s)"
        )
    console.print(told, soft_wrap=True)


def show_answer(answer: dict, console: Console) -> None:
    console.print(f"\n{answer['title']}", soft_wrap=True)
    for sentence in answer["words"]:
        console.print(f"  {sentence}", soft_wrap=True, markup=False)
    table = Table()
    for head in ("variant", "seeds", "accuracy", "difference", "95 % interval", "p (Holm)", "verdict"):
        table.add_column(head)
    for row in answer["rows"]:
        found = row["difference"] or {}
        table.add_row(
            row["name"],
            f"{row['seeds_done']}/{row['seeds_planned']}",
            "–" if row["score"] is None else f"{100 * row['score']:.1f}",
            signed(found["points"]) if found else "",
            f"{signed(found['low'])} to {signed(found['high'])}" if found else "",
            p_text(found["p_corrected"]) if found else "",
            "failed" if row["errors"] else VERDICTS[row["verdict"]],
        )
    console.print(table)


def report_main(folders: Sequence[str], out: str | None) -> int:
    """One run: its report. A sweep's folder: the sweep's page. Several runs: their comparison."""
    from pathlib import Path

    from lingshu_rl.report import write_report

    paths = [Path(folder) for folder in folders]
    try:
        if len(paths) == 1 and (paths[0] / "plan.json").exists():
            from lingshu_rl.sweep.plan import reread

            write_answers(reread(paths[0]))
            print(paths[0] / "sweep.html")
        elif len(paths) == 1:
            print(write_report(paths[0]))
        else:
            from lingshu_rl.sweep.runs import compare_runs

            print(compare_runs(paths, Path(out) if out else None))
    except (FileNotFoundError, SweepError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
