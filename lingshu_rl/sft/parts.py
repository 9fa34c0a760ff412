"""Which part of a vision-language model a parameter belongs to: vision, projector or language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lingshu_rl.failures import ConfigError
from lingshu_rl.sft.settings import PARTS

# Names of modules in transformers' vision-language models. The projector often lies inside the vision tower, so it is
# asked for first.
_PROJECTOR = set(
    "embed_vision merger deepstack_merger_list merger_list multi_modal_projector mm_projector connector aligner".split()
)


_VISION = {"visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "vpm"}


_LANGUAGE = {"language_model", "lm_head", "embed_tokens", "text_model"}


def part_of(name: str, given: Mapping[str, Sequence[str]] | None = None, sees: bool = True) -> str:
    """The part that a parameter belongs to; all of a model that does not see is language. Raises ConfigError."""
    for part, prefixes in (given or {}).items():
        if any(name.startswith(prefix) for prefix in prefixes):
            return part
    words = set(name.split("."))
    for part, known in (("projector", _PROJECTOR), ("vision", _VISION), ("language", _LANGUAGE)):
        if words & known:
            return part
    if not sees:
        return "language"
    raise ConfigError(
        f"the parameter {name} belongs to no known part; name its prefix under parts.vision, projector or language"
    )


def parameters_by_part(
    model: Any, given: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[tuple[str, Any]]]:
    names = [name for name, _ in model.named_parameters()]
    sees = bool(given) or any(set(name.split(".")) & (_PROJECTOR | _VISION) for name in names)
    found: dict[str, list[tuple[str, Any]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        found[part_of(name, given, sees)].append((name, parameter))
    return found


def parameter_groups(
    model: Any,
    lr: Mapping[str, float],
    weight_decay: float,
    decayed: set[str],
    given: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups: each trained part with its learning rate, with and without weight decay."""
    groups = []
    for part, members in parameters_by_part(model, given).items():
        for decays in (True, False):
            chosen = [p for name, p in members if p.requires_grad and (name in decayed) is decays]
            if chosen:
                groups.append(
                    {"params": chosen, "lr": lr[part], "weight_decay": weight_decay if decays else 0.0, "part": part}
                )
    return groups
