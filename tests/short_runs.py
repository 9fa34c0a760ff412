"""Short real runs of the recipe, to be looked at while they go on and afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from launching import ROOT, launch_command

SHORT = [
    "data.curriculum=pass_rate",
    "train.steps=2",
    "train.prompts_per_step=4",
    "train.group_size=4",
    "train.warmup_steps=1",
    "eval.limit=24",
]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def started(settings: list[str], folder: Path, env: dict[str, str], until: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A run in the background and its output, once `until` shows in it."""
    log = folder.parent / "out.txt"
    with open(log, "w") as out:
        process = subprocess.Popen(
            launch_command([*SHORT, "train.steps=500", *settings, f"run.dir={folder}"]),
            cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 600
    while until not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return process, log


def engines_of(folder: Path) -> list[int]:
    """vLLM's and the reference's processes that write into this run's folder, by number."""
    out = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    marks = ("vllm.entrypoints", "VLLM::", "lingshu_rl.reference.server")
    found = []
    for line in out.splitlines():
        if any(mark in line for mark in marks):
            pid = int(line.split()[0])
            try:
                if str(folder) in os.readlink(f"/proc/{pid}/fd/1"):
                    found.append(pid)
            except OSError:
                continue
    return found
