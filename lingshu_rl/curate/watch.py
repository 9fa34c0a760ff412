"""The files that a finished step looked at beside its input, so that one repaired, changed or fetched later is
noticed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


class Watch:
    """A list of paths on disk, each written once in a row of mentions; `digest` says how those files stand now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path.open("w", encoding="utf-8", errors="surrogateescape")
        self.last = ""

    def __call__(self, file: Path | str) -> None:
        """Remember a file, whether it exists or not."""
        name = os.path.abspath(file)
        if name != self.last:
            self.last = name
            self.lines.write(name.replace("\n", "\0") + "\n")

    def close(self) -> str:
        """The digest of what was seen."""
        self.lines.close()
        return digest(self.path)


def digest(watched: Path) -> str:
    """Hash of size and time of change of every file of a list; "" where the list is gone."""
    if not watched.is_file():
        return ""
    total = hashlib.sha256()
    with watched.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            state = _state(line.rstrip("\n").replace("\0", "\n"))
            total.update(state.encode("utf-8", "surrogateescape") + b"\0")
    return total.hexdigest()


def _state(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return f"{path} is missing"
    return f"{path} {found.st_size} {found.st_mtime_ns}"
