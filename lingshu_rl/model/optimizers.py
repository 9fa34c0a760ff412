"""Optimisers by name (`train.optimizer`): what builds one, the bytes of its state, and where it must not be used.

Loads no torch, so that a plan of the memory or a check of the configuration stays cheap.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lingshu_rl.failures import ConfigError

Groups = Sequence[dict[str, Any]]  # torch's parameter groups, each with its `lr` and `weight_decay`
Build = Callable[[Any, Groups, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Place:
    """What an optimiser would work under. clips: DeepSpeed limits the norm of what it is given."""

    on_gpu: bool
    deepspeed: bool = True
    stage: int = 0
    offloads: bool = False  # ZeRO keeps the states in the host's memory
    forces_cpu_adam: bool = True  # and replaces whatever optimiser it is given by its own Adam
    reduce_scatter: bool = True
    clips: bool = False
    names_one: bool = False  # the settings of DeepSpeed hold an optimiser themselves

    @classmethod
    def of(cls, deepspeed: Mapping[str, Any] | None, *, on_gpu: bool, max_grad_norm: float) -> Place:
        """deepspeed: its configuration, in which "auto" means our own setting; None: it is not used."""
        if deepspeed is None:
            return cls(on_gpu, deepspeed=False)
        zero = deepspeed.get("zero_optimization") or {}
        clipping = deepspeed.get("gradient_clipping", "auto")
        return cls(
            on_gpu,
            stage=int(zero.get("stage", 0)),
            offloads=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
            forces_cpu_adam=bool(deepspeed.get("zero_force_ds_cpu_optimizer", True)),
            reduce_scatter=bool(zero.get("reduce_scatter", True)),
            clips=(max_grad_norm if clipping == "auto" else float(clipping)) > 0,
            names_one="optimizer" in deepspeed,
        )


@dataclass(frozen=True)
class Limit:
    """A place where an optimiser would be wrong or missing, and what to do instead."""

    holds: Callable[[Place], bool]
    advice: str


@dataclass(frozen=True)
class Optimizer:
    """state_bytes: per trained parameter, beside DeepSpeed's float32 copy of the weight (4) and its gradient.

    Under ZeRO they are divided by the ranks. matrix_state_bytes: of those, per element of a hidden matrix, where it
    differs.
    """

    build: Build
    state_bytes: float
    package: str = ""
    matrix_state_bytes: float | None = None
    in_pages: bool = False  # states move to the host's memory when the GPU's is short
    limits: tuple[Limit, ...] = ()


def _adamw(model: Any, groups: Groups, options: Mapping[str, Any]) -> Any:
    import torch

    fused = not {"foreach", "differentiable"} & options.keys()  # other ways of its own
    return torch.optim.AdamW(groups, **{"fused": fused, **options})


def _bitsandbytes(name: str) -> Build:
    def build(model: Any, groups: Groups, options: Mapping[str, Any]) -> Any:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(groups, **options)

    return build


MUON_OPTIONS = ("momentum", "ns_method")  # DeepSpeed's names, as are those of its Adam for the rest
MUON_REST_OPTIONS = ("betas", "eps", "adam_lr")


def _muon(model: Any, groups: Groups, options: Mapping[str, Any]) -> Any:
    """DeepSpeed's Muon, the only one whose steps are right on ZeRO's shards: there it orthogonalises whole matrices.

    All but the hidden matrices get AdamW: in each group, with its own learning rate unless `adam_lr` is given.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if unknown := set(options) - {*MUON_OPTIONS, *MUON_REST_OPTIONS}:
        raise TypeError(
            f"muon takes {', '.join((*MUON_OPTIONS, *MUON_REST_OPTIONS))}, not {', '.join(sorted(unknown))}"
        )
    rest = {key: options[key] for key in ("betas", "eps") if key in options}
    rest |= {"lr": options["adam_lr"]} if "adam_lr" in options else {}
    settings = {True: {key: options[key] for key in MUON_OPTIONS if key in options}, False: rest}
    hidden = set(map(id, hidden_matrices(model)))
    halves = []
    for group in groups:
        for use_muon, own in settings.items():
            members = [p for p in group["params"] if (id(p) in hidden) is use_muon]
            for parameter in members:
                parameter.use_muon = use_muon  # ZeRO asks the parameter itself
            if members:
                halves.append({**group, "params": members, "use_muon": use_muon, **own})
    return MuonWithAuxAdam(halves)


