"""When two texts are the same one: shared words and word pairs (Jaccard), found through MinHash and banded buckets on
disk.

MinHash only proposes; a pair counts as near duplicate when the exact Jaccard index of both texts reaches the threshold
and the words that carry the finding agree (numbers, sides, negations, degrees): "no left effusion" is not "left
effusion". What a question asks and what a report states is told more exactly by `asked` and `stated`, where rows are to
be dropped.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np

from lingshu_rl.curate.image_index import open_database

PERMUTATIONS = 128
MIN_RECALL = 0.95  # chance that a pair exactly at the threshold is proposed
BUCKET = 4  # rows kept a bucket: what a template repeats a million times must not be compared a million times
SKETCHED = 32  # candidates of a query whose Jaccard index is estimated, those in most common buckets first
COMPARED = 16  # ... and computed, those with the highest estimate first
SLACK = 0.15  # how far an estimate from PERMUTATIONS hashes may fall short: over three standard deviations

WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+", re.UNICODE)
NEGATIONS = frozenset("no not without absent absence negative denies free never none nor neither cannot".split())
# Words whose exchange changes what is found, in classes of equal meaning.
TELLING = {
    word: words.split()[0]
    for words in (
        "left l",
        "right r",
        "bilateral both",
        "upper superior",
        "lower inferior",
        "anterior",
        "posterior",
        "medial",
        "lateral",
        "yes",
        "normal unremarkable",
        "abnormal",
        "enlarged enlargement",
        "mild mildly slight slightly minimal",
        "moderate moderately",
        "severe severely marked markedly",
        "acute",
        "chronic",
        "increased increase",
        "decreased decrease",
        "stable unchanged",
        "new",
        "resolved",
        "benign",
        "malignant",
        "male man",
        "female woman",
    )
    for word in words.split()
}


def words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def telling_words(text: str) -> tuple[tuple[str, ...], int]:
    """The numbers and finding words of a text, sorted, each once; and how many negations it has."""
    found, negations = set(), 0
    for word in words(text):
        if word in NEGATIONS:
            negations += 1
        elif word in TELLING:
            found.add(TELLING[word])
        elif word[0].isdigit():
            found.add(word)
    return tuple(sorted(found)), negations


# Words of a question that say how it is put, not what is asked.
_FRAME = """
a an the this that these those any some please following given shown here there it its is are was were be been being
am do does did has have had can could would should may might will you your we i me in of on at by for with as image
images picture pictures photo photograph scan scans film films study figure exam examination patient s evidence sign
signs seen see visible visualized visualised show shows showing depict depicts depicted display displays displayed
demonstrate demonstrates demonstrated present noted identified observed located
"""
FRAME = frozenset(_FRAME.split())
# Words that mean little without the one after them: "left" of what, "than" what.
BINDING = NEGATIONS | {"than", "from", "to", "before", "after", "over", "under", "into", "between", *TELLING.values()}
DOUBTS = frozenset("possible possibly probable probably likely unlikely suspected suspicious questionable may".split())
SAME_WORD = {"which": "what", **TELLING}
# How words for diseases, operations and substances end, whatever the speciality.
TERM_ENDING = re.compile(
    r"(?:itis|omas?|osis|oses|emia|aemia|uria|pathy|pathies|ectasis|ectasia|megaly|plasia|ectomy|ostomy|otomy|thorax"
    r"|algia"
    r"|rrhage|rrhagic|stenosis|stenotic|sclerosis|sclerotic|lithiasis|penia|cele|dynia|phagia|plegia|trophy|lysis"
    r"|listhesis"
    r"|adenopathy|effusions?|edema|oedema|fractured?s?|tumou?rs?|cysts?|cystic|lesions?|mass(?:es)?|nodules?"
    r"|opacit(?:y|ies)|infarcts?"
    r"|infarction|ischemi[ac]|ischaemi[ac]|aneurysms?|thromb\w+|embol\w+|absces\w+|calcifi\w+|ulcer\w*|polyps?"
    r"|necro\w+|metasta\w+)$"
)


def asked(question: str, options: Iterable[str] = ()) -> str:
    """One text for all wordings that ask the same: the words that carry the question, sorted, without those that only
    frame it ("Does this image show ...?"). A question of nothing but frame words is kept as it is.
    """
    carrying = _carrying(question)
    kept = carrying if set(carrying) - {"what"} else words(question)
    bound = [f"{a} {b}" for a, b in pairwise(kept) if a in BINDING]
    choices = sorted(" ".join(_carrying(option) or words(option)) for option in options)
    return "|".join([*sorted(kept), *sorted(bound), "/", *choices])


def _carrying(text: str) -> list[str]:
    found = [SAME_WORD.get(word, word) for word in words(text) if word not in FRAME]
    return [_singular(word) for word in found]


def _singular(word: str) -> str:
    from rewards.report import load

    return load().stem(word)


def stated(report: str) -> str:
    """One text for all wordings that state the same: the findings that the report reader knows, names of diseases and
    operations that it may not know, what is denied, doubted and on which side, and the numbers and finding words.

    Not the reader's stances: they follow the sentences, and a copy may have lost its full stops.
    """
    from rewards.report import load
    from rewards.report.sentences import read
    from rewards.report.terms import find

    lexicon = load()
    findings = {
        head.name for sentence in read(report, lexicon).sentences for head in find(sentence.words, lexicon).heads
    }
    terms = {_singular(word) for word in words(report) if TERM_ENDING.search(word)}
    doubts = sum(word in DOUBTS for word in words(report))
    parts = (findings, terms, _denied(report), _sided(report))
    return "/".join([*("|".join(sorted(part)) for part in parts), str(doubts), repr(telling_words(report))])


def _denied(report: str) -> set[str]:
    carrying = [word for word in words(report) if word not in FRAME]
    return {f"no {_singular(b)}" for a, b in pairwise(carrying) if a in ("no", "without")}


def _sided(report: str) -> set[str]:
    found = set()
    for sentence in re.split(r"[.;:\n]", report):
        carrying = [TELLING.get(word, word) for word in words(sentence) if word not in FRAME]
        found |= {f"{a} {_singular(b)}" for a, b in pairwise(carrying) if a in ("left", "right", "bilateral")}
    return found


def shingles(text: str) -> frozenset[int]:
    """Hashes (32 bits) of the text's words and pairs of neighbouring words."""
    w = words(text)
    grams = {*w, *(f"{a} {b}" for a, b in pairwise(w))}
    return frozenset([zlib.crc32(gram.encode()) for gram in grams])


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


