"""Several run folders side by side, whoever started them: runs that differ only in their seed are one variant."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingshu_rl.report.html import load_run
from lingshu_rl.sweep.answer import Member, write_comparison
from lingshu_rl.sweep.plan import SweepError, Variant, flat
from lingshu_rl.sweep.status import Status

NOT_COMPARED = ("seed", "run.", "resume", "checkpoint.")  # settings in which runs of one variant may differ


def compare_runs(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the comparison page (and its JSON, CSV and markdown beside it); the first run's variant is the baseline.

    out: the page, default `comparison.html` in the folder that holds all runs. Raises FileNotFoundError for a folder
    without a run, SweepError when two runs have the same settings and the same seed.
    """
    names = _names(folders)
    members, groups = [], {}  # type: ignore[var-annotated]
    for folder in folders:
        data = load_run(folder, scores=False)
        settings = {k: v for k, v in flat(data.config).items() if not k.startswith(NOT_COMPARED)}
        key = json.dumps(settings, sort_keys=True)
        variant = groups.setdefault(key, Variant(names[folder], settings))
        seed = int(data.config.get("seed", 0))
        if any(m.variant is variant and m.seed == seed for m in members):
            raise SweepError(f"{folder} has the settings and the seed of another run given; compare it alone")
        members.append(Member(variant, seed, folder, _status(data.stored)))
    if len(groups) < 2:
        raise SweepError("all runs given have the same settings but for their seed: there is nothing to compare")
    common = Path(os.path.commonpath([f.resolve() for f in folders]))
    page = out or common / "comparison.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(
        members, members[0].variant.name, page.parent, name=f"{len(folders)} runs", stem=page.name.removesuffix(".html")
    )
    return page


def _status(summary: Mapping[str, Any]) -> Status:
    """A run folder knows its time but not its devices."""
    state = "done" if summary else "stopped"
    return Status("", state=state, seconds=float(summary.get("seconds_total") or 0.0))


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """As much of the end of each path as tells them apart."""
    for depth in range(1, max(len(f.resolve().parts) for f in folders) + 1):
        names = {f: "/".join(f.resolve().parts[-depth:]) for f in folders}
        if len(set(names.values())) == len(folders):
            return names
    raise SweepError("the same run folder is given twice")
