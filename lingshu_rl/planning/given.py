"""A run's settings from what a user gave: a YAML file and `key=value` words over the defaults that fit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingshu_rl.config import Config
from lingshu_rl.data.sources import is_demo, paths_in
from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.validation import validate
from lingshu_rl.settings import built, changes_in, in_defaults, values_of

# What another model than the demo's changes in the defaults, which are the demo's: a real model, on rows that ask for
# thoughts.
REAL_RUN: Mapping[str, Any] = {
    "train.steps": 300,
    "train.prompts_per_step": 32,
    "train.lr": 1e-6,
    "train.lr_schedule": "constant",
    "rollout.max_tokens": 1024,
    "eval.every": 50,
    "eval.limit": 500,
}
WITH_LORA: Mapping[str, Any] = {"train.lr": 1e-5}  # adapters start at 0 and take a higher rate
SHORT_ANSWERS: Mapping[str, Any] = {"rollout.max_tokens": 64}  # data.instruction=short


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, the model's (`defaults_for`), the YAML file, the overrides. Raises ConfigError for an unknown key or an
    impossible value, and for rows of one's own to train or to test on without the other."""
    changes = changes_in(path, overrides)
    given = values_of(changes)
    result = built(Config, [in_defaults(defaults_for(given)), *changes])
    _check_sources(given)
    validate(result)
    return result


def defaults_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that differ from the demo's, by dotted key, for the settings that were given."""
    model = str(given.get("model", Config.model))
    if model == Config.model:
        return {}
    own: dict[str, Any] = {"run.dir": f"runs/{Path(model).name}", **REAL_RUN}
    if any(key.startswith("train.lora.") and value for key, value in given.items()):
        own |= WITH_LORA
    if given.get("data.instruction") == "short":
        own |= SHORT_ANSWERS
    return own


def origins(path: str | Path | None = None, overrides: Sequence[str] = ()) -> list[str]:
    """Where the settings of `load_config` come from, a line a place; all others are the demo's."""
    changes = changes_in(path, overrides)
    given = values_of(changes)
    ours = {key: value for key, value in defaults_for(given).items() if key not in given}
    lines = [f"defaults of a real run: {' '.join(f'{key}={value}' for key, value in ours.items())}"] if ours else []
    by_file = values_of(changes[: path is not None])
    by_hand = values_of(changes[path is not None :])
    if by_file:
        lines.append(f"from {path}: {' '.join(key for key in by_file if key not in by_hand)}")
    if by_hand:
        lines.append(f"from the command: {' '.join(by_hand)}")
    return lines


def _check_sources(given: Mapping[str, Any]) -> None:
    """Rows of one's own beside the demo's are a slip unless both are named: the one would say nothing of the other."""
    for key, other in (("data.train", "data.test"), ("data.test", "data.train")):
        source = _under(given, key)
        if source is not None and not is_demo(source) and _under(given, other) is None:
            raise ConfigError(
                f"{key}={', '.join(paths_in(source))[:200]} needs a {other} of yours beside it (the default is the "
                f"demo's): questions of the same kind, "
                "with other images and patients. docs/curation.md splits one set into both"
            )


def _under(given: Mapping[str, Any], key: str) -> Any:
    """The value of a key, also where it is a mapping, whose own keys are given one by one."""
    inner = {name.removeprefix(f"{key}."): value for name, value in given.items() if name.startswith(f"{key}.")}
    return given.get(key, inner or None)
