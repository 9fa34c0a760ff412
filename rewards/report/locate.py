"""Where in a completion the sentences stand that were read from it.

Reading changes the text (short forms, tables, answers beside a name) and leaves parts out, so places are not carried
along: the words that were read are aligned with those of the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from rewards.report.lexicon import Lexicon
from rewards.report.sentences import TOKEN

Place = tuple[int, int]


def locate(sentences: Sequence[Sequence[str]], completion: str, lexicon: Lexicon) -> list[Place | None]:
    """(start, end) of each sentence in the completion, from its first to its last word found; None where none was.

    Both run backwards: what a thought drafts and the answer repeats is placed in the answer. In a long text the
    commonest words alone find nothing (`difflib`'s autojunk), which bounds the work on one that says the same over and
    over.
    """
    words = [(lexicon.stem(match[0].lower()), match.span()) for match in TOKEN.finditer(completion)][::-1]
    read = [(word, number) for number, sentence in enumerate(sentences) for word in sentence][::-1]
    matcher = SequenceMatcher(None, [word for word, _ in words], [word for word, _ in read])
    places: list[Place | None] = [None] * len(sentences)
    for at, begin, length in matcher.get_matching_blocks():
        for (_, (start, end)), (_, number) in zip(words[at : at + length], read[begin : begin + length], strict=True):
            known = places[number]
            places[number] = (start, known[1] if known else end)
    return places
