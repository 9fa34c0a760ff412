"""Commitments in free text: after a cue, before a verdict, on a line of their own, or as the only sentence.

Used by OptionLetter. A question, a condition or a denied cue commits to nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rewards.answer import Answer, Candidate
from rewards.choices import LETTER_ALONE, OptionSet, may_be_conditional, named_first, text_head
from rewards.claims import asks, is_disowned, says_another
from rewards.phrases import CHOSEN, CONFLICT, EXCLUDED, MAX_PHRASE, NOTHING, Reading, denied_later, read_phrase
from rewards.text import sentence_spans, strip_markup, text_key, unwrap_latex
from rewards.words import words


@dataclass(frozen=True)
class Statement:
    """A reading with its channel (cue | bare | text | flood) and its place in the text."""

    reading: Reading
    channel: str
    start: int


FLOOD = Statement(Reading(CONFLICT, reason="too many statements"), "flood", 0)

_SPLIT = re.compile(
    r"\b(that|because|so|therefore|thus|hence|but|while|whereas|though|although|and|or|since|only)\b|[,;:—]",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\b(?:not|never|no(?! doubt)|neither|nor|unlikely|cannot|without|avoid)\b|n't\b"
    r"|(?<!no )(?<!without )\bdoubt",
    re.IGNORECASE,
)
_NEGATED_CUE = re.compile(
    r"(?:\b(?:not|never|no|cannot|without|avoid|rather than|instead of)|n't)\s+(?:\w+\s+){0,2}$"
    r"|\b(?:wrong|incorrect|mistake|error|unwise|tempting|tempted|hard|difficult|reluctant) to\s+$",
    re.IGNORECASE,
)
# "The diagnosis", not "the previous diagnosis": an unknown adjective may make it another one.
_OTHER_KIND = re.compile(r"\w\s+$", re.IGNORECASE)
_SAME_KIND = re.compile(
    r"\b(?:the|my|our|your|this|that|so|thus|hence|therefore|and|as|is|overall|radiological|radiographic|radiologic|imaging|unifying"
    r"|single|underlying|new|clear|obvious|clinical)\s+$",
    re.IGNORECASE,
)
_LOWER_LETTER = re.compile(r"\W*[a-z]\W*$")
_COPULA = re.compile(
    r"\b(?:is|are|was|were|shows?|reveals?|demonstrates?|suggests?|indicates?|represents?|depicts?|displays?|has|have)"
    r"(?: (?:most likely|likely|probably|clearly|definitely|indeed|(?:most )?consistent with|diagnosed with))?\s+",
    re.IGNORECASE,
)
_INSTEAD = re.compile(r",? (?:and not|not|rather than|instead of|as opposed to) ", re.IGNORECASE)
_LABEL_LINE = re.compile(r"\s*(?:option|choice|letter|answer)\s+\(?[a-z]\)?[.\s]*", re.IGNORECASE)
_FENCE = re.compile(r"^\s*(?:```\w*|-{3,}|={3,}|\*{3,}|_{3,})\s*$")
_BLANK = "\xa0"
_HEADING_MARK = re.compile(r"[ \t]*(?:(?:[-*•>+]|#{1,6})[ \t]+)*[*_]{0,3}[ \t]?")
_ANNOUNCED = re.compile(r"[^:\n]{1,40}:[*_\s]{1,5}")
_HEADING_LABEL = re.compile(
    r"\(?(?:([A-Z])[.):\]]{1,2}|(?:option|choice|answer)s? \(?([A-Z])\)?(?:\s?[:.)–—-]|(?= \()))[*_\s]{0,5}(?=[\w(])",
    re.IGNORECASE,
)
_HEADING_END = re.compile(r"[*_]{0,3}\s*(?:$|[:(–—-])[*_]{0,3}")
_CLAUSE_END = re.compile(r";|\.\W")
_NOTHING = Reading(NOTHING)
# Nobody announces an answer this often; it also bounds the time.
_MOST_CUES = 100
_MOST_SENTENCES = 300
_LONGEST_LINE = 300
_LONGEST_SENTENCE = 2000


def find_statements(answer: Answer, options: OptionSet, multi: bool) -> list[Statement]:
    """All commitments outside tags, boxes and JSON, in no particular order."""
    rest = _without_echo(answer.rest, options)
    if not rest.strip():
        return []
    plain = rest if multi else _without_headings(rest, options)
    found = _find(plain, answer, options, multi)
    if plain is rest or answer.closed or any(statement.reading.kind in (CHOSEN, CONFLICT) for statement in found):
        return found
    return _find(rest, answer, options, multi)


def _find(rest: str, answer: Answer, options: OptionSet, multi: bool) -> list[Statement]:
    spans = sentence_spans(rest)
    starts = [start for start, _ in spans]
    mentioning = {bisect_right(starts, place) - 1 for place in options.mentions(rest)}
    conditional = may_be_conditional(rest)
    usable = [
        not asks(rest[start:end]) and not (conditional and options.is_conditional(rest[start:end]))
        for start, end in spans
    ]
    candidates = answer.candidates if answer.channel == "cue" else answer.lower
    if len(candidates) > _MOST_CUES:
        return [FLOOD]

    blocks: list[tuple[int, int]] = []
    found = list(_after_cues(rest, candidates, starts, usable, options, multi, blocks))
    taken = {bisect_right(starts, place) - 1 for candidate in candidates for place in (candidate.lead, candidate.start)}

    seen: set[str] = set()
    for index, (start, end) in enumerate(spans):
        sentence = rest[start:end]
        if not usable[index] or sentence in seen or len(sentence) > _LONGEST_SENTENCE or index not in mentioning:
            continue
        seen.add(sentence)
        if len(seen) > _MOST_SENTENCES:
            return [FLOOD]
        if index and sentence[:3] == "Or ":
            sentence = f"or {sentence[3:]}"  # the second line of "B\nOr C" takes part of the first back
        before = len(found)
        found += (Statement(reading, "cue", start) for reading in _in_sentence(sentence, options, multi))
        if len(found) > before:
            taken.add(index)

    bare = list(_bare_lines(_blanked(rest, blocks), options, multi))
    if spans and not multi:
        start, end = spans[-1]
        if LETTER_ALONE.fullmatch(rest[start:end]) and rest[start:end].isupper():
            bare.append(Statement(read_phrase(rest[start:end], options), "bare", start))
    found += bare
    taken |= {bisect_right(starts, statement.start) - 1 for statement in bare}
    left = [index for index in range(len(spans)) if index not in taken]
    if len(left) == 1 and left[0] in mentioning and usable[left[0]] and not multi:
        start, end = spans[left[0]]
        predicate = _only_sentence(rest[start:end], options)
        if predicate is not None:
            found.append(Statement(predicate, "text", start))
    return found


def _after_cues(
    rest: str,
    candidates: Iterable[Candidate],
    starts: Sequence[int],
    usable: Sequence[bool],
    options: OptionSet,
    multi: bool,
    blocks: list[tuple[int, int]],
) -> Iterator[Statement]:
    """Statements of the cue candidates. `starts`, `usable`: where sentences begin, and whether each asserts something.

    `blocks` collects the places that a cue and the lines below it fill.
    """
    read: dict[str, Reading] = {}
    before = 0
    for candidate in candidates:
        if candidate.channel == "cue" and rest[candidate.start : candidate.start + 1] == _BLANK:
            continue  # "Let me look at each option:" before the first of them
        if candidate.channel == "cue" and denied_later(candidate.text):
            before = max(before, candidate.end)
            continue
        # "A The answer is B": a choice stands before the cue on its line.
        line_start = max(before, rest.rfind("\n", before, candidate.lead) + 1)
        before = max(before, candidate.end)
        ahead = rest[line_start : candidate.lead].strip(" ,;")
        if ahead and len(ahead) < _LONGEST_LINE and _may_choose(ahead, options):
            choice = read_phrase(ahead, options, multi)
            if (choice.kind == CHOSEN and choice.exact) or (choice.kind == CONFLICT and choice.letters):
                yield Statement(choice, "bare", line_start)
        # The cue may stand in a sentence of its own: a heading, or "What is the answer?".
        index = bisect_right(starts, candidate.start) - 1
        if candidate.channel != "cue" or (index >= 0 and not usable[index]):
            continue
        if words().wrong_lead.search(rest[max(0, candidate.lead - 40) : candidate.lead]):
            continue
        lead = rest[max(starts[index], candidate.lead - _LONGEST_LINE) : candidate.lead] if index >= 0 else ""
        if is_disowned(lead) or says_another(lead):
            continue
        text = candidate.text
        if multi:
            text, end = _with_following_lines(rest, candidate)
            blocks.append((candidate.start, end))
        else:
            # The sentence may seem to end inside an option's own words ("Inj. Calcium").
            newline = rest.find("\n", candidate.start)
            line = rest[candidate.start : newline if newline >= 0 else len(rest)][:MAX_PHRASE]
            longer = text_head(line, options)
            if longer is not None and longer[1] > len(text):
                text = line[: longer[1]]
        if text not in read:
            read[text] = _NOTHING if options.is_conditional(text) else read_phrase(text, options, multi)
        reading = read[text]
        if reading.kind == EXCLUDED and reading.by_letter:
            reading = Reading(CONFLICT, reason="an option is chosen and taken back")
        if reading.kind in (CHOSEN, CONFLICT) or (reading.kind == EXCLUDED and reading.letters):
            yield Statement(reading, "cue", candidate.start)


def _blanked(text: str, spans: Iterable[tuple[int, int]]) -> str:
    parts: list[str] = []
    position = 0
    for start, end in sorted(spans):
        start = max(start, position)
        if end > start:
            parts += [text[position:start], re.sub(r"[^\n]", " ", text[start:end])]
            position = end
    return "".join([*parts, text[position:]])


def _with_following_lines(rest: str, candidate: Candidate) -> tuple[str, int]:
    """In multi mode a heading may be followed by one option a line: (text, end)."""
    block: list[str] = []
    end = candidate.start
    for line in rest[candidate.start : candidate.start + 1000].split("\n")[:27]:
        if not line.strip():
            break
        block.append(strip_markup(line))
        end += len(line) + 1
    if len(block) < 2 or any(len(line) > 80 for line in block):
        return candidate.text, candidate.end
    return "; ".join(line.rstrip(".,; ") for line in block), end


def _in_sentence(sentence: str, options: OptionSet, multi: bool) -> Iterator[Reading]:
    plain = strip_markup(unwrap_latex(sentence))
    rival = _rival(plain, options)
    if rival is not None:
        yield rival
    predicate = words().ascii_predicate if plain.isascii() else words().predicate
    for match in predicate.finditer(plain):
        if _COUNTERFACTUAL.match(plain, match.start()):
            continue
        reading = _subject(plain[: match.start()], options, multi)
        if reading is not None:
            yield reading
    for match in words().soft_cue.finditer(plain):
        ahead = plain[max(0, match.start() - _LONGEST_LINE) : match.start()]
        lead = ahead + "which" if match.group()[:5].lower() == "which" else ahead
        if _NEGATED_CUE.search(ahead) or is_disowned(lead):
            continue
        phrase = plain[match.end() :]
        if len(phrase) > _LONGEST_LINE or _LOWER_LETTER.fullmatch(phrase):
            continue
        reading = read_phrase(phrase, options, multi)
        before = read_phrase(ahead, options, multi) if reading.kind == CHOSEN and len(ahead) < 60 else _NOTHING
        if before.kind == CHOSEN and before.exact and before.letters != reading.letters:
            yield before  # "B, no, C"
        if match.group()[:2].lower() in ("or", "al") and reading.kind == CHOSEN:
            yield Reading(CONFLICT, reading.letters, reason="an alternative is offered")
            continue
        if reading.kind in (NOTHING, CONFLICT) and (stop := _CLAUSE_END.search(phrase)) is not None:
            first = read_phrase(phrase[: stop.start()], options, multi)
            reading = first if first.kind == CHOSEN and first.exact else reading
        if (
            reading.letters
            and (reading.kind == CONFLICT or reading.exact or reading.by_letter)
            and reading.kind != EXCLUDED
        ):
            yield reading
    for match in words().text_cue.finditer(plain):
        ahead = plain[max(0, match.start() - _LONGEST_LINE) : match.start()]
        if (_OTHER_KIND.search(ahead) and not _SAME_KIND.search(ahead)) or is_disowned(ahead):
            continue
        phrase = plain[match.end() :]
        if len(phrase) > _LONGEST_LINE or _LOWER_LETTER.fullmatch(phrase):
            continue
        reading = read_phrase(phrase, options, multi)
        if reading.kind in (CHOSEN, CONFLICT):
            yield reading


_COUNTERFACTUAL = re.compile(
    r"would be (?:\w+ ){0,3}?(?:correct|right|answer|choice|option) (?:in|if|for|with|when|only|had|were)\b(?! (?:this|the|our)\b)",
    re.IGNORECASE,
)


def _rival(sentence: str, options: OptionSet) -> Reading | None:
    """A sentence that goes on with "or B": it takes part of the answer back."""
    join = words().join_word.match(sentence)
    if join is None or join.end() == 0:
        return None
    reading = read_phrase(sentence[join.end() :], options)
    return reading if reading.kind == CHOSEN and reading.exact else None


def _subject(text: str, options: OptionSet, multi: bool) -> Reading | None:
    """What stands before "is correct": the whole subject, or its last clause."""
    text = text[-_LONGEST_LINE:]
    whole = read_phrase(text, options, multi)
    if whole.kind == CONFLICT or (whole.kind == CHOSEN and whole.exact):
        return whole
    if whole.kind == EXCLUDED and words().negator.match(text):
        return None
    splits = list(_SPLIT.finditer(text))
    if not splits:
        return None
    last = splits[-1]
    if last.group(1) and last.group(1).lower() == "that":
        begin = splits[-2].end() if len(splits) > 1 else 0
        if _NEGATED.search(text, begin, last.start()) or is_disowned(text[begin : last.start()]):
            return None
    tail = read_phrase(text[last.end() :], options, multi)
    return tail if tail.kind == CONFLICT or (tail.kind == CHOSEN and tail.exact) else None


def _bare_lines(rest: str, options: OptionSet, multi: bool) -> Iterator[Statement]:
    """Lines that are an answer and nothing else; the first and last line may add a reason."""
    offset = 0
    places: list[tuple[int, str]] = []
    for line in rest.split("\n"):
        if line.strip() and not _FENCE.match(line):
            places.append((offset, line))
        offset += len(line) + 1
    edges = {0, len(places) - 1}
    seen: set[str] = set()
    loose: list[Statement] = []
    exact: list[Statement] = []
    for index, (start, line) in enumerate(places):
        plain = strip_markup(line[: _LONGEST_LINE * 4])
        if plain in seen or (index not in edges and len(plain) > _LONGEST_LINE):
            continue
        seen.add(plain)
        if not (len(places) == 1 and len(plain) < 8) and not _may_choose(plain, options):
            continue
        reading = read_phrase(plain, options, multi)
        if reading.exact and (reading.by_letter or index in edges):
            exact.append(Statement(reading, "bare", start))
        elif reading.kind == EXCLUDED and reading.letters:
            loose.append(Statement(reading, "bare", start))  # "B\nNot B"
        elif reading.kind in (CHOSEN, CONFLICT) and index in edges and not options.is_conditional(plain):
            loose.append(Statement(reading, "bare", start))
    if multi and len(exact) == len(places) and len(exact) > 1:
        letters = frozenset[str]().union(*(statement.reading.letters for statement in exact))
        yield Statement(Reading(CHOSEN, letters, exact=True, by_letter=True), "bare", 0)
        return
    yield from exact
    # "A. Unlikely ...", "B. Fits ...": a walk through the options is no answer.
    if loose and not _walks_through(places, options):
        yield from loose


def _may_choose(line: str, options: OptionSet) -> bool:
    """A cheap test before a line is read."""
    lead = words().lead.match(line)
    return bool(
        _LABEL_LINE.fullmatch(line)
        or named_first(line, options)
        or words().negator.match(line)
        or (lead is not None and named_first(line[lead.end() :], options))
    )


def _walks_through(places: list[tuple[int, str]], options: OptionSet) -> bool:
    letters: set[str] = set()
    for _, line in places[:200]:
        plain = strip_markup(line[:_LONGEST_LINE])
        lead = words().lead.match(plain)
        letters.add(named_first(plain[lead.end() :] if lead is not None else plain, options))
    return len(letters - {""}) > 1


def _only_sentence(sentence: str, options: OptionSet) -> Reading | None:
    """ "The image shows pneumonia." as the only sentence: its predicate is exactly one option's text, undenied."""
    plain = strip_markup(unwrap_latex(sentence))
    if len(plain) > _LONGEST_LINE:
        return None
    plain = _not_another(plain, options)
    if _NEGATED.search(plain):
        return None
    if words().text_cue.search(plain):
        return None  # "the previous diagnosis was ...": what may follow it was judged as a cue
    copulas = list(_COPULA.finditer(plain))
    if not copulas or is_disowned(plain[: copulas[-1].start()]):
        return None
    reading = read_phrase(plain[copulas[-1].end() :], options)
    if reading.kind != CHOSEN or not reading.exact or reading.by_letter:
        return None
    subject = f" {text_key(plain[: copulas[-1].start()])} "
    if any(f" {key} " in subject for key in options.keys if len(key) > 1):
        return None
    return reading


