"""What is known of every run of a sweep: one small file a run, so that a killed sweep knows where it stopped.

A run is `done` (it ended by itself with a summary), `failed` (it ended otherwise; `error` says why), `pruned` (a search
stopped it for good), `stopped` (the sweep was stopped) or `running` (or was, when the sweep was killed). The last two
are run again and go on from their checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lingshu_rl.sweep.plan import PlannedRun, SweepError

FINAL = ("done", "failed", "pruned")


@dataclass
class Status:
    run: str
    overrides: list[str] = field(default_factory=list)
    state: str = "waiting"
    error: str = ""
    exit_code: int | None = None
    seconds: float = 0.0  # wall time over all attempts
    devices: str = ""
    device_count: int = 1
    attempts: int = 0


def read(folder: Path, run: PlannedRun) -> Status:
    """Raises SweepError when the run on disk was made with other settings."""
    path = _path(folder, run)
    try:
        status = Status(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Status(run.name, list(run.overrides))
    except (ValueError, TypeError) as error:
        raise SweepError(f"{path} cannot be read ({error}); remove it to run {run.name} again") from None
    if status.overrides != list(run.overrides):
        changed = sorted(set(status.overrides) ^ set(run.overrides))
        raise SweepError(
            f"{folder} holds run {run.name} with other settings ({', '.join(changed)}); give the sweep another `dir` "
            f"or remove {path} and {run.folder}"
        )
    return status


def write(folder: Path, run: PlannedRun, status: Status) -> None:
    from lingshu_rl.storage.runfolder import write_text

    write_text(_path(folder, run), json.dumps(asdict(status), indent=1))


def usual_seconds(folder: Path, runs: Iterable[PlannedRun]) -> float | None:
    """Median wall time of the sweep's runs that are done."""
    import statistics

    seconds = [s.seconds for s in (read(folder, run) for run in runs) if s.state == "done" and s.seconds > 0]
    return statistics.median(seconds) if seconds else None


def _path(folder: Path, run: PlannedRun) -> Path:
    return folder / "status" / f"{run.variant.slug}.seed-{run.seed}.json"
