"""Where in a completion the sentences stand that were read from it.

Reading changes the text (short forms, tables, answers beside a name) and leaves parts out, so places are not carried
along: the words that were read are aligned with those of the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import itemgetter

from rewards.report.lexicon import Lexicon
from rewards.report.sentences import TOKEN

Place = tuple[int, int]


def locate(sentences: Sequence[Sequence[str]], completion: str, lexicon: Lexicon) -> list[Place | None]:
    """(start, end) of each sentence in the completion, from its first to its last word found; None where none was.

    The longest common subsequence of the two, both run backwards: what a thought drafts and the answer repeats is
    placed in the answer.
    """
    from rapidfuzz.distance import LCSseq  # only here: `import rewards` stays light

    words = list(TOKEN.finditer(completion))[::-1]
    stems = list(map(lexicon.stem, map(str.lower, map(itemgetter(0), words))))
    read = list(chain.from_iterable(sentences))[::-1]
    at = [-1] * len(read)  # of each word read its place in `words`
    for block in LCSseq.editops(stems, read).as_matching_blocks():
        at[block.b : block.b + block.size] = range(block.a, block.a + block.size)
    places: list[Place | None] = []
    end = len(read)
    for sentence in sentences:
        begin = end - len(sentence)
        found = list(filter((-1).__lt__, at[begin:end]))
        end = begin
        places.append((words[found[-1]].start(), words[found[0]].end()) if found else None)
    return places
