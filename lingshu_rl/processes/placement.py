"""Which device belongs to which group: policy, rollout, reference, judge.

A GPU number, here and in `devices.*`, is a place in the list that this process may use: CUDA_VISIBLE_DEVICES, however a
user, `accelerate --gpu_ids` or Slurm wrote it. A child is given entries of that same list, never a number counted anew.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lingshu_rl.config import Config
from lingshu_rl.failures import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
GIB = 2**30
MOST_CORES = 4096  # that a range of `devices.*` may name
# A CUDA process fixes its list of devices when it first looks, so another one looks and this one can still narrow its
# own.
_PROBE = """
import torch
for i in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(i)
    print("card", card.total_memory, getattr(card, "uuid", ""))
"""


@dataclass(frozen=True)
class Gpu:
    """index: its number in `devices.*`. name: the entry of CUDA_VISIBLE_DEVICES that means it to a child. gb: 2^30
    bytes.

    uuid: of the card, however it is named; "" when unknown.
    """

    index: int
    name: str
    gb: float = 0.0
    uuid: str = ""


@dataclass(frozen=True)
class Machine:
    """The GPUs that this process may use; none: everything runs on the CPU.

    nodes: hosts like this one in the run. assumed: described by devices.assume, not here.
    """

    gpus: tuple[Gpu, ...] = ()
    nodes: int = 1
    assumed: bool = False

    @classmethod
    def of(cls, visible: str | None, cards: Sequence[tuple[float, str]]) -> Machine:
        """visible: CUDA_VISIBLE_DEVICES. cards: (2^30 bytes, uuid) of each device that CUDA shows.

        CUDA ends the list at its first bad entry, so it may show fewer devices than there are names.
        """
        names = [name.strip() for name in visible.split(",")] if visible is not None else map(str, range(len(cards)))
        return cls(tuple(Gpu(i, name, *card) for i, (name, card) in enumerate(zip(names, cards, strict=False))))

    @classmethod
    def assume(cls, count: int = 1, memory_gb: float = 80.0, nodes: int = 1) -> Machine:
        return cls(tuple(Gpu(i, str(i), memory_gb) for i in range(count)), nodes, assumed=True)

    @property
    def gb(self) -> float:
        """Memory of the smallest GPU."""
        return min((gpu.gb for gpu in self.gpus), default=0.0)

    def __str__(self) -> str:
        sizes = " + ".join(f"{gb:.0f}" for gb in sorted({gpu.gb for gpu in self.gpus}))
        what = f"{len(self.gpus)} GPU(s) of {sizes} GB" if self.gpus else "the CPU"
        where = " (devices.assume)" if self.assumed else ""
        return f"{self.nodes} nodes of {what}{where}" if self.nodes > 1 else what + where


@functools.cache
def this_machine() -> Machine:
    """What this process was started with; later changes of its environment, as by `narrow`, do not count."""
    import torch

    visible = os.environ.get(VISIBLE)
    if torch.version.cuda is None or visible == "":
        return Machine()
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"the GPUs could not be counted: {done.stderr.strip().splitlines()[-1]}")
    cards = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("card ")]
    return Machine.of(visible, [(int(size) / GIB, "".join(uuid)) for size, *uuid in cards])


@dataclass(frozen=True)
class Ranks:
    """Policy processes: on this node, and on all of them."""

    here: int = 1
    all: int = 1

    @classmethod
    def launched(cls) -> Ranks:
        """What the launcher says that it started; one without a launcher."""
        every = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("LOCAL_WORLD_SIZE", every)), every)


@dataclass(frozen=True)
class DeviceSet:
    """Either GPUs, or CPU with the cores it is bound to (empty = all cores of the process)."""

    gpus: tuple[Gpu, ...] = ()
    cores: tuple[int, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return bool(self.gpus)

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(gpu.index for gpu in self.gpus)

    def __str__(self) -> str:
        if self.gpus:
            return "cuda:" + ",".join(map(str, self.numbers))
        return "cpu:" + ",".join(map(str, self.cores)) if self.cores else "cpu"

    def env(self) -> dict[str, str]:
        """What a child process of this group gets in its environment."""
        if self.gpus:
            return {VISIBLE: ",".join(gpu.name for gpu in self.gpus)}
        threads = len(self.cores) or available_cores()
        return {VISIBLE: "", "OMP_NUM_THREADS": str(threads)}

    def split(self, parts: int) -> tuple[DeviceSet, ...]:
        """Equal shares in order; CPU without named cores is shared by all. Raises ValueError when it does not
        divide."""
        whole: tuple[Any, ...] = self.gpus or self.cores
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
    """policy: in the order of the local ranks. The others are empty when this run does not start them.

    engines: of each policy rank's engine, when they sample in their own processes (colocated).
    rollout, reference, judge: of each server and replica. reference_shares: the replicas are on the policy's devices.
    """

    policy: DeviceSet
    engines: tuple[DeviceSet, ...] = ()
    rollout_servers: tuple[DeviceSet, ...] = ()
    reference_replicas: tuple[DeviceSet, ...] = ()
    reference_shares: bool = False
    judges: tuple[DeviceSet, ...] = ()
    idle: DeviceSet = DeviceSet()

    @property
    def colocated(self) -> bool:
        return bool(self.engines)

    @property
    def here(self) -> DeviceSet:
        """All GPUs of this node that the run uses; a server that shares the policy's counts once."""
        sets = (self.policy, *self.rollout_servers, *self.reference_replicas, *self.judges)
        return DeviceSet(tuple(dict.fromkeys(gpu for devices in sets for gpu in devices.gpus)))

    def describe(self) -> dict[str, str]:
        rollout = " | ".join(map(str, self.rollout_servers)) or "elsewhere (rollout.urls)"
        reference = " | ".join(map(str, self.reference_replicas))
        shown = {
            "policy": str(self.policy),
            "rollout": "in the policy's processes, on its devices" if self.colocated else rollout,
            "reference": reference or "none started (reference.urls, or loss.kl_coef=0)",
        }
        if self.reference_shares:
            shown["reference"] += " (beside the policy)"
        if self.judges:
            shown["judge"] = " | ".join(map(str, self.judges))
        if self.idle.gpus:
            shown["idle"] = f"{self.idle} (no group uses these)"
        return shown


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def parse_devices(group: str, value: Any) -> tuple[str, tuple[int, ...]] | None:
    """`auto` -> None; `cpu`, `cpu:0-3,6`, `cuda:0,1`, 0, [0, 1] -> ("cpu" | "cuda", numbers). Raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, (list, tuple)):
        if not value or any(not isinstance(v, int) or v < 0 for v in value):
            raise ConfigError(f"devices.{group}={value!r}: give GPU numbers, for example [0, 1]")
        if len(set(value)) != len(value):
            raise ConfigError(f"devices.{group}={value!r} names a GPU twice")
        return "cuda", tuple(value)
    text = str(value).replace(" ", "")
    if text == "auto":
        return None
    if text == "cpu":
        return "cpu", ()
    match = re.fullmatch(r"(cpu|cuda):(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)", text)
    if not match:
        raise ConfigError(f"devices.{group}={value!r}: use auto, cpu, cpu:0-3, cuda:0,1 or a list of GPU numbers")
    numbers: list[int] = []
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        if not 0 <= int(last or first) - int(first) < MOST_CORES:
            raise ConfigError(
                f"devices.{group}={value!r}: {part} counts from the lower number up, at most {MOST_CORES}"
            )
        numbers += range(int(first), int(last or first) + 1)
    if match[1] == "cuda":
        return parse_devices(group, numbers)
    return "cpu", tuple(numbers)


def find_devices(group: str, value: Any, machine: Machine) -> DeviceSet | None:
    """The devices that `value` names on this machine; None for auto. Raises ConfigError for one that is not there."""
    found = parse_devices(group, value)
    if found is None:
        return None
    kind, numbers = found
    if kind == "cpu":
        if missing := set(numbers) - os.sched_getaffinity(0):
            raise ConfigError(f"devices.{group}={value!r}: this process may not use core(s) {sorted(missing)}")
        return DeviceSet(cores=numbers)
    count = len(machine.gpus)
    for number in numbers:
        if number >= count:
            raise ConfigError(
                f"devices.{group} names GPU {number}, but this process sees {count} (counted from 0 in {VISIBLE}="
                f"{','.join(gpu.name for gpu in machine.gpus)})"
            )
    return DeviceSet(gpus=tuple(machine.gpus[number] for number in numbers))


BESIDE_POLICY = "policy"  # devices.reference: the policy's own devices


def place(config: Config, machine: Machine, ranks: int = 1, engine_gpus: int = 1, judge_gpus: int = 1) -> Placement:
    """Give every group its devices; a pure function.

    ranks: policy processes that accelerate started on this node. engine_gpus: GPUs over which one engine's weights have
    to be spread, unless rollout.vllm.tensor_parallel_size says so; judge_gpus: of the judge's server.
    Of what is not named, the policy takes a GPU a rank and the judge its own; the rest goes to rollout servers, but for
    a reference replica when there is room for both, else the reference shares the policy's GPUs. When too few GPUs are
    left for a server, every rank samples in its own process. Raises ConfigError when groups overlap on a GPU, or there
    are too few.
    """
    engine_gpus = server_size(config) or engine_gpus
    groups = [group for group, needed in _started(config).items() if needed]
    deck = _Deck(config, machine, groups)
    policy = deck.named["policy"] or deck.first(ranks if machine.gpus else 0, f"{ranks} policy rank(s)")
    if policy.on_gpu and len(policy.gpus) != ranks:
        raise ConfigError(
            f"devices.policy names {len(policy.gpus)} GPUs, but accelerate started {ranks} processes here; give "
            "--num_processes the same number"
        )
    judge = deck.named.get("judge")
    if "judge" in groups and judge is None:
        judge = deck.first(judge_gpus if machine.gpus else 0, "the judge")
    if config.cluster != "local":
        return Placement(policy, (), *on_cluster(config, machine, engine_gpus), idle=DeviceSet(tuple(deck.free)))
    colocated = _colocates(config, machine, len(deck.free), engine_gpus)
    serves = "rollout" in groups and not colocated
    rollout, reference, beside = deck.named.get("rollout"), deck.named.get("reference"), False
    if "reference" in groups and reference is None:
        reference, beside = _reference(config, deck, policy, engine_gpus if serves and rollout is None else 0)
    if serves and rollout is None:
        servers = config.rollout.servers or max(1, len(deck.free) // engine_gpus)
        rollout = deck.first(servers * engine_gpus if machine.gpus else 0, f"{servers} rollout server(s)")
    return Placement(
        policy,
        engines=policy.split(ranks) if colocated else (),
        rollout_servers=share_rollout(config, rollout, engine_gpus) if serves and rollout is not None else (),
        reference_replicas=share_reference(config, reference) if reference is not None else (),
        reference_shares=beside,
        judges=(judge,) if judge is not None else (),
        idle=DeviceSet(tuple(deck.free)),
    )


def _reference(config: Config, deck: _Deck, policy: DeviceSet, engine_gpus: int) -> tuple[DeviceSet, bool]:
    """Its devices, and whether they are the policy's. engine_gpus: of the rollout servers still to be placed, 0: none.

    Of its own it takes one replica's, and those that no further server could use.
    """
    each, replicas, free = config.reference.tensor_parallel, config.reference.replicas, len(deck.free)
    if policy.on_gpu and (config.devices.reference == BESIDE_POLICY or free - engine_gpus < each):
        return DeviceSet(policy.gpus[: replicas * each or None]), True
    sampling = max(0, free - each) // engine_gpus * engine_gpus if engine_gpus else 0
    return deck.last(replicas * each if replicas and free else (free - sampling) // each * each), False


def _started(config: Config) -> dict[str, bool]:
    """The groups that get devices on this node; a colocated rollout group takes those of the policy."""
    here = config.cluster == "local"
    return {
        "policy": True,
        "rollout": here and not config.rollout.urls,
        "reference": here and not config.reference.urls and config.loss.kl_coef > 0,
        "judge": here and bool(config.judge.model),
    }


def _colocates(config: Config, machine: Machine, free: int, engine_gpus: int) -> bool:
    """Whether every policy rank samples in its own process: said so, or too few GPUs are left for a server."""
    if config.rollout.placement != "auto":
        return config.rollout.placement == "colocate"
    r = config.rollout
    says_servers = bool(
        r.urls
        or r.servers
        or r.weight_transfer != "auto"
        or config.devices.rollout != "auto"
        or config.train.max_staleness
    )
    return bool(machine.gpus) and not says_servers and free < engine_gpus


class _Deck:
    """The machine's GPUs while they are dealt. named: what devices.* says for each group, None for auto."""

    def __init__(self, config: Config, machine: Machine, groups: Sequence[str]) -> None:
        values = {group: getattr(config.devices, group) for group in groups}
        self.named = {
            group: None if group == "reference" and value == BESIDE_POLICY else find_devices(group, value, machine)
            for group, value in values.items()
        }
        owner: dict[Gpu, str] = {}
        for group, devices in self.named.items():
            for gpu in devices.gpus if devices else ():
                if gpu in owner:
                    raise ConfigError(
                        f"GPU {gpu.index} is given to both devices.{owner[gpu]} and devices.{group}; every group needs "
                        f"its own (devices.reference={BESIDE_POLICY} shares the policy's)"
                    )
                owner[gpu] = group
        self.free = [gpu for gpu in machine.gpus if gpu not in owner]

    def first(self, count: int, what: str) -> DeviceSet:
        if count > len(self.free):
            raise ConfigError(
                f"{what} need {count} GPU(s) of their own, {len(self.free)} are free; start fewer policy ranks "
                "(--num_processes), name devices.*, give servers by rollout.urls and reference.urls, or sample in the "
                "policy's processes (rollout.placement=colocate)"
            )
        taken, self.free = self.free[:count], self.free[count:]
        return DeviceSet(tuple(taken))

    def last(self, count: int) -> DeviceSet:
        keep = len(self.free) - count
        taken, self.free = self.free[keep:], self.free[:keep]
        return DeviceSet(tuple(taken))


