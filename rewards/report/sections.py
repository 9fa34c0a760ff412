"""A report to its sections: what was asked, done and compared is left out, what was found is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rewards.report.lexicon import Lexicon

SKIP, CLOSING, FINDINGS, IMPRESSION, ORGAN = "skip", "closing", "findings", "impression", "organ"
LEFT_OUT = (SKIP, CLOSING)  # what was asked and done, and what should be done next

_WORD = re.compile(r"[^\W_]+")
_COLON = re.compile(":")
_DASHED = re.compile(r"[-–—][ \t]")
_LABEL_END = re.compile(r":|(?<=\w)[ \t]+[-–—]{1,3}(?=[ \t])")
_BORDERS = "\n.;!?:|"  # what a heading cannot reach across
_LABEL_CHARS = 64
_LINE_CHARS = 48
_BLANK = re.compile(r"\S[^\n]*\n[ \t]*\n")
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_NOTHING = re.compile(r"\s*(?:none|no|not? available|n/a|nil|unavailable)\b", re.IGNORECASE)
_LONGEST = 6  # words of a heading


@dataclass(frozen=True)
class Heading:
    """text[begin:end] is the heading with its colon."""

    begin: int
    end: int
    kind: str


@dataclass(frozen=True)
class Section:
    """`kind`: "" (no heading), findings, impression, organ, skip or closing."""

    kind: str
    text: str


def split(text: str, lexicon: Lexicon) -> list[Section]:
    """The sections of a report in order, the skipped ones too."""
    found = sorted(_headings(text, lexicon), key=lambda heading: heading.begin)
    if not found:
        return [Section("", text)]
    sections = [Section("", text[: found[0].begin])]
    for i, heading in enumerate(found):
        later = found[i + 1] if i + 1 < len(found) else Heading(len(text), len(text), "")
        body = text[heading.end : later.begin]
        cut = _skipped(body, later.kind) if heading.kind == SKIP else 0
        if cut:
            sections += [Section(SKIP, body[:cut]), Section("", body[cut:])]
        else:
            sections.append(Section(heading.kind, body))
    return [section for section in sections if section.text.strip()]


def _headings(text: str, lexicon: Lexicon) -> Iterator[Heading]:
    skipping = False
    for end in (_LABEL_END if _DASHED.search(text) else _COLON).finditer(text):
        colon = end.start()
        near = text[max(0, colon - _LABEL_CHARS) : colon]
        begin = colon - len(near) + 1 + max(near.rfind(border) for border in _BORDERS)
        words = list(_WORD.finditer(text, begin, colon))
        heading = _named(text, end, words, lexicon)
        if heading is None and skipping and _begins_line(text, begin) and _names_organ(words, lexicon):
            heading = Heading(begin, end.end(), ORGAN)
        if heading is not None and (end[0] == ":" or _begins_line(text, heading.begin)):
            skipping = heading.kind in LEFT_OUT
            yield heading
    last = -1
    for line in text.split("\n"):
        begin, last = last + 1, last + 1 + len(line)
        if 3 <= len(line) <= _LINE_CHARS and ":" not in line:
            kind = lexicon.headings.get(_phrase(_WORD.findall(line), lexicon))
            if kind and line.strip(" \t*_#>-").count(".") == 0:
                yield Heading(begin, last, kind)


def _named(text: str, end: re.Match[str], words: list[re.Match[str]], lexicon: Lexicon) -> Heading | None:
    """A known heading right before a colon; one that skips has to be the whole label or stand out in capitals."""
    colon = end.start()
    aside = text.rfind("(", words[0].start(), colon) if words and text[colon - 1] == ")" else -1
    if aside >= 0:
        words = [word for word in words if word.start() < aside]  # "REASON FOR EXAM (per the referrer):"
    if words and text[words[0].start() : colon].strip().lower() in lexicon.none_of:
        return None  # "negative findings: ..." heads a list, not a section
    for count in range(min(_LONGEST, len(words)), 0, -1):
        kind = lexicon.headings.get(_phrase([word[0] for word in words[-count:]], lexicon))
        if kind is None:
            continue
        begin = words[-count].start()
        if kind in LEFT_OUT and count < len(words) and not _stands_out(text, begin, colon, words[:-count], lexicon):
            return None
        return Heading(begin, end.end(), kind)
    return None


def _stands_out(text: str, begin: int, colon: int, before: list[re.Match[str]], lexicon: Lexicon) -> bool:
    """ "Relevant history:" on a line of its own is a heading, and so are capitals among other words."""
    if text[begin:colon].isupper() and not text.isupper():
        return True
    first = before[0].start()
    return _begins_line(text, first) and not any(lexicon.stem(word[0].lower()) in lexicon.trie for word in before)


def _phrase(words: list[str], lexicon: Lexicon) -> str:
    return " ".join(lexicon.stem(word.lower()) for word in words[: _LONGEST + 1])


def _begins_line(text: str, at: int) -> bool:
    return not text[text.rfind("\n", 0, at) + 1 : at].strip(" \t*_#>-")


def _names_organ(words: list[re.Match[str]], lexicon: Lexicon) -> bool:
    return len(words) <= _LONGEST and any(lexicon.stem(word[0].lower()) in lexicon.organ_words for word in words)


def _skipped(body: str, then: str) -> int:
    """How much of a skipped section's text belongs to it; 0 for all.

    Where findings have a heading of their own, everything before it was asked or done. Where they have none, they begin
    after a blank line, after the line, or after the first sentence.
    """
    if then in (FINDINGS, ORGAN, *LEFT_OUT):
        return 0
    lead = len(body) - len(body.lstrip(" \t*_"))
    own_line = body[lead : lead + 1] == "\n"
    blank = _BLANK.search(body)
    if blank:
        return blank.end()
    if own_line or (then == IMPRESSION and not _NOTHING.match(body)):
        return 0
    end = _SENTENCE_END.search(body, lead) if "\n" not in body.strip() else re.search(r"\S[^\n]*\n", body)
    return end.end() if end else 0
