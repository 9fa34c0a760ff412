"""Objects by their import path, "module:name": of installed packages, and of files in the working folder."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any


class PathError(ValueError):
    """A path from which nothing can be imported; the message says what to write instead."""


def imported(path: str, wanted: type = object) -> Any:
    """The object that `path` names. wanted: what near names are looked for, when there is no such name in the module.

    The working folder is searched last: console scripts and launched recipes have their own folder on the path, not the
    author's, and a file there must not hide an installed package. Raises PathError.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise PathError(f"an import path is 'module:name', got {path!r}")
    if module_name == "__main__":
        raise PathError("what the running script defines cannot be imported elsewhere; move it to a module")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is there but misses an import of its own must not be reported as absent.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise PathError(f"importing {module_name} failed: {error}") from error
        raise PathError(
            f"no module {module_name!r} on the import path; start from its folder or set PYTHONPATH"
        ) from error
    except Exception as error:
        raise PathError(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise PathError(f"{module_name} has no {name!r}{hint(name, _of_type(module, wanted))}")
    return getattr(module, name)


def _of_type(module: Any, wanted: type) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, wanted) or (isinstance(value, type) and issubclass(value, wanted))
    ]


def hint(word: Any, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", or "" where nothing known is near."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
