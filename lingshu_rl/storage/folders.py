"""A folder that a command writes into is that command's alone while it works, and an older one is kept aside.

The lock lies with an open file, so the kernel frees it with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lingshu_rl.failures import ConfigError
from lingshu_rl.storage.disk import said

LOCK = ".lock"
PATIENCE_S = 5.0  # for a holder that is just ending: a killed run's children take seconds to go


class InUse(RuntimeError):
    """Another process works on it. holder: which one, in words."""

    def __init__(self, what: str, holder: str) -> None:
        super().__init__(what)
        self.holder = holder


@contextmanager
def own(place: Path, who: str, key: str, *, afresh: bool = False, file: bool = False) -> Iterator[None]:
    """Only this process works in the folder, which is made if need be, or writes the file.

    who: the command, for whoever finds it taken. key: the setting that names it. afresh: what is in the folder is kept
    aside as FOLDER.old-1 and so on. Waits PATIENCE_S for a holder that may be ending. Raises InUse naming it,
    ConfigError where nothing can be written.
    """
    if afresh and Path.cwd().is_relative_to(place.resolve()):
        raise ConfigError(f"{key}={place} is where this command runs, which cannot be kept aside: give another {key}")
    lock = place.with_name(f".{place.name}.lock") if file else place / LOCK
    try:
        descriptor = take(lock, who, patience_s=PATIENCE_S)
        if afresh and any(path.name != LOCK for path in place.iterdir()):
            place.rename(next(p for n in range(1, 10_000) if not (p := Path(f"{place}.old-{n}")).exists()))
            os.close(descriptor)
            descriptor = take(lock, who)
    except InUse as taken:
        told = f"{place} is in use by {taken.holder}: wait for it, stop it, or give another name ({key})"
        raise InUse(told, taken.holder) from None
    except OSError as error:
        raise ConfigError(f"{key}={place} cannot be written: {said(error, place)}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def holder(place: Path) -> tuple[str, bool | None]:
    """Who works, or worked last, in this folder (see `own`), in words, and whether that process lives.

    None: it ran on another host, whose locks some file systems do not show here. "" when nobody ever did.
    """
    try:
        with open(place / LOCK) as file:
            who = file.read().strip()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return who, True
    except OSError:  # there is no lock, or it may not be read
        return "", False
    return who, False if f" on {socket.gethostname()} " in f"{who} " else None


def take(file: Path, who: str, *, patience_s: float = 0.0) -> int:
    """Hold a file until the returned descriptor is closed, or this process ends. Raises InUse."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + patience_s
    while not _locked(descriptor):
        if time.monotonic() >= deadline:
            os.close(descriptor)
            holder = file.read_text(errors="replace").strip() or "another process"
            raise InUse(f"{file} is held by {holder}", holder)
        time.sleep(0.1)
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{this_process()} ({who})\n".encode(), 0)
    return descriptor


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
