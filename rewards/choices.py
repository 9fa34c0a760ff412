"""A closed set of options, and where a text begins with one: with its letter or with its own words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase
from typing import Any

from rewards.fuzzy import nearest_option, negators
from rewards.text import ARTICLE, drop_article, key_of_normalised, normalise, table
from rewards.words import may_be_conditional, words


@dataclass(frozen=True)
class OptionSet:
    """Options as they are compared. `keys` leaves out texts that two options share after normalisation."""

    texts: tuple[str, ...]
    lowered: tuple[str, ...]
    letters: str
    keys: dict[str, str]
    heads: dict[str, list[tuple[str, tuple[str, ...]]]]
    longest: int
    yes_no: bool
    conditional: tuple[str, ...]
    only_letters: bool  # the texts are not known
    letter_alone: re.Pattern[str]
    sure_letters: frozenset[str]  # no option's text is one of them

    def mentions(self, text: str) -> list[int]:
        """Where `text` has an option's letter on its own or an option's text, unsorted. A cheap first test."""
        places = [match.start() for match in self.letter_alone.finditer(text)]
        lowered = text.lower()
        for option in filter(None, self.lowered):  # an empty text stands everywhere and nowhere
            at = lowered.find(option)
            while at >= 0:
                places.append(at)
                at = lowered.find(option, at + len(option))
        return places

    def is_conditional(self, text: str) -> bool:
        """Whether `text` has an "if", those inside an option's own words aside."""
        if not may_be_conditional(text) or words().conditional.search(text) is None:
            return False
        for option in self.conditional:
            text = re.sub(re.escape(option).replace(r"\ ", r"\s+"), " ", text, flags=re.IGNORECASE)
        return words().conditional.search(text) is not None

    def text_of(self, letter: str) -> str:
        return self.texts[self.letters.index(letter)]


_TOKEN = re.compile(r"[A-Za-z0-9\u00c0-\u024f]+(?:\.\d+)?|[^\W_]+(?:\.\d+)?|[^\w\s]|_")
_IGNORED = frozenset("\"'“”„‟‘’‚‛«»‹›「」『』`*,;:!?()[]{}。、，；：！？।._")
_DASH_CHARS = frozenset("-‐‑‒–—―−﹣")
_OWN_LABEL = re.compile(r"\s*\(?([A-Za-z])\s*[.):]\s+(?=\S)|\s*\(([A-Za-z])\)\s*(?=\S)")


