"""Where in a completion the sentences stand that were read from it.

Reading changes the text (short forms, tables, answers beside a name) and leaves parts out, so places are not carried
along: the words that were read are aligned with those of the completion.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.report.lexicon import Lexicon
from rewards.report.sentences import TOKEN

Place = tuple[int, int]


def locate(sentences: Sequence[Sequence[str]], completion: str, lexicon: Lexicon) -> list[Place | None]:
    """(start, end) of each sentence in the completion, from its first to its last word found; None where none was.

    The longest common subsequence of the two, both run backwards: what a thought drafts and the answer repeats is
    placed in the answer.
    """
    from rapidfuzz.distance import LCSseq  # only here: `import rewards` stays light

    stem = lexicon.stem
    words = list(TOKEN.finditer(completion))[::-1]
    read = [(word, number) for number, sentence in enumerate(sentences) for word in sentence][::-1]
    pairs = LCSseq.editops([stem(match[0].lower()) for match in words], [word for word, _ in read])
    places: list[Place | None] = [None] * len(sentences)
    for block in pairs.as_matching_blocks():
        at, begin, length = block.a, block.b, block.size
        for match, (_, number) in zip(words[at : at + length], read[begin : begin + length], strict=True):
            known = places[number]
            places[number] = (match.start(), known[1] if known else match.end())
    return places
