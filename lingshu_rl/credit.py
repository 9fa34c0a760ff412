"""Where in a completion its reward was earned, from characters to the sampled tokens.

The text is not given to the tokenizer again: it has many spellings in tokens, of which sampling takes any. What the
sampled tokens decode to, one after another, says where each stands.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from lingshu_rl.advantages import Placed
from lingshu_rl.types import Scored

Decode = Callable[[Sequence[int]], str]
HALF_A_CHARACTER = 3  # bytes at the most


def placed(member: Scored, decode: Decode) -> Placed:
    """The member's spans by token. decode: what made its text of its tokens."""
    ids, text, spans = member.rollout.token_ids, member.rollout.text, member.result.spans
    ranges = iter(token_ranges(ids, text, [(s.start, s.end) for one in spans.values() for s in one], decode))
    return Placed(len(ids), {name: [(*next(ranges), s.points) for s in one] for name, one in spans.items()})


def token_ranges(
    token_ids: Sequence[int], text: str, spans: Iterable[tuple[int, int]], decode: Decode
) -> list[tuple[int, int]]:
    """The tokens that hold a character of text[start:end], for each span, as (first, the one after the last).

    A character that is spelled by several tokens, in bytes, belongs to all of them. A token without a character, as
    the end of the turn, belongs to none.
    """

    @cache
    def decoded(count: int) -> tuple[int, int]:
        """Characters that the first tokens are decoded to, and how many of them are the text's."""
        so_far = decode(token_ids[:count])
        differs = (n for n, (a, b) in enumerate(zip(so_far, text, strict=False)) if a != b)
        return len(so_far), next(differs, min(len(so_far), len(text)))

    def spelled(count: int) -> int:
        """Characters that the first tokens spell. SentencePiece decodes no byte of a run that ends in half a one."""
        return max(decoded(n)[1] for n in range(max(0, count - HALF_A_CHARACTER), count + 1))

    def begun(count: int) -> int:
        """Those, and one of which the next token spells the rest: half a character is decoded as another one."""
        return spelled(count) + (decoded(count)[0] > spelled(count))

    counts = range(len(token_ids) + 1)
    return [(bisect_right(counts, start, key=begun) - 1, bisect_left(counts, end, key=spelled)) for start, end in spans]
