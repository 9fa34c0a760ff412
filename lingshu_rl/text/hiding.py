"""Secrets among settings: whatever is printed, stored or said has them hidden.

A setting is secret by its name (a password, a key, a token of access), by where it stands (the environment of a
process, of which only what engines are known to be tuned by is shown), or by its look (a URL with a password or a
signature, a key of a known form). Hiding too much costs a reader a look into his own file; hiding too little cannot be
taken back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from rewards.chat import HIDDEN, address

ENVIRONMENTS = {"env", "env_vars", "environment", "environ"}  # mappings of a process's variables
# Variables that tune engines; any other may hold anything.
_TUNING = re.compile(r"(VLLM|OMP|MKL|KMP|CUDA|NCCL|GLOO|UCX|TORCH|PYTORCH|TRITON|RAY|TOKENIZERS|HF_HUB)_[A-Z0-9_]+")
_SECRET_WORDS = set(
    "password passwd passphrase pwd secret secrets token credential credentials authorization auth cookie bearer "
    "apikey pat "
    "signature sig login netrc".split()
)
_KEYS_OF = set(
    "api access secret private account auth encryption signing master ssh license subscription session".split()
)
_FORMS = re.compile(
    r"\b(?:(?:sk|pk|rk)[-_][\w-]{12,}|hf_\w{12,}|gh[a-z]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{12,}|xox[a-z]-[\w-]{8,}"
    r"|A[KS]IA[0-9A-Z]{12,}|AIza[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)|(?<=[Bb]earer )\S+|(?<=[Bb]asic )[\w+/=]{8,}"
)
_URL = re.compile(r"\b[a-zA-Z][\w+.-]*://[^\s'\"<>]+")


def without_secrets(node: Any, name: str = "", *, environment: bool = False) -> Any:
    """The same tree of mappings, lists and values with its secrets replaced by HIDDEN. name: the key that it stands
    under."""
    if isinstance(node, Mapping):
        inside = name.lower() in ENVIRONMENTS
        return {key: without_secrets(value, str(key), environment=inside) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [without_secrets(value, name, environment=environment) for value in node]
    if node in (None, "") or isinstance(node, bool):
        return node
    if environment and not _TUNING.fullmatch(name):
        return HIDDEN
    if is_secret(name) and (environment or isinstance(node, str)):
        return HIDDEN
    return shown(node) if isinstance(node, str) else node


def shown_beside(text: str, tree: Any) -> str:
    """A message about these settings, in which a library may have repeated them."""
    hidden = without_secrets(tree)
    for value in _differing(tree, hidden):
        text = text.replace(value, HIDDEN)
    return shown(text)


def _differing(node: Any, hidden: Any) -> list[str]:
    if isinstance(node, Mapping):
        return [value for key in node for value in _differing(node[key], hidden[key])]
    if isinstance(node, (list, tuple)):
        return [value for one, other in zip(node, hidden, strict=True) for value in _differing(one, other)]
    return [str(node)] if hidden == HIDDEN and node else []


def is_secret(name: str) -> bool:
    """Whether a setting of this name, in whatever spelling, holds a secret: api_key, hfToken, X-Auth-Password."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    keys = {after for before, after in pairwise(words) if before in _KEYS_OF}
    return bool(_SECRET_WORDS.intersection(words)) or bool(keys & {"key", "keys"})


def shown(text: str) -> str:
    """A text with passwords and queries of URLs, and keys of known forms, hidden."""
    return _FORMS.sub(HIDDEN, _URL.sub(lambda found: address(found[0]), text))


def setting_shown(word: str) -> str:
    """A setting given as key=value, for a message."""
    key, equals, value = word.partition("=")
    parts = key.split(".")
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    nested = without_secrets(nested)
    for part in parts:
        nested = nested[part]
    holds_more = set(re.findall(r"\w+", key.lower())) & ENVIRONMENTS or any(
        map(is_secret, re.findall(r"[\w-]+(?=\s*:)", value))
    )
    return f"{key}{equals}{HIDDEN if holds_more and value else nested}"


def url_fault(url: str) -> str:
    """Why this is no address to send requests to, in words that hold nothing of it; "" where it is one."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018
    except ValueError:
        return "is no URL"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "is no address such as http://node2:8100"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return "holds a user, a password or a query, which would stand in logs and reports; leave them out"
    return ""
