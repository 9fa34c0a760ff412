"""Which device belongs to which group: policy, rollout, reference. Groups on GPUs never overlap."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from lingshu_rl.config import Config, ConfigError


@dataclass(frozen=True)
class DeviceSet:
    """Either GPU numbers, or CPU with the cores it is bound to (empty = all cores of the process)."""

    gpus: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return bool(self.gpus)

    def __str__(self) -> str:
        if self.gpus:
            return "cuda:" + ",".join(map(str, self.gpus))
        return "cpu:" + ",".join(map(str, self.cores)) if self.cores else "cpu"

    def env(self) -> dict[str, str]:
        """What a child process of this group gets in its environment."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))}
        threads = len(self.cores) or available_cores()
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}

    def split(self, parts: int) -> tuple[DeviceSet, ...]:
        """Equal shares in order; CPU without named cores is shared by all. Raises ValueError when it does not divide."""
        whole = self.gpus or self.cores
        if len(whole) % parts:
            raise ValueError(f"{self} cannot be divided among {parts}")
        size = len(whole) // parts
        shares = [whole[i * size : (i + 1) * size] for i in range(parts)]
        return tuple(DeviceSet(gpus=share) if self.gpus else DeviceSet(cores=share) for share in shares)

    def command_prefix(self) -> list[str]:
        """Binds a child process to the group's cores."""
        return ["taskset", "-c", ",".join(map(str, self.cores))] if self.cores else []


@dataclass(frozen=True)
class Placement:
    """None stands for a group this run does not start: given by URLs, or not needed.

    rollout_servers, reference_replicas: the devices of each process of the group.
    """

    policy: DeviceSet
    rollout: DeviceSet | None
    reference: DeviceSet | None
    idle_gpus: tuple[int, ...]
    rollout_servers: tuple[DeviceSet, ...] = ()
    reference_replicas: tuple[DeviceSet, ...] = ()

    def describe(self) -> dict[str, str]:
        shown = {
            "policy": str(self.policy),
            "rollout": " | ".join(map(str, self.rollout_servers))
            or "elsewhere (rollout.urls), or in the policy's process",
            "reference": " | ".join(map(str, self.reference_replicas))
            or "none started (reference.urls, or loss.kl_coef=0)",
        }
        if self.idle_gpus:
            shown["idle"] = "cuda:" + ",".join(map(str, self.idle_gpus)) + " (no group uses these)"
        return shown


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def visible_gpus() -> int:
    """GPUs of this machine, without starting CUDA in this process."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def parse_devices(group: str, value: Any) -> DeviceSet | None:
    """`auto` -> None; `cpu`, `cpu:0-3,6`, `cuda:0,1`, 0, [0, 1] -> the set. Raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, (list, tuple)):
        if not value or any(not isinstance(v, int) or v < 0 for v in value):
            raise ConfigError(f"devices.{group}={value!r}: give GPU numbers, for example [0, 1]")
        if len(set(value)) != len(value):
            raise ConfigError(f"devices.{group}={value!r} names a GPU twice")
        return DeviceSet(gpus=tuple(value))
    text = str(value).replace(" ", "")
    if text == "auto":
        return None
    if text == "cpu":
        return DeviceSet()
    match = re.fullmatch(r"(cpu|cuda):(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)", text)
    if not match:
        raise ConfigError(f"devices.{group}={value!r}: use auto, cpu, cpu:0-3, cuda:0,1 or a list of GPU numbers")
    numbers: list[int] = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    if match[1] == "cpu":
        missing = set(numbers) - os.sched_getaffinity(0)
        if missing:
            raise ConfigError(f"devices.{group}={value!r}: this process may not use core(s) {sorted(missing)}")
        return DeviceSet(cores=tuple(numbers))
    return parse_devices(group, numbers)


