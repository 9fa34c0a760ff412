"""PhraseReading one phrase against a closed set of options: a letter, an option's text, both, a list, or a negation.

A phrase is what stands in an answer tag, after a cue, or alone on a line. Nothing is guessed: a phrase that is not
wholly explained by the grammar below reads as nothing. What a letter or a text at its beginning means is judged by the
rules for what follows it, in order; the first that has an opinion decides.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

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
from rewards.claims import Said
from rewards.text import drop_article, key_of_normalised, strip_quotes
from rewards.words import clean_phrase, without_leads, words

MAX_PHRASE = 2000
_DEEPEST = 26
_MOST_KNOWN = 500  # phrases


@dataclass(slots=True)
class PhraseReading(Said):
    """What a phrase says: value is the set of letters that it chooses, denied those that it denies.

    A conflict is firm where it surely offers an option. exact: the phrase is the answer and nothing else. by_letter: a
    letter was written.
    """

    exact: bool = False
    by_letter: bool = False


def chosen(letters: Iterable[str], exact: bool = False, by_letter: bool = False) -> PhraseReading:
    return PhraseReading(frozenset(letters), "".join(sorted(letters)), exact=exact, by_letter=by_letter)


def conflict(reason: str, offered: str = "", firm: bool = False) -> PhraseReading:
    return PhraseReading(frozenset(offered) or None, offered, "conflict", reason, firm=firm or bool(offered))


def nothing(reason: str = "") -> PhraseReading:
    return PhraseReading(reason=reason)


def rejected(letters: Iterable[str] = (), reason: str = "the choice is denied") -> PhraseReading:
    return PhraseReading(reason=reason, denied=frozenset(letters))


_TURKISH_SUFFIX = re.compile(r"(?<![A-Za-z])([A-Z])['’](?:dir|dır|dur|dür|tir|tır|yi|i|ı|e|a)(?!\w)")
_ARABIC_LETTERS = {"أ": "A", "ا": "A", "ب": "B", "ج": "C", "د": "D", "هـ": "E", "ه": "E"}
_ARABIC_LONE = re.compile(r"\W{0,3}(أ|ا|ب|ج|د|هـ|ه)\W{0,3}")
_LOWER_LIST = re.compile(r"\(?[a-z]\)?(?:(?:\s?[,;/&+]\s?|\s)(?:(?:and|or)\s)?\(?[a-z]\)?)+[.\s]*")
_LETTER_RUN = re.compile(r"[\s(\[{]*([A-Z]{2,26})[\s)\]}.!。]*")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_LONE_CAPITAL = re.compile(r"[B-HJ-Z][.)]?")
_STRONG = re.compile(r"\s*[.):,;\-–—=>→|/]+\s*")
_PLAIN_END = re.compile(r"[\s.,;:!)\]}>*\"'”’」。、]*")
_NUMBER = re.compile(r"[-−–+<>≤≥=~.]{0,3}\d")
_CONFIDENCE_END = re.compile(
    r"\s*[(\[,]\s?(?:(?:with|very|high|medium|low|my|is) ){0,2}(?:confidence|certainty|probability)?(?: (?:is"
    r"|of))?\s?:?\s?"
    r"(?:high|medium|low|\d(?:[\d.]{0,4})\s?%?)?(?:\s?(?:confidence|certainty|sure|certain|confident))?[\s)\].!]+",
    re.IGNORECASE,
)
_NEW_STATEMENT = re.compile(r"[\s.,;]+(?:(?:or|and|but)\s+)?I\s+[a-z]|\s*\.\s+(?:or|and|but)\b")
# The first text may keep its full stop ("Nasal polyp., Deviated septum.").
_JOIN = re.compile(r"[\s.]{0,3}[,;、，]\s*(?:(?:and|or|und|oder|y|e|et|ou)\b)?\s*")
_ITEM_END = re.compile(r"\s*(?:$|[.,;])")
_COMMA = re.compile(r"\A\s*[,;(—–]?")
_NEW_CLAUSE = re.compile(r"\s*[.;:。]+[,;]?\s|\s*[;(]|\s[—–-]\s|,\s")
_SEPARATOR = re.compile(r"\s*[,;、，/.]?\s*")
_STRAY = re.compile(r"\s*[,;/&+、，]?\s*(?:and\s+)?\(?([A-Z])\)?[\s.]*$")
_LIST_WORD = re.compile(r"(?:options?|choices?|letters?|also|either)\s+", re.IGNORECASE)
_LABEL_BEHIND = re.compile(
    r"\s*(?:[,:–—-]\s*|\(\s*|,?\s*(?:i\.e\.,?|that is,?|which is)\s+)?(?:option|choice|answer|letter)?\s*",
    re.IGNORECASE,
)
# Between a letter and its text. A dash or a ">" before a digit is a sign of the text.
_PAIR_MARK = re.compile(r"(?:[\s.):,;=(|/の]|>(?!\s?\d))*+(?:[-–—]++(?!\d)[\s(]*+)?")
_PORTUGUESE = re.compile(r"\s+\(?([A-Z])\W*")
# "B. or C": a small letter goes on with the sentence.
_CLAUSE_STOP = re.compile(r"(?<![.!?])[.!?]++(?=\s++(?![a-z])|\s*+$)|[。！？]")
_LONG_CLAUSE = 6  # words


class _Named(NamedTuple):
    """A letter or an option's text at the beginning of a phrase, and the rest of the phrase behind it.

    raw: the letter as written, "" for a text. closed: a bracket closed behind it, so it cannot be an article or a
    pronoun.
    """

    letter: str
    rest: str
    depth: int
    raw: str = ""
    closed: bool = False

    @property
    def chosen(self) -> PhraseReading:
        return chosen(self.letter, by_letter=bool(self.raw))

    @property
    def exact(self) -> PhraseReading:
        return chosen(self.letter, exact=True, by_letter=bool(self.raw))

    @property
    def articled(self) -> bool:
        return not self.closed and (self.raw in "AI" or self.raw.islower())


class Phrases:
    """Reads phrases against options. multi: a list of letters or texts is a set; otherwise it is a conflict."""

    def __init__(self, options: OptionSet, multi: bool = False) -> None:
        self.options = options
        self.multi = multi
        self._known: dict[str, PhraseReading] = {}

    def read(self, phrase: str) -> PhraseReading:
        reading = self._known.get(phrase)
        if reading is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            reading = self._known[phrase] = self._phrase(phrase)
        return reading

    def _phrase(self, phrase: str) -> PhraseReading:
        if phrase in self.options.sure_letters:
            return chosen(phrase, exact=True, by_letter=True)
        if len(phrase) > MAX_PHRASE:
            return nothing()
        if phrase[:1] == ">" and (by_text := self.options.keys.get(key_of_normalised(phrase))):
            return chosen(by_text, exact=True)  # "> 15 mm" is no quotation
        text = clean_phrase(phrase)
        open_end = words().open_end.search(text)
        if open_end is None:
            return self._read(text, 0)
        offered = self._read(text[: open_end.start()], 0)
        return conflict("an alternative is left open", offered.parsed) if offered.value else offered

    def _read(self, text: str, depth: int) -> PhraseReading:
        """Take leading words off ("the answer is probably option"); the whole phrase may be the choice at every
        point."""
        for form in without_leads(text, self._text_end):
            whole = self._whole(form if form is text else strip_quotes(form))
            if whole is not None:
                return whole
        return self._parse(form, depth)

    def _text_end(self, text: str) -> int:
        named = text_head(text, self.options)
        return named[1] if named is not None else 0

    def _whole(self, text: str) -> PhraseReading | None:
        """The phrase is exactly an option's text, or exactly one letter."""
        key, keys = key_of_normalised(text), self.options.keys
        by_text = keys.get(key) or (
            keys.get(key_of_normalised(drop_article(text))) or keys.get(tight(key)) if " " in key else None
        )
        if by_text and text.rstrip(" .").endswith("?") and not self.options.text_of(by_text).endswith("?"):
            return nothing("a question is no answer")
        letter = _lone_letter(text)
        if by_text and letter not in ("", by_text) and letter in self.options.letters:
            return conflict(f"{letter} is both a letter and the text of option {by_text}")
        if by_text:
            return chosen(by_text, exact=True)
        if letter and letter not in self.options.letters:
            return self._outside(letter)
        return chosen(letter, exact=True, by_letter=True) if letter else None

    def _outside(self, letter: str) -> PhraseReading:
        return nothing(f"letter {letter} is outside the {len(self.options.texts)} options")

    def _parse(self, text: str, depth: int) -> PhraseReading:
        if not text or depth > _DEEPEST:
            return nothing()
        if _LOWER_LIST.fullmatch(text):
            text = re.sub(r"\b[a-z]\b", lambda match: match.group().upper(), text)
        at_text = text_head(text, self.options)
        head = LETTER_HEAD.match(text)
        if at_text is not None:
            if head is not None and head.end() >= at_text[1] and head.group(1).upper() in self.options.letters:
                return self._letter_like_text(at_text[0], head, text, depth)
            return self._judge(_Named(at_text[0], text[at_text[1] :], depth))
        run = _LETTER_RUN.fullmatch(text) if self.multi else None
        if run is not None:
            return self._run(run.group(1))
        if (negator := words().negator.match(text)) is not None:
            return self._denied(text[negator.end() :], depth)
        head = _TURKISH_SUFFIX.match(text) or head
        return nothing() if head is None else self._judge(_named(head, text, depth))

    def _letter_like_text(self, by_text: str, head: re.Match[str], text: str, depth: int) -> PhraseReading:
        """Options such as blood groups: a letter that is also a text counts only where both readings meet."""
        named = _named(head, text, depth)
        pair = text_head(_after_mark(named.rest), self.options)
        reading = self._judge(named)
        if not reading.value or reading.value == {by_text} or (pair is not None and pair[0] == named.letter):
            return reading
        return conflict(f"{named.letter} is both a letter and the text of option {by_text}")

    def _run(self, run: str) -> PhraseReading:
        if any(letter not in self.options.letters for letter in run) or len(set(run)) != len(run):
            return nothing(f"{run[:12]} is not a set of option letters")
        return chosen(run, exact=True, by_letter=True)

    def _denied(self, rest: str, depth: int) -> PhraseReading:
        """After "not": only what a contrast word brings back counts ("not B, but C")."""
        if words().only.match(rest):
            return nothing()
        contrast = words().contrast.search(rest)
        if contrast is None:
            stop = re.search(r"[;.—–]\s", rest)
            other = self._whole(rest[stop.end() :].strip()) if stop is not None else None
            *_, plain = without_leads(rest, self._text_end)
            return other or rejected(named_first(plain, self.options))
        kept = self._read(rest[contrast.end() :].lstrip(" ,:;"), depth + 1)
        return kept if kept.value or kept.status != "ok" else rejected()

    # --------------------------------------------------------------------------------- what follows a letter or a text

    def _judge(self, named: _Named) -> PhraseReading:
        if named.letter not in self.options.letters:
            return self._outside(named.letter)
        for rule in _AFTER_LETTER if named.raw else _AFTER_TEXT:
            reading = rule(self, named)
            if reading is not None:
                return reading
        return nothing("more words follow the option's text")

    def _asks(self, named: _Named) -> PhraseReading | None:
        stop = _CLAUSE_STOP.search(named.rest)
        return nothing("a question is no answer") if stop is not None and "?" in stop.group() else None

    def _ends(self, named: _Named) -> PhraseReading | None:
        return named.exact if _PLAIN_END.fullmatch(named.rest) else None

    def _closes(self, named: _Named) -> PhraseReading | None:
        return named.exact if words().closers_only.fullmatch(named.rest) else None

    def _denied_behind(self, named: _Named) -> PhraseReading | None:
        """A word behind it denies it; what follows may name the right one (Korean, Japanese, Turkish)."""
        denial = words().negated_after.match(named.rest)
        if denial is None:
            return None
        rest = named.rest[denial.end() :].lstrip(" ,;、，。")
        if (contrast := words().contrast.match(rest)) is not None:
            rest = rest[contrast.end() :]
        kept = self._read(rest, named.depth + 1) if rest else nothing()
        return kept if kept.value or kept.status != "ok" else rejected()

    def _preferred(self, named: _Named) -> PhraseReading | None:
        return named.chosen if self._is_instead(named.rest) else None

    def _is_instead(self, rest: str) -> bool:
        """ "..., not B", "rather than pneumonia": what follows is denied in favour of what stands before."""
        match = words().instead_of.match(rest)
        if match is None:
            return False
        tail = rest[match.end() :].lstrip(" :")
        lead = words().lead.match(tail)
        return bool(
            named_first(tail, self.options)
            or (lead is not None and named_first(tail[lead.end() :], self.options))
            or re.match(r"(?:the )?(?:others?|rest|any)\b", tail)
        )

    def _second_thought(self, named: _Named) -> PhraseReading | None:
        is_name = not named.raw or named.raw.isupper()
        return named.chosen if is_name and words().second_thought.match(named.rest) else None

    def _rejects(self, named: _Named) -> PhraseReading | None:
        if not words().bad_verdict.match(named.rest):
            return None
        return rejected(named.raw.upper(), f"option {named.letter} is rejected")

    def _offers(self, named: _Named) -> PhraseReading | None:
        """The same sentence offers another option ("B, or maybe C")."""
        clause = _first_clause(named.rest)
        rivals = _letters_beside(clause) & set(self.options.letters)
        for hedge in words().hedge.finditer(clause):
            tail = clause[hedge.end() :]
            other = choice_head(tail, self.options)
            if other is None:
                rivals |= {tail[:1]} if _LONE_CAPITAL.fullmatch(tail) else set()  # an option that is not there
            elif not self._is_bad_list(tail[other[1] :]):
                rivals.add(other[0])
        is_hedged = rivals - {named.letter}
        return conflict(f"{named.letter} is offered beside another option") if is_hedged else None

    # ------------------------------------------------------------------------------------------- behind a letter alone

    def _portuguese(self, named: _Named) -> PhraseReading | None:
        """ "a C": the article."""
        article = _PORTUGUESE.fullmatch(named.rest) if named.raw == "a" and not named.closed else None
        return (self._whole(article.group(1)) or nothing()) if article is not None else None

    def _listed(self, named: _Named) -> PhraseReading | None:
        pair = text_head(_after_mark(named.rest), self.options)
        return self._list(named) if pair is None or pair[0] != named.letter else None

    def _paired(self, named: _Named) -> PhraseReading | None:
        """A letter and the text of an option."""
        behind = _after_mark(named.rest)
        pair = text_head(behind, self.options)
        if pair is None:
            return None
        after = named._replace(rest=behind[pair[1] :])
        if pair[0] == named.letter:
            return self._after_pair(after)
        strong = named.closed or _STRONG.match(named.rest)
        if not strong and named.raw in "Aa" and not (named.raw == "A" and re.match(r"\s+[A-Z][a-z]", named.rest)):
            # "a CT angiography": the article of another option's text, not letter A.
            return self._judge(_Named(pair[0], after.rest, named.depth))
        is_said = strong and VERB.match(after.rest) and not words().also_true.match(after.rest)
        return conflict(f"letter {named.letter} with the text of option {pair[0]}", firm=bool(is_said))

    def _after_pair(self, named: _Named) -> PhraseReading:
        for rule in (Phrases._ends, Phrases._closes, Phrases._list, Phrases._offers):
            if (reading := rule(self, named)) is not None:
                return reading
        if self._is_instead(named.rest.lstrip(" )]")):
            return named.chosen
        return (
            rejected((), f"option {named.letter} is rejected")
            if words().bad_verdict.match(named.rest)
            else named.chosen
        )

    def _hedged_end(self, named: _Named) -> PhraseReading | None:
        is_hedge = words().hedged_end.fullmatch(named.rest) or _CONFIDENCE_END.fullmatch(named.rest)
        return named.exact if is_hedge else None

    def _called_right(self, named: _Named) -> PhraseReading | None:
        at = 1 if named.rest.startswith(" ") else 0
        return named.chosen if words().predicate.match(named.rest, at) else None

    def _foreign(self, named: _Named) -> PhraseReading | None:
        """What follows is of a script that may touch the letter."""
        if named.rest.lstrip(" ")[:1].isascii():
            return None
        if words().denied_later.match(named.rest) and not words().contrast.search(named.rest):
            return rejected(named.letter, f"option {named.letter} is rejected")
        is_word = unicodedata.category(named.rest[0])[0] in "LM"
        glued = not named.closed and not words().closer.match(named.rest) and is_word
        return nothing() if glued else named.chosen

    def _loose(self, named: _Named) -> PhraseReading | None:
        """No mark separates the letter from what follows."""
        if named.closed or _STRONG.match(named.rest) is not None:
            return None
        if named.articled:
            return named.chosen if words().reason_behind.match(named.rest) else nothing()
        return named.chosen if words().because.match(named.rest) or words().verb.match(named.rest) else nothing()

    def _marked(self, named: _Named) -> PhraseReading | None:
        """A mark separates the letter from what follows: a reason, a form of its text, or another text."""
        strong = _STRONG.match(named.rest)
        tail = named.rest[strong.end() :] if strong is not None else named.rest.lstrip()
        mark = strong.group().strip() if strong is not None else ")"
        if is_form_of(named.letter, key_of_normalised(_first_clause(tail)), self.options):
            return named.chosen
        is_weak = named.articled and set(mark) <= set(",-–—")
        if is_weak and (named.raw != "A" or not words().because.match(tail)):
            return nothing()
        if words().because.match(tail) or (words().verb.match(tail) and not named.articled):
            return named.chosen
        if _LATIN.match(tail) and tail[0].islower() and "." in mark and not named.closed:
            return nothing(f"'{named.raw}. {tail[:20]}' is a name, not an option")
        names = _NUMBER.match(tail) or (_LATIN.match(tail) and not _is_sentence(tail))
        if names and not self.options.only_letters:
            return conflict(f"letter {named.letter} with a text that is not its option's")
        return named.chosen

    # ------------------------------------------------------------------------------------------- behind a text alone

    def _lettered(self, named: _Named) -> PhraseReading | None:
        """A text and then a letter: "pneumonia (B)"."""
        head = LETTER_HEAD.match(_LABEL_BEHIND.sub("", named.rest, count=1)) or LETTER_HEAD.match(named.rest)
        if head is None or not head.group(1).isupper() or head.group(1) not in self.options.letters:
            return None
        ends = _PLAIN_END.fullmatch(head.string, head.end()) is not None
        if head.group(1) == named.letter:
            return chosen(named.letter, exact=ends, by_letter=True)
        return conflict(f"the text of option {named.letter} with letter {head.group(1)}")

    def _joined(self, named: _Named) -> PhraseReading | None:
        """Another text follows as a member of a list."""
        rest = named.rest
        join = words().join_word.match(rest) or _JOIN.match(rest)
        if join is None or join.end() == 0:
            return None
        tail = rest[join.end() :]
        other = text_head(tail, self.options)
        if self.options.yes_no and rest.lstrip()[:1] == "," and (other is None or re.match(r"\s+\w", tail[other[1] :])):
            return self._offers(named) or named.chosen
        if self.multi and not join.groupdict().get("or") and named_first(tail, self.options):
            more = self._read(tail, named.depth + 1)
            if more.value:
                return chosen(more.value | {named.letter}, exact=more.exact)
        return conflict("several options are named") if other is not None else None

    def _new_clause(self, named: _Named) -> PhraseReading | None:
        clause = _NEW_CLAUSE.match(named.rest)
        if clause is not None:
            other = text_head(named.rest[clause.end() :], self.options)
            if other is not None and _ITEM_END.match(named.rest, clause.end() + other[1]):
                return conflict("several options are named")
            return named.chosen
        goes_on = _NEW_STATEMENT.match(named.rest) or words().because.match(_COMMA.sub("", named.rest, count=1))
        return named.chosen if goes_on else None

    # ------------------------------------------------------------------------------------------------- lists of letters

    def _list(self, named: _Named) -> PhraseReading | None:
        """A list of letters, each perhaps with its own text. None when the rest is no list."""
        rest = named.rest
        found, repeated, position = {named.letter}, False, 0
        for _ in range(31):
            item = self._next_item(rest, position)
            if item is None:
                break
            letter, end, either = item
            tail = rest[end:]
            if "." in rest[position:end] and self._is_new_sentence(tail):
                break
            if either and self.multi:
                return conflict("alternatives are offered", firm=True)
            repeated = repeated or letter in found
            found.add(letter)
            position = end
            pair = text_head(_after_mark(tail), self.options)
            if pair is not None:
                if pair[0] != letter:
                    return conflict(f"letter {letter} with the text of option {pair[0]}")
                position = len(rest) - len(_after_mark(tail)) + pair[1]
        if position == 0:
            return None
        return self._after_list(frozenset(found), rest[position:], repeated and len(found) == 1)

    def _after_list(self, found: frozenset[str], after: str, is_repeated: bool) -> PhraseReading:
        stray = _STRAY.match(after)
        if stray is not None and stray.group(1) not in self.options.letters:
            return self._outside(stray.group(1))
        instead = self._is_instead(after)
        if not instead and (words().bad_verdict.match(after) or words().negated_after.match(after)):
            return rejected((), "the listed options are rejected")
        if not self.multi or is_repeated:
            return conflict("several options are listed", firm=is_repeated)
        if _PLAIN_END.fullmatch(after) is not None or words().closers_only.fullmatch(after) is not None:
            return chosen(found, exact=True, by_letter=True)
        ends = (VERB, _STRONG, words().because, words().verb, words().closer)
        if not instead and not any(end.match(after) for end in ends):
            return nothing("a list that does not end")
        return chosen(found, by_letter=True)

    def _list_end(self, rest: str) -> int:
        """Where the list of letters at the start of `rest` ends; 0 without one. 30 members are list enough."""
        position = 0
        for _ in range(30):
            item = self._next_item(rest, position)
            if item is None:
                break
            position = item[1]
        return position

    def _is_new_sentence(self, rest: str) -> bool:
        """After "B. A": the second letter, perhaps with more, is the subject of a sentence ("A, C and D are wrong")."""
        end = self._list_end(rest)
        is_subject = VERB.match(rest, end) or words().bad_verdict.match(rest, end)
        return bool(is_subject) and not words().also_true.match(rest, end)

    def _is_bad_list(self, rest: str) -> bool:
        """`rest` goes on to list letters and then rejects them (", C and D are wrong")."""
        return bool(words().bad_verdict.match(rest, self._list_end(rest)))

    def _next_item(self, rest: str, start: int) -> tuple[str, int, bool] | None:
        """The next member of a list: (letter, end, joined by an "or"). Needs a separator before it."""
        word, position = _joint(rest, start)
        if position == start and rest[start : start + 1] not in ("(", "["):
            return None
        if (mark := _LIST_WORD.match(rest, position)) is not None:
            position = mark.end()
        head = LETTER_HEAD.match(rest, position)
        if head is None or head.group(1).upper() not in self.options.letters:
            return None
        letter = head.group(1)
        if (
            letter.islower()
            and not head.group("close")
            and (word is None or not _PLAIN_END.fullmatch(rest, head.end()))
        ):
            return None
        articled = letter in "AI" and re.match(r"\s+[a-z]", rest[head.end() : head.end() + 3])
        if articled and not VERB.match(rest, head.end()) and not words().join_word.match(rest, head.end()):
            return None
        return letter.upper(), head.end(), word is not None and bool(word.group("or"))


