"""The names of vLLM's and DeepSpeed's own options, read from their sources: to import either takes half a minute.

A package that is not installed is not known here; it looks at its options itself when it starts.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rewards.imports import hint

VLLM_SOURCES = ("engine/arg_utils.py", "entrypoints/*/cli_args.py")
DEEPSPEED_SOURCES = ("**/*constants.py", "**/*config.py")
ZERO_SOURCES = ("runtime/zero/config.py", "runtime/zero/leaf_module_config.py")
TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
# vLLM's counts of devices and places, which our own arithmetic divides by.
COUNTS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
)


def faults(vllm: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with `rollout.vllm` and `deepspeed`, one after another, with the key."""
    yield from _unknown("rollout.vllm", vllm, set(vllm_options()))
    for name, value in vllm.items():
        kind = vllm_options().get(name, "").removesuffix(" | None")
        if name in COUNTS:
            kind = "int"
        if name == "max_model_len" and isinstance(value, str):
            if not re.fullmatch(r"auto|[1-9]\d*(\.\d+)?[kKmM]?", value):
                yield f"rollout.vllm.max_model_len={value!r} is a number of tokens such as 8192 or 8k, or auto"
            continue
        if kind in TYPES and not _is(value, kind):
            yield f"rollout.vllm.{name}={value!r} must be {WORDS[kind]}"
        elif name in COUNTS and value < 1:
            yield f"rollout.vllm.{name}={value} must be at least 1"
    if (context := vllm.get("max_model_len", 1)) == 0 or (_is(context, "int") and context < -1):
        yield f"rollout.vllm.max_model_len={context} is a number of tokens, or -1 for as many as the cache holds"
    if _is(share := vllm.get("gpu_memory_utilization", 1), "float") and not 0 < share <= 1:
        yield f"rollout.vllm.gpu_memory_utilization={share} is a share of a GPU's memory, above 0 and at most 1"
    zero = deepspeed.get("zero_optimization") or {}
    if not isinstance(zero, Mapping):
        yield f"deepspeed.zero_optimization={zero!r} must be a mapping such as {{stage: 3}}"
    else:
        yield from _unknown("deepspeed", deepspeed, _words("deepspeed", DEEPSPEED_SOURCES))
        yield from _unknown("deepspeed.zero_optimization", zero, _words("deepspeed", ZERO_SOURCES))


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


def _unknown(key: str, given: Mapping[str, Any], known: set[str] | frozenset[str]) -> Iterator[str]:
    for name in given:
        if known and name not in known:
            package = "vLLM" if "vllm" in key else "DeepSpeed"
            yield f"unknown key '{key}.{name}'{hint(str(name), sorted(known))}; {package} has no option of that name"


@cache
def vllm_options() -> Mapping[str, str]:
    """The fields of the classes that vLLM's command line is made of, with their types as they are written."""
    classes = [node for tree in _trees("vllm", VLLM_SOURCES) for node in tree.body if isinstance(node, ast.ClassDef)]
    fields = [node for one in classes for node in one.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: ast.unparse(node.annotation) for node in fields if isinstance(node.target, ast.Name)}


@cache
def _words(package: str, sources: Sequence[str]) -> frozenset[str]:
    """Every name in the sources that hold the package's settings: as a text, or as a field."""
    found = set()
    for node in (node for tree in _trees(package, sources) for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return frozenset(found)


def _trees(package: str, sources: Sequence[str]) -> Iterator[ast.Module]:
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        for source in sources:
            for file in sorted(Path(folder).glob(source)):
                yield ast.parse(file.read_text(encoding="utf-8"))
