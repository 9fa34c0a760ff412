"""Damaged copies of whole files: what a cut transfer, a bad disk or an attacker makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

# Bytes that fields of a length, a count or a text are broken with.
TELLING = (
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\xfe\xff\xff\xff",
    b"\xff\xff",
    b"\x00\x00",
    b"1000000000",
    b"-1",
    b"nan",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 1500,
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\r",
    b"\n",
    b'"',
    b"~nosuchuser/x.png",
    b"x" * 5000,
    b"a\\u0000b",
    b"\xc3",
    b"null",
    b"true",
    b"{}",
    b"''",
    b"\xef\xbb\xbf",
)


def _place(data: bytes, rng: random.Random) -> int:
    """Anywhere, and half of the times near the start, where headers are."""
    return rng.randrange(min(len(data), 400) if rng.random() < 0.5 else len(data))


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    at, piece = _place(data, rng), rng.choice(TELLING)
    return data[:at] + piece + data[at + len(piece) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.choice(TELLING) + data[at:]


def _remove(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 60)) :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at, length = _place(data, rng), rng.choice((4, 16, 200))
    return data[:at] + data[at : at + length] * rng.choice((2, 30)) + data[at + length :]


def _splice(data: bytes, rng: random.Random) -> bytes:
    first, second = sorted((_place(data, rng), _place(data, rng)))
    return data[:first] + data[second:]


CHANGES: Sequence[Callable[[bytes, random.Random], bytes]] = (
    _flip,
    _flip,
    _overwrite,
    _overwrite,
    _insert,
    _remove,
    _cut,
    _repeat,
    _splice,
)


def mutant(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of a file; never an empty one."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        data = rng.choice(CHANGES)(data, rng) or b"\0"
    return data
