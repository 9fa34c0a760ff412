"""Text normalisation shared by all rewards. Every function here is linear in its input."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import cache
from importlib import resources
from typing import Any, cast

# Characters that show nothing: soft hyphen, joiners, bidi controls, fillers, variation selectors, tag characters, C0/C1
# controls other than tab and newline.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)
_NOT_NEWLINE = re.compile(r"[^\n]")
_NEWLINE = re.compile("\r\n?|\x85|\u2028|\u2029")
# NFKC would turn 10⁹ into 109 and 2½ into 21/2: keep the power and the space apart before it runs.
_SUPERSCRIPT = re.compile("(?<=[0-9])([⁺⁻]?[⁰¹²³⁴-⁹]+)")
_FRACTION = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞↉])")

_LATEX_SPACE = re.compile(r"\\[,;:! ]|\\q?quad\b|~")
_LATEX_WRAP = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|boxed|fbox|bf|rm|bold"
    r"|boldsymbol|operatorname|underline|emph|displaystyle|large|Large)(?![A-Za-z])\s*"
)
_MARKUP = re.compile(r"[*`#]+|_{2,}|(?<!\w)_|_(?!\w)|~~")
_BULLET = re.compile(r"^(?:[>\-•‣◦▪●–—+]+\s+)+|^>+\s*|^(?:[✅✔☑👉➡⭐🎯📌▶][\s*]*)+")
_QUOTES = "\"'“”„‟‘’‚‛«»‹›「」『』"
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">", "【": "】", "〔": "〕", "《": "》", "〈": "〉"}
_DASHES = re.compile("[‐‑‒–—―−﹣]")
_KEY_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=\w)|(?<=\w)-(?=[^\W\d_])")
_KEY_POSSESSIVE = re.compile(r"(?<=[^\W\d_])['’]s\b")
_KEY_DROP = re.compile(rf"[{_QUOTES}`*,;:!?()\[\]{{}}。、，；：！？।]|\.(?!\d)|(?<!\w)_|_(?!\w)")
# The look-behind keeps a long run of full stops linear.
_PLAIN_WORDS = re.compile(r"[A-Za-z0-9 ]*")
_SENTENCE_END = re.compile(r"[。！？।]|(?<![.!?])[.!?]++(?=[\"'”’)\]*_]*+(?:\s|$))")
_ABBREVIATION = re.compile(r"\b(?:[ei]\.[ge]|vs|cf|st|dr|mr|mrs|fig|ca|approx|resp|(?P<numbers>no))$", re.IGNORECASE)
# The last letters of the abbreviations: most full stops need no second look.
_ABBREVIATION_ENDS = frozenset("egsftropa.")
_NEXT = re.compile(r"\s*(\S)")
_NUMBER = re.compile(r"\s*(?:\d|[A-Z]\b)")  # "No. 5", "No. C"
# After a label: another label that begins a sentence of its own ("B. Option C describes ...", "B. A (fracture) ...").
_NEXT_SUBJECT = re.compile(
    r"\s+(?:(?:Option|Choice|Answer)s? \(?[A-Z]\b|[A-Z] \(|[B-HJ-Z] (?!and\b|or\b)[a-z]"
    r"|[AI] (?:is|was|would|will|can|could|does|did|has|should|may|might|cannot)\b|Let me know\b|(?:Actually|Wait"
    r"|Hmm+)\b)"
)
ARTICLE = re.compile(r"(?:a|(?i:an|the)|A(?! [A-Z][a-z])) +")


# Scripts that are written without spaces.
_SPACELESS = re.compile("[\u0600-\u06ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]")


class Folded:
    """A pattern in small letters that takes capitals for the same: on ASCII several times as fast as IGNORECASE.

    The groups of a match are in small letters; its places are those of the text.
    """

    def __init__(self, pattern: str) -> None:
        self._small = re.compile(pattern)
        self._any = re.compile(pattern, re.IGNORECASE)

    def search(self, text: str, *span: int) -> re.Match[str] | None:
        return self._small.search(text.lower(), *span) if text.isascii() else self._any.search(text, *span)

    def match(self, text: str, *span: int) -> re.Match[str] | None:
        return self._small.match(text.lower(), *span) if text.isascii() else self._any.match(text, *span)

    def fullmatch(self, text: str, *span: int) -> re.Match[str] | None:
        return self._small.fullmatch(text.lower(), *span) if text.isascii() else self._any.fullmatch(text, *span)

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        return self._small.finditer(text.lower()) if text.isascii() else self._any.finditer(text)

    def sub(self, new: str, text: str) -> str:
        return self._any.sub(new, text)


@cache
def table(name: str) -> dict[str, Any]:
    """The words of data/NAME.json, normalised as completions are."""
    source = resources.files("rewards") / "data" / f"{name}.json"
    found: dict[str, Any] = json.loads(normalise(source.read_text(encoding="utf-8")))
    return found


class Patterns:
    """The patterns of a table of words, each compiled when it is first asked for.

    In a pattern {a+b} is one of the words of a, as a whole word, or one of the marks of b, which may touch other words;
    {*a} is one of the entries of a as they are. A role may hold its entries by language.
    """

    def __init__(self, name: str) -> None:
        self._table = table(name)

    def __getattr__(self, name: str) -> Folded:
        template = self._table["patterns"][name]
        pattern = re.sub(r"\{([*a-z_+]+)\}", lambda role: self._role(role.group(1)), template)
        # What tells capitals apart says so.
        found = re.compile(pattern) if pattern.startswith("(?-i:") else Folded(pattern)
        setattr(self, name, found)
        return cast(Folded, found)

    def _role(self, name: str) -> str:
        if name.startswith("*"):
            return "|".join(self._entries(name[1:]))
        words, _, marks = name.partition("+")
        whole = [entry for entry in self._entries(words) if not _SPACELESS.search(entry)]
        touching = [entry for entry in self._entries(words) if _SPACELESS.search(entry)] + self._entries(marks)
        return "(?:" + "|".join([rf"(?<!\w)(?:{'|'.join(whole)})(?!\w)", *touching]) + ")"

    def _entries(self, name: str) -> list[str]:
        given = self._table[name] if name else []
        entries = [entry for words in given.values() for entry in words] if isinstance(given, dict) else given
        return sorted(entries, key=len, reverse=True)


def normalise(text: str) -> str:
    """NFKC with invisible and bidi characters removed and newlines unified.

    Look-alike letters of other scripts are left as they are: a Cyrillic letter is not a Latin one. A superscript after
    a digit becomes `^n` and a vulgar fraction after a digit keeps a space, because plain NFKC would change the number.
    """
    if not text.isascii():
        text = _SUPERSCRIPT.sub(r"^\1", text)
        text = _FRACTION.sub(" ", text)
        # Two ligatures unfold to 18 and 8 letters each and answer nothing.
        text = text.replace("\ufdfa", " ").replace("\ufdfb", " ")
        text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
        text = _NEWLINE.sub("\n", text)
    elif "\r" in text:
        text = _NEWLINE.sub("\n", text)
    return _INVISIBLE.sub("", text)


def unwrap_latex(text: str) -> str:
    """Drop math delimiters, spacing and font commands: `$\\mathbf{(B)}$` becomes `(B)`. Other commands are kept."""
    if "\\" not in text and "$" not in text:
        return text
    text = text.replace("\\(", "").replace("\\)", "").replace("\\[", "").replace("\\]", "").replace("$", "")
    text = _LATEX_SPACE.sub(" ", text).replace("\\{", "{").replace("\\}", "}")
    unwrapped = _LATEX_WRAP.sub("", text)
    if unwrapped != text:
        unwrapped = unwrapped.replace("{", "").replace("}", "")
    return unwrapped.strip()


def strip_markup(text: str) -> str:
    """Remove markdown emphasis, code ticks, headings, bullets and table bars around one line."""
    if "*" in text or "_" in text or "`" in text or "#" in text or "~" in text:
        text = _MARKUP.sub("", text)
    text = text.strip(" \t|")
    return text if text[:1].isalnum() else _BULLET.sub("", text).strip()


def strip_quotes(text: str) -> str:
    """Remove quotes and bracket pairs that enclose the whole text, with surrounding space."""
    for _ in range(8):  # deeper nesting is no answer, and unbounded peeling would be quadratic
        text = text.strip()
        if (len(text) >= 2 and text[0] in _QUOTES and text[-1] in _QUOTES) or (
            len(text) >= 2
            and _BRACKETS.get(text[0]) == text[-1]
            and text[0] not in text[1:-1]
            and text[-1] not in text[1:-1]
        ):
            text = text[1:-1]
        else:
            break
    return text


def blanked(text: str, spans: Collection[tuple[int, int]], fill: str = " ") -> str:
    """`text` with the spans filled but for their line breaks: offsets and lines stay what they are."""
    if not spans:
        return text
    parts: list[str] = []
    position = 0
    for start, end in sorted(spans):
        start = max(start, position)
        if end > start:
            parts += [text[position:start], _NOT_NEWLINE.sub(fill, text[start:end])]
            position = end
    return "".join([*parts, text[position:]])


def text_key(text: str) -> str:
    """The form in which two short answers are compared: case, punctuation, quotes, hyphens and a possessive 's ignored.

    Signs, digits, comparison marks, accents and every word are kept: "+1" and "-1" stay different.
    """
    return key_of_normalised(normalise(text))


def key_of_normalised(text: str) -> str:
    """`text_key` for a text that went through `normalise` already."""
    text = text.lstrip(" ,;:!?").rstrip(" .,;:!?")
    if _PLAIN_WORDS.fullmatch(text):
        return " ".join(text.lower().split())
    if not text.isascii():
        text = _DASHES.sub("-", text)
    text = text.casefold()
    if "'" in text or "’" in text:
        text = _KEY_POSSESSIVE.sub("", text)
    if "-" in text:
        text = _KEY_HYPHEN.sub(" ", text)
    text = _KEY_DROP.sub(" ", text)
    return " ".join(text.split())


def drop_article(text: str) -> str:
    """`text` without one leading English article. "A Liver" keeps its A, which may be a label."""
    article = ARTICLE.match(text)
    return text[article.end() :] if article is not None else text


def lines(text: str) -> list[str]:
    """The lines of `text` that hold more than space, stripped."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def sentences(text: str) -> list[str]:
    """Split into sentences, over line breaks too. Abbreviations and a leading label ("B. Pneumonia") do not end one."""
    return [text[start:end].strip() for start, end in sentence_spans(text)]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) offsets of the sentences of `text`; between them lies only white space and stray full stops."""
    spans: list[tuple[int, int]] = []
    offset = 0
    for line in text.split("\n"):
        start = 0
        for match in _SENTENCE_END.finditer(line):
            if match.group()[0] == "." and _goes_on(line, start, match):
                continue
            spans.append((offset + start, offset + match.end()))
            start = match.end()
        spans.append((offset + start, offset + len(line)))
        offset += len(line) + 1
    return [(start, end) for start, end in spans if text[start:end].strip(" \t.!?。！？।")]


def first_sentence_end(line: str) -> int:
    """Where the first sentence of a line ends."""
    for match in _SENTENCE_END.finditer(line):
        if match.group()[0] != "." or not _goes_on(line, 0, match):
            return match.end()
    return len(line)


def _goes_on(line: str, start: int, stop: re.Match[str]) -> bool:
    following = _NEXT.match(line, stop.end())
    if following is None:
        return False
    if following.group(1).islower():
        return True
    at = stop.start()
    if at - start < 8 and len(line[start:at].strip(" ()*_[]")) == 1:
        return _NEXT_SUBJECT.match(line, stop.end()) is None
    if line[at - 1 : at].lower() not in _ABBREVIATION_ENDS:
        return False
    short = _ABBREVIATION.search(line[max(start, at - 8) : at])
    return short is not None and (short["numbers"] is None or _NUMBER.match(line, stop.end()) is not None)
