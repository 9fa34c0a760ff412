"""A run from Python: in a script, or in a notebook, where an event loop runs already."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lingshu_rl.config import Config


def train(config: Config) -> dict[str, Any]:
    """Train as `lingshu-rl train` does, one policy rank, and return what summary.json holds.

    Blocks until the run is over; in a notebook an interrupt comes through when the run has ended. A run of the same
    folder goes on from its last checkpoint. Raises LingshuError (ConfigError, DataError, RunStopped, ...) where the
    command would say so in a line. Several ranks: `accelerate launch recipes/grpo_medvqa.py`.
    """
    from lingshu_rl.cli import settle
    from lingshu_rl.train import train as run

    # Importing the module put it in the place of this function in the package.
    setattr(sys.modules["lingshu_rl"], "train", train)  # noqa: B010
    config = settle(config)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run(config))
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run(config)).result()
