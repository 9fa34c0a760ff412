"""A folder that a command writes into is that command's alone while it works, and an older one is kept aside.

The lock lies with an open file, so the kernel frees it with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lingshu_rl.config import ConfigError

LOCK = ".lock"


class InUse(RuntimeError):
    """Another process works on it. holder: which one, in words."""

    def __init__(self, what: str, holder: str) -> None:
        super().__init__(what)
        self.holder = holder


@contextmanager
def own(place: Path, who: str, key: str, *, afresh: bool = False, file: bool = False) -> Iterator[None]:
    """Only this process works in the folder, which is made if need be, or writes the file.

    who: the command, for whoever finds it taken. key: the setting that names it. afresh: what is in the folder is kept
    aside as FOLDER.old-1 and so on. Raises InUse naming the holder, ConfigError where nothing can be written.
    """
    lock = place.with_name(f".{place.name}.lock") if file else place / LOCK
    try:
        descriptor = take(lock, who)
        if afresh and any(path.name != LOCK for path in place.iterdir()):
            place.rename(next(p for n in range(1, 10_000) if not (p := Path(f"{place}.old-{n}")).exists()))
            os.close(descriptor)
            descriptor = take(lock, who)
    except InUse as taken:
        told = f"{place} is in use by {taken.holder}: wait for it, stop it, or give another name ({key})"
        raise InUse(told, taken.holder) from None
    except OSError as error:
        raise ConfigError(f"{key}={place} cannot be written: {error}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def take(file: Path, who: str) -> int:
    """Hold a file until the returned descriptor is closed, or this process ends. Raises InUse."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        holder = file.read_text(errors="replace").strip() or "another process"
        raise InUse(f"{file} is held by {holder}", holder) from None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} ({who})\n".encode(), 0)
    return descriptor
