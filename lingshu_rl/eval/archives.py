"""Publishers' archives, unpacked once beside the Hub's cache: the same archive is found unpacked the next time."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

from lingshu_rl.eval.benchmarks import EvalError


def unpacked_zip(file: Path, name: str) -> Path:
    """The folder of an archive's content, whole or not there. name: whose it is. Raises EvalError for a damaged one.

    Known by its place, size and age, as reading gigabytes to name them would take longer than to look.
    """
    from huggingface_hub import cached_assets_path

    state = file.stat()
    told = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    key = f"{file.stem}-{hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}"
    folder = cached_assets_path("lingshu_rl", namespace=name, subfolder="archives") / key
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{key}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(part)
    except (zipfile.BadZipFile, OSError) as error:
        raise EvalError(f"{file} cannot be unpacked: {error}; fetch it again") from error
    part.rename(folder)
    return folder
