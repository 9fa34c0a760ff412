"""What a sweep has still to run, as it is handed out to its devices."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lingshu_rl.sweep.plan import PlannedRun
from lingshu_rl.sweep.status import Status

Job = Sequence[PlannedRun]  # runs that one device set does one after another


class JobQueue:
    """Hands out jobs. `finished` hears of every run that reached a final state in this call."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.lock = threading.Lock()

    def take(self) -> Job | None:
        with self.lock:
            return self.jobs.pop(0) if self.jobs else None

    def finished(self, run: PlannedRun, status: Status) -> bool:
        """Whether the rest of the run's job should go on."""
        return True

    def prune(self, run: PlannedRun) -> str | None:
        return None
