"""Pictures on disk: features computed once a file, and a search for the near duplicate of a picture among all so far.

Both live in SQLite, so memory stays the same whatever their number.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lingshu_rl.curate.images import (
    FEATURES,
    LONG_BITS,
    SCORE,
    THUMB,
    VARIANTS,
    Features,
    ImageError,
    View,
    distance,
    features,
    likeness,
)

BANDS = 4  # a short hash is looked up by four pieces of 16 bits
ALIGNED = 8  # candidates of a query that are aligned pixel by pixel, the nearest by the long hash
CACHE_KIB = 32 * 1024  # of SQLite's pages, a database
MAX_DISTANCE = 15
TABLE = f"features_{FEATURES}"


def open_database(path: Path | str, *, scratch: bool) -> sqlite3.Connection:
    """scratch: a database that a killed run throws away, written without a journal."""
    if scratch:
        for leftover in (Path(path), Path(f"{path}-journal")):
            leftover.unlink(missing_ok=True)
    base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    base.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    base.execute("PRAGMA temp_store = FILE")
    if scratch:
        base.execute("PRAGMA journal_mode = OFF")
        base.execute("PRAGMA synchronous = OFF")
        base.execute("PRAGMA locking_mode = EXCLUSIVE")
        base.execute("BEGIN")  # never committed: pages spill to the file when the cache is full
    else:
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = NORMAL")
    return base


class FeatureStore:
    """Features of image files, kept under path, size and time of change; survives a kill."""

    def __init__(self, path: Path, workers: int | None = None) -> None:
        self.base = open_database(path, scratch=False)
        self.base.execute(
            f"CREATE TABLE IF NOT EXISTS {TABLE} (path TEXT, bytes INTEGER, changed INTEGER, error TEXT, "
            "sha TEXT, pixels TEXT, width INTEGER, height INTEGER, std REAL, sharpness REAL, queries BLOB, thumb BLOB, "
            "PRIMARY KEY (path)) WITHOUT ROWID"
        )
        self.pool = ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1)

    def get(self, image: str | bytes) -> Features | ImageError:
        """The error is returned, not raised: an unreadable picture is a finding."""
        return self._finish(image, self._begin(image))

    def prefetch(self, groups: Iterable[tuple[object, tuple[str, ...]]], ahead: int = 32) -> Iterator[tuple]:
        """Yield (thing, features of its images) in order while the pictures of the next `ahead` things are decoded."""
        waiting: deque[tuple[object, list[tuple[str, Features | ImageError | Future]]]] = deque()
        under_way: dict[str, Future] = {}

        def settle() -> tuple:
            thing, begun = waiting.popleft()
            found = []
            for image, state in begun:
                found.append(self._finish(image, state))
                under_way.pop(image, None)
            return thing, found

        for thing, images in groups:
            begun = []
            for image in images:
                state = under_way.get(image) or self._begin(image)
                if isinstance(state, Future):
                    under_way[image] = state
                begun.append((image, state))
            waiting.append((thing, begun))
            if len(waiting) > ahead:
                yield settle()
        while waiting:
            yield settle()

    def _begin(self, image: str | bytes) -> Features | ImageError | Future:
        if isinstance(image, str) and (known := self._known(image)) is not None:
            return known
        return self.pool.submit(_try_features, image)

    def _finish(self, image: str | bytes, state: Features | ImageError | Future) -> Features | ImageError:
        if not isinstance(state, Future):
            return state
        result = state.result()
        if isinstance(image, str) and os.path.isfile(image):
            stat = os.stat(image)
            row: tuple
            if isinstance(result, Features):
                r = result
                queries = b"".join(s.to_bytes(8, "big") + long for view in r.views for s, long in view.queries)
                thumbs = b"".join(view.thumb for view in r.views)
                row = (None, r.sha, r.pixels, r.width, r.height, r.std, r.sharpness, queries, thumbs)
            else:
                row = (str(result), *[None] * 8)
            key = (os.path.abspath(image), stat.st_size, stat.st_mtime_ns)
            self.base.execute(f"INSERT OR REPLACE INTO {TABLE} VALUES ({','.join('?' * 12)})", (*key, *row))
        return result

    def _known(self, image: str) -> Features | ImageError | None:
        query = f"SELECT * FROM {TABLE} WHERE path = ?"
        row = self.base.execute(query, (os.path.abspath(image),)).fetchone()
        if row is None:
            return None
        _, size, changed, error, sha, pixels, width, height, std, sharpness, queries, thumbs = row
        try:
            stat = os.stat(image)
        except OSError:
            return None
        if (stat.st_size, stat.st_mtime_ns) != (size, changed):
            return None
        if error is not None:
            return ImageError(error)
        pairs = [(int.from_bytes(q[:8], "big"), q[8:]) for q in _pieces(queries, 40)]
        views = zip(_pieces(thumbs, THUMB * THUMB), _pieces(pairs, len(VARIANTS)), strict=True)
        found = tuple(View(thumb, tuple(hashes)) for thumb, hashes in views)
        return Features(sha, pixels, width, height, std, sharpness, found)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.base.close()


def _try_features(image: str | bytes) -> Features | ImageError:
    try:
        return features(image)
    except ImageError as error:
        return error


@dataclass(frozen=True)
class Match:
    """owner: what the matching picture was added under. how: "exact" (bytes or pixels) or "near". score: 1.0 if
    exact."""

    owner: str
    how: str
    distance: int
    score: float


class ImageIndex:
    """Near-duplicate search. distance: bits of 64 in which a candidate's hash may differ (0: exact copies only)."""

    def __init__(self, path: Path | str, max_distance: int = 7, min_score: float = SCORE) -> None:
        if not 0 <= max_distance <= MAX_DISTANCE:
            raise ValueError(f"distance must lie between 0 and {MAX_DISTANCE} bits, got {max_distance}")
        self.max_distance, self.min_score = max_distance, min_score
        self.base = open_database(path, scratch=True)
        for statement in (
            "CREATE TABLE pictures (id INTEGER PRIMARY KEY, owner TEXT, short BLOB, long BLOB, thumb BLOB)",
            "CREATE TABLE digests (digest TEXT, id INTEGER, PRIMARY KEY (digest, id)) WITHOUT ROWID",
            "CREATE TABLE bands (key INTEGER, id INTEGER, PRIMARY KEY (key, id)) WITHOUT ROWID",
        ):
            self.base.execute(statement)

    def add(self, picture: Features, owner: str) -> None:
        insert = "INSERT INTO pictures (owner, short, long, thumb) VALUES (?, ?, ?, ?)"
        for view in picture.views:
            short, long = view.queries[0]
            number = self.base.execute(insert, (owner, short.to_bytes(8, "big"), long, view.thumb)).lastrowid
            digests = [(picture.sha, number), (picture.pixels, number)]
            self.base.executemany("INSERT OR IGNORE INTO digests VALUES (?, ?)", digests)
            if not picture.flat:
                rows = [(int(key), number) for key in _keys(np.array([short], np.uint64), 0)]
                self.base.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", rows)

    def find(self, picture: Features) -> Match | None:
        """The best match: an exact copy, else the candidate whose aligned pixels agree best."""
        query = "SELECT owner FROM digests JOIN pictures USING (id) WHERE digest IN (?, ?) ORDER BY id LIMIT 1"
        if row := self.base.execute(query, (picture.sha, picture.pixels)).fetchone():
            return Match(row[0], "exact", 0, 1.0)
        if self.max_distance == 0 or picture.flat:
            return None
        best: Match | None = None
        for view in picture.views:
            for number, bits, variant in self._candidates(view):
                owner, thumb = self.base.execute("SELECT owner, thumb FROM pictures WHERE id = ?", (number,)).fetchone()
                score = likeness(view.thumb, thumb, variant)
                if score >= self.min_score and (best is None or score > best.score):
                    best = Match(owner, "near", bits, score)
        return best

    def _candidates(self, view: View) -> list[tuple[int, int, int]]:
        """(number, distance, variant) of at most ALIGNED pictures, the nearest by the long hash first."""
        shorts = np.array([short for short, _ in view.queries], np.uint64)
        # Two hashes that differ in d bits agree up to d // BANDS bits in one of their pieces.
        keys = _keys(shorts, self.max_distance // BANDS)
        numbers: set[int] = set()
        for start in range(0, len(keys), 900):
            part = ",".join(map(str, keys[start : start + 900].tolist()))
            numbers.update(n for (n,) in self.base.execute(f"SELECT DISTINCT id FROM bands WHERE key IN ({part})"))
        longs = np.array([np.frombuffer(long, np.uint8) for _, long in view.queries])
        near = []
        for group in _pieces(sorted(numbers), 900):
            places = ",".join(map(str, group))
            for number, short, long in self.base.execute(
                f"SELECT id, short, long FROM pictures WHERE id IN ({places})"
            ):
                value = int.from_bytes(short, "big")
                bits = [distance(value, s) for s, _ in view.queries]
                if min(bits) > self.max_distance:
                    continue
                gaps = np.bitwise_count(longs ^ np.frombuffer(long, np.uint8)).sum(1)
                variant = int(gaps.argmin())
                if gaps[variant] > LONG_BITS:
                    continue
                near.append((int(gaps[variant]), number, min(bits), variant))
        return [(number, bits, variant) for _, number, bits, variant in sorted(near)[:ALIGNED]]

    def close(self) -> None:
        self.base.close()


def _keys(shorts: np.ndarray, flips: int) -> np.ndarray:
    """Band keys of hashes, with up to `flips` bits of each piece changed: unique integers (band in the high bits)."""
    bands = np.arange(BANDS, dtype=np.uint64)
    pieces = (shorts[:, None] >> (bands * np.uint64(16))) & np.uint64(0xFFFF)
    varied = (pieces[..., None] ^ _flips(flips)) | (bands[:, None] << np.uint64(16))
    return np.unique(varied)


@cache
def _flips(count: int) -> np.ndarray:
    masks = [0]
    for n in range(1, count + 1):
        masks += [sum(1 << bit for bit in bits) for bits in itertools.combinations(range(16), n)]
    return np.array(masks, np.uint64)


def _pieces(whole: Any, size: int) -> list[Any]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]
