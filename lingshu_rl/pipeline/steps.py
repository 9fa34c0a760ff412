"""From raw data to a trained model: steps that are ordinary commands, each run only when something it depends on
changed.

    dir: runs/mini
    vars: {steps: 60}
    steps:
      rows:  {run: "lingshu-rl synth template {here}/nih.yaml --out {out}/rows.jsonl", inputs: ["{here}/nih.yaml",
      data],
              outputs: [rows.jsonl]}
      sft:   {run: "lingshu-rl sft {here}/sft.yaml stages.a.data=[{rows}/rows.jsonl] dir={out}
      trainer.max_steps={steps}",
              inputs: ["{here}/sft.yaml"], outputs: [a/model, eval]}
    table: [{stage: before, rows: "{sft}/eval/start.jsonl"}, {stage: sft, rows: "{sft}/eval/a.jsonl"}]

{out} is the step's own folder, {NAME} an earlier step's folder or a variable, {here} the pipeline file's folder. A
step's key hashes its command, the contents of its inputs and the outputs of the steps that it names; its folder is
DIR/NAME-KEY. So a change makes new folders for what depends on it and finds everything else, and a step that makes the
same bytes again stops the change there. A command that was killed is started again in its folder and goes on as it can.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lingshu_rl.data.tables import json_rows
from lingshu_rl.failures import ConfigError, LingshuError
from lingshu_rl.pipeline import rehearsal
from lingshu_rl.progress import Progress
from lingshu_rl.settings import read_config
from lingshu_rl.storage.fingerprint import LENGTH, Fingerprints, text_hash
from lingshu_rl.storage.folders import own
from lingshu_rl.storage.runfolder import write_text

_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_-]*)\}")
_OUTPUT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_-]*)\}/([^\s,\]\[{}:]+)")  # {STEP}/FILE in a command
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_RESERVED = {"out", "here"}
SAY_EVERY_S = 60.0


@dataclass
class StepConfig:
    run: str = ""  # the command, split as a shell would, but run without one
    inputs: list[str] = field(default_factory=list)  # files and folders that it reads
    outputs: list[str] = field(default_factory=list)  # what it leaves in {out}: checked, hashed for the steps after it
    env: dict[str, str] = field(default_factory=dict)
    stop_timeout_s: float = 60.0  # how long it may take to stop before it is killed


@dataclass
class TableRow:
    stage: str = ""
    rows: str = ""  # graded questions (JSONL with id and value), as `sft` and `train` write them


@dataclass
class PipelineConfig:
    dir: str = "runs/pipeline"
    vars: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, StepConfig] = field(default_factory=dict)  # in order
    table: list[TableRow] = field(default_factory=list)  # a row's gain is over the row before it


class PipelineError(LingshuError, RuntimeError):
    """A step failed; the message names it and its log."""


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Overrides are variables (`steps=80`) or keys (`dir=...`). Raises ConfigError naming the step."""
    plain = read_config(PipelineConfig, path)
    told = [f"vars.{o}" if o.partition("=")[0] in plain.vars else o for o in overrides]
    config = read_config(PipelineConfig, path, told)
    if unknown := set(config.vars) - set(plain.vars):
        raise ConfigError(f"{path} has no variable {min(unknown)!r}; it has {', '.join(plain.vars) or 'none'}")
    if not config.steps:
        raise ConfigError(f"{path}: steps is empty")
    known = {"here", *config.vars}
    for name, step in config.steps.items():
        where = f"{path}: steps.{name}"
        if not _NAME.fullmatch(name) or name in known | _RESERVED:
            raise ConfigError(
                f"{where}: a step's name is letters, digits, - and _, and not that of a variable, out or here"
            )
        if not step.run.strip():
            raise ConfigError(f"{where}.run is empty")
        if not step.outputs:
            raise ConfigError(f"{where}.outputs is empty: say what it leaves in {{out}}")
        for text in (step.run, *step.inputs, *step.env.values()):
            _check_fields(text, config, known | {"out"}, where)
        known.add(name)
    for row in config.table:
        _check_fields(row.rows, config, known, f"{path}: table: {row.stage}")
    return config


def _check_fields(text: str, config: PipelineConfig, known: set[str], where: str) -> None:
    """Each {NAME} is known by now, and {STEP}/FILE is among what that step leaves. Raises ConfigError."""
    for used in _FIELD.findall(text):
        if used not in known:
            raise ConfigError(f"{where}: {{{used}}} is neither a variable nor an earlier step")
    for name, rest in _OUTPUT.findall(text):
        if name in config.steps and not _leaves(config.steps[name], rest):
            outputs = ", ".join(config.steps[name].outputs)
            raise ConfigError(f"{where}: {{{name}}}/{rest} is not among the outputs of {name}, which are {outputs}")


def _leaves(step: StepConfig, place: str) -> bool:
    """Whether a place in a step's folder is one of its outputs, lies in one, or holds one."""
    parts = Path(place).parts
    return any(all(a == b for a, b in zip(parts, Path(output).parts, strict=False)) for output in step.outputs)


