"""Failures with a known cause: a run that meets one saves its last whole step, says the message and ends.

Beside the library's own: numbers that are not finite, and what the system says of files and disks. Anything else is a
bug: the step is saved as well, and the traceback kept.
"""

from __future__ import annotations

from rewards.base import LingshuError
from rewards.executor import RewardFailure


class ConfigError(LingshuError, ValueError):
    """The configuration cannot be run; the message names the key and what to do."""


class RunStopped(LingshuError, RuntimeError):
    """Base of a run's own known failures. Made of one message, so that it can be raised again with more to say."""


class PromptRefused(RunStopped):
    """A server refused one prompt, or has no room for it; others may be answered. prompt_id: the row."""

    def __init__(self, message: str, prompt_id: str = "") -> None:
        super().__init__(message)
        self.prompt_id = prompt_id


KNOWN_FAILURES: tuple[type[Exception], ...] = (RunStopped, RewardFailure, FloatingPointError, OSError)