def _not_another(plain: str, options: OptionSet) -> str:
    """`plain` without a last ", not pneumothorax" or "rather than pneumothorax"."""
    for match in _INSTEAD.finditer(plain):
        tail = plain[match.end() :]
        other = text_head(tail, options)
        if other is not None and not tail[other[1] :].strip(" ."):
            return plain[: match.start()]
    return plain


def _without_echo(rest: str, options: OptionSet) -> str:
    """Blank out a copy of the whole option list, unless nothing follows it."""
    if options.only_letters:
        return rest
    lowered = " ".join(rest.lower().split())
    if any(text not in lowered for text in options.lowered):
        return rest
    pairs = [
        (letter, re.escape(text).replace(r"\ ", r"\s+"))
        for letter, text in zip(options.letters, options.texts, strict=True)
    ]
    labelled = "".join(
        rf"[\s\-*•]{{0,6}}\(?{letter}[.):\]]{{1,2}}[\s*_]{{0,4}}{text}[\s,;.|*_]{{0,6}}" for letter, text in pairs
    )
    listed = "".join(rf"[ \t\-*•]{{0,6}}{text}[ \t.,;]{{0,4}}(?:\n+|\Z)" for _, text in pairs)
    echo = re.search(rf"{labelled}|(?m:^){listed}", rest, re.IGNORECASE)
    if echo is None or not rest[echo.end() :].strip():
        return rest
    blank = re.sub(r"[^\n]", " ", echo.group())
    return rest[: echo.start()] + blank + rest[echo.end() :]


