"""What a sweep file means: variants of the settings, times seeds. The format is described in docs/sweeps.md."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.settings import changes_in, read_yaml
from rewards.imports import hint

Settings = dict[str, Any]  # dotted key -> value

KEYS = tuple(
    "name question dir config base seeds axes variants search baseline devices processes command timeout_s "
    "seconds_per_run".split()
)
SEARCH_KEYS = ("method", "trials", "seed", "space", "prune")
PRUNE_KEYS = ("metric", "after", "startup")
METHODS = ("random", "tpe")
SET_BY_SWEEP = {"seed": "list them under `seeds`", "run.dir": "every run gets its folder inside the sweep's `dir`"}


class SweepError(ConfigError):
    """The sweep file cannot be used; the message names the key and what to write."""


@dataclass(frozen=True)
class Variant:
    """One combination of settings. point: the label of its place on each axis, by axis name."""

    name: str
    settings: Settings
    point: dict[str, str] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Its name as a folder's name."""
        return re.sub(r"[^\w.=+,-]+", "_", self.name).strip("_.") or "variant"


@dataclass(frozen=True)
class PlannedRun:
    """One training run of the sweep. overrides: the `key=value` words of its command."""

    variant: Variant
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.variant.slug}/seed-{self.seed}"


@dataclass(frozen=True)
class Prune:
    """Stop a trial whose first seed is below the median of the earlier trials' at the same step."""

    metric: str = "reward/mean"
    after: int = 5  # steps before which no trial is stopped
    startup: int = 4  # trials that are never stopped


@dataclass(frozen=True)
class SearchSpec:
    """space: dotted key -> list of choices, or {low, high, log, step}."""

    space: dict[str, Any]
    trials: int
    method: str = "tpe"
    seed: int = 0
    prune: Prune | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked. For a search `variants` holds only the baseline; trials are asked for later."""

    name: str
    folder: Path
    base: Settings
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    baseline: str
    axes: dict[str, list[str]] = field(default_factory=dict)  # labels by axis, in the file's order
    question: str = ""
    config: str | None = None
    search: SearchSpec | None = None
    devices: tuple[Any, ...] = ("auto",)
    processes: int = 1
    command: tuple[str, ...] = ()  # () = the trainer, launched by accelerate
    timeout_s: float | None = None
    seconds_per_run: float | None = None  # the author's estimate, used until a run has been timed

    def runs_of(self, variant: Variant) -> list[PlannedRun]:
        out = []
        for seed in self.seeds:
            folder = self.folder / "runs" / variant.slug / f"seed-{seed}"
            settings = {**self.base, **variant.settings, "seed": seed, "run.dir": str(folder)}
            out.append(PlannedRun(variant, seed, folder, tuple(words(settings))))
        return out

    def runs(self) -> list[PlannedRun]:
        """All planned runs, seed by seed, so that a sweep that is cut short has compared all variants already."""
        columns = [self.runs_of(v) for v in self.variants]
        return [column[i] for i in range(len(self.seeds)) for column in columns]

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)

    def steps_of(self, variant: Variant) -> int | None:
        if self.command:
            return None
        return load_config(self.config, words({**self.base, **variant.settings})).train.steps


def load_sweep(path: str | Path, settings: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file; `settings` (key=value) go over its base. Raises SweepError, naming the key."""
    try:
        content: Any = OmegaConf.to_container(read_yaml(path, "sweep file"))
        changes = changes_in(None, settings)
    except ConfigError as error:
        raise SweepError(str(error)) from None
    keys = [word.partition("=")[0] for word in settings]  # as given: what base has beside one in a mapping stays
    given = zip(keys, changes, strict=True)
    over: Any = OmegaConf.to_container(OmegaConf.create({k: OmegaConf.select(change.values, k) for k, change in given}))
    if over:
        content["base"] = {**flat(_mapping("base", content.get("base"))), **flat(over)}
    return parse_sweep(content, default_name=Path(path).stem)


def reread(folder: Path) -> Sweep:
    """The sweep that a folder holds, as its plan.json tells it."""
    plan = json.loads((folder / "plan.json").read_text())
    variants = tuple(Variant(v["name"], v["settings"], v["point"]) for v in plan["variants"])
    search = SearchSpec({}, 0) if plan["searched"] else None
    return Sweep(
        plan["name"],
        folder,
        plan["base"],
        tuple(plan["seeds"]),
        variants,
        plan["baseline"],
        plan["axes"],
        plan["question"],
        plan["config"],
        search,
    )


