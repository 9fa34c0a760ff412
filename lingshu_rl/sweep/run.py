"""Runs a sweep: every run a child process of the ordinary training command, one at a time on each device set.

Stopping the sweep (Ctrl-C, SIGTERM) stops the runs under way, which keep their checkpoints; killing it stops them too
(parent-death signal). The same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.processes.placement import DeviceSet, find_devices, this_machine
from lingshu_rl.processes.workers import die_with_parent, free_port, group_exists
from lingshu_rl.progress import Progress
from lingshu_rl.report.text import duration
from lingshu_rl.storage.folders import own
from lingshu_rl.sweep import status as states
from lingshu_rl.sweep.jobs import JobQueue
from lingshu_rl.sweep.plan import PlannedRun, Sweep, SweepError, select
from lingshu_rl.sweep.search import SearchSource
from lingshu_rl.sweep.status import Status

LAUNCH = tuple(
    "{python} -m accelerate.commands.launch --num_processes {processes} --main_process_port {port} -m lingshu_rl.cli "
    "train".split()
)
STOP_TIMEOUT_S = 60.0  # a run that is asked to stop first stops its servers
POLL_S = 0.2

Prune = Callable[[PlannedRun], str | None]  # why a running run should be given up


@dataclass
class Outcome:
    """Runs of this call by how they ended."""

    counts: dict[str, int] = field(default_factory=dict)
    stopped: bool = False


def run_sweep(
    sweep: Sweep,
    *,
    only: Sequence[str] = (),
    retry_failed: bool = False,
    progress: Progress | None = None,
    after_run: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run what is not done yet; `after_run` is called after each run (to write the tables anew).

    Raises SweepError when a run on disk has other settings, InUse when another process works on this sweep.
    """
    progress = progress or Progress(quiet=False)
    stop = threading.Event()
    with own(sweep.folder, "a sweep", "dir"), stopping_on_signals(stop):
        write_plan(sweep)
        if sweep.search:
            if only:
                raise SweepError("--only does not go with search: a trial depends on the ones before it")
            source: JobQueue = SearchSource(sweep, retry_failed)
            total = len(sweep.seeds) * (1 + sweep.search.trials)
        else:
            wanted = [r for r in select(sweep.runs(), only) if to_do(sweep, r, retry_failed)]
            source, total = JobQueue([[run] for run in wanted]), len(wanted)
        return _Pool(sweep, source, progress, stop, after_run, retry_failed).work(total)


def to_do(sweep: Sweep, run: PlannedRun, retry_failed: bool) -> bool:
    state = states.read(sweep.folder, run).state
    if state == "done" and not (run.folder / "summary.json").exists():
        return True  # its folder was removed
    return state not in states.FINAL or (retry_failed and state == "failed")


def command_of(sweep: Sweep, run: PlannedRun) -> list[str]:
    """The run's command; in a sweep file's `command`, {python}, {port} and {processes} are filled in."""
    facts = {"python": sys.executable, "port": str(free_port()), "processes": str(sweep.processes)}
    command = []
    for word in sweep.command or LAUNCH:
        for name, value in facts.items():
            word = word.replace(f"{{{name}}}", value)
        command.append(word)
    return [*command, *(["--config", sweep.config] if sweep.config else []), *run.overrides]


