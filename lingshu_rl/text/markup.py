"""Names and sentences from outside (folders, variants, errors) as pages and tables show them: word for word."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What Markdown would make a tag, an entity, a link, code, a cell or emphasis of.
_MARKUP = re.compile(r"[\\`|*]|<(?=[A-Za-z/!?])|&(?=[#A-Za-z])|(?<=\])[(\[:]")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}
_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")
# In LaTeX every one of these begins something.
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"†": r"\textdagger{}", "‡": r"\textdaggerdbl{}", "–": "--", "→": r"$\to$"}
)


def as_markdown(text: str) -> str:
    """A text in one line of Markdown, of which no tag, link, code or cell comes to life."""
    line = _BREAKS.sub(" ", encodable(text))
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), line)


def table_line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(as_markdown, cells))} |"


def as_latex(text: str) -> str:
    """A text in one line of LaTeX, of which no command comes to life."""
    return _BREAKS.sub(" ", encodable(text)).translate(_LATEX)


def encodable(text: str) -> str:
    """Bytes of a file's name that are no UTF-8, written out: every page and side file is UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
