"""How a command ends: what a person did wrong, or what stopped it, is said in a line, not in a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from lingshu_rl.storage.disk import said
from lingshu_rl.storage.folders import InUse

WRONG, STOPPED, INTERRUPTED = 2, 1, 130


def piped(command: Callable[[], int]) -> int:
    """What `command` returns; 0 where whoever reads its output has enough of it (`| head`)."""
    try:
        try:
            return command()
        finally:  # also behind argparse's help, which ends with SystemExit
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end
        return 0


def exit_code(
    command: Callable[[], int | None],
    name: str,
    *,
    wrong: tuple[type[Exception], ...] = (),
    stops: tuple[type[Exception], ...] = (),
    goes_on: str = "from there",
) -> int:
    """What `command` returns (None counts as 0), or 2 for an error of `wrong`, 1 for one of `stops`, 130 for Ctrl-C.

    goes_on: how the same command continues after it was stopped.
    """
    wrong = (*wrong, InUse)
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # see `piped`
        raise
    except wrong as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except stops as error:
        print(f"\n{name} stopped: {error}\nthe same command goes on {goes_on}", file=sys.stderr)
        return STOPPED
    except OSError as error:  # a disk that is full, a folder that may not be written, a file in its place
        print(f"\n{name} stopped: {said(error)}\nthe same command goes on {goes_on}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"\n{name} was stopped; the same command goes on {goes_on}", file=sys.stderr)
        return INTERRUPTED