def on_cluster(
    config: Config, machine: Machine, engine_gpus: int
) -> tuple[tuple[DeviceSet, ...], tuple[DeviceSet, ...]]:
    """What each rollout server and reference replica asks Ray for; which GPUs of which node these are, Ray decides."""
    sizes = {"rollout": engine_gpus, "reference": config.reference.tensor_parallel}
    counts = {
        "rollout": 0 if config.rollout.urls or config.rollout.placement == "colocate" else config.rollout.servers or 1,
        "reference": 0 if config.reference.urls or not config.loss.kl_coef else config.reference.replicas or 1,
    }

    def each(group: str) -> DeviceSet:
        here = machine.gpus and getattr(config.devices, group) != "cpu"
        return DeviceSet(tuple(Gpu(i, str(i), machine.gb) for i in range(sizes[group] if here else 0)))

    return (each("rollout"),) * counts["rollout"], (each("reference"),) * counts["reference"]


def server_size(config: Config) -> int:
    """GPUs of one rollout server as rollout.vllm says; 0 when it does not."""
    given = config.rollout.vllm
    return int(given.get("tensor_parallel_size", 0)) * int(given.get("pipeline_parallel_size", 1))


def share_rollout(config: Config, devices: DeviceSet, engine_gpus: int) -> tuple[DeviceSet, ...]:
    """The devices of each rollout server. Raises ConfigError when they do not divide evenly."""
    each, count = engine_gpus if devices.on_gpu else 0, config.rollout.servers
    if devices.on_gpu and count and not server_size(config):  # the size follows from how many were asked for
        each = len(devices.gpus) // count
    what = "rollout.vllm.tensor_parallel_size x pipeline_parallel_size, or what the weights need"
    return _split("rollout.servers", count, each, devices, what)


