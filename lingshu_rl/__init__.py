"""lingshu-rl: reinforcement learning with verifiable rewards for medical vision-language models.

The names below are the public API, each loaded when it is asked for (docs/python.md); rewards are the package
`rewards`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingshu_rl.config import Config
    from lingshu_rl.data.load import DataError, Loaded, load
    from lingshu_rl.failures import ConfigError, LingshuError, RunStopped
    from lingshu_rl.notebook import train
    from lingshu_rl.planning.given import load_config
    from lingshu_rl.types import Prompt, Rollout

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "LingshuError",
    "Loaded",
    "Prompt",
    "Rollout",
    "RunStopped",
    "load",
    "load_config",
    "train",
]

_HOME = {
    "config": ("Config",),
    "data.load": ("DataError", "Loaded", "load"),
    "failures": ("ConfigError", "LingshuError", "RunStopped"),
    "notebook": ("train",),
    "planning.given": ("load_config",),
    "types": ("Prompt", "Rollout"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"lingshu_rl.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
