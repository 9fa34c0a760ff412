"""Reading one phrase against a closed set of options: a letter, an option's text, both, a list, or a negation.

A phrase is what stands in an answer tag, after a cue, or alone on a line. Nothing is guessed: a phrase that is not
wholly explained by the grammar below reads as nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from rewards.choices import (
    LETTER_ALONE,
    LETTER_HEAD,
    VERB,
    OptionSet,
    choice_head,
    is_form_of,
    named_first,
    text_head,
    tight,
)
from rewards.rivals import rivals_beside
from rewards.text import drop_article, key_of_normalised, strip_markup, strip_quotes, unwrap_latex
from rewards.words import words

CHOSEN, NOTHING, EXCLUDED, CONFLICT = "chosen", "nothing", "excluded", "conflict"
MAX_PHRASE = 2000


@dataclass(frozen=True)
class Reading:
    """kind: chosen | nothing | excluded (a choice is denied) | conflict (several, or letter against text).

    letters: the chosen or denied letters; of a conflict, those it surely offers. exact: the phrase is the answer and nothing else. by_letter: a letter was written.
    """

    kind: str
    letters: frozenset[str] = frozenset()
    exact: bool = False
    by_letter: bool = False
    reason: str = ""


_NOTHING = Reading(NOTHING)


_TURKISH_SUFFIX = re.compile(r"(?<![A-Za-z])([A-Z])['’](?:dir|dır|dur|dür|tir|tır|yi|i|ı|e|a)(?!\w)")
_ARABIC_LETTERS = {"أ": "A", "ا": "A", "ب": "B", "ج": "C", "د": "D", "هـ": "E", "ه": "E"}
_ARABIC_LONE = re.compile(r"\W{0,3}(أ|ا|ب|ج|د|هـ|ه)\W{0,3}")
_LOWER_LIST = re.compile(r"\(?[a-z]\)?(?:(?:\s?[,;/&+]\s?|\s)(?:(?:and|or)\s)?\(?[a-z]\)?)+[.\s]*")
_LETTER_RUN = re.compile(r"[\s(\[{]*([A-Z]{2,26})[\s)\]}.!。]*")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_STRONG = re.compile(r"\s*[.):,;\-–—=>→|/]+\s*")
_PLAIN_END = re.compile(r"[\s.,;:!)\]}>*\"'”’」。、]*")
_NUMBER = re.compile(r"[-−–+<>≤≥=~.]{0,3}\d")
# What comes next is another statement; here the phrase ends.
# A denial anywhere in the clause, in scripts where it stands behind the letter.
_DENIED_LATER = re.compile(
    r"[^,;.、，。]{0,40}?(?:아니|않|없|틀[렸린리]|오답|잘못|ない|ません|間違|誤|不[正对對是符会會能]|错|錯|并非|並非|नहीं|गलत|নয়|ভুল|ไม่|ผิด"
    r"|ليس|خطأ|خاطئ)"
)
_STARTS_DENIED = re.compile(
    r"[이가은는]?\s?(?:될 수 )?(?:아니|아닙|않|없|못)|(?:では|で|じゃ)?(?:ない|ありません|なく)"
)
_ADVERB_END = re.compile(
    r"[\s,(–—-]*(?:(?:most )?(?:likely|probably)|definitely|certainly|for sure|i (?:think|believe|guess|suppose))[\s).!]*"
    r"|\s*[(\[,]\s?(?:(?:with|very|high|medium|low|my|is) ){0,2}(?:confidence|certainty|probability)?(?: (?:is|of))?\s?:?\s?(?:high|medium|low|\d(?:[\d.]{0,4})\s?%?)?"
    r"(?:\s?(?:confidence|certainty|sure|certain|confident))?[\s)\].!]+",
    re.IGNORECASE,
)
_SECOND_THOUGHT = re.compile(r"\W{0,4}(?:actually|no,? wait|wait|hmm|sorry|oops)\b", re.IGNORECASE)
_NEW_STATEMENT = re.compile(r"[\s.,;]+(?:(?:or|and|but)\s+)?I\s+[a-z]|\s*\.\s+(?:or|and|but)\b")
# "B or": what follows was taken away as another answer, or is missing.
_OPEN_END = re.compile(r"(?:(?<!\w)(?:or|and|but|oder|und|ou|et|или)|或|또는|または)\W{0,6}$")
# The first text may keep its full stop ("Nasal polyp., Deviated septum.").
_JOIN = re.compile(r"[\s.]{0,3}[,;、，]\s*(?:(?:and|or|und|oder|y|e|et|ou)\b)?\s*")
_ITEM_END = re.compile(r"\s*(?:$|[.,;])")
_COMMA = re.compile(r"\A\s*[,;(—–]?")
_NEW_CLAUSE = re.compile(r"\s*[.;:。]+[,;]?\s|\s*[;(]|\s[—–-]\s|,\s")
_SEPARATOR = re.compile(r"\s*[,;、，/.]?\s*")
_STRAY = re.compile(r"\s*[,;/&+、，]?\s*(?:and\s+)?\(?([A-Z])\)?[\s.]*$")
_LIST_WORD = re.compile(r"(?:options?|choices?|letters?|also|either)\s+", re.IGNORECASE)
# Between a letter and its text. A dash before a digit is a sign of the text.
_PAIR_MARK = re.compile(r"[\s.):,;=>(|/の]*+(?:[-–—]++(?!\d)[\s(]*+)?")
_HEDGE = re.compile(
    r"\b(?:or|and|but|maybe|perhaps|possibly|alternatively|could be|might be|also|oder|ou|и|или)\b"
    r"(?:\s+(?:it|is|it's|maybe|perhaps|possibly|also|even|option|choice|answer|could|might|be|the|a|an|probably)\b){0,4}"
    r"\s*(?=\S)|或者?|또는|または|أو",
    re.IGNORECASE,
)
_ALSO_TRUE = re.compile(
    r"\s*(?:is|are)(?: (?:also|both|all|equally)){0,3}(?: (?:correct|right|possible|true|plausible|likely|answers?))"
    r"|\s*(?:都|均|也)(?:正确|对|有可能|可能)",
    re.IGNORECASE,
)
_SAFE_AFTER_ARTICLE = re.compile(r"\s+(?:because|since|as|due to|based on|fits|matches)\b", re.IGNORECASE)
# "B. or C": a small letter goes on with the sentence.
_CLAUSE_STOP = re.compile(r"(?<![.!?])[.!?]++(?=\s++(?![a-z])|\s*+$)|[。！？]")
_HTML = re.compile(r"</?(?:b|i|u|em|strong|p|br|span|sub|sup|center|code|div|h[1-6])\s?/?>")


def clean_phrase(phrase: str) -> str:
    """One line without LaTeX, markdown and enclosing quotes; line breaks become sentence breaks."""
    text = unwrap_latex(phrase)
    if "<" in text:
        text = _HTML.sub("", text)
    if "\n" in text:
        parts = (strip_markup(part).rstrip(".,; ") for part in text.split("\n"))
        text = ". ".join(part for part in parts if part.strip(".-_= "))
    return " ".join(strip_quotes(strip_markup(text)).split())


def read_phrase(phrase: str, options: OptionSet, multi: bool = False) -> Reading:
    """What `phrase` chooses. In `multi` mode a list of letters or texts is a set; otherwise it is a conflict."""
    if len(phrase) > MAX_PHRASE:
        return _NOTHING
    if phrase[:1] == ">" and (by_text := options.keys.get(key_of_normalised(phrase))):
        return Reading(CHOSEN, frozenset(by_text), exact=True)  # "> 15 mm" is no quotation
    text = clean_phrase(phrase)
    open_end = _OPEN_END.search(text)
    if open_end is None:
        return _read(text, options, multi, depth=0)
    offered = _read(text[: open_end.start()], options, multi, depth=0)
    if offered.kind != CHOSEN:
        return offered
    return Reading(CONFLICT, offered.letters, reason="an alternative is left open")


def _read(text: str, options: OptionSet, multi: bool, depth: int) -> Reading:
    """Take leading words off ("the answer is probably option"); the whole phrase may be the choice at every point."""
    for form in _without_leads(text, options):
        whole = _whole(form if form is text else strip_quotes(form), options)
        if whole is not None:
            return whole
    return _parse(form, options, multi, depth)


def _without_leads(text: str, options: OptionSet | None = None) -> Iterator[str]:
    """`text`, then `text` with one leading word or phrase less at a time."""
    yield text
    for _ in range(6):
        lead = words().lead.match(text)
        if lead is None or lead.end() == 0 or _answers(text, lead, options):
            return
        text = text[lead.end() :]
        yield text


def _answers(text: str, lead: re.Match[str], options: OptionSet | None) -> bool:
    """The leading words are themselves an answer: an option's text, or a describing word of a free one ("right lung").

    Before a word for an answer they announce again ("the right answer is ...").
    """
    if options is not None:
        named = text_head(text, options)
        end = named[1] if named is not None else 0
    else:
        described = words().describing.match(text)
        end = described.end() if described is not None else 0
    return end >= len(lead.group().rstrip(" :,")) > 0 and words().option_word.match(text, end) is None


def strip_leads(text: str) -> str:
    """`text` without words that only announce an answer ("the answer is probably ...")."""
    return strip_quotes(_after_leads(text))


def _after_leads(text: str, options: OptionSet | None = None) -> str:
    *_, last = _without_leads(text, options)
    return last


def _whole(text: str, options: OptionSet) -> Reading | None:
    """The phrase is exactly an option's text, or exactly one letter."""
    key = key_of_normalised(text)
    by_text = (
        options.keys.get(key) or options.keys.get(key_of_normalised(drop_article(text))) or options.keys.get(tight(key))
    )
    if by_text and text.endswith("?") and not options.texts[options.letters.index(by_text)].endswith("?"):
        return Reading(NOTHING, reason="a question is no answer")
    lone = LETTER_ALONE.fullmatch(text)
    if lone is None:
        arabic = _ARABIC_LONE.fullmatch(text) if not text.isascii() else None
        letter = _ARABIC_LETTERS[arabic.group(1)] if arabic else ""
    else:
        letter = lone.group(1).upper()
    if by_text and letter and by_text != letter and letter in options.letters:
        return Reading(CONFLICT, reason=f"{letter} is both a letter and the text of option {by_text}")
    if by_text:
        return Reading(CHOSEN, frozenset(by_text), exact=True)
    if letter:
        if letter not in options.letters:
            return Reading(NOTHING, reason=f"letter {letter} is outside the {len(options.texts)} options")
        return Reading(CHOSEN, frozenset(letter), exact=True, by_letter=True)
    return None


