"""Where the checkout is, and commands as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-token-for-tests"


def launch(arguments: list[str], *, env: dict[str, str] | None = None, timeout_s: float = 900, processes: int = 0,
           script: str = "recipes/grpo_medvqa.py") -> subprocess.CompletedProcess[str]:  # fmt: skip
    """The recipe run to its end; stdout and stderr come back together."""
    env = dict(env or os.environ)
    return subprocess.run(
        launch_command(arguments, processes, script),
        cwd=ROOT,
        env={**env, "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )


def launch_command(arguments: list[str], processes: int = 1, script: str = "recipes/grpo_medvqa.py") -> list[str]:
    """`accelerate launch` as a user types it; processes 0: without a launcher, which saves its ten seconds."""
    if not processes:
        return [sys.executable, script, *arguments]
    config = ["--config_file", "recipes/accelerate/cpu_2ranks.yaml"] if processes > 1 else ["--num_processes", "1"]
    return [sys.executable, "-m", "accelerate.commands.launch", *config, script, *arguments]


@dataclass(frozen=True)
class Servers:
    """A running vLLM and a running reference server of the demo policy."""

    rollout: str
    reference: str
    transfer: Path

    @property
    def env(self) -> dict[str, str]:
        from lingshu_rl.processes.token import TOKEN_ENV
        from lingshu_rl.rollout.vllm_plugin import TRANSFER_DIR_ENV

        return {**os.environ, TOKEN_ENV: TOKEN, TRANSFER_DIR_ENV: str(self.transfer), "PYTHONPATH": str(ROOT)}

    @property
    def settings(self) -> list[str]:
        return [f"rollout.urls=[{self.rollout}]", f"reference.urls=[{self.reference}]"]
