"""What a result depends on, written beside it. Runs whose provenance is equal give equal results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from lingshu_rl.eval.benchmarks import EvalError
from lingshu_rl.storage.runfolder import versions

# What scores depend on beside the engine.
GRADING = ("numpy", "sympy", "rapidfuzz", "rouge-score", "sacrebleu", "pycocoevalcap", "radeval")


def model_hash(model: str) -> str:
    """SHA-256 over a local model folder's files that decide what it answers, or the commit of a Hub model."""
    from lingshu_rl.model.loading import model_path

    folder = Path(model_path(model)).expanduser()
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt"):
                digest.update(file.name.encode())
                with file.open("rb") as data:
                    while block := data.read(1 << 22):
                        digest.update(block)
        return digest.hexdigest()[:16]
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent.name
    except Exception as error:  # the Hub's errors share no base class
        raise EvalError(f"{model} is no model folder and cannot be fetched: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=1)
def grader_version() -> str:
    """SHA-256 over the rewards package: code and word lists. The same string in training and evaluation, or not the
    same grader."""
    import rewards

    root = Path(rewards.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".json", ".tsv")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def commit() -> str:
    """The git commit of this library's checkout, with "+changes" if files differ; "" for an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def environment() -> dict[str, Any]:
    found = versions()
    for package in GRADING:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return {"grader": grader_version(), "commit": commit(), "versions": found}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what differs, with both values."""
    out = []
    for key in sorted(a.keys() | b.keys()):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            out += differences(one, other, f"{prefix}{key}.")
        elif json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True):
            out.append(f"{prefix}{key}: {one!r} -> {other!r}")
    return out