_Rule = Callable[[Phrases, _Named], PhraseReading | None]
_P = Phrases
_AFTER_LETTER: tuple[_Rule, ...] = (
    _P._asks,
    _P._ends,
    _P._denied_behind,
    _P._preferred,
    _P._portuguese,
    _P._listed,
    _P._paired,
    _P._hedged_end,
    _P._second_thought,
    _P._rejects,
    _P._offers,
    _P._called_right,
    _P._closes,
    _P._foreign,
    _P._loose,
    _P._marked,
)
_AFTER_TEXT: tuple[_Rule, ...] = (
    _P._asks,
    _P._ends,
    _P._closes,
    _P._second_thought,
    _P._denied_behind,
    _P._preferred,
    _P._lettered,
    _P._joined,
    _P._rejects,
    _P._offers,
    _P._new_clause,
)


def _named(head: re.Match[str], text: str, depth: int) -> _Named:
    closed = bool(head.groupdict().get("close"))
    return _Named(head.group(1).upper(), text[head.end() :], depth, head.group(1), closed)


def _lone_letter(text: str) -> str:
    lone = LETTER_ALONE.fullmatch(text)
    if lone is not None:
        return lone.group(1).upper()
    arabic = _ARABIC_LONE.fullmatch(text) if not text.isascii() else None
    return _ARABIC_LETTERS[arabic.group(1)] if arabic else ""