def _parse(text: str, options: OptionSet, multi: bool, depth: int) -> Reading:
    if not text or depth > 26:
        return _NOTHING
    if _LOWER_LIST.fullmatch(text):
        text = re.sub(r"\b[a-z]\b", lambda match: match.group().upper(), text)
    at_text = text_head(text, options)
    if at_text is not None:
        letter = LETTER_HEAD.match(text)
        if letter is not None and letter.end() >= at_text[1] and letter.group(1).upper() in options.letters:
            return _letter_like_text(at_text[0], letter, text, options, multi, depth)
        return _after_text(at_text[0], text[at_text[1] :], options, multi, depth)
    if multi:
        run = _LETTER_RUN.fullmatch(text)
        if run is not None:
            return _letters(run.group(1), options)
    negator = words().negator.match(text)
    if negator is not None:
        return _denied(text[negator.end() :], options, multi, depth)
    turkish = _TURKISH_SUFFIX.match(text)
    if turkish is not None:
        return _after_letter(turkish.group(1), text[turkish.end() :], False, options, multi, depth)
    head = LETTER_HEAD.match(text)
    if head is None:
        return _NOTHING
    return _after_letter(head.group(1), text[head.end() :], bool(head.group("close")), options, multi, depth)


def _after_mark(rest: str) -> str:
    return _PAIR_MARK.sub("", rest, count=1) if rest else rest


