"""Commitments in free text beside its cues: before a verdict, on a line of their own, or as the only sentence.

Used by OptionLetter. A question, a condition or a denied cue commits to nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rewards.answer import Answer, Candidate
from rewards.choices import LETTER_ALONE, OptionSet, named_first, text_head
from rewards.claims import asks, fold, is_disowned, sentence_claims
from rewards.phrases import MAX_PHRASE, PhraseReading, Phrases, chosen, conflict, denied_later
from rewards.text import blanked, key_of_normalised, sentence_spans, strip_markup, text_key, unwrap_latex
from rewards.words import may_be_conditional, words

Statement = tuple[int, PhraseReading]  # where it begins, what it says

_SPLIT = re.compile(
    r"\b(that|because|so|therefore|thus|hence|but|while|whereas|though|although|and|or|since|only)\b|[,;:—]",
    re.IGNORECASE,
)
_CONCEDES = re.compile(r"\W*(?:while|whereas|(?:al)?though)\b", re.IGNORECASE)
# "The diagnosis", not "the previous diagnosis": an unknown adjective may make it another one.
_OTHER_KIND = re.compile(r"\w\s+$")
_LOWER_LETTER = re.compile(r"\W*[a-z]\W*$")
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
_MOST_SENTENCES = 300
_LONGEST_LINE = 300
_LONGEST_SENTENCE = 2000
_LONGEST_BLOCK = 1000


def prepared(answer: Answer, phrases: Phrases) -> Answer:
    """The answer without copies of the option list, and with cues that reach as far as their option's text does."""
    rest = _without_echo(answer.rest, phrases.options)
    plain = rest if phrases.multi else _without_headings(rest, phrases.options)
    candidates, lower = (tuple(_cues(plain, found, phrases)) for found in (answer.candidates, answer.lower))
    if (plain, candidates, lower) == (answer.rest, answer.candidates, answer.lower):
        return answer
    return replace(answer, rest=plain, candidates=candidates, lower=lower)


def _cues(rest: str, candidates: Iterable[Candidate], phrases: Phrases) -> Iterator[Candidate]:
    for candidate in candidates:
        if candidate.channel != "cue":
            yield candidate
        elif rest[candidate.start : candidate.start + 1] == _BLANK or denied_later(candidate.text):
            continue  # "Let me look at each option:" before the first of them
        elif phrases.multi and "\n" in rest[candidate.lead : candidate.start]:
            yield _with_following_lines(rest, candidate)
        else:
            # The sentence may seem to end inside an option's own words ("Inj. Calcium").
            newline = rest.find("\n", candidate.start)
            line = rest[candidate.start : newline if newline >= 0 else len(rest)][:MAX_PHRASE]
            end = _reach(line, candidate.text, phrases)
            yield candidate._replace(text=line[:end]) if end > len(candidate.text) else candidate


def _reach(line: str, text: str, phrases: Phrases) -> int:
    """Where an option's text ends that begins a line, or stands behind a letter that `text` seems to end with."""
    _, end = text_head(line, phrases.options) or ("", 0)
    if end == 0 and text.endswith(".") and phrases.read(text).by_letter:
        behind = line[len(text) :].lstrip()
        _, length = text_head(behind, phrases.options) or ("", 0)
        is_text = key_of_normalised(behind[:length]) in phrases.options.keys  # not "A (pneumonia)", a further letter
        end = len(line) - len(behind) + length if is_text else 0
    return end


def statements(answer: Answer, phrases: Phrases) -> Iterator[Statement]:
    """All commitments outside tags, boxes, JSON and cues, in no particular order."""
    rest, options = answer.rest, phrases.options
    spans = sentence_spans(rest)
    starts = [start for start, _ in spans]

    def at(place: int) -> int:
        return bisect_right(starts, place) - 1

    cues = [candidate for candidate in (*answer.candidates, *answer.lower) if candidate.channel == "cue"]
    yield from _before_cues(rest, cues, phrases)
    mentioning = sorted({at(place) for place in options.mentions(rest)} - {-1})
    conditional = may_be_conditional(rest)
    usable = [
        index
        for index in mentioning
        if not asks(sentence := rest[slice(*spans[index])]) and not (conditional and options.is_conditional(sentence))
    ]
    taken = {at(place) for cue in cues for place in (cue.lead, cue.start)}
    is_announced = answer.closed or any(phrases.read(cue.text).value for cue in cues)
    seen: set[str] = set()
    for index in usable:
        start, end = spans[index]
        sentence = rest[start:end]
        if sentence in seen or len(sentence) > _LONGEST_SENTENCE:
            continue
        seen.add(sentence)
        if len(seen) > _MOST_SENTENCES:
            yield start, conflict("too many statements", firm=True)
            return
        for reading in _in_sentence(sentence, phrases):
            taken.add(index)
            is_announced = is_announced or bool(reading.value)
            yield start, reading if reading.firm else replace(reading, firm=True)
    blocks = [(cue.start, cue.end) for cue in cues] if phrases.multi else []
    bare = list(_bare_lines(blanked(rest, blocks), phrases))
    if spans and not phrases.multi and LETTER_ALONE.fullmatch(last := rest[slice(*spans[-1])]) and last.isupper():
        bare.append((spans[-1][0], phrases.read(last)))
    yield from (
        (start, reading if reading.firm or is_announced else replace(reading, firm=True)) for start, reading in bare
    )
    taken |= {at(start) for start, _ in bare}
    left = [index for index in range(len(spans)) if index not in taken]
    if len(left) == 1 and left[0] in usable and not phrases.multi:
        predicate = _only_sentence(rest[slice(*spans[left[0]])], phrases)
        if predicate is not None:
            yield spans[left[0]][0], predicate