def _after_mark(rest: str) -> str:
    return _PAIR_MARK.sub("", rest, count=1) if rest else rest


def _joint(rest: str, start: int) -> tuple[re.Match[str] | None, int]:
    """What joins the next member of a list: (its word, where it ends)."""
    separator = _SEPARATOR.match(rest, start)
    assert separator is not None  # every part is optional
    begin = separator.end() if separator.group().strip() else start
    word = words().join_word.match(rest, begin)
    return word, separator.end() if word is None else word.end()


def _is_sentence(tail: str) -> bool:
    """An explanation rather than a name: it has a verb or runs long."""
    clause = _first_clause(tail)
    return len(clause.split()) > _LONG_CLAUSE or words().of_sentence.search(clause) is not None


def denied_later(text: str) -> bool:
    """Whether `text` begins by denying what stands before it, as Korean and Japanese do."""
    return not text.isascii() and words().denied_start.match(text) is not None


def _letters_beside(clause: str) -> set[str]:
    """Letters that a clause offers beside the one it chose ("B, with C as a backup"), unless it explains them away."""
    rivals = {match.group(1) for match in words().rival_letter.finditer(clause)}
    if rivals and words().explained_away.search(clause) and not words().not_excluded.search(clause):
        return set()
    return rivals


def _first_clause(rest: str) -> str:
    stop = _CLAUSE_STOP.search(rest)
    return rest if stop is None else rest[: stop.start()]