def share_reference(config: Config, devices: DeviceSet) -> tuple[DeviceSet, ...]:
    """The devices of each reference replica. Raises ConfigError when they do not divide evenly."""
    each = config.reference.tensor_parallel if devices.on_gpu else 0
    return _split("reference.replicas", config.reference.replicas, each, devices, "reference.tensor_parallel")


def _split(key: str, count: int, each: int, devices: DeviceSet, what: str) -> tuple[DeviceSet, ...]:
    """count processes of `each` GPUs; 0 = as many as there are, on a CPU one."""
    group = key.split(".")[0]
    count = count or (max(1, len(devices.gpus) // each) if each else 1)
    if each and count * each != len(devices.gpus):
        raise ConfigError(
            f"devices.{group} has {len(devices.gpus)} GPUs; {count} ({key}) of {each} ({what}) need {count * each}"
        )
    try:
        return devices.split(count)
    except ValueError as error:
        raise ConfigError(f"{key}={count}, but devices.{group}={error}") from None


def narrow(policy: DeviceSet, machine: Machine) -> dict[str, str]:
    """Environment that makes accelerate's `cuda:LOCAL_RANK` each rank's own device: the policy's GPUs alone, in order.

    It has to be set before this process first asks CUDA for anything. Children get the entries of their own group
    (`DeviceSet.env`), whatever this one sees.
    """
    return {VISIBLE: ",".join(gpu.name for gpu in policy.gpus)} if machine.gpus else {}
