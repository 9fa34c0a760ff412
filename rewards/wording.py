"""When two short wordings are one answer: keys that ignore spelling, number, accents and known synonyms."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import cache, lru_cache

from rewards.text import table, text_key

# "a" is a letter of a name at its end and behind words such as "hepatitis"; "A" is one anywhere but at the start.
_ARTICLE = re.compile(
    r"(?:^(?:a|an|the)|(?<!\w)(?-i:an|the"
    r"|a)(?<!\bvitamin a)(?<!\bhepatitis a)(?<!\binfluenza a)(?<!\bgroup a)(?<!\btype a)"
    r"(?<!\bblood a)(?<!\bstage a)(?<!\bgrade a)(?<!\bclass a)(?<!\bprotein a))(?=\s+\w)\s+",
    re.IGNORECASE,
)
_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "κ": "kappa", "λ": "lambda", "μ": "mu", "ω": "omega"}
_LONE_GREEK = re.compile(rf"(?<![\u0370-\u03ff])[{''.join(_GREEK)}](?![\u0370-\u03ff])")
_BESIDE_GREEK = re.compile(rf"(?<=[a-z0-9])(?=[{''.join(_GREEK)}])|(?<=[{''.join(_GREEK)}])(?=[a-z0-9])")
_ACCENT = re.compile("(?<=[A-Za-z])[\u0300-\u036f]+")


@lru_cache(maxsize=16384)
def answer_key(text: str) -> str:
    """`text_key` that also ignores articles, plural endings, British spelling, accents, Greek letters, adjectives of an
    organ (venous: vein), known synonyms and number words up to twelve.
    """
    key = " ".join(as_said(text))
    return _synonyms().get(key, key)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without articles."""
    text = _ARTICLE.sub("", text.strip())
    if not text.isascii():
        text = _BESIDE_GREEK.sub(" ", text.lower())
        text = _LONE_GREEK.sub(lambda match: _GREEK[match.group()], text)
        text = unicodedata.normalize("NFC", _ACCENT.sub("", unicodedata.normalize("NFD", text)))
    return text_key(text.replace("_", " ")).split()


@lru_cache(maxsize=16384)
def _word(token: str) -> str:
    words = table("answers")
    token = _singular(_spelt(words["numbers"].get(token, token)), words["plurals"])
    adjectives: dict[str, str] = words["adjectives"]
    return adjectives.get(token, token)


def as_said(text: str) -> tuple[str, ...]:
    """The keys of a text's words in order, each word for itself."""
    return tuple(_word(token) for token in words_of(text))


@cache
def _synonyms() -> dict[str, str]:
    """From the key of each synonym to the key of the first of its group."""
    found: dict[str, str] = {}
    for group in table("answers")["synonyms"]:
        keys = [" ".join(as_said(name)) for name in group]
        found |= dict.fromkeys(keys[1:], keys[0])
    return found


@cache
def _groups() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, first in _synonyms().items():
        groups.setdefault(first, []).append(name)
    return groups


def synonyms_of(key: str) -> list[str]:
    """The keys of the other names of what a key from `answer_key` names."""
    return _groups().get(key, [])


def _spelt(token: str) -> str:
    for british, american in table("answers")["spelling"]:
        if british in token:
            token = token.replace(british, american)
    return token


def _singular(token: str, plurals: Mapping[str, str]) -> str:
    if token in plurals:
        return plurals[token]
    if len(token) < 4 or not token.endswith("s") or token.endswith(("ss", "us", "is", "as", "os")):
        return token
    if token.endswith("ies") and len(token) > 4:
        return token[:-3] + "y"
    if token.endswith(("ches", "shes", "xes", "sses")):
        return token[:-2]
    return token[:-1]


def abbreviates(short: str, long: str) -> bool:
    """Whether `short` is made of the initials of `long`, with or without those of small words."""
    letters = re.sub(r"[^a-z0-9]", "", short.lower())
    names = re.findall(r"[a-z0-9]+", long.lower())
    initials = "".join(name[0] for name in names if name not in ("of", "the", "and", "with", "in"))
    if len(letters) < 2:
        return False
    if letters in (initials, "".join(name[0] for name in names)):
        return True
    # GPA: granulomatosis with polyangiitis. Every word gives its initial, a compound one letter more.
    return (
        short.isupper() and len(initials) > 1 and len(letters) == len(initials) + 1 and _in_order(letters, long.lower())
    )


def _in_order(letters: str, text: str) -> bool:
    initials = [name[0] for name in re.findall(r"[a-z0-9]+", text) if name not in ("of", "the", "and", "with", "in")]
    rest = iter(text)
    return all(letter in rest for letter in letters) and all(letter in letters for letter in initials)