def _letter_like_text(
    by_text: str, head: re.Match[str], text: str, options: OptionSet, multi: bool, depth: int
) -> Reading:
    """Options such as blood groups: a letter that is also a text counts only where both readings meet."""
    letter = head.group(1).upper()
    rest = text[head.end() :]
    pair = text_head(_after_mark(rest), options)
    reading = _after_letter(head.group(1), rest, bool(head.group("close")), options, multi, depth)
    if reading.kind != CHOSEN or reading.letters == {by_text} or (pair is not None and pair[0] == letter):
        return reading
    return Reading(CONFLICT, reason=f"{letter} is both a letter and the text of option {by_text}")


def _letters(run: str, options: OptionSet) -> Reading:
    if any(letter not in options.letters for letter in run) or len(set(run)) != len(run):
        return Reading(NOTHING, reason=f"{run[:12]} is not a set of option letters")
    return Reading(CHOSEN, frozenset(run), exact=True, by_letter=True)


def _denied(rest: str, options: OptionSet, multi: bool, depth: int) -> Reading:
    """After "not": only what a contrast word brings back counts ("not B, but C")."""
    if words().only.match(rest):
        return _NOTHING
    contrast = words().contrast.search(rest)
    if contrast is None:
        stop = re.search(r"[;.—–]\s", rest)
        other = _whole(rest[stop.end() :].strip(), options) if stop is not None else None
        denied = frozenset(named_first(_after_leads(rest, options), options))
        return other if other is not None else Reading(EXCLUDED, denied, reason="the choice is denied")
    kept = _read(rest[contrast.end() :].lstrip(" ,:;"), options, multi, depth + 1)
    if kept.kind == CHOSEN:
        return Reading(CHOSEN, kept.letters, exact=kept.exact, by_letter=kept.by_letter)
    return kept if kept.kind == CONFLICT else Reading(EXCLUDED, reason="the choice is denied")