def hidden_matrices(model: Any) -> Iterator[Any]:
    """Weights of the linear layers between the embedding and the head, language model and vision tower alike."""
    from torch import nn

    head = set(map(id, model.get_output_embeddings().parameters()))  # may be the embedding as well
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in head:
            yield module.weight


_OFFLOAD = Limit(
    lambda place: place.offloads,
    "deepspeed.zero_optimization.offload_optimizer replaces it by DeepSpeed's CPU Adam: use adamw there, or no offload",
)
_NAMED_TWICE = Limit(
    lambda place: place.names_one, "the settings of DeepSpeed hold an `optimizer` of their own; leave that out"
)
_PAGES = Limit(
    lambda place: not place.on_gpu,
    "paged states exist on a CUDA GPU only: use adamw or adamw_8bit there",
)
_MUON = (
    Limit(
        lambda place: place.deepspeed and place.clips,
        "DeepSpeed clips what Muon has orthogonalised, so that each step would be divided by its own norm: set "
        "max_grad_norm=0 (Muon's steps have their size from the learning rate alone)",
    ),
    Limit(
        lambda place: place.stage == 3 and place.reduce_scatter,
        "Muon needs whole gradients: set deepspeed.zero_optimization.reduce_scatter=false, or use stage 2",
    ),
    Limit(
        lambda place: place.offloads and place.forces_cpu_adam,
        "offload_optimizer would replace Muon by DeepSpeed's CPU Adam: set deepspeed.zero_force_ds_cpu_optimizer=false",
    ),
)

BYTES_8BIT = 2 * (1 + 4 / 256)  # two moments, each with a float32 scale for 256 values

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(_adamw, 8.0),
    "adamw_8bit": Optimizer(_bitsandbytes("AdamW8bit"), BYTES_8BIT, package="bitsandbytes", limits=(_OFFLOAD,)),
    "paged_adamw": Optimizer(
        _bitsandbytes("PagedAdamW"), 8.0, in_pages=True, package="bitsandbytes", limits=(_PAGES, _OFFLOAD)
    ),
    "paged_adamw_8bit": Optimizer(
        _bitsandbytes("PagedAdamW8bit"), BYTES_8BIT, in_pages=True, package="bitsandbytes", limits=(_PAGES, _OFFLOAD)
    ),
    "muon": Optimizer(_muon, 8.0, matrix_state_bytes=4.0, limits=_MUON),
}
SET_ELSEWHERE = {"params", "lr", "weight_decay"}


def check_optimizer(key: str, name: str, options: Mapping[str, Any], place: Place) -> None:
    """Raises ConfigError, which says what to do, where this optimiser would fail or compute something else.

    key: of the configuration that names it; its arguments are under KEY_args.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"{key}={name!r} is not one of {', '.join(OPTIMIZERS)}")
    for option in sorted(SET_ELSEWHERE & options.keys()):
        raise ConfigError(
            f"{key}_args.{option} would not be used: what is trained, lr and weight_decay have their own keys"
        )
    for limit in (_NAMED_TWICE, *OPTIMIZERS[name].limits):
        if limit.holds(place):
            raise ConfigError(f"{key}={name}: {limit.advice}")


def check_package(package: str, key: str) -> None:
    """Raises ConfigError where the package that `key` needs is not installed."""
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"{key} needs {package}, which is not installed: pip install 'lingshu-rl[quant]'")


def build_optimizer(
    key: str, name: str, options: Mapping[str, Any], place: Place, *, model: Any, groups: Groups
) -> Any:
    """The optimiser of these groups. options: by the package's own names. Raises ConfigError as `check_optimizer`."""
    check_optimizer(key, name, options, place)
    check_package(OPTIMIZERS[name].package, f"{key}={name}")
    return _built(key, name, options, model, groups)


def check_arguments(key: str, name: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that the optimiser refuses, by building it for a small layer.

    Says nothing where its package is not installed: `check_package` does, where a run starts.
    """
    from torch import nn

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    if importlib.util.find_spec(OPTIMIZERS[name].package or "torch") is not None:
        model = Small()
        _built(key, name, options, model, [{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.0}])


def _built(key: str, name: str, options: Mapping[str, Any], model: Any, groups: Groups) -> Any:
    try:
        return OPTIMIZERS[name].build(model, groups, options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{key}_args of {name}: {error}") from None
