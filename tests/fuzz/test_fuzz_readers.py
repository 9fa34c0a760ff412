"""Damaged files of every kind that is read: each becomes rows, refused rows or one refused source, in little memory.

A child process is limited to 1 GiB more than it has (`feeding.MEMORY`); what ends it, a traceback, a signal or the
limit itself, fails the test, and the file that did it stays in the test's folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
KINDS = ("json lines", "json", "tables", "packed", "parquet", "tar", "dicom", "nifti", "pictures")


def fed(kind: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    told = subprocess.run(
        [sys.executable, str(HERE / "feeding.py"), kind, str(count), str(seed), str(folder)],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, f"{kind}, {folder}: {told.returncode}\n{told.stderr[-3000:]}"
    return json.loads(told.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_files(kind: str, tmp_path: Path) -> None:
    found = fed(kind, 100, 7, tmp_path)
    assert found["tried"] == 100 and found["slowest_s"] < 10, found
    assert found.get("refused", 0) + found.get("read in part", 0) > 10, found  # the damage is found


@pytest.mark.endurance
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_damaged_files(kind: str, tmp_path: Path) -> None:
    found = fed(kind, 10_000, 11, tmp_path)
    print(kind, json.dumps(found))  # for docs/reliability.md
    assert found["tried"] == 10_000 and found["slowest_s"] < 20, found
