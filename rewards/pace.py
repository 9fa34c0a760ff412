"""What a trial of rewards says meanwhile, and the completion that it puts answers in."""

from __future__ import annotations

import time
from collections.abc import Callable

# The think block keeps a format gate open; a reward that reads other marks needs a template of its own.
TEMPLATE = "<think>I compare the findings with the question.</think>\n<answer>{answer}</answer>"
PATIENCE_S = 10.0  # between two lines about how far it is


class Pace:
    """Says how far a slow trial has come. expected: completions in all, about. what: is tried, in words."""

    def __init__(self, expected: int, say: Callable[[str], None], what: str = "the reward") -> None:
        self.expected, self.say, self.what = expected, say, what
        self.done = 0
        self.began = self.told = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= PATIENCE_S:
            self.told, each = now, (now - self.began) / self.done
            left = each * max(0, self.expected - self.done)
            self.say(
                f"trying {self.what}: {self.done:,} of about {max(self.done, self.expected):,} completions, "
                f"{each:.3g} s each; about {left / 60:.1f} min left"
            )