@dataclass(frozen=True)
class Plan:
    """One step, once the steps before it are done. reason: why it has to run, "" when it is done."""

    name: str
    folder: Path
    command: tuple[str, ...]
    env: Mapping[str, str]
    parts: Mapping[str, str]  # what its key is made of
    reason: str


class Pipeline:
    """here: the pipeline file's folder. Other relative paths start from where the command was started."""

    def __init__(self, config: PipelineConfig, here: Path) -> None:
        self.config, self.here = config, here
        self.dir = Path(config.dir).resolve()
        self.hashes = Fingerprints(self.dir / "fingerprints.json")
        self.folders: dict[str, Path] = {}  # of the steps that are done
        self.contents: dict[str, str] = {}  # hashes of their outputs

    def run(self, progress: Progress, force: Sequence[str] = ()) -> None:
        """All steps in order. Raises PipelineError at the first that fails; what is done stays done."""
        for name in force:
            if name not in self.config.steps:
                raise ConfigError(f"--force {name}: the steps are {', '.join(self.config.steps)}")
        with own(self.dir, "a pipeline", "dir"):
            self.check()
            for name in self.config.steps:
                plan = self.plan(name)
                if name in force and not plan.reason:
                    shutil.rmtree(plan.folder)
                    plan = self.plan(name)
                if plan.reason:
                    progress.say(f"{name}: runs ({plan.reason}); log: {plan.folder / 'log.txt'}")
                    self._execute(plan, progress)
                else:
                    progress.say(f"{name}: done before, {plan.folder}")
                self._remember(plan)
            self.hashes.save()

    def check(self) -> None:
        """Every step's inputs, files, names and settings, as far as they are known before the first starts.

        Raises ConfigError with all that is wrong, by step.
        """
        folders = {name: self.dir / name for name in self.config.steps}

        def promised(path: Path) -> bool:
            step = self.config.steps.get(path.relative_to(self.dir).parts[0]) if self.dir in path.parents else None
            return step is not None and (
                path.parent == self.dir or _leaves(step, "/".join(path.relative_to(self.dir).parts[1:]))
            )

        wrong = []
        for name, step in self.config.steps.items():
            fill = {**folders, "out": folders[name]}
            for text in step.inputs:
                path = Path(self._filled(text, fill)).expanduser()
                if not path.exists() and not promised(path):
                    wrong.append(f"steps.{name}.inputs: {path}: no such file or folder")
            wrong += self._undeclared(name, shlex.split(step.run))
            command = [self._filled(word, fill) for word in shlex.split(step.run)]
            wrong += [f"steps.{name}: {fault}" for fault in rehearsal.faults(command, promised)]
        if wrong:
            raise ConfigError("\n".join(["these steps could not do their work:", *(f"  {line}" for line in wrong)]))

    def show(self, progress: Progress) -> None:
        """What `run` would do, up to the first step that would run: the keys after it depend on what it makes.

        All steps are checked first.
        """
        self.check()
        progress.say(f"checked: {', '.join(self.config.steps)}")
        names = list(self.config.steps)
        for number, name in enumerate(names):
            plan = self.plan(name)
            if plan.reason:
                progress.say(f"{name}: would run ({plan.reason}): {shlex.join(plan.command)}")
                if names[number + 1 :]:
                    progress.say(f"then, as far as its outputs change them: {', '.join(names[number + 1 :])}")
                return
            progress.say(f"{name}: done before, {plan.folder}")
            self._remember(plan)

    def plan(self, name: str) -> Plan:
        """Raises ConfigError for an input that is missing."""
        step = self.config.steps[name]
        parts = self.parts(name)
        folder = self.dir / f"{name}-{text_hash(parts)}"
        fill = {**self.folders, "out": folder}
        command = tuple(self._filled(word, fill) for word in shlex.split(step.run))
        env = {key: self._filled(value, fill) for key, value in step.env.items()}
        return Plan(name, folder, command, env, parts, self._reason(name, folder, parts))

    def parts(self, name: str) -> dict[str, str]:
        """Everything that a step depends on, by what a person would call it. Folders' places are left out."""
        step = self.config.steps[name]
        inputs = {text: Path(self._filled(text, self.folders)).expanduser() for text in step.inputs}
        parts = {
            "command": self._with_variables(step.run),
            "outputs": ", ".join(step.outputs),
            "lingshu-rl": _version(),
        }
        parts |= {f"variable {key} of its environment": self._with_variables(value) for key, value in step.env.items()}
        for text, path in inputs.items():
            try:
                parts[f"input {text}"] = self.hashes.of(path)
            except FileNotFoundError as error:
                raise ConfigError(f"steps.{name}.inputs: {error}") from None
        used = {u for text in (step.run, *step.inputs, *step.env.values()) for u in _FIELD.findall(text)}
        return parts | {f"output of {other}": self.contents[other] for other in sorted(used & self.contents.keys())}

    def table(self) -> str:
        """Accuracy, and the paired gain over the row before, in table.md and table.json; "" without a table."""
        from lingshu_rl.sft.held_out import score_row, table

        rows: list[dict[str, Any]] = []
        before: list[dict[str, Any]] = []
        for row in self.config.table:
            path = Path(self._filled(row.rows, self.folders))
            if not path.is_file():
                raise ConfigError(f"table: {row.stage}: {path} is missing")
            graded = [row for _, row in json_rows(path)]
            rows.append(score_row(row.stage, graded, before))
            before = graded
        if not rows:
            return ""
        write_text(self.dir / "table.json", json.dumps(rows, indent=1))
        write_text(self.dir / "table.md", table(rows))
        return table(rows)

    def _reason(self, name: str, folder: Path, parts: Mapping[str, str]) -> str:
        if (done := _read(folder / "done.json")) is not None:
            for output, content in done["outputs"].items():
                if not (folder / output).exists() or self.hashes.of(folder / output) != content:
                    return f"its output {output} was removed or changed"
            return ""
        if (folder / "step.json").exists():
            return "it did not finish"
        earlier = [p for p in self.dir.glob(f"{name}-*/step.json") if len(p.parent.name) == len(name) + 1 + LENGTH]
        if not earlier:
            return "it has not run yet"
        before = _read(max(earlier, key=lambda p: p.stat().st_mtime)) or {}
        changed = [
            key for key in (before.get("parts", {}) | parts) if before.get("parts", {}).get(key) != parts.get(key)
        ]
        return f"changed: {', '.join(changed)}"

    def _undeclared(self, name: str, words: Sequence[str]) -> Iterator[str]:
        """A file that the command names but `inputs` does not would go stale unseen."""
        made = {"out", *self.config.steps}
        inputs = [text for text in self.config.steps[name].inputs if not made & set(_FIELD.findall(text))]
        covered = [Path(self._filled(text, {})).expanduser().resolve() for text in inputs]
        for word in words[1:]:
            for text in _paths_in(word):
                if made & set(_FIELD.findall(text)):
                    continue
                path = Path(self._filled(text, {})).expanduser().resolve()
                if path.exists() and not any(path == c or c in path.parents for c in covered):
                    yield f"steps.{name}: the command reads {text}, which is not among its inputs"

    def _execute(self, plan: Plan, progress: Progress) -> None:
        from lingshu_rl.processes.workers import Worker

        folder, step = plan.folder, self.config.steps[plan.name]
        if (folder / "done.json").exists():  # its outputs were changed by someone else: nothing in it can be trusted
            shutil.rmtree(folder)
        write_text(folder / "step.json", json.dumps({"command": plan.command, "parts": plan.parts}, indent=1))
        began = said = time.monotonic()
        log = folder / "log.txt"
        worker = Worker(
            plan.name, resolved(plan.command), url="", log=log, env=plan.env, stop_timeout_s=step.stop_timeout_s
        )
        try:
            while (code := worker.process.poll()) is None:
                time.sleep(0.1)
                if time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    progress.say(f"{plan.name}: {(said - began) / 60:.0f} min; {_last_line(log)}")
        finally:
            worker.stop()
        if code != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise PipelineError(f"step {plan.name} ended with {how}; its log is {log}:\n{tail}")
        if missing := [output for output in step.outputs if not (folder / output).exists()]:
            raise PipelineError(f"step {plan.name} went well, but left no {', '.join(missing)} in {folder}")
        seconds = round(time.monotonic() - began, 1)
        outputs = {output: self.hashes.of(folder / output) for output in step.outputs}
        write_text(folder / "done.json", json.dumps({"outputs": outputs, "seconds": seconds}, indent=1))
        self.hashes.save()
        progress.say(f"{plan.name}: took {seconds:.0f} s")

    def _remember(self, plan: Plan) -> None:
        done = _read(plan.folder / "done.json")
        assert done is not None
        self.folders[plan.name] = plan.folder
        self.contents[plan.name] = text_hash(done["outputs"])

    def _filled(self, text: str, folders: Mapping[str, Path]) -> str:
        known = {**self.config.vars, "here": self.here, **folders}
        return _FIELD.sub(lambda match: str(known[match.group(1)]), text)

    def _with_variables(self, text: str) -> str:
        known = self.config.vars
        return _FIELD.sub(lambda m: str(known[m.group(1)]) if m.group(1) in known else m.group(), text)


def resolved(command: Sequence[str]) -> list[str]:
    """The programs of this environment, also where its bin folder is not on the path."""
    own = {
        "python": [sys.executable],
        "lingshu-rl": [sys.executable, "-m", "lingshu_rl.cli"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    }
    return [*own.get(command[0], [command[0]]), *command[1:]]


def _paths_in(word: str) -> Iterator[str]:
    """What in a word of a command may be a path: itself, the value of key=value, the members of a list."""
    value = word.partition("=")[2] if "=" in word else word
    for text in value.strip("[]").split(","):
        if "/" in text or "." in text:
            yield text.strip()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:120] for line in reversed(lines) if line.strip()), "")


def _version() -> str:
    try:
        return metadata.version("lingshu-rl")
    except metadata.PackageNotFoundError:
        return ""