def _instead(rest: str, options: OptionSet) -> bool:
    """ "..., not B", "rather than pneumonia": what follows is denied in favour of what stands before."""
    match = words().instead_of.match(rest)
    if match is None:
        return False
    tail = rest[match.end() :].lstrip(" :")
    lead = words().lead.match(tail)
    return bool(
        named_first(tail, options)
        or (lead is not None and named_first(tail[lead.end() :], options))
        or re.match(r"(?:the )?(?:others?|rest|any)\b", tail)
    )


def _hedged(chosen: frozenset[str], rest: str, options: OptionSet) -> bool:
    """The same sentence offers another option ("B, or maybe C")."""
    clause = _first_clause(rest)
    if rivals_beside(clause) & set(options.letters) - chosen:
        return True
    for hedge in _HEDGE.finditer(clause):
        tail = clause[hedge.end() :]
        other = choice_head(tail, options)
        if other is not None and other[0] not in chosen:
            after = tail[other[1] :]
            if words().bad_verdict.match(after) or _bad_list(after, options):
                continue
            return True
    return False


def _list_end(rest: str, options: OptionSet) -> int:
    """Where the list of letters at the start of `rest` ends; 0 without one. 30 members are list enough."""
    position = 0
    for _ in range(30):
        item = _next_item(rest, position, options)
        if item is None:
            break
        position = item[1]
    return position


def _new_sentence(rest: str, options: OptionSet) -> bool:
    """After "B. A": the second letter, perhaps with more, is the subject of a sentence ("A, C and D are wrong")."""
    end = _list_end(rest, options)
    return bool(VERB.match(rest, end) or words().bad_verdict.match(rest, end)) and not _ALSO_TRUE.match(rest, end)


def _bad_list(rest: str, options: OptionSet) -> bool:
    """`rest` goes on to list letters and then rejects them (", C and D are wrong")."""
    return bool(words().bad_verdict.match(rest, _list_end(rest, options)))


def _next_item(rest: str, start: int, options: OptionSet) -> tuple[str, int, bool] | None:
    """The next member of a list: (letter, end, joined by an "or"). Needs a separator before it."""
    word = words().join_word.match(rest, start)
    separator = _SEPARATOR.match(rest, start)
    assert separator is not None  # every part is optional
    position = word.end() if word is not None else separator.end()
    if word is None:
        second = words().join_word.match(rest, position)
        if second is not None and position > start and separator.group().strip():
            word, position = second, second.end()
    if position == start and rest[start : start + 1] not in ("(", "["):
        return None
    mark = _LIST_WORD.match(rest, position)
    if mark is not None:
        position = mark.end()
    head = LETTER_HEAD.match(rest, position)
    if head is None or head.group(1).upper() not in options.letters:
        return None
    letter = head.group(1)
    if (
        letter.islower()
        and not head.group("close")
        and not (word is not None and _PLAIN_END.fullmatch(rest, head.end()))
    ):
        return None
    articled = letter in "AI" and re.match(r"\s+[a-z]", rest[head.end() : head.end() + 3])
    if articled and not VERB.match(rest, head.end()) and not words().join_word.match(rest, head.end()):
        return None
    return letter.upper(), head.end(), word is not None and bool(word.group("or"))


