"""The steps that look at the whole set: shares of classes, places of right options, splits by patient."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lingshu_rl.curate.image_index import open_database
from lingshu_rl.curate.items import SPLIT_KEY, Context, Dropped, Item, group_of, rank
from lingshu_rl.data.rows import LETTERS, row_to_prompt

MAX_CLASSES = 10_000
FIELDS = ("answer", "kind", "source")


@dataclass(frozen=True)
class Balance:
    """Thin out classes that are over their share.

    of: what makes the class: "answer" (yes/no, or the letter), "kind", "source" or "meta.NAME". kinds: only rows of
    these kinds are counted and thinned; [] = all. max_share: of any class among the counted rows; or shares: of the
    named classes, others stay free. Which rows stay is drawn by the hash of their ids.
    """

    name: ClassVar[str] = "balance"
    of: str = "answer"
    kinds: tuple[str, ...] = ()
    max_share: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.of not in FIELDS and not self.of.startswith("meta."):
            raise ValueError(f"balance.of={self.of!r} is none of {', '.join(FIELDS)} or meta.NAME")
        if bool(self.max_share) == bool(self.shares):
            raise ValueError("balance needs max_share or shares, and not both")
        for name, share in {"max_share": self.max_share or 0.5, **self.shares}.items():
            if not 0 < share < 1:
                raise ValueError(f"balance: the share of {name!r} must lie between 0 and 1, got {share}")

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Item | Dropped]:
        drawn = open_database(context.folder / "drawn.sqlite", scratch=True)
        drawn.execute(
            "CREATE TABLE drawn (class TEXT, draw INTEGER, id TEXT, PRIMARY KEY (class, draw, id)) WITHOUT ROWID"
        )
        counts: dict[str, int] = {}
        for item in rows:
            if (name := self.class_of(item)) is None:
                continue
            counts[name] = counts.get(name, 0) + 1
            if len(counts) > MAX_CLASSES:
                raise ValueError(f"balance.of={self.of!r} has over {MAX_CLASSES:,} classes; it is meant for few")
            key = (name, rank(context.seed, "balance", self.of, str(item.row["id"])), str(item.row["id"]))
            drawn.execute("INSERT INTO drawn VALUES (?, ?, ?)", key)
        allowed = targets(counts, self.shares or {name: self.max_share for name in counts})
        last: dict[str, tuple[int, str]] = {}
        for name, n in allowed.items():
            if n < counts[name]:
                found = drawn.execute(
                    "SELECT draw, id FROM drawn WHERE class = ? ORDER BY draw, id LIMIT 1 OFFSET ?", (name, n)
                ).fetchone()
                last[name] = found  # the first that has to go
        drawn.close()
        context.notes.update(before=counts, after=allowed)
        for item in rows:
            name = self.class_of(item)
            if name in last:
                assert name is not None
                key_of_item = (rank(context.seed, "balance", self.of, str(item.row["id"])), str(item.row["id"]))
                if key_of_item >= last[name]:
                    yield Dropped.item(item, "surplus", f"{self.of} {name}: {allowed[name]} of {counts[name]} stay")
                    continue
            yield item

    def class_of(self, item: Item) -> str | None:
        """None: the row is not counted."""
        if self.kinds and item.row["kind"] not in self.kinds:
            return None
        if self.of == "source":
            return item.source
        if self.of == "kind":
            return str(item.row["kind"])
        if self.of == "answer":
            return str(row_to_prompt(item.row).gold)
        return str(item.meta.get(self.of.removeprefix("meta."), ""))


def targets(counts: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """The most rows of every class so that none is over its share of what stays. Raises ValueError if there is no
    way."""
    for name in shares:
        if name not in counts:
            raise ValueError(f"balance: no row has the class {name!r}; there are {', '.join(sorted(counts)[:20])}")
    if set(counts) <= set(shares) and sum(shares[name] for name in counts) < 1 - 1e-9:
        raise ValueError(
            f"balance: the shares of all {len(counts)} classes sum to {sum(shares[n] for n in counts):.2f}, below 1"
        )
    total = sum(counts.values())
    while True:  # a cut shrinks the whole, and with it what the shares allow; ends at the largest whole that holds
        kept = {name: min(n, math.floor(shares.get(name, 1.0) * total + 1e-9)) for name, n in counts.items()}
        if (left := sum(kept.values())) == total:
            break
        total = left
    if counts and not total:
        raise ValueError(f"balance: these shares leave no row of {dict(counts)}")
    return kept


@dataclass(frozen=True)
class ShuffleOptions:
    """Lay out the options of every option row anew, so that no letter is right more often than another.

    Rows whose options point at each other ("all of the above", "A and C") stay as they are.
    """

    name: ClassVar[str] = "shuffle_options"

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Item | Dropped]:
        for item in rows:
            if item.row["kind"] != "option" or item.meta.get("multi") is True:
                yield item
                continue
            prompt = row_to_prompt(item.row)
            options = list(prompt.options)
            if any(_points_at_others(text) for text in options):
                context.count("left_as_they_are")
                yield item
                continue
            right = options[LETTERS.index(prompt.gold)]
            random.Random(rank(context.seed, "options", str(item.row["id"]))).shuffle(options)
            yield item.with_row(options=options, answer=LETTERS[options.index(right)])


def _points_at_others(option: str) -> bool:
    text = option.casefold()
    pieces = text.replace(",", " ").replace("&", " ").replace(" and ", " ").replace(" or ", " ").split()
    letters = len(pieces) > 1 and all(len(piece) == 1 for piece in pieces)
    return letters or any(
        part in text for part in ("of the above", "of these", "of the options", "both a", "all the above")
    )


@dataclass(frozen=True)
class Split:
    """Divide into train, validation and test so that no patient and no picture stands in two of them.

    validation, test: shares. Rows that share a patient or a picture (by dedup_images' groups) form one block; the
    block's hash decides, so a row keeps its split when others are added to other blocks. Shares are met on average.
    """

    name: ClassVar[str] = "split"
    validation: float = 0.0
    test: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise ValueError(
                f"split: validation={self.validation} and test={self.test} must be shares that leave some to train on"
            )

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Item | Dropped]:
        blocks = Blocks(context)
        for item in rows:
            blocks.join(self.keys(item))
        for item in rows:
            block = blocks.find(self.keys(item)[0])
            draw = rank(context.seed, "split", block) / 2**63
            split = "test" if draw < self.test else "validation" if draw < self.test + self.validation else "train"
            context.count(split)
            yield item.with_meta(**{SPLIT_KEY: split})
        blocks.close()

    def keys(self, item: Item) -> list[str]:
        keys = [f"p:{patient}"] if (patient := item.meta.get("patient_id")) not in (None, "") else []
        keys += [f"i:{group}" for group in group_of(item).split("+") if group]
        return keys or [f"r:{item.row['id']}"]


class Blocks:
    """Sets of keys that were named together, on disk. A block's name is its smallest key."""

    def __init__(self, context: Context) -> None:
        self.base = open_database(context.folder / "blocks.sqlite", scratch=True)
        self.base.execute("CREATE TABLE blocks (key TEXT PRIMARY KEY, block TEXT) WITHOUT ROWID")
        self.base.execute("CREATE INDEX members ON blocks (block)")

    def join(self, keys: list[str]) -> None:
        found = {key: self.find(key) for key in keys}
        smallest = min(found.values())
        for key in keys:
            self.base.execute("INSERT OR IGNORE INTO blocks VALUES (?, ?)", (key, smallest))
        for block in set(found.values()) - {smallest}:
            self.base.execute("UPDATE blocks SET block = ? WHERE block = ?", (smallest, block))

    def find(self, key: str) -> str:
        row: tuple[Any, ...] | None = self.base.execute("SELECT block FROM blocks WHERE key = ?", (key,)).fetchone()
        return row[0] if row else key

    def close(self) -> None:
        self.base.close()
