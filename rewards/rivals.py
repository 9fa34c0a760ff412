"""Letters that a text offers beside the one it chose. English words; other languages deny through data/choices.json."""

from __future__ import annotations

import re

from rewards.text import sentence_spans

_LONGEST_TAIL = 20_000
_LONGEST_END = 300

_DENIES = re.compile(
    r"\b(?:not|never|neither|nor|none|cannot|unlikely|wrong|incorrect|excluded?|ruled? out|reject\w*|eliminat\w*|distractors?|unlike|than)\b|n['’]t\b",
    re.IGNORECASE,
)
# Another letter beside the chosen one, and the words that may explain it ("B, since C would show air").
_RIVAL_LETTER = re.compile(
    r"(?:[,;:(→>–—-]\s*|\b(?:with|and|or|but|though|although|while|then|also|maybe|perhaps|possibly|plus|option|choice|answer"
    r"|is|be|versus|vs\.?) )\(?(?!A [a-z]|I\b)([A-Z])\)?(?![\w'’-])"
)
_REJECTS = re.compile(
    r"\b(?:not?|never|neither|nor|none|wrong|incorrect|false|un\w+|less|exclude\w*|rule[sd]?|reject\w*|eliminate\w*|rather|instead|than"
    r"|lacks?|without|fails?|cannot|absent|tempting|inconsistent|would|describes?|typically|usually|shows?|over|explains?"
    r"|requires?|causes?|presents?|needs?|others?|rest|distractors?)\b|n['’]t\b",
    re.IGNORECASE,
)
_NOT_EXCLUDED = re.compile(
    r"(?:cannot|can['’]t|not|hard to|difficult to)(?: \w+){0,2} (?:excluded?|ruled? out)", re.IGNORECASE
)
_ENDS_WITH = re.compile(
    r"(?:[,:;→⇒>–—]\s*|\b(?:also|maybe|perhaps|possibly|probably|likely|actually|be|is|rather|instead) )(?:(?:option|choice) )?\(?(?!I\b)([A-Z])\)?(?: instead)?[\s.!*]*$"
)


def rivals_after(tail: str) -> set[str]:
    """Letters that a sentence of `tail`, the text from the answer on, ends with ("On reflection, C."), unless it denies."""
    found: set[str] = set()
    tail = tail[:_LONGEST_TAIL]
    for start, end in sentence_spans(tail):
        sentence = tail[max(start, end - _LONGEST_END) : end]
        match = _ENDS_WITH.search(sentence)
        if match is not None and not _DENIES.search(sentence):
            found.add(match.group(1))
    return found


def rivals_beside(clause: str) -> set[str]:
    """Letters that a clause offers beside the one it chose ("B, with C as a backup"), unless it explains them away."""
    rivals = {match.group(1) for match in _RIVAL_LETTER.finditer(clause)}
    if rivals and _REJECTS.search(clause) is not None and _NOT_EXCLUDED.search(clause) is None:
        return set()
    return rivals