def _after_letter(raw: str, rest: str, closed: bool, options: OptionSet, multi: bool, depth: int) -> Reading:
    """Judge what follows a letter. `closed`: a bracket closed behind it, so it cannot be an article or a pronoun."""
    letter = raw.upper()
    if letter not in options.letters:
        return Reading(NOTHING, reason=f"letter {letter} is outside the {len(options.texts)} options")
    if _asks(rest):
        return Reading(NOTHING, reason="a question is no answer")
    chosen = Reading(CHOSEN, frozenset(letter), by_letter=True)
    exact = Reading(CHOSEN, frozenset(letter), exact=True, by_letter=True)
    if _PLAIN_END.fullmatch(rest):
        return exact
    denied = words().negated_after.match(rest)
    if denied is not None:
        return _denied_after(rest[denied.end() :], options, multi, depth)
    if _instead(rest, options):
        return chosen
    own_text = text_head(_after_mark(rest), options)
    if raw == "a" and not closed and (portuguese := re.fullmatch(r"\s+\(?([A-Z])\W*", rest)):
        return _whole(portuguese.group(1), options) or _NOTHING
    articled = not closed and (raw in "AI" or raw.islower())
    if own_text is None or own_text[0] != letter:
        listed = _list(letter, rest, options, multi)
        if listed is not None:
            return listed
    if own_text is not None:
        after = _after_mark(rest)[own_text[1] :]
        strong = closed or _STRONG.match(rest)
        if own_text[0] == letter:
            return _after_pair(letter, after, options, multi)
        if not strong and raw in "Aa" and not (raw == "A" and re.match(r"\s+[A-Z][a-z]", rest)):
            # "a CT angiography": the article of another option's text, not letter A.
            return _after_text(own_text[0], after, options, multi, depth)
        if strong and VERB.match(after) and not _ALSO_TRUE.match(after):
            return chosen
        return Reading(CONFLICT, reason=f"letter {letter} with the text of option {own_text[0]}")
    if _ADVERB_END.fullmatch(rest):
        return exact
    if raw.isupper() and _SECOND_THOUGHT.match(rest):
        return chosen
    if words().bad_verdict.match(rest):
        return Reading(EXCLUDED, by_letter=True, reason=f"option {letter} is rejected")
    if _hedged(chosen.letters, rest, options):
        return Reading(CONFLICT, reason=f"{letter} is offered beside another option")
    if raw.isupper() and _NEW_STATEMENT.match(rest):
        return chosen
    if words().predicate.match(rest, 1 if rest.startswith(" ") else 0):
        return chosen
    if words().closers_only.fullmatch(rest):
        return exact
    if not rest.lstrip(" ")[:1].isascii():
        if _DENIED_LATER.match(rest) and not words().contrast.search(rest):
            return Reading(EXCLUDED, by_letter=True, reason=f"option {letter} is rejected")
        mark = unicodedata.category(rest[0])[0]
        glued = not closed and not words().closer.match(rest) and mark in "LM"
        return _NOTHING if glued else chosen
    strong_sep = _STRONG.match(rest)
    if strong_sep is None and not closed:
        if articled:
            return chosen if _SAFE_AFTER_ARTICLE.match(rest) else _NOTHING
        return chosen if words().because.match(rest) or words().verb.match(rest) else _NOTHING
    tail = rest[strong_sep.end() :] if strong_sep is not None else rest.lstrip()
    mark = strong_sep.group().strip() if strong_sep is not None else ")"
    if is_form_of(letter, key_of_normalised(_first_clause(tail)), options):
        return chosen
    if articled and raw != "A" and set(mark) <= set(",-–—"):
        return _NOTHING
    if words().because.match(tail) or (words().verb.match(tail) and not articled):
        return chosen
    if articled and set(mark) <= set(",-–—"):
        return _NOTHING
    if _LATIN.match(tail) and tail[0].islower() and "." in mark and not closed:
        return Reading(NOTHING, reason=f"'{raw}. {tail[:20]}' is a name, not an option")
    if options.only_letters:
        return chosen
    if _NUMBER.match(tail) or (_LATIN.match(tail) and not _is_sentence(tail)):
        return Reading(CONFLICT, reason=f"letter {letter} with a text that is not its option's")
    return chosen