@contextlib.contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop`. Outside the main thread signals cannot be caught, and are not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_plan(sweep: Sweep) -> None:
    """Leave beside the runs what was asked, for a reader and for `lingshu-rl report`."""
    from lingshu_rl.storage.runfolder import write_text

    plan = {
        "name": sweep.name,
        "question": sweep.question,
        "baseline": sweep.baseline,
        "seeds": list(sweep.seeds),
        "base": sweep.base,
        "config": sweep.config,
        "axes": sweep.axes,
        "searched": sweep.search is not None,
        "variants": [{"name": v.name, "settings": v.settings, "point": v.point} for v in sweep.variants],
    }
    write_text(sweep.folder / "plan.json", json.dumps(plan, indent=1))


class _Pool:
    """One thread a device set, each with at most one child process."""

    def __init__(
        self,
        sweep: Sweep,
        source: JobQueue,
        progress: Progress,
        stop: threading.Event,
        after_run: Callable[[], None],
        retry_failed: bool,
    ) -> None:
        self.sweep, self.source, self.progress, self.stop = sweep, source, progress, stop
        self.after_run, self.retry_failed = after_run, retry_failed
        self.outcome = Outcome()
        self.told = threading.Lock()  # one thread at a time writes tables and lines
        self.error: BaseException | None = None

    def work(self, total: int) -> Outcome:
        self.progress.start(f"sweep {self.sweep.name}", total)
        threads = [threading.Thread(target=self._serve, args=(value,)) for value in self.sweep.devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.progress.stop()
        if self.error is not None:
            raise self.error
        self.outcome.stopped = self.stop.is_set()
        return self.outcome

    def _serve(self, value: Any) -> None:
        try:
            devices = find_devices("sweep", value, this_machine())
            while not self.stop.is_set() and (job := self.source.take()) is not None:
                for run in job:
                    if self.stop.is_set():
                        return
                    status = states.read(self.sweep.folder, run)
                    if to_do(self.sweep, run, self.retry_failed):
                        status = self._run(run, status, devices)
                    if status.state in states.FINAL and not self.source.finished(run, status):
                        break
        except BaseException as error:
            self.error = error
            self.stop.set()

    def _run(self, run: PlannedRun, status: Status, devices: DeviceSet | None) -> Status:
        status.state, status.error, status.exit_code = "running", "", None
        status.attempts += 1
        status.devices = str(devices or "auto")
        status.device_count = max(1, len(this_machine().gpus if devices is None else devices.gpus))
        states.write(self.sweep.folder, run, status)
        with self.told:
            self.progress.say(f"{run.name}: starts on {status.devices}")
        began, before = time.monotonic(), status.seconds
        log = self.sweep.folder / "logs" / f"{run.variant.slug}.seed-{run.seed}.log"
        end, code, why = self._child(run, devices, log)
        status.seconds = round(before + time.monotonic() - began, 2)
        status.exit_code = code
        if end == "pruned":
            status.state, status.error = "pruned", why
        elif end == "stopped":
            status.state = "stopped"
        elif end == "timeout":
            status.state, status.error = (
                "failed",
                f"it ran longer than timeout_s={self.sweep.timeout_s:g}; its log is {log}",
            )
        elif code == 0 and (run.folder / "summary.json").exists():
            status.state = "done"
        else:
            status.state, status.error = "failed", failure(code, run, log)
        states.write(self.sweep.folder, run, status)
        with self.told:
            self.outcome.counts[status.state] = self.outcome.counts.get(status.state, 0) + 1
            self.progress.advance(note=run.name)
            self.progress.say(f"{run.name}: {status.state} after {duration(status.seconds)}{_told(run, status)}")
            self.after_run()
        return status

    def _child(self, run: PlannedRun, devices: DeviceSet | None, log: Path) -> tuple[str, int, str]:
        """Start the run's command and wait: how it ended (itself, pruned, stopped, timeout), its exit code, why
        pruned."""
        log.parent.mkdir(parents=True, exist_ok=True)
        prefix, env = (devices.command_prefix(), devices.env()) if devices else ([], {})
        with open(log, "ab") as out:
            child = subprocess.Popen(
                [*prefix, *command_of(self.sweep, run)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + (self.sweep.timeout_s or float("inf"))
        try:
            while child.poll() is None:
                if self.stop.is_set():
                    return "stopped", stop_group(child), ""
                if time.monotonic() > deadline:
                    return "timeout", stop_group(child), ""
                if (why := self.source.prune(run)) is not None:
                    return "pruned", stop_group(child), why
                time.sleep(POLL_S)
            return "itself", child.returncode, ""
        finally:
            stop_group(child)  # whatever a run that ended has left behind


def stop_group(child: subprocess.Popen[bytes]) -> int:
    """End the child's process group: asked first, killed after STOP_TIMEOUT_S. Returns the child's exit code."""
    for number, wait_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if child.poll() is not None and not group_exists(child.pid):
                return child.returncode
            time.sleep(0.05)
    return child.wait()


def failure(code: int, run: PlannedRun, log: Path) -> str:
    """Why a run failed, in a line: what it said itself, else the last line of its log."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    )
    told = [i for i, line in enumerate(lines) if line.startswith(("the run stopped:", "error:"))]
    said = None
    if told:  # what it said may go on over several lines, up to the launcher's traceback
        said = " ".join(itertools.takewhile(lambda line: not line.startswith("Traceback"), lines[told[-1] :]))
    said = said or next((line for line in reversed(lines) if _is_error(line)), None)
    said = said or (lines[-1] if lines else "its log is empty")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    how = "it wrote no summary.json" if code == 0 else how
    return f"{how}: {said[:300]} (log: {log})"


def _is_error(line: str) -> bool:
    head = line.split(":", 1)[0]
    return ":" in line and head.endswith(("Error", "Exception", "Failure")) and " " not in head


def _told(run: PlannedRun, status: Status) -> str:
    if status.error:
        return f": {status.error}"
    try:
        score = json.loads((run.folder / "summary.json").read_text())["after"]["accuracy"]
        return f", accuracy {score:.3f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