def _before_cues(rest: str, cues: Sequence[Candidate], phrases: Phrases) -> Iterator[Statement]:
    """A choice that stands before a cue on its line: "A The answer is B"."""
    before = 0
    for cue in cues:
        start = max(before, rest.rfind("\n", before, cue.lead) + 1)
        before = max(before, cue.end)
        ahead = rest[start : cue.lead].strip(" ,;")
        if ahead and len(ahead) < _LONGEST_LINE and _may_choose(ahead, phrases.options):
            choice = phrases.read(ahead)
            if choice.exact or (choice.status == "conflict" and choice.firm):
                yield start, choice


def _with_following_lines(rest: str, candidate: Candidate) -> Candidate:
    """In multi mode a heading may be followed by one option a line."""
    block = rest[candidate.start : candidate.start + _LONGEST_BLOCK].split("\n\n", 1)[0]
    text = "; ".join(strip_markup(line).rstrip(".,; ") for line in block.split("\n"))
    return candidate._replace(text=text, end=candidate.start + len(block))


def _in_sentence(sentence: str, phrases: Phrases) -> Iterator[PhraseReading]:
    plain = strip_markup(unwrap_latex(sentence))
    predicate = words().ascii_predicate if plain.isascii() else words().predicate
    for match in predicate.finditer(plain):
        if not _COUNTERFACTUAL.match(plain, match.start()):
            yield from _subject(plain[: match.start()], phrases)
    for match in words().soft_cue.finditer(plain):
        yield from _after_soft_cue(plain, match, phrases)
    for match in words().text_cue.finditer(plain):
        ahead, phrase = plain[max(0, match.start() - _LONGEST_LINE) : match.start()], plain[match.end() :]
        is_other = _OTHER_KIND.search(ahead) and not words().same_kind.search(ahead)
        if not is_other and not is_disowned(ahead) and _is_phrase(phrase):
            reading = phrases.read(phrase)
            if reading.value or reading.status == "conflict":
                yield reading


def _is_phrase(text: str) -> bool:
    return len(text) <= _LONGEST_LINE and not _LOWER_LETTER.fullmatch(text)


def _after_soft_cue(plain: str, cue: re.Match[str], phrases: Phrases) -> Iterator[PhraseReading]:
    ahead, phrase = plain[max(0, cue.start() - _LONGEST_LINE) : cue.start()], plain[cue.end() :]
    lead = ahead + "which" if cue.group()[:5].lower() == "which" else ahead
    if not _is_phrase(phrase) or words().negated_cue.search(ahead) or is_disowned(lead):
        return
    reading = phrases.read(phrase)
    before = phrases.read(ahead) if reading.value and len(ahead) < 60 else reading
    if before.exact and before.value != reading.value:
        yield before  # "B, no, C"
    if not reading.value and not reading.denied and (stop := _CLAUSE_END.search(phrase)) is not None:
        first = phrases.read(phrase[: stop.start()])
        reading = first if first.exact else reading
    if reading.exact or (reading.value and reading.by_letter) or (reading.status == "conflict" and reading.firm):
        yield reading


_COUNTERFACTUAL = re.compile(
    r"would be (?:\w+ ){0,3}?(?:correct|right|answer|choice|option) (?:in|if|for|with|when|only|had|were)\b(?! (?:this"
    r"|the|our)\b)",
    re.IGNORECASE,
)


def _subject(text: str, phrases: Phrases) -> Iterator[PhraseReading]:
    """What stands before "is correct": the whole subject, or its last clause."""
    text = text[-_LONGEST_LINE:]
    whole = phrases.read(text)
    splits = list(_SPLIT.finditer(text))
    if _CONCEDES.match(text) is not None and len(splits) == 1:
        return  # "While A seems right, it is not."
    if whole.status == "conflict" or whole.exact:
        yield whole
    elif splits and not _is_denied_clause(text, splits) and not (not whole.value and words().negator.match(text)):
        tail = phrases.read(text[splits[-1].end() :])
        if tail.status == "conflict" or tail.exact:
            yield tail


