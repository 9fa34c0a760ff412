"""Whether a checkpoint may be gone on from: its files are there, whole, and would run no code of another's when loaded.

DeepSpeed and accelerate load their state by pickle. What a pickle would call is read from it without running it, and
only what these libraries themselves write is let through. Weights are safetensors.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEAL = "run.json"
PICKLES = {".pt", ".pkl", ".bin", ".pth"}
# Beside tensors and plain data: what DeepSpeed's optimiser state and accelerate's random states hold.
KNOWN_NAMES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
}
_CHUNK = 1 << 20


def seal(folder: Path, state: Mapping[str, Any]) -> str:
    """The text of run.json: the state, and of every file in the folder its bytes and CRC-32. Reads all of them once."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = {name: [(folder / name).stat().st_size, crc] for name, crc in _checksums(folder, names).items()}
    return json.dumps({**state, "files": files}, indent=1)


def fault(folder: Path, *, contents: bool = True) -> str:
    """Why a checkpoint cannot be gone on from, or "". contents: also read every file, not its length alone."""
    if not (folder / SEAL).exists():
        return f"{folder} is not a checkpoint folder (it has no {SEAL})"
    try:
        state = json.loads((folder / SEAL).read_text())
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in state["files"].items()}
        int(state["step"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{SEAL} is unreadable ({type(error).__name__}: {error})"
    for name, (size, _) in files.items():
        if not (file := folder / name).exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if not contents:
        return ""
    for name, crc in _checksums(folder, list(files)).items():
        if crc != files[name][1]:
            return f"{name} has other contents than were saved (CRC-32)"
    return next((told for name in sorted(files) if (told := pickle_fault(folder / name))), "")


def pickle_fault(file: Path) -> str:
    """What a pickled file would call that no library of ours writes, or "". Nothing in it is run."""
    if file.suffix not in PICKLES:
        return ""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        named = set(get_unsafe_globals_in_checkpoint(file))
    except Exception as error:  # not torch's format; its own reader would say nothing better
        return f"{file.name} cannot be read without running it ({type(error).__name__}: {error})"
    if foreign := sorted(named - KNOWN_NAMES):
        return f"{file.name} would run code when it is loaded: it names {', '.join(foreign[:3])}"
    return ""


def _checksums(folder: Path, names: list[str]) -> dict[str, int]:
    """CRC-32 by name; several files at a time, as the sum is taken without the interpreter's lock."""

    def crc(name: str) -> int:
        found = 0
        with open(folder / name, "rb") as file:
            while chunk := file.read(_CHUNK):
                found = zlib.crc32(chunk, found)
        return found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(crc, names), strict=True))