def place(config: Config, gpus: int, policy_ranks: int = 1) -> Placement:
    """Give every group its devices. `gpus`: how many this machine has; `policy_ranks`: processes accelerate started here.

    Raises ConfigError when groups overlap on a GPU, or there are too few GPUs to place them by themselves.
    """
    here, colocate = config.cluster == "local", config.rollout.placement == "colocate"
    starts = {
        "policy": True,
        "rollout": here and not config.rollout.urls and not colocate,
        "reference": here and not config.reference.urls and config.loss.kl_coef > 0,
    }
    chosen: dict[str, DeviceSet | None] = {
        group: parse_devices(group, getattr(config.devices, group)) if needed else None
        for group, needed in starts.items()
    }
    taken: dict[int, str] = {}
    for group, devices in chosen.items():
        for gpu in devices.gpus if devices else ():
            if gpu >= gpus:
                raise ConfigError(f"devices.{group} names GPU {gpu}, but this machine has {gpus} (counted from 0)")
            if gpu in taken:
                raise ConfigError(
                    f"GPU {gpu} is given to both devices.{taken[gpu]} and devices.{group}; every group needs its own"
                )
            taken[gpu] = group
    automatic = [group for group, needed in starts.items() if needed and chosen[group] is None]
    free = [gpu for gpu in range(gpus) if gpu not in taken]
    if gpus == 0:
        for group in automatic:
            chosen[group] = DeviceSet()
    elif automatic:
        # accelerate numbers its ranks from GPU 0, so the policy takes the first free ones.
        share = {"policy": policy_ranks, "reference": 1}
        need = sum(share.get(group, 1) for group in automatic)
        if need > len(free):
            raise ConfigError(
                f"{', '.join(automatic)} need at least {need} GPUs of their own, {len(free)} are free; "
                "name them in devices.*, give servers by rollout.urls/reference.urls, or put a group on cpu"
            )
        if "policy" in automatic:
            chosen["policy"] = DeviceSet(gpus=tuple(free[:policy_ranks]))
            free = free[policy_ranks:]
        if "reference" in automatic:
            chosen["reference"] = DeviceSet(gpus=(free.pop(),))
        if "rollout" in automatic:
            chosen["rollout"] = DeviceSet(gpus=tuple(free))
            free = []
    assert chosen["policy"] is not None
    if chosen["policy"].on_gpu and len(chosen["policy"].gpus) != policy_ranks:
        raise ConfigError(
            f"devices.policy names {len(chosen['policy'].gpus)} GPUs, but accelerate started {policy_ranks} "
            "processes here; give --num_processes the same number"
        )
    used = {gpu for devices in chosen.values() if devices for gpu in devices.gpus}
    idle = tuple(gpu for gpu in range(gpus) if gpu not in used)
    if not here:
        return Placement(chosen["policy"], None, None, idle, *on_cluster(config, gpus > 0))
    return Placement(
        chosen["policy"],
        chosen["rollout"],
        chosen["reference"],
        idle,
        share_rollout(config, chosen["rollout"]),
        share_reference(config, chosen["reference"]),
    )


def on_cluster(config: Config, on_gpu: bool) -> tuple[tuple[DeviceSet, ...], tuple[DeviceSet, ...]]:
    """What each rollout server and reference replica asks Ray for; which GPUs of which node these are, Ray decides."""
    given = config.rollout.vllm
    sizes = {
        "rollout": int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1)),
        "reference": config.reference.tensor_parallel,
    }
    counts = {
        "rollout": 0 if config.rollout.urls or config.rollout.placement == "colocate" else config.rollout.servers or 1,
        "reference": 0 if config.reference.urls or not config.loss.kl_coef else config.reference.replicas or 1,
    }

    def each(group: str) -> DeviceSet:
        here = on_gpu and getattr(config.devices, group) != "cpu"
        return DeviceSet(gpus=tuple(range(sizes[group]))) if here else DeviceSet()

    return (each("rollout"),) * counts["rollout"], (each("reference"),) * counts["reference"]


def share_rollout(config: Config, devices: DeviceSet | None) -> tuple[DeviceSet, ...]:
    """The devices of each rollout server. Raises ConfigError when they do not divide evenly."""
    if devices is None:
        return ()
    given = config.rollout.vllm
    each = int(given.get("tensor_parallel_size", 0)) * int(given.get("pipeline_parallel_size", 1))
    count = config.rollout.servers
    if devices.on_gpu and each:
        count = count or max(1, len(devices.gpus) // each)
        if count * each != len(devices.gpus):
            raise ConfigError(
                f"devices.rollout has {len(devices.gpus)} GPUs; {count} server(s) of {each} (rollout.vllm."
                f"tensor_parallel_size x pipeline_parallel_size) need {count * each}"
            )
    return _split("rollout.servers", count or 1, "devices.rollout", devices)


def share_reference(config: Config, devices: DeviceSet | None) -> tuple[DeviceSet, ...]:
    """The devices of each reference replica. Raises ConfigError when they do not divide evenly."""
    if devices is None:
        return ()
    each, count = config.reference.tensor_parallel, config.reference.replicas
    if devices.on_gpu:
        count = count or max(1, len(devices.gpus) // each)
        if count * each != len(devices.gpus):
            raise ConfigError(
                f"devices.reference has {len(devices.gpus)} GPUs; {count} replica(s) of reference.tensor_parallel={each} "
                f"need {count * each}"
            )
    return _split("reference.replicas", count or 1, "devices.reference", devices)


def _split(key: str, count: int, group: str, devices: DeviceSet) -> tuple[DeviceSet, ...]:
    try:
        return devices.split(count)
    except ValueError as error:
        raise ConfigError(f"{key}={count}, but {group}={error}") from None