def _after_pair(letter: str, after: str, options: OptionSet, multi: bool) -> Reading:
    """After a letter and its own text."""
    if _PLAIN_END.fullmatch(after) or words().closers_only.fullmatch(after):
        return Reading(CHOSEN, frozenset(letter), exact=True, by_letter=True)
    listed = _list(letter, after, options, multi)
    if listed is not None:
        return listed
    if _hedged(frozenset(letter), after, options):
        return Reading(CONFLICT, reason=f"{letter} is offered beside another option")
    if not _instead(after.lstrip(" )]"), options) and words().bad_verdict.match(after):
        return Reading(EXCLUDED, reason=f"option {letter} is rejected")
    return Reading(CHOSEN, frozenset(letter), by_letter=True)


def _list(first: str, rest: str, options: OptionSet, multi: bool) -> Reading | None:
    """A list of letters, each perhaps with its own text. None when `rest` is no list."""
    found = {first}
    repeated = False
    position = 0
    for _ in range(31):
        item = _next_item(rest, position, options)
        if item is None:
            break
        letter, end, either = item
        tail = rest[end:]
        if "." in rest[position:end] and _new_sentence(tail, options):
            break
        if either and multi:
            return Reading(CONFLICT, reason="alternatives are offered")
        repeated = repeated or letter in found
        found.add(letter)
        position = end
        pair = text_head(_after_mark(tail), options)
        if pair is not None:
            if pair[0] != letter:
                return Reading(CONFLICT, reason=f"letter {letter} with the text of option {pair[0]}")
            position = len(rest) - len(_after_mark(tail)) + pair[1]
    if position == 0:
        return None
    after = rest[position:]
    stray = _STRAY.match(after)
    if stray is not None and stray.group(1) not in options.letters:
        return Reading(NOTHING, reason=f"letter {stray.group(1)} is outside the {len(options.texts)} options")
    denied = words().negated_after.match(after)
    instead = _instead(after, options)
    if not instead and (words().bad_verdict.match(after) or denied is not None):
        return Reading(EXCLUDED, reason="the listed options are rejected")
    if not multi or (repeated and len(found) == 1):
        return Reading(CONFLICT, reason="several options are listed")
    exact = _PLAIN_END.fullmatch(after) is not None or words().closers_only.fullmatch(after) is not None
    if not exact and not (
        VERB.match(after)
        or _STRONG.match(after)
        or words().because.match(after)
        or words().verb.match(after)
        or words().closer.match(after)
        or instead
    ):
        return Reading(NOTHING, reason="a list that does not end")
    if not exact and _hedged(frozenset(found), after, options):
        return Reading(CONFLICT, reason="the list is hedged")
    return Reading(CHOSEN, frozenset(found), exact=exact, by_letter=True)


def _denied_after(rest: str, options: OptionSet, multi: bool, depth: int) -> Reading:
    """After "B ..." was denied by a word behind it: what follows may name the right one (Korean, Japanese, Turkish)."""
    rest = rest.lstrip(" ,;、，。")
    contrast = words().contrast.match(rest)
    if contrast is not None:
        rest = rest[contrast.end() :]
    kept = _read(rest, options, multi, depth + 1) if rest else _NOTHING
    if kept.kind in (CHOSEN, CONFLICT):
        return kept
    return Reading(EXCLUDED, reason="the choice is denied")


