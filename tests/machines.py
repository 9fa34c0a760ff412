"""Machines that are not here: lists of GPUs under the names a parent process may see them by."""

from __future__ import annotations

from lingshu_rl.processes.placement import Machine


def machine(count: int, visible: str | None = None, gb: float = 80.0) -> Machine:
    """count: devices that CUDA shows. visible: CUDA_VISIBLE_DEVICES of the parent; None = not set."""
    return Machine.of(visible, [(gb, f"GPU-uuid-{i}") for i in range(count)])


def numbers(sets) -> str:
    """Groups of GPU numbers in short: "1|23" are two processes, of GPU 1 and of GPUs 2 and 3."""
    return "|".join("".join(map(str, devices.numbers)) for devices in sets)
