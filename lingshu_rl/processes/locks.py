"""A GPU is held by one command at a time: a lock file for each card, which the kernel frees with the process.

The lock lies with the open file, so a command that replaces this process (`serve`) keeps it. Locks are those of one
user on one host, in LOCKS; two users are kept apart by whoever shares out the machine.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lingshu_rl.failures import ConfigError
from lingshu_rl.processes.placement import DeviceSet, Gpu
from lingshu_rl.storage.folders import InUse, take


def lock_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"lingshu-rl-{os.getuid()}" / "devices"


def hold(devices: DeviceSet, who: str, *, inherited: bool = False) -> list[int]:
    """Take the GPUs until this process ends, and say as whom. Returns the file descriptors that hold them.

    inherited: so that a program which replaces this process, or is started by it, goes on holding them.
    Raises ConfigError naming the holder of one that is taken; none is held then.
    """
    held: list[int] = []
    for gpu in devices.gpus:
        try:
            held.append(take(lock_folder() / _name(gpu), who))
        except InUse as taken:
            release(held)
            raise ConfigError(
                f"GPU {gpu.index} is in use by {taken.holder}; name other GPUs in devices.*, or stop it"
            ) from None
        os.set_inheritable(held[-1], inherited)
    return held


def release(held: Sequence[int]) -> None:
    for descriptor in held:
        os.close(descriptor)


def unheld(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Those that nobody holds now."""

    def free(gpu: Gpu) -> bool:
        try:
            release(hold(DeviceSet((gpu,)), "a look"))
        except ConfigError:
            return False
        return True

    return tuple(gpu for gpu in gpus if free(gpu))


def _name(gpu: Gpu) -> str:
    """The card's own name where it is known, so that a number and a UUID that mean one card meet."""
    return (gpu.uuid or gpu.name).replace("/", "_")