def _after_text(letter: str, rest: str, options: OptionSet, multi: bool, depth: int) -> Reading:
    """Judge what follows an option's text: the end, its letter, a reason; anything else changes its meaning."""
    if _asks(rest):
        return Reading(NOTHING, reason="a question is no answer")
    chosen = Reading(CHOSEN, frozenset(letter))
    exact = Reading(CHOSEN, frozenset(letter), exact=True)
    if _PLAIN_END.fullmatch(rest) or words().closers_only.fullmatch(rest):
        return exact
    if _SECOND_THOUGHT.match(rest):
        return chosen
    denied = words().negated_after.match(rest)
    if denied is not None:
        return _denied_after(rest[denied.end() :], options, multi, depth)
    if _instead(rest, options):
        return chosen
    label = re.match(
        r"\s*(?:[,:–—-]\s*|\(\s*|,?\s*(?:i\.e\.,?|that is,?|which is)\s+)?(?:option|choice|answer|letter)?\s*",
        rest,
        re.IGNORECASE,
    )
    if label is not None and label.end() > 0:
        head = LETTER_HEAD.match(rest, label.end()) or LETTER_HEAD.match(rest)
        articled = head is not None and head.group(1) in "AI" and not head.group("close")
        if head is not None and head.group(1).isupper() and head.group(1) in options.letters:
            ends = _PLAIN_END.fullmatch(rest, head.end()) is not None
            if head.group(1) == letter and (ends or not articled):
                return Reading(CHOSEN, frozenset(letter), exact=ends, by_letter=True)
            if ends or not articled:
                return Reading(CONFLICT, reason=f"the text of option {letter} with letter {head.group(1)}")
    join = words().join_word.match(rest) or _JOIN.match(rest)
    if join is not None and join.end() > 0:
        tail = rest[join.end() :]
        other = text_head(tail, options)
        if options.yes_no and rest.lstrip()[:1] == "," and (other is None or re.match(r"\s+\w", tail[other[1] :])):
            if _hedged(frozenset(letter), rest, options):
                return Reading(CONFLICT, reason="yes and no")
            return chosen
        if multi and not join.groupdict().get("or"):
            more = _read(tail, options, multi, depth + 1) if named_first(tail, options) else _NOTHING
            if more.kind == CHOSEN:
                return Reading(CHOSEN, more.letters | {letter}, exact=more.exact)
        if other is not None:
            return Reading(CONFLICT, reason="several options are named")
    if words().bad_verdict.match(rest):
        return Reading(EXCLUDED, reason=f"option {letter} is rejected")
    if _hedged(frozenset(letter), rest, options):
        return Reading(CONFLICT, reason=f"{letter} is offered beside another option")
    clause = _NEW_CLAUSE.match(rest)
    other = text_head(rest[clause.end() :], options) if clause is not None else None
    if clause is not None and other is not None and _ITEM_END.match(rest, clause.end() + other[1]):
        return Reading(CONFLICT, reason="several options are named")
    if clause is not None or _NEW_STATEMENT.match(rest) or words().because.match(_COMMA.sub("", rest, count=1)):
        return chosen
    return Reading(NOTHING, reason="more words follow the option's text")


def _is_sentence(tail: str) -> bool:
    """An explanation rather than a name: it has a verb or runs long."""
    clause = _first_clause(tail)
    return (
        len(clause.split()) > 6
        or re.search(
            r"\b(?:is|are|was|were|has|have|had|shows?|showed|suggests?|indicates?|fits?|explains?|can|cannot|does|do|this|there|we|you|i|it"
            r"|best|most|again|correct|right|because|since|reveals?|demonstrates?|supports?|rules?|the|see|final|explanation|reason|reasoning|rationale|why)\b",
            clause,
            re.IGNORECASE,
        )
        is not None
    )


def denied_later(text: str) -> bool:
    """Whether `text` begins by denying what stands before it, as Korean and Japanese do."""
    return not text.isascii() and _STARTS_DENIED.match(text) is not None


def _first_clause(rest: str) -> str:
    stop = _CLAUSE_STOP.search(rest)
    return rest if stop is None else rest[: stop.start()]


def _asks(rest: str) -> bool:
    """The clause that `rest` completes ends with a question mark."""
    stop = _CLAUSE_STOP.search(rest)
    return stop is not None and "?" in stop.group()
