"""Report text to sentences of stemmed words: Unicode form, sections, lists, line breaks, abbreviations."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rewards.report.fields import spell_out
from rewards.report.lexicon import Lexicon
from rewards.report.sections import LEFT_OUT, split
from rewards.report.tables import unfold

MAX_WORDS = 1500  # with punctuation; a long whole-body CT report has about 1,400, what is longer is no report
MAX_CHARS = 12_000
MAX_SENTENCE = 100  # words; a longer run is cut, which bounds the work on text without full stops

TOKEN = re.compile(r"[^\W\d_]+\d*|\d+(?:st|nd|rd|th)\b|\d+(?:\.\d+)?|(?<![\w.])\.\d+|[.;:,!?/|]")
_NOT = re.compile(r"\b(can|ca|wo|\w{1,12})n't\b")
_INVISIBLE = re.compile(  # the category Cf
    "[\u00ad\u0600-\u0605\u061c\u06dd\u070f\u08e2\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0001\U000e0020-\U000e007f]"
)
_BRACKETED = re.compile(r"[【〔〖]([^\n【〔〖】〕〗]{1,20})[】〕〗]:?")
_BELOW = re.compile(r"[<≤]\s*(?=\d)")
_TIMES = re.compile(r"(\d)\s?[x×](?=\s?\d)")
_OPTIONAL_PLURAL = re.compile(r"(?<=\w)\(e?s\)", re.IGNORECASE)  # diagnosis(es)
_CAN_NOT = re.compile(r"\bcannot\b")
_DASH = re.compile(r"\s[-–—]+\s|—|\s\|\s")
_HAS_DASH = re.compile("[-–—|]")
_LEADING_QUESTION = re.compile(r"(^|[\s,(])\?+\s*(?=[a-z])", re.MULTILINE)
_BULLET = re.compile(r"^\s*(?:[-•*–—+]+\s|\(?\d{1,2}[.)]\s|[a-z][.)]\s|#+\s*)", re.IGNORECASE)
_MARKUP = str.maketrans({c: " " for c in '*_`#"“”[]{}<>()'} | {"’": "'", "‘": "'"})
_ENDS = frozenset(".;!?")
_SIGNS = frozenset(".;!?:/|x")  # what such a token begins with may be no word; "x" begins a redaction
_NO_END = frozenset(("dr", "e", "g", "i", "eg", "ie", "etc", "fig", "al"))
_REDACTED = re.compile(r"^x{2,}$")
_GOES_ON = frozenset(
    ("and", "or", "nor", "with", "without", "of", "in", "at", "on", "the", "a", "to", "no", "is", "are", ",")
)


class Sentence(NamedTuple):
    """`words`: stems, "," and ":" kept. `lines`: positions where a new line began. `section`: counts the headings."""

    words: tuple[str, ...]
    lines: tuple[int, ...] = ()
    section: int = 0
    question: bool = False


@dataclass(frozen=True)
class Text:
    sentences: tuple[Sentence, ...]
    too_long: bool = False


@lru_cache(maxsize=8)
def _abbreviation_pattern(shorts: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(shorts, key=lambda s: (-len(s), s))
    tails = [re.escape(s) + (r"(?![a-z0-9])" if s[-1].isalnum() else "") for s in longest_first]
    return re.compile(r"(?<![a-z0-9])(?:" + "|".join(tails) + ")")


def clean(text: str) -> str:
    """NFKC, without zero-width, direction and other invisible characters; headings in brackets get a colon."""
    if not text.isascii():
        text = _BRACKETED.sub(r"\n\1:", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))
    return _OPTIONAL_PLURAL.sub("", text) if "s)" in text or "S)" in text else text


def _lines(text: str, shouted: bool) -> Iterator[tuple[str, bool]]:
    """(line, whether it surely begins a new sentence)"""
    fresh, before = True, ""
    for raw in text.splitlines():
        if not raw.strip():
            fresh = True
            continue
        line = _BULLET.sub("", raw)
        first = line.lstrip("* _#")[:1]
        starts = fresh or len(line) != len(raw) or before.endswith((".", ":", ";", "!", "?"))
        if shouted:
            starts = starts or len(before) < 60
        elif first.isupper() and before.rsplit(" ", 1)[-1].lower() not in _GOES_ON and not before.endswith(","):
            starts = True
        yield line, starts
        fresh, before = False, raw.rstrip(" *_")


def read(text: str, lexicon: Lexicon) -> Text:
    """Split a report. Sections that only ask (indication, technique, comparison ...) are left out."""
    too_long = len(text) > MAX_CHARS
    text = clean(text[:MAX_CHARS])
    splitter = _Splitter(lexicon, shouted=text.upper() == text)
    for number, section in enumerate(split(text, lexicon)):
        if section.kind not in LEFT_OUT:
            splitter.section = number
            splitter.take(spell_out(unfold(section.text, lexicon), lexicon))
    return Text(tuple(splitter.sentences), too_long or splitter.count > MAX_WORDS)


class _Splitter:
    """Collects words until a sentence ends."""

    def __init__(self, lexicon: Lexicon, shouted: bool) -> None:
        self.lexicon, self.shouted = lexicon, shouted
        self.shorts = _abbreviation_pattern(tuple(lexicon.abbreviations))
        self.sentences: list[Sentence] = []
        self.words: list[str] = []
        self.lines: list[int] = []
        self.section = self.count = 0
        self.short = False  # whether a short form may stand in this section

    def take(self, text: str) -> None:
        """The sentences of one section; the last of them ends with it."""
        lowered = text.lower()
        self.short = any(short in lowered for short in self.lexicon.abbreviations)
        for line, starts in _lines(text, self.shouted):
            tokens = list(map(self.lexicon.stem, TOKEN.findall(self.plain(line))))
            if starts:
                self.close()
            elif self.words:
                self.lines.append(len(self.words))
            self.count += len(tokens)
            if self.count > MAX_WORDS:
                break
            begin, last = 0, len(tokens) - 1
            for i, token in enumerate(tokens):
                if token[0] in _SIGNS:
                    self.extend(tokens[begin:i])
                    self.add(token, last=i == last)
                    begin = i + 1
            self.extend(tokens[begin:])
        self.close()

    def plain(self, line: str) -> str:
        """Lower case, without markup, short forms written out."""
        line = line.lower()
        if "<" in line or "≤" in line:
            line = _BELOW.sub(" below ", line)
        line = line.translate(_MARKUP)
        if "?" in line:
            line = _LEADING_QUESTION.sub(r"\1 possible ", line)
        if self.short:
            line = self.shorts.sub(lambda match: f" {self.lexicon.abbreviations[match[0]]} ", line)
        if "x" in line or "×" in line:
            line = _TIMES.sub(r"\1 x ", line)
        if "n't" in line:
            line = _NOT.sub(
                lambda m: {"can": "can not", "ca": "can not", "wo": "will not"}.get(m[1], f"{m[1]} not"), line
            )
        if "cannot" in line:
            line = _CAN_NOT.sub("can not", line)
        return _DASH.sub(" , ", line) if _HAS_DASH.search(line) else line

    def add(self, token: str, last: bool) -> None:
        words = self.words
        if token in _ENDS:
            if token != "." or not words or words[-1] not in _NO_END or last:
                self.close(token == "?")
        elif token == ":":
            if words:
                words.append(":")
        elif token in ("/", "|"):
            words.append(",")
        elif token[0] != "x" or not _REDACTED.match(token):
            self.extend([token])

    def extend(self, tokens: list[str]) -> None:
        room = max(0, MAX_SENTENCE - len(self.words))
        while len(tokens) > room:
            self.words += tokens[:room]
            self.close()
            tokens, room = tokens[room:], MAX_SENTENCE
        self.words += tokens

    def close(self, question: bool = False) -> None:
        words = self.words
        while words and words[-1] in (",", ":"):
            words.pop()
        if words:
            self.sentences.append(Sentence(tuple(words), tuple(self.lines), self.section, question))
        words.clear()
        self.lines.clear()
