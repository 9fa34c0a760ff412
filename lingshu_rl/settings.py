"""Settings of any command: a YAML file and `key=value` words, as data or as the dataclass that declares them. An
unknown key fails with the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lingshu_rl.failures import ConfigError
from lingshu_rl.names import known_elsewhere
from lingshu_rl.text.hiding import setting_shown, shown_beside, without_secrets
from rewards.imports import hint

T = TypeVar("T")


@dataclass(frozen=True)
class Change:
    """Settings that somebody gave, and where: `in FILE`, `in override 'key=value'`."""

    values: DictConfig
    where: str


def read_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """`load_config` for any dataclass, without the checks and the defaults that belong to one."""
    return built(schema, changes_in(path, overrides))


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Settings given as key=value, nested. Raises ConfigError."""
    found: Any = OmegaConf.to_container(OmegaConf.merge({}, *(change.values for change in changes_in(None, words))))
    return dict(found)


def read_yaml(path: str | Path, what: str, resolved: bool = False) -> DictConfig:
    """The keys and values of a file. what: the file, as a message calls it. resolved: with what its ${...} name in
    their place. Raises ConfigError."""
    try:
        loaded = OmegaConf.load(path)
        if resolved:
            OmegaConf.resolve(loaded)
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist") from None
    except Exception as error:  # YAML's errors, the file system's and OmegaConf's share no base class
        raise ConfigError(f"{what} {path} is not readable YAML: {_problem(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{what} {path} must hold keys and values at its top level")
    return loaded


def built(schema: type[T], changes: Iterable[Change]) -> T:
    config = OmegaConf.structured(schema)
    for change in changes:
        config = _merge(config, change.values, change.where)
    try:
        result = OmegaConf.to_object(config)
    except ValueError as error:  # the option classes check themselves when built
        raise ConfigError(str(error)) from None
    assert isinstance(result, schema)
    return result


def changes_in(path: str | Path | None, overrides: Sequence[str]) -> list[Change]:
    """What a file and then the words give, in their order. Raises ConfigError."""
    changes = [] if path is None else [Change(read_yaml(path, "config file"), f"in {path}")]
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"override {setting_shown(override)!r} is not of the form key=value, for example train.lr=5e-7"
            )
        try:
            change = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise ConfigError(f"override {setting_shown(override)!r} cannot be read: {_problem(error)}") from None
        changes.append(Change(change, f"in override {setting_shown(override)!r}"))
    return changes


def _problem(error: Exception) -> str:
    """What YAML says of a text and where, without the text, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return str(getattr(error, "problem", None) or type(error).__name__) + where


def values_of(changes: Sequence[Change]) -> dict[str, Any]:
    """The values by dotted key, later ones over earlier ones."""
    return {key: value for change in changes for key, value in flat(OmegaConf.to_container(change.values)).items()}


def in_defaults(values: Mapping[str, Any]) -> Change:
    """Defaults by dotted key, to be built before what a user gave."""
    config = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return Change(config, "in the model's defaults")


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    if not isinstance(node, dict):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def to_yaml(config: Any) -> str:
    """To be read, by people and by `RunFolder`: without secrets."""
    return OmegaConf.to_yaml(without_secrets(OmegaConf.to_container(OmegaConf.structured(config), resolve=True)))


def _merge(config: DictConfig, change: DictConfig, where: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(config, change)
    except ConfigKeyError as error:
        unknown = str(error.full_key or "")
        meant = [known_elsewhere(key) for key in flat(OmegaConf.to_container(change)) if key.startswith(unknown)]
        told = next(filter(None, meant), "") or _nearest(unknown, config)
        raise ConfigError(f"unknown key {unknown!r} {where}{told}") from None
    except OmegaConfBaseException as error:
        if shapes := _misshapen(config, change):
            raise ConfigError(f"{shapes} {where}") from None
        key = getattr(error, "full_key", None)
        told = shown_beside(str(error).splitlines()[0], OmegaConf.to_container(change))
        raise ConfigError(f"bad value for {key!r} {where}: {told}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _misshapen(config: Any, change: Any, key: str = "") -> str:
    """The first key that is given a list for a mapping or a mapping for a list, in words, or ""."""
    if isinstance(config, DictConfig) and isinstance(change, DictConfig):
        both = [str(name) for name in change if name in config]
        found = (_misshapen(config._get_node(n), change._get_node(n), f"{key}.{n}".lstrip(".")) for n in both)
        return next(filter(None, found), "")
    words: dict[Any, str] = {DictConfig: "keys and values", ListConfig: "a list"}
    takes, given = words.get(type(config)), words.get(type(change))
    return f"{key} takes {takes}, not {given}" if takes and given and takes != given else ""


OTHER_WORDS = dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval", "holdout"), "test"
)  # for what is asked at the end


def _nearest(key: str, config: DictConfig) -> str:
    known = list(_keys(config))
    section, _, leaf = key.lower().rpartition(".")
    meant = f"{section}.{OTHER_WORDS.get(leaf, leaf)}".strip(".")
    elsewhere = next((name for name in known if name.rpartition(".")[2] == leaf), "")  # train.lr for lr
    return hint(meant, known) or hint(elsewhere, known) or "; see `lingshu-rl train --help`"


def _keys(node: DictConfig, prefix: str = "") -> Any:
    for name in node:
        child = node._get_node(name)
        yield f"{prefix}{name!s}"
        if isinstance(child, DictConfig):
            yield from _keys(child, f"{prefix}{name!s}.")
