"""Search over settings with Optuna: which trial is next, and which running one is given up.

A trial is a variant; its value is the mean held-out accuracy over its seeds. Its settings are written down before it
starts, and the sampler is seeded anew for every trial, so that a killed search goes on to the same trials.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lingshu_rl.sweep import status as states
from lingshu_rl.sweep.jobs import Job, JobQueue
from lingshu_rl.sweep.plan import PlannedRun, SearchSpec, Sweep, SweepError, Variant, _label, check_settings
from lingshu_rl.sweep.status import Status


class SearchSource(JobQueue):
    """The baseline first, then one trial after another."""

    def __init__(self, sweep: Sweep, retry_failed: bool) -> None:
        super().__init__([])
        assert sweep.search is not None
        self.sweep, self.spec = sweep, sweep.search
        self.optuna = _optuna()
        self.study = self.optuna.create_study(direction="maximize", pruner=_pruner(self.optuna, self.spec))
        self.space = distributions(self.optuna, self.spec)
        self.trials: dict[str, Any] = {}  # Optuna's trial under way, by variant name
        self.reported: dict[str, int] = {}  # last step reported, by variant name
        self.variants = read_trials(sweep)
        self.pending = [sweep.runs_of(v) for v in sweep.variants]
        for variant in self.variants:
            if retry_failed:
                _forget_failures(sweep, variant)
            self._recall(variant)

    def take(self) -> Job | None:
        with self.lock:
            if self.pending:
                job = self.pending.pop(0)
                if (name := job[0].variant.name) != self.sweep.baseline:
                    self._ask(int(name.removeprefix("trial-")), job[0].variant)
                return job
            if len(self.variants) >= self.spec.trials:
                return None
            variant = self._ask(len(self.variants), None)
            self.variants.append(variant)
            _write_trials(self.sweep, self.variants)
            check_settings(self.sweep, variant) if not self.sweep.command else None
            return self.sweep.runs_of(variant)

    def finished(self, run: PlannedRun, status: Status) -> bool:
        with self.lock:
            trial = self.trials.get(run.variant.name)
            if trial is None:
                return True  # the baseline
            state, value = self._result(run.variant)
            if self.spec.prune and run.seed == self.sweep.seeds[0]:
                for _ in self._report(run, trial):  # the steps since the last look, which later trials are held against
                    pass
            if state is not None:
                self.study.tell(self.trials.pop(run.variant.name), value, state=state)
            return state is None

    def prune(self, run: PlannedRun) -> str | None:
        """Report the first seed's new steps; the reason when the trial falls behind."""
        rule = self.spec.prune
        if rule is None or run.seed != self.sweep.seeds[0]:
            return None
        with self.lock:
            trial = self.trials.get(run.variant.name)
            if trial is None:
                return None
            for step, value in self._report(run, trial):
                if trial.should_prune():
                    return f"at step {step} its {rule.metric} of {value:.3g} was below the median of the earlier trials"
        return None

    def _report(self, run: PlannedRun, trial: Any) -> Iterator[tuple[int, float]]:
        """Tell Optuna the steps that are new, one by one."""
        assert self.spec.prune is not None
        for step, value in _curve(run.folder, self.spec.prune.metric).items():
            if step > self.reported.get(run.variant.name, 0):
                trial.report(value, step)
                self.reported[run.variant.name] = step
                yield step, value

    def _ask(self, number: int, known: Variant | None) -> Variant:
        """Optuna's next trial; `known`: with the settings it was given before the sweep was stopped."""
        self.study.sampler = _sampler(self.optuna, self.spec, number)
        if known is not None:
            self.study.enqueue_trial(self._params(known))
        trial = self.study.ask(self.space)
        variant = Variant(f"trial-{number:03d}", settings_of(self.spec, trial.params)) if known is None else known
        self.trials[variant.name] = trial
        return variant

    def _recall(self, variant: Variant) -> None:
        """A trial from before: tell Optuna its result, or queue what is left of it."""
        state, value = self._result(variant)
        if state is None:
            self.pending.append(self.sweep.runs_of(variant))
            return
        make = self.optuna.trial.create_trial
        curve = _curve(self.sweep.runs_of(variant)[0].folder, self.spec.prune.metric) if self.spec.prune else {}
        params = self._params(variant)
        self.study.add_trial(
            make(state=state, value=value, params=params, distributions=self.space, intermediate_values=curve)
        )

    def _result(self, variant: Variant) -> tuple[Any, float | None]:
        """Optuna's state and the value of a trial that is over; (None, None) for one that is not."""
        kinds = self.optuna.trial.TrialState
        runs = self.sweep.runs_of(variant)
        found = [states.read(self.sweep.folder, run).state for run in runs]
        if "pruned" in found:
            return kinds.PRUNED, None
        if "failed" in found:
            return kinds.FAIL, None
        if any(state != "done" for state in found):
            return None, None
        scores = [_accuracy(run.folder) for run in runs]
        if None in scores:
            return kinds.FAIL, None
        return kinds.COMPLETE, sum(scores) / len(scores)  # type: ignore[arg-type]

    def _params(self, variant: Variant) -> dict[str, Any]:
        """Settings as Optuna's parameters: choices by their label."""
        return {k: _label(v) if isinstance(self.spec.space[k], list) else v for k, v in variant.settings.items()}