def parse_sweep(raw: Mapping[str, Any], default_name: str = "sweep") -> Sweep:
    """A sweep from the file's content; see `load_sweep`."""
    _known("sweep file", raw, KEYS)
    name = str(raw.get("name") or default_name)
    base = flat(_mapping("base", raw.get("base")))
    _refuse_own("base", base)
    seeds = _seeds(raw.get("seeds", 3))
    search = _search(raw["search"]) if raw.get("search") else None
    if search and (raw.get("axes") or raw.get("variants")):
        raise SweepError("search stands alone: put what axes and variants would change into search.space or base")
    axes = _axes(raw)
    if not axes and not search:
        raise SweepError("nothing to compare: give axes, variants or search")
    variants = [Variant("baseline", {})] if search else _grid(axes)
    _unique(variants)
    sweep = Sweep(
        name=name,
        folder=Path(raw.get("dir") or Path("runs") / "sweeps" / re.sub(r"[^\w.=+,-]+", "_", name)),
        base=base,
        seeds=seeds,
        variants=tuple(variants),
        baseline=_baseline(raw.get("baseline"), variants),
        axes={axis: [label for label, _ in points] for axis, points in axes.items()},
        question=str(raw.get("question") or ""),
        config=raw.get("config"),
        search=search,
        devices=_devices(raw.get("devices", "auto")),
        processes=_count("processes", raw.get("processes", 1)),
        command=tuple(str(word) for word in raw.get("command") or ()),
        timeout_s=_positive("timeout_s", raw.get("timeout_s")),
        seconds_per_run=_positive("seconds_per_run", raw.get("seconds_per_run")),
    )
    if not sweep.command:
        for variant in variants:
            check_settings(sweep, variant)
    return sweep


def check_settings(sweep: Sweep, variant: Variant) -> None:
    """Raises SweepError when the trainer would refuse the variant's settings."""
    try:
        load_config(sweep.config, words({**sweep.base, **variant.settings}))
    except ConfigError as error:
        raise SweepError(f"variant {variant.name!r}: {error}") from None


def select(runs: Sequence[PlannedRun], patterns: Sequence[str]) -> list[PlannedRun]:
    """The runs whose variant or `variant/seed-N` matches one of the patterns (* and ? as in a shell)."""
    if not patterns:
        return list(runs)
    for pattern in patterns:
        if not any(_matches(run, pattern) for run in runs):
            known = ", ".join(sorted({run.variant.slug for run in runs}))
            raise SweepError(f"--only {pattern!r} matches no run; variants are {known}, runs are VARIANT/seed-N")
    return [run for run in runs if any(_matches(run, pattern) for pattern in patterns)]