def unlettered(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options' texts without their own labels ("A. CT"), where all carry one and the labels are in order."""
    if len(options) > len(ascii_uppercase) or own_labels(options) != list(ascii_uppercase[: len(options)]):
        return options
    return tuple(text[m.end() :] for text in options if (m := _OWN_LABEL.match(text)))


def by_letter(options: Mapping[Any, Any]) -> list[Any]:
    """{"A": "left", "B": "right"}: tables fill the letters that a row does not have with None. Raises ValueError."""
    kept = {str(key).strip().upper(): value for key, value in options.items() if value is not None and value == value}
    letters = list(ascii_uppercase[: len(kept)])
    if sorted(kept) != letters:
        raise ValueError(
            f"options by letter must be {', '.join(letters) or 'A, B, ...'}, got {', '.join(map(str, options))}"
        )
    return [kept[letter] for letter in letters]


def own_labels(options: tuple[str, ...]) -> list[str]:
    """The letter that each option carries in its own text ("A. CT"), "" where it carries none."""
    found = [_OWN_LABEL.match(text) for text in options]
    return [(m.group(1) or m.group(2)).upper() if m else "" for m in found]


@lru_cache(maxsize=8192)
def option_set(options: tuple[str, ...]) -> OptionSet:
    """Prepare 2 to 26 options. Labels that the data already carries ("A. CT") are taken off.

    Options that are their own letters ("A", "B", ...) have no texts: what stands behind a letter is then not compared.
    """
    letters = ascii_uppercase[: len(options)]
    texts = unlettered(tuple(" ".join(normalise(option).split()) for option in options))
    if texts == tuple(letters):
        alone = re.compile(rf"(?<![A-Za-z0-9])[A-{letters[-1]}](?![A-Za-z0-9])")
        return OptionSet(texts, (), letters, {}, {}, 0, False, (), True, alone, frozenset(letters))
    keys: dict[str, str] = {}
    shared: set[str] = set()
    for letter, text in zip(letters, texts, strict=True):
        for key in {key_of_normalised(text), key_of_normalised(drop_article(text)), tight(key_of_normalised(text))}:
            if not key:
                continue
            if keys.setdefault(key, letter) != letter:
                shared.add(key)
    for key in shared:
        del keys[key]
    heads: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for key, letter in sorted(keys.items(), key=lambda item: -len(item[0])):
        tokens = tuple(token for token in _TOKEN.findall(key) if token not in _IGNORED)
        if tokens:
            heads.setdefault(tokens[0], []).append((letter, tokens))
    longest = max((len(tokens) for entries in heads.values() for _, tokens in entries), default=0)
    yes_no = {"yes", "no"} <= set(keys) and len(options) <= 3
    conditional = tuple(text for text in texts if words().conditional.search(text))
    return OptionSet(
        texts,
        tuple(text.lower() for text in texts),
        letters,
        keys,
        heads,
        longest,
        yes_no,
        conditional,
        False,
        re.compile(rf"(?<![A-Za-z0-9])[A-{letters[-1]}](?![A-Za-z0-9])"),
        frozenset(letter for letter in letters if letter.lower() not in keys and letter.lower() not in shared),
    )


_UNIT_SPACE = re.compile(r"(?<=\d) (?=[a-zµ%])")


def tight(key: str) -> str:
    """A text key without the space between a number and its unit: "5 mg" and "5mg" are one text."""
    return _UNIT_SPACE.sub("", key)


# A letter stands alone: no Latin, Greek or Cyrillic letter, digit or apostrophe-joined word touches it. Scripts written
# without spaces may.
_EDGE = r"A-Za-z0-9_\u00c0-\u052f"
LETTER_ALONE = re.compile(r"[\s(\[{<*\"'–—-]*([A-Za-z])[\s)\]}>*\"'.:,;!。、–—-]*")
LETTER_HEAD = re.compile(
    rf"[\s(\[{{<\"'“‘「]*(?<![{_EDGE}])([A-Za-z])(?![{_EDGE}])(?![-‐‑–'’][A-Za-z0-9])(?!\.(?:\d|[A-Za-z](?:\W"
    rf"|$)))(?P<close>[)\]}}>\"'”’」]*)"
)
# After an option text: a longer number, a compound or a percentage is another text.
_GOES_ON = re.compile(r"[.,/-]\d|[-/‐‑–][A-Za-z]|%")
VERB = re.compile(
    r"\s*(?:is|are|was|were|would|will|can|cannot|can't|could|does|do|did|has|have|had|should|may|might|isn't|aren't"
    r"|doesn't"
    r"|fits?|explains?|均|都|은|는|이|가|는)(?!\w)|\s*(?:均|都|也|不)",
    re.IGNORECASE,
)


def text_head(text: str, options: OptionSet) -> tuple[str, int] | None:
    """(letter, end) of the longest option text that `text` begins with, an article aside."""
    found = _text_at(text, 0, options)
    if found is None and (article := ARTICLE.match(text)) is not None:
        found = _text_at(text, article.end(), options)
    return found


def _text_at(text: str, start: int, options: OptionSet) -> tuple[str, int] | None:
    spans: list[tuple[str, int]] = []
    for match in _TOKEN.finditer(text, start):
        token = match.group()
        if token in _IGNORED or (token == "s" and text[max(0, match.start() - 1) : match.start()] in ("'", "’")):
            continue
        if token in _DASH_CHARS:
            # As in a text key: a hyphen at a letter is a space; before or between numbers it counts.
            before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
            if before.isalnum() and after.isalnum() and (before.isalpha() or after.isalpha()):
                continue
            token = "-"
        token = token.casefold()
        if not spans and token not in options.heads:
            return None if token.isascii() else _glued_head(token, match.end(), text, options)
        spans.append((token, match.end()))
        if len(spans) >= options.longest:
            break
    for letter, tokens in options.heads.get(spans[0][0], ()) if spans else ():
        if len(tokens) <= len(spans) and all(said == token for (said, _), token in zip(spans, tokens, strict=False)):
            end = spans[len(tokens) - 1][1]
            glued = text[end : end + 1].isalnum() and (text[end].isascii() or not words().closer.match(text, end))
            if not glued and not _GOES_ON.match(text, end):
                return letter, end
    return None


def _glued_head(token: str, end: int, text: str, options: OptionSet) -> tuple[str, int] | None:
    """An option text in a script without spaces, with a particle or verb glued to it."""
    start = end - len(token)
    for head, entries in options.heads.items():
        if token.startswith(head) and not head.isascii() and len(entries[-1][1]) == 1:
            stop = start + len(head)
            if words().closer.match(text, stop):
                return entries[-1][0], stop
    return None


def named_first(text: str, options: OptionSet) -> str:
    """The letter that `text` begins with or names by its option text, or ""."""
    found = choice_head(text, options)
    return found[0] if found is not None else ""


def choice_head(text: str, options: OptionSet) -> tuple[str, int] | None:
    """(letter, end) of the letter or the option text that `text` begins with. Articles and pronouns are no letters."""
    head = LETTER_HEAD.match(text)
    if head is not None:
        letter = head.group(1)
        rest = text[head.end() :]
        sure = bool(head.group("close")) or letter.isupper()
        articled = letter in "AIai" and re.match(r"\s+(?!(?:or|and|but)\b)[a-z]", rest) and not VERB.match(rest)
        if sure and not articled and letter.upper() in options.letters:
            return letter.upper(), head.end()
    return text_head(text, options)


def is_form_of(letter: str, key: str, options: OptionSet) -> bool:
    """Whether a text key is a shorter or longer form of the letter's own text, and of no other option's."""
    own = _spelt_out(key_of_normalised(options.text_of(letter)))
    said = _spelt_out(key)
    if not own or not said:
        return not said
    if said == [word[0] for word in own] or "".join(said) == "".join(
        word[0] for word in own if word not in ("of", "the")
    ):
        return len(own) > 1
    if negators(" ".join(said)) != negators(" ".join(own)):
        return False
    if set(said) <= set(own):
        return True
    if len(said) == len(own) and all(a == b or (len(a) == 1 and b[0] == a) for a, b in zip(said, own, strict=True)):
        return len(own) > 1  # "E. coli"
    if nearest_option(" ".join(said), options.keys) == letter:
        return True
    flat = f" {' '.join(said)} "
    if f" {' '.join(own)} " not in flat:
        return False
    return not any(
        f" {key} " in flat and key not in " ".join(own) for key, other in options.keys.items() if other != letter
    )


def _spelt_out(key: str) -> list[str]:
    return [word for part in key.split() for word in table("answers")["abbreviations"].get(part, part).split()]