def _forget_failures(sweep: Sweep, variant: Variant) -> None:
    """Let failed runs of a trial be run again."""
    for run in sweep.runs_of(variant):
        status = states.read(sweep.folder, run)
        if status.state == "failed":
            status.state = "stopped"
            states.write(sweep.folder, run, status)


def settings_of(spec: SearchSpec, params: Mapping[str, Any]) -> dict[str, Any]:
    labels = {key: {_label(v): v for v in values} for key, values in spec.space.items() if isinstance(values, list)}
    return {key: labels[key][value] if key in labels else value for key, value in params.items()}


def distributions(optuna: Any, spec: SearchSpec) -> dict[str, Any]:
    """Optuna's description of the space. Whole limits (and steps) mean whole numbers."""
    out = {}
    for key, values in spec.space.items():
        if isinstance(values, list):
            out[key] = optuna.distributions.CategoricalDistribution([_label(v) for v in values])
            continue
        low, high, step, log = values["low"], values["high"], values.get("step"), bool(values.get("log", False))
        whole = isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int))
        kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
        try:
            out[key] = kind(low, high, log=log, step=step or 1 if whole else step)
        except ValueError as error:
            raise SweepError(f"search.space.{key}: {error}") from None
    return out


def read_trials(sweep: Sweep) -> list[Variant]:
    """The trials of a search so far, in their order."""
    file = sweep.folder / "trials.json"
    if not file.exists():
        return []
    stored = json.loads(file.read_text())
    return [Variant(f"trial-{n:03d}", settings) for n, settings in enumerate(stored)]


def all_variants(sweep: Sweep) -> list[Variant]:
    return [*sweep.variants, *(read_trials(sweep) if sweep.search else [])]


def _write_trials(sweep: Sweep, variants: list[Variant]) -> None:
    from lingshu_rl.storage.runfolder import write_text

    write_text(sweep.folder / "trials.json", json.dumps([v.settings for v in variants], indent=1))


def _curve(folder: Path, metric: str) -> dict[int, float]:
    """The metric by step, as far as the run has come."""
    out: dict[int, float] = {}
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return out
    for line in lines:
        try:
            row = json.loads(line)
            out[int(row["step"])] = float(row[metric])
        except (ValueError, KeyError, TypeError):
            continue
    return out


def _accuracy(folder: Path) -> float | None:
    try:
        return float(json.loads((folder / "summary.json").read_text())["after"]["accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sampler(optuna: Any, spec: SearchSpec, number: int) -> Any:
    seed = 10_007 * spec.seed + number
    return (
        optuna.samplers.RandomSampler(seed=seed) if spec.method == "random" else optuna.samplers.TPESampler(seed=seed)
    )


def _pruner(optuna: Any, spec: SearchSpec) -> Any:
    if spec.prune is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=spec.prune.startup, n_warmup_steps=spec.prune.after)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SweepError("search needs Optuna: pip install optuna (grids and variants do not)") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