def words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line's `key=value` words; lists and mappings as JSON, which YAML reads."""
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def flat(node: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested keys as dotted ones. Mappings that are values of one option (rewards.spec, deepspeed) stay whole."""
    out: Settings = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name.split(".")[0] in _sections() and name not in _mapping_options():
            out |= flat(value, f"{name}.")
        else:
            out[name] = value
    return out


def differences(variant: Variant, baseline: Variant) -> Settings:
    """The settings in which a variant differs from the baseline (its own values; None where only the baseline sets)."""
    keys = dict.fromkeys([*variant.settings, *baseline.settings])
    return {k: variant.settings.get(k) for k in keys if variant.settings.get(k) != baseline.settings.get(k)}


def _matches(run: PlannedRun, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (run.name, run.variant.slug, run.variant.name))


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | list | dict):
        return json.dumps(value)
    return str(value)


def _axes(raw: Mapping[str, Any]) -> dict[str, list[tuple[str, Settings]]]:
    """Axis name -> (label, settings). An axis is a list of values of a key, or named settings; variants are one
    more."""
    axes: dict[str, list[tuple[str, Settings]]] = {}
    for axis, values in _mapping("axes", raw.get("axes")).items():
        where = f"axes.{axis}"
        if isinstance(values, Mapping):
            axes[axis] = [(str(label), flat(_mapping(f"{where}.{label}", v))) for label, v in values.items()]
        elif isinstance(values, list):
            axes[axis] = [(_label(value), {axis: value}) for value in values]
        else:
            raise SweepError(f"{where} must be a list of values, or named settings, got {values!r}")
        if len(axes[axis]) < 2:
            raise SweepError(f"{where} needs at least two values to compare")
    if raw.get("variants"):
        found = _mapping("variants", raw["variants"])
        axes["variant"] = [(str(n), flat(_mapping(f"variants.{n}", v))) for n, v in found.items()]
    for axis, points in axes.items():
        for _, settings in points:
            _refuse_own(axis, settings)
        labels = [label for label, _ in points]
        if len(set(labels)) < len(labels):
            raise SweepError(f"axis {axis!r} holds a value twice: {', '.join(labels)}")
    return axes


def _grid(axes: Mapping[str, Sequence[tuple[str, Settings]]]) -> list[Variant]:
    short = {axis: axis.rsplit(".", 1)[-1] for axis in axes}
    if len(set(short.values())) < len(short):
        short = {axis: axis for axis in axes}
    out = []
    for corner in itertools.product(*axes.values()):
        point = {axis: label for axis, (label, _) in zip(axes, corner, strict=True)}
        settings: Settings = {}
        for _, own in corner:
            if both := settings.keys() & own.keys():
                raise SweepError(f"two axes set {', '.join(sorted(both))}")
            settings |= own
        parts = [label if axis == "variant" else f"{short[axis]}={label}" for axis, label in point.items()]
        out.append(Variant(" ".join(parts), settings, point))
    return out


def _baseline(given: Any, variants: Sequence[Variant]) -> str:
    """The first variant, the one of that name, or the one at that place of the grid (keys left out: the first
    value)."""
    if given is None:
        return variants[0].name
    if isinstance(given, Mapping):
        wanted = {str(axis): _label(value) for axis, value in given.items()}
        fits = [v for v in variants if all(v.point.get(axis) == label for axis, label in wanted.items())]
        if fits:
            return fits[0].name
    elif any(v.name == str(given) for v in variants):
        return str(given)
    raise SweepError(f"baseline {given!r} is none of the variants: {', '.join(v.name for v in variants)}")


def _search(raw: Any) -> SearchSpec:
    raw = _mapping("search", raw)
    _known("search", raw, SEARCH_KEYS)
    space = _mapping("search.space", raw.get("space"))
    if not space:
        raise SweepError("search.space is empty: give keys with a list of choices or {low, high, log, step}")
    for key, values in space.items():
        _refuse_own("search.space", {key: None})
        if isinstance(values, Mapping):
            _known(f"search.space.{key}", values, ("low", "high", "log", "step"))
            low, high = (v if isinstance(v, int | float) else None for v in (values.get("low"), values.get("high")))
            if low is None or high is None or low >= high:
                raise SweepError(f"search.space.{key} needs numbers low < high, got {low!r} and {high!r}")
        elif not isinstance(values, list) or len(values) < 2:
            raise SweepError(f"search.space.{key} must be a list of at least two choices or {{low, high, log, step}}")
    method = str(raw.get("method", "tpe"))
    if method not in METHODS:
        raise SweepError(f"search.method={method!r} is not one of {', '.join(METHODS)}")
    prune = None
    if raw.get("prune"):
        own = _mapping("search.prune", raw["prune"])
        _known("search.prune", own, PRUNE_KEYS)
        prune = Prune(**own)
    if "trials" not in raw:
        raise SweepError("search.trials: say how many trials to run")
    return SearchSpec(dict(space), _count("search.trials", raw["trials"]), method, int(raw.get("seed", 0)), prune)


def _seeds(given: Any) -> tuple[int, ...]:
    seeds = list(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) for s in seeds):
        raise SweepError(f"seeds={given!r}: give how many (3) or which ones ([0, 1, 2])")
    if len(set(seeds)) < len(seeds):
        raise SweepError(f"seeds={given!r} names a seed twice")
    return tuple(seeds)


def _devices(given: Any) -> tuple[Any, ...]:
    """Device sets, in the words of the trainer's devices.*: each runs one training run at a time."""
    from lingshu_rl.processes.placement import parse_devices

    many = given if isinstance(given, list) else [given]
    if not many:
        raise SweepError(
            "devices is empty: give a list of device sets, for example [[0, 1], [2, 3]] or [cpu:0-3, cpu:4-7]"
        )
    try:
        sets = [parse_devices("sweep", value) or ("cpu", ()) for value in many]
    except ConfigError as error:
        raise SweepError(str(error).replace("devices.sweep", "devices")) from None
    for (a, one), (b, other) in itertools.combinations(zip(many, sets, strict=True), 2):
        if one[0] == other[0] and set(one[1]) & set(other[1]):
            raise SweepError(f"device sets {a!r} and {b!r} overlap")
    return tuple(many)


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SweepError(f"{where} must hold keys and values, got {value!r}")
    return {str(k): v for k, v in value.items()}


def _known(where: str, given: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in given:
        if key not in keys:
            raise SweepError(f"unknown key {key!r} in {where}{hint(key, keys)}; known are {', '.join(keys)}")


def _refuse_own(where: str, settings: Settings) -> None:
    for key, instead in SET_BY_SWEEP.items():
        if key in settings:
            raise SweepError(f"{where} sets {key}, which the sweep sets: {instead}")


def _unique(variants: Sequence[Variant]) -> None:
    seen: dict[str, str] = {}
    for v in variants:
        if v.slug in seen:
            raise SweepError(f"variants {seen[v.slug]!r} and {v.name!r} would share the folder {v.slug!r}; rename one")
        seen[v.slug] = v.name


def _count(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SweepError(f"{key}={value!r} must be a whole number of at least 1")
    return value


def _positive(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise SweepError(f"{key}={value!r} must be a number above 0")
    return float(value)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sections() -> Iterator[str] | set[str]:
    from dataclasses import fields, is_dataclass

    from lingshu_rl.config import Config

    default = Config()
    return {f.name for f in fields(Config) if is_dataclass(getattr(default, f.name))}


def _mapping_options() -> set[str]:
    """Options whose value is itself a mapping: `rewards.spec`, `rollout.vllm` ..."""
    from dataclasses import fields, is_dataclass

    from lingshu_rl.config import Config

    default = Config()
    sections = [(f.name, getattr(default, f.name)) for f in fields(Config)]
    return {
        f"{name}.{option.name}"
        for name, section in sections
        if is_dataclass(section)
        for option in fields(section)
        if isinstance(getattr(section, option.name), dict)
    }