@dataclass(frozen=True)
class TextMatch:
    """owner: what the matching text was added under. score: Jaccard index; 1.0 for equal word sets."""

    owner: str
    score: float


class TextIndex:
    """Near-duplicate search over texts. threshold: smallest Jaccard index of a pair. guard: telling words must
    agree."""

    def __init__(self, path: Path | str, threshold: float = 0.6, guard: bool = True) -> None:
        from datasketch import MinHash

        if not 0.3 <= threshold <= 1:
            raise ValueError(f"threshold must lie between 0.3 and 1, got {threshold}")
        self.threshold, self.guard = threshold, guard
        self.bands, self.rows = band_shape(threshold)
        self.blank = MinHash(PERMUTATIONS, scheme="affine32", hashfunc=int)
        self.mix = np.random.default_rng(7).integers(
            1, 2**63, size=(self.bands, self.rows), dtype=np.uint64
        ) | np.uint64(1)
        self.base = open_database(path, scratch=True)
        self.base.execute("CREATE TABLE texts (id INTEGER PRIMARY KEY, owner TEXT, text TEXT, sketch BLOB)")
        self.base.execute("CREATE TABLE buckets (key INTEGER, id INTEGER, PRIMARY KEY (key, id)) WITHOUT ROWID")
        # at most BUCKET a key are stored
        self.lookup = f"SELECT key, id FROM buckets WHERE key IN ({','.join('?' * self.bands)})"

    def find_or_add(self, text: str, owner: str, group: str = "") -> TextMatch | None:
        """The nearest earlier text of the same group; without one, the text is added under `owner`."""
        own = shingles(text)
        values, keys = self._keys(own, group)
        match, full = self._search(text, own, values, keys)
        if match is None:
            self._store(text, owner, values, keys, full)
        return match

    def find(self, text: str, group: str = "") -> TextMatch | None:
        own = shingles(text)
        return self._search(text, own, *self._keys(own, group))[0]

    def add(self, text: str, owner: str, group: str = "") -> None:
        own = shingles(text)
        values, keys = self._keys(own, group)
        self._store(text, owner, values, keys, self._search(text, own, values, keys)[1])

    def _keys(self, own: frozenset[int], group: str) -> tuple[np.ndarray, list[int]]:
        """The MinHash sketch and the keys of its buckets."""
        from datasketch import MinHash

        sketch = MinHash(
            PERMUTATIONS, scheme="affine32", hashfunc=int, permutations=self.blank.permutations
        )  # shares the permutations, which take longest to make
        sketch.update_batch(own)
        values = sketch.hashvalues
        table = values[: self.bands * self.rows].reshape(self.bands, self.rows).astype(np.uint64)
        keys = (table * self.mix).sum(1, dtype=np.uint64) ^ np.uint64(_digest(group))
        keys = (keys ^ (keys >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        return values, keys.view(np.int64).tolist()

    def _search(
        self, text: str, own: frozenset[int], values: np.ndarray, keys: list[int]
    ) -> tuple[TextMatch | None, set[int]]:
        """The match, and the buckets that are full."""
        count: dict[int, int] = {}
        size: dict[int, int] = {}
        for key, number in self.base.execute(self.lookup, keys):
            count[number] = count.get(number, 0) + 1
            size[key] = size.get(key, 0) + 1
        full = {key for key, n in size.items() if n >= BUCKET}
        if not count:
            return None, full
        likely = sorted(count, key=lambda n: (-count[n], n))[:SKETCHED]
        query = f"SELECT id, sketch FROM texts WHERE id IN ({','.join(map(str, likely))})"
        found = self.base.execute(query).fetchall()
        sketches = np.frombuffer(b"".join(sketch for _, sketch in found), values.dtype).reshape(len(found), -1)
        estimates = (sketches == values).mean(1).tolist()
        near = sorted((-e, n) for e, (n, _) in zip(estimates, found, strict=True) if e >= self.threshold - SLACK)
        best: TextMatch | None = None
        telling = telling_words(text) if self.guard and near else None
        for _, number in near[:COMPARED]:
            owner, other = self.base.execute("SELECT owner, text FROM texts WHERE id = ?", (number,)).fetchone()
            score = jaccard(own, shingles(other))
            if score < self.threshold or (best is not None and score <= best.score):
                continue
            if telling is None or telling == telling_words(other):
                best = TextMatch(owner, score)
                if score == 1.0:
                    break
        return best, full

    def _store(self, text: str, owner: str, values: np.ndarray, keys: list[int], full: set[int]) -> None:
        insert = "INSERT INTO texts (owner, text, sketch) VALUES (?, ?, ?)"
        number = self.base.execute(insert, (owner, text, values.tobytes())).lastrowid
        rows = [(key, number) for key in keys if key not in full]
        self.base.executemany("INSERT OR IGNORE INTO buckets VALUES (?, ?)", rows)

    def close(self) -> None:
        self.base.close()


@cache
def band_shape(threshold: float) -> tuple[int, int]:
    """(bands, rows a band): the strictest that still proposes a pair at the threshold with MIN_RECALL."""
    for rows in range(PERMUTATIONS // 2, 0, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= MIN_RECALL:
            return bands, rows
    return PERMUTATIONS, 1


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
