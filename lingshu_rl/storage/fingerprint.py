"""What a file or a folder holds, as a short hash: the same content gives the same hash, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lingshu_rl.storage.runfolder import write_text

LENGTH = 16


def text_hash(value: Any) -> str:
    """Of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:LENGTH]


class Fingerprints:
    """Hashes of files; with `memory`, a file whose size and time have not changed is not read again."""

    def __init__(self, memory: Path | None = None) -> None:
        self.memory = memory
        self._known: dict[str, list[Any]] = {}
        if memory is not None and memory.exists():
            try:
                self._known = json.loads(memory.read_text())
            except json.JSONDecodeError:  # a memory that cannot be read costs time, nothing else
                self._known = {}

    def of(self, path: Path) -> str:
        """Raises FileNotFoundError. A folder is its files' names and contents; links are followed."""
        if path.is_file():
            return self._file(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such file or folder")
        files = sorted(Path(top) / name for top, _, names in os.walk(path, followlinks=True) for name in names)
        return text_hash([[str(file.relative_to(path)), self._file(file)] for file in files])

    def save(self) -> None:
        if self.memory is not None:
            write_text(self.memory, json.dumps(self._known, indent=0, sort_keys=True))

    def _file(self, path: Path) -> str:
        name, stat = str(path.resolve()), path.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(name)
        if known is None or known[:2] != seen:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            known = [*seen, digest.hexdigest()[:LENGTH]]
            self._known[name] = known
        return str(known[2])