def _is_denied_clause(text: str, splits: Sequence[re.Match[str]]) -> bool:
    """Whether the last clause is what another denies: "it is not true that B"."""
    last = splits[-1]
    if (last.group(1) or "").lower() != "that":
        return False
    begin = splits[-2].end() if len(splits) > 1 else 0
    return words().negated.search(text, begin, last.start()) is not None or is_disowned(text[begin : last.start()])


def _bare_lines(rest: str, phrases: Phrases) -> Iterator[Statement]:
    """Lines that are an answer and nothing else; the first and last line may add a reason."""
    offset = 0
    places: list[tuple[int, str]] = []
    for line in rest.split("\n"):
        if line.strip() and not _FENCE.match(line):
            places.append((offset, strip_markup(line[: _LONGEST_LINE * 4])))
        offset += len(line) + 1
    edges = {0, len(places) - 1}
    loose: list[Statement] = []
    exact: list[Statement] = []
    is_short = len(places) == 1 and len(places[0][1]) < 8
    seen: set[str] = set()
    for index, (start, plain) in enumerate(places):
        if plain in seen or (index not in edges and len(plain) > _LONGEST_LINE):
            continue
        seen.add(plain)
        if not is_short and not _may_choose(plain, phrases.options):
            continue
        reading = _line(plain, phrases)
        is_edge = index in edges and (reading.value or reading.status == "conflict")
        if reading.exact and (reading.by_letter or index in edges):
            exact.append((start, reading))
        elif reading.denied or (is_edge and not phrases.options.is_conditional(plain)):
            loose.append((start, reading))  # "B\nNot B"
    if phrases.multi and len(exact) == len(places) and len(exact) > 1:
        yield 0, chosen(frozenset[str]().union(*(reading.value for _, reading in exact)), exact=True, by_letter=True)
        return
    yield from exact
    # "A. Unlikely ...", "B. Fits ...": a walk through the options is no answer.
    answers = {start for start, _ in exact}
    if loose and not _walks_through([line for start, line in places if start not in answers], phrases.options):
        yield from loose


def _line(plain: str, phrases: Phrases) -> PhraseReading:
    """What a line says when all that it takes back is heard ("Pneumonia. On second thought, sarcoidosis.")."""
    reading = phrases.read(plain)
    if reading.exact or not reading.value:
        return reading
    claims = sentence_claims(plain)
    said = fold(claims, phrases.read) if len(claims) > 1 else reading
    return replace(said, exact=False) if isinstance(said, PhraseReading) else conflict(said.reason, firm=True)


def _may_choose(line: str, options: OptionSet) -> bool:
    """A cheap test before a line is read."""
    lead = words().lead.match(line)
    return bool(
        _LABEL_LINE.fullmatch(line)
        or named_first(line, options)
        or words().negator.match(line)
        or (lead is not None and named_first(line[lead.end() :], options))
    )


def _walks_through(lines: Sequence[str], options: OptionSet) -> bool:
    letters: set[str] = set()
    for line in lines[:200]:
        lead = words().lead.match(line)
        letters.add(named_first(line[lead.end() :] if lead is not None else line, options))
    return len(letters - {""}) > 1


def _only_sentence(sentence: str, phrases: Phrases) -> PhraseReading | None:
    """ "The image shows pneumonia." as the only sentence: its predicate is exactly one option's text, undenied."""
    plain = _not_another(strip_markup(unwrap_latex(sentence)), phrases.options)
    if len(plain) > _LONGEST_LINE or words().negated.search(plain) or words().text_cue.search(plain):
        return None  # "the previous diagnosis was ...": what may follow it was judged as a cue
    copulas = list(words().copula.finditer(plain))
    if not copulas or is_disowned(plain[: copulas[-1].start()]):
        return None
    reading = phrases.read(plain[copulas[-1].end() :])
    subject = f" {text_key(plain[: copulas[-1].start()])} "
    names_another = any(f" {key} " in subject for key in phrases.options.keys if len(key) > 1)
    return reading if reading.exact and not reading.by_letter and not names_another else None


def _not_another(plain: str, options: OptionSet) -> str:
    """`plain` without a last ", not pneumothorax" or "rather than pneumothorax"."""
    for match in words().instead_of.finditer(plain):
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
    return blanked(rest, [echo.span()])


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
    return blanked(rest, [(start, end) for _, start, end in found], _BLANK)


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
