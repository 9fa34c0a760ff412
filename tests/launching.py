"""Where the checkout is, and commands as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-token-for-tests"


def launch(arguments: list[str], *, env: dict[str, str] | None = None, timeout_s: float = 900, processes: int = 1,
           script: str = "recipes/grpo_medvqa.py") -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`accelerate launch` as a user types it; stdout and stderr come back together."""
    return subprocess.run(
        launch_command(arguments, processes, script),
        cwd=ROOT,
        env={**(env or os.environ), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )


def launch_command(arguments: list[str], processes: int = 1, script: str = "recipes/grpo_medvqa.py") -> list[str]:
    config = ["--config_file", "recipes/accelerate/cpu_2ranks.yaml"] if processes > 1 else ["--num_processes", "1"]
    return [sys.executable, "-m", "accelerate.commands.launch", *config, script, *arguments]
