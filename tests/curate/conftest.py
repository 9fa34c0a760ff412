"""One fixture: run steps over rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from curate_helpers import Curated, write_rows

from lingshu_rl.curate.pipeline import parse_pipeline, run_pipeline
from lingshu_rl.progress import Progress


@pytest.fixture
def curate(tmp_path: Path) -> Callable[..., Curated]:
    """Run steps over rows (or over ready sources)."""

    def run(rows: Any, steps: list[Any], **more: Any) -> Curated:
        sources = rows
        if not rows or "path" not in rows[0]:
            sources = [{"name": "s", "path": str(write_rows(tmp_path / "in" / "s.jsonl", rows))}]
        pipeline = parse_pipeline({"out": str(tmp_path / "out"), "sources": sources, "steps": steps, **more})
        return Curated(pipeline, run_pipeline(pipeline, Progress(quiet=True)))

    return run