def _without_headings(rest: str, options: OptionSet) -> str:
    """Blank out options that head the lines of a walk through them: "A. Sarcoidosis: would show nodes ...\\nB. ..."."""
    if "\n" not in rest:
        return rest
    found: list[tuple[str, int, int]] = []
    announced: list[tuple[str, int, int]] = []  # "Answer: A. Cardiomegaly", which may begin a copy of the whole list
    offset = 0
    for line in rest.split("\n"):
        mark = _HEADING_MARK.match(line)
        begin = mark.end() if mark is not None else 0
        named = _heading(line[begin:], options)
        if named is None and not found and (announcement := _ANNOUNCED.match(line)) is not None:
            begin = announcement.end()
            named = _heading(line[begin:], options)
            announced = [(named[0], offset + begin, offset + begin + named[1])] if named is not None else []
        elif named is not None:
            found.append((named[0], offset + begin, offset + begin + named[1]))
        offset += len(line) + 1
    if len(found) + len(announced) == len(options.letters):
        found = announced + found
    letters = [letter for letter, _, _ in found]
    if len(letters) < 2 or sorted(set(letters)) != letters:
        return rest
    parts: list[str] = []
    position = 0
    for _, start, end in found:
        parts += [rest[position:start], _BLANK * (end - start)]
        position = end
    return "".join([*parts, rest[position:]])


def _heading(line: str, options: OptionSet) -> tuple[str, int] | None:
    """(letter, end) of a label with words behind it, or of an option's whole text."""
    label = _HEADING_LABEL.match(line)
    if label is None:
        text = text_head(line, options)
        return text if text is not None and _HEADING_END.match(line, text[1]) else None
    letter = (label.group(1) or label.group(2)).upper()
    own = text_head(line[label.end() :], options)
    if letter not in options.letters or (own is not None and own[0] != letter):
        return None
    return letter, label.end() + (own[1] if own is not None else 0)


def denied_letters(statements: Iterable[Statement]) -> frozenset[str]:
    """The letters that a cue denies ("the answer is not B")."""
    return frozenset().union(*(s.reading.letters for s in statements if s.reading.kind == EXCLUDED))


def open_ended(statements: Iterable[Statement]) -> set[frozenset[str]]:
    """The letter sets that statements offer with an alternative left open ("A or")."""
    return {s.reading.letters for s in statements if s.reading.kind == CONFLICT and s.reading.letters}


def agree(statements: Iterable[Statement]) -> set[frozenset[str]]:
    """The different letter sets that statements commit to."""
    return {statement.reading.letters for statement in statements if statement.reading.kind == CHOSEN}
