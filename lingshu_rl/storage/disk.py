"""What goes wrong with files, in a line: which file, why, and of a full disk how many MB are free there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lingshu_rl.failures import RunStopped

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = tuple(os.strerror(number) for number in _FULL)  # as libraries with errors of their own repeat them


class DiskError(RunStopped):
    """A file cannot be written; the message names it, the cause and the room that is left."""


def is_full(error: BaseException) -> bool:
    """A disk, a quota or a limit on files; also where a library says so in its own error."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


def said(error: BaseException, path: Path | None = None) -> str:
    """The error in a line, with the file where the system names it. path: what was to be written, whose disk is looked
    at."""
    named = getattr(error, "filename", None)
    file = Path(named) if isinstance(named, str) else None
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    place = file or path
    left = f" ({room(place)})" if place is not None and is_full(error) and "MB" not in text else ""
    return (f"{file}: {text}" if file is not None else text) + left


def room(path: Path) -> str:
    """How much is free where this file is or would be. A quota of the user's leaves less, and does not show."""
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))
    usage = shutil.disk_usage(there)
    return f"{usage.free / 1e6:,.1f} MB of {usage.total / 1e6:,.1f} MB are free; a quota may leave less"


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file to write aside, which takes the place of `path` at the end: a reader sees the old one or the new one
    whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as out:
        yield out
    part.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever a failed write raises (each library has its own error) into a DiskError."""
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        raise DiskError(f"{path} cannot be written: {said(error, path)}") from error
