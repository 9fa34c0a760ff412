"""What is wrong with a command, found without running it: its words, settings, names, and the files that it reads.

A pipeline asks this of all its steps before it starts the first, so that a name written wrong in the last one does not
cost the days of those before it.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.util
import io
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lingshu_rl.data.sources import DATA_ENDINGS, sources_of
from lingshu_rl.planning.given import load_config

Promised = Callable[[Path], bool]  # whether an earlier step leaves a file or folder there
Entry = Callable[[Sequence[str]], argparse.Namespace]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HANDS_ON = re.compile(r"\b(train|sft)_main\(")  # a recipe is a script that gives its words to one of these


def faults(command: Sequence[str], promised: Promised) -> list[str]:
    """Why a command would not start, or would not find what it reads; empty where nothing is known against it.

    Commands of this library are read as they read themselves; of others it is known whether there is such a program,
    module or script.
    """
    program, words = command[0], list(command[1:])
    if program == "lingshu-rl":
        return _ours(words, promised)
    if program == "accelerate" and words[:1] == ["launch"]:
        return _launched(words[1:], promised)
    if program == "python":
        return _python(words, promised)
    return [] if shutil.which(program) else [f"there is no program {program!r}"]


def rehearsed(name: str, told: argparse.Namespace) -> int:
    """The end of a command's dry run: 1 where it would not find what it reads, which is said."""
    missing = list(CHECKS[name](told, lambda path: False))
    for line in missing:
        print(f"it would not start: {line}", file=sys.stderr)
    return 1 if missing else 0


def _python(words: Sequence[str], promised: Promised) -> list[str]:
    if words[:1] == ["-m"]:
        return [] if _is_module(words[1]) else [f"there is no module {words[1]!r}"]
    return _script(words[0], words[1:], promised)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _launched(words: Sequence[str], promised: Promised) -> list[str]:
    from accelerate.commands.launch import launch_command_parser

    told, problem = _read(launch_command_parser().parse_args, words)
    if told is None:
        return [problem]
    absent = [told.config_file] if told.config_file and not Path(told.config_file).is_file() else []
    return [f"{path}: no such file" for path in absent] + _script(
        told.training_script, told.training_script_args, promised
    )


def _script(path: str, words: Sequence[str], promised: Promised) -> list[str]:
    from lingshu_rl import cli

    if not Path(path).is_file():
        return [] if promised(Path(path)) else [f"{path}: no such file"]
    entries: Mapping[str, Entry] = {"train": cli.train_words, "sft": cli.sft_words}
    recipe = _HANDS_ON.search(Path(path).read_text(encoding="utf-8"))
    return _checked(recipe[1], entries[recipe[1]], words, promised) if recipe else []


def _ours(words: Sequence[str], promised: Promised) -> list[str]:
    from lingshu_rl import cli

    return _checked(words[0] if words else "", cli.parsed, words, promised)


def _checked(name: str, entry: Entry, words: Sequence[str], promised: Promised) -> list[str]:
    told, problem = _read(entry, words)
    if told is None:
        return [problem]
    try:
        return list(CHECKS[name](told, promised)) if name in CHECKS else []
    except (ValueError, RuntimeError) as error:  # the library's own errors of settings, sources and addresses
        return [str(error)]


def _read(entry: Entry, words: Sequence[str]) -> tuple[argparse.Namespace | None, str]:
    """The words as the command reads them, or what it says of them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return entry(words), ""
    except SystemExit:
        return None, said.getvalue().strip().rpartition("error: ")[2] or "its words cannot be read"


# --------------------------------------------------------------------------------------------------------- the commands


def _train(told: argparse.Namespace, promised: Promised) -> Iterator[str]:
    yield from _train_settings(told.config, told.settings, promised)


def _train_settings(file: str | None, settings: Sequence[str], promised: Promised) -> Iterator[str]:
    config = load_config(file, settings)
    yield from _sources(config.data.train, "data.train", promised)
    yield from _sources(config.data.test, "data.test", promised)
    yield from _models({"model": config.model, "reference.model": config.reference.model}, promised)


def _sft(told: argparse.Namespace, promised: Promised) -> Iterator[str]:
    from lingshu_rl.sft.settings import load_sft_config

    config = load_sft_config(told.config, told.settings)
    if told.stage and told.stage not in config.stages:
        yield f"--stage {told.stage}: the stages are {', '.join(config.stages)}"
    for name, stage in config.stages.items():
        yield from _sources(stage.data, f"stages.{name}.data", promised)
    yield from _sources(config.test.data, "test.data", promised)
    yield from _models({"model": config.model}, promised)


def _curate(told: argparse.Namespace, promised: Promised) -> Iterator[str]:
    from lingshu_rl.curate.pipeline import load_pipeline

    for source in load_pipeline(told.pipeline, told.out).sources:
        yield from _absent(source.path, f"source {source.label}", promised)


def _synth(told: argparse.Namespace, promised: Promised) -> Iterator[str]:
    from lingshu_rl.synth.run import check_words

    check_words(told)
    yield from _absent(str(getattr(told, "records", "")), "records", promised)


def _eval(told: argparse.Namespace, promised: Promised) -> Iterator[str]:
    from lingshu_rl.eval.command import settings_of
    from lingshu_rl.eval.loading import where_from
    from lingshu_rl.eval.runner import check_settings

    if told.task:
        return
    settings = settings_of(told)
    for benchmark in settings.benchmarks:
        where_from(benchmark, settings.data)
    known = not promised(Path(settings.model))
    check_settings(settings, model_is_there=known)
    if known and not settings.model.startswith(("http://", "https://")):
        yield from _models({"--model": settings.model}, promised)


def _sweep(told: argparse.Namespace, promised: Promised) -> Iterator[str]:
    from lingshu_rl.sweep.plan import load_sweep

    sweep = load_sweep(told.file, told.settings)
    faults = (fault for run in sweep.runs() for fault in _train_settings(sweep.config, run.overrides, promised))
    yield from dict.fromkeys(faults)


CHECKS: Mapping[str, Callable[[Any, Promised], Iterable[str]]] = {
    "train": _train,
    "sweep": _sweep,
    "sft": _sft,
    "curate": _curate,
    "synth": _synth,
    "eval": _eval,
}


# ------------------------------------------------------------------------------------------------------------ the files


def _sources(given: Any, key: str, promised: Promised) -> Iterator[str]:
    for source in sources_of(given, key) if given else ():
        yield from _absent(source.path, key, promised)


def _models(given: Mapping[str, str], promised: Promised) -> Iterator[str]:
    for key, model in given.items():
        if model and model != "demo":
            yield from _absent(model, key, promised)


def _absent(text: str, key: str, promised: Promised) -> Iterator[str]:
    """A file that nobody has and no step makes. An id of the Hub is taken as it is."""
    path = Path(text).expanduser()
    there = (
        not text or text.startswith("demo:") or path.exists() or promised(path) or glob.glob(str(path), recursive=True)
    )
    if not there and (path.suffix in DATA_ENDINGS or not _HUB_ID.fullmatch(text)):
        yield f"{key}: {text}: no such file or folder"
