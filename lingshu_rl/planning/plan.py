"""What a run will hold on each device, before anything is loaded: arithmetic on the model's config and the settings.

`--dry-run` prints it, docs/clusters.md has it for every recipe. GB are 2^30 bytes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lingshu_rl.config import Config
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.shape import Shape, UnknownModelError, read_shape
from lingshu_rl.planning.given import load_config
from lingshu_rl.planning.memory import (
    LEAST_ROW,
    EngineMemory,
    PolicyMemory,
    number_bytes,
    reference_parts,
    row_tokens,
    sent_bytes,
)
from lingshu_rl.planning.validation import validate
from lingshu_rl.processes.locks import unheld
from lingshu_rl.processes.placement import (
    GIB,
    DeviceSet,
    Machine,
    Placement,
    Ranks,
    find_devices,
    parse_devices,
    place,
    server_size,
    this_machine,
)

CONTEXT_GB = 1.0  # of a process on a GPU: CUDA context, libraries, NCCL's buffers
FRAGMENTS = 0.05  # share of a GPU that the allocator cannot hand out in one piece
ASLEEP_GB = 1.5  # what a sleeping engine keeps: captured graphs, workspaces
SERVER_SHARE = 0.9  # of a GPU that a rollout server of its own takes (vLLM's gpu_memory_utilization)
CPU_CACHE_GB = 1.0  # VLLM_CPU_KVCACHE_SPACE of a server on a CPU
WEIGHTS_SHARE = 0.6  # an engine is spread over more GPUs when its weights take more than this of one


@dataclass(frozen=True)
class Load:
    """Most that one device of a group holds in a phase. parts: GB by what they are. room: 0 = not a device of its
    own."""

    group: str
    devices: str
    phase: str
    room: float
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return not self.room or self.total <= self.room

    def __str__(self) -> str:
        verdict = f" of {self.room:.1f}" if self.room else ""
        held = ", ".join(f"{name} {gb:.1f}" for name, gb in self.parts.items() if gb >= 0.05)
        mark = "" if self.fits else "  << DOES NOT FIT"
        return f"{self.group} on {self.devices}, {self.phase}: {self.total:.1f}{verdict} GB ({held}){mark}"


@dataclass(frozen=True)
class Plan:
    """placement: devices of this node. engine_share: gpu_memory_utilization of the engines, 0 on a CPU.

    cache_tokens: prompt and completion tokens that one engine's cache holds at once. sent_gb: weights to each engine
    after a step. host_gb: what DeepSpeed's offload keeps in the memory of a node.
    """

    machine: Machine
    ranks: Ranks
    placement: Placement
    loads: tuple[Load, ...] = ()
    engine_share: float = 0.0
    cache_tokens: int = 0
    sent_gb: float = 0.0
    host_gb: float = 0.0
    about: str = ""

    @property
    def fits(self) -> bool:
        return all(load.fits for load in self.loads)

    @property
    def fullest(self) -> Load | None:
        """The load with the least room left, among those that no cache fills up."""
        limited = [load for load in self.loads if load.room and not any("cache" in part for part in load.parts)]
        return min(limited, key=lambda load: load.room - load.total, default=None)

    def lines(self, config: Config) -> Iterator[str]:
        """For a reader, without what would help."""
        yield f"plan: {self.machine}, {self.ranks.all} policy rank(s); GB are 2^30 bytes of one device"
        for group, devices in self.placement.describe().items():
            yield f"devices: {group}: {devices}"
        yield from map(str, self.loads)
        train = config.train
        samples = train.prompts_per_step * train.group_size
        yield (
            f"a step: {train.prompts_per_step} prompts x {train.group_size} = {samples} samples, up to "
            f"{samples * config.rollout.max_tokens:,} tokens; {self.sent_gb:.3g} GB of weights to each engine"
        )
        yield (
            f"a row of the update: up to {row_tokens(config, bool(self.machine.gpus)):,} tokens (packing.token_budget)"
        )
        if self.cache_tokens:
            yield f"an engine's cache holds {self.cache_tokens:,} tokens at once"
        if self.host_gb:
            yield f"host memory for offloaded state: {self.host_gb:.0f} GB a node"
        yield self.about


def make_plan(config: Config, machine: Machine, ranks: Ranks) -> Plan:
    """The placement and what it holds; pure but for reading the model's config. Raises ConfigError as `place` does."""
    try:
        shape = read_shape(config.model, config.train.freeze, config.train.lora)
        frozen = read_shape(config.reference.model or config.model)
        judge = read_shape(config.judge.model) if config.judge.model else None
    except UnknownModelError as error:
        return Plan(machine, ranks, place(config, machine, ranks.here), about=f"sizes are unknown: {error}")
    number = number_bytes(config, on_gpu=bool(machine.gpus))
    judge_gpus = server_size(judge_run(config)) or (gpus_for_weights(judge, number, machine) if judge else 1)
    placement = place(config, machine, ranks.here, gpus_for_weights(shape, number, machine), judge_gpus)
    policy = PolicyMemory(config, shape, ranks.all, number, placement.policy.on_gpu)
    sampler = EngineMemory(config, shape, number, machine.gb, placement)
    replicas = placement.reference_replicas
    reference = reference_parts(config, frozen, number, replicas[0].on_gpu) | _context(replicas[0]) if replicas else {}
    beside = _context(placement.policy) | (_named("reference", reference) if placement.reference_shares else {})
    loads, share = (_colocated if placement.colocated else _apart)(config, machine, placement, policy, sampler, beside)
    if replicas and not placement.reference_shares:
        loads.append(_load("reference", replicas, "scoring", _room(machine), reference))
    if judge is not None:
        own = replace(placement, rollout_servers=placement.judges, engines=())
        engine = EngineMemory(judge_run(config), judge, number, machine.gb, own)
        loads.append(_serving("judge", placement.judges, "judging", engine, _room(machine))[0])
    return Plan(
        machine,
        ranks,
        placement,
        tuple(loads),
        share,
        cache_tokens=sampler.tokens(share),
        sent_gb=sent_bytes(config, shape, number) / GIB,
        host_gb=policy.host_bytes * ranks.here / GIB,
        about=f"{shape.name}: {shape.parameters / 1e9:.2f} billion parameters, {shape.trained / 1e9:.3g} trained, by "
        f"{shape.source}",
    )


def judge_run(config: Config) -> Config:
    """The run as if the judge were its model: what its server is started with, and what it holds."""
    return replace(
        config,
        model=config.judge.model,
        train=replace(config.train, lora={}, freeze=[], quantize=""),
        rollout=replace(config.rollout, vllm=config.judge.vllm),
    )


def plan_here(config: Config) -> Plan:
    """The plan of the run that this process is a rank of."""
    return make_plan(config, this_machine(), Ranks.launched())


def plan_dry(config: Config, here: Machine) -> Plan:
    """The plan of a dry run."""
    return make_plan(config, *planned_for(config, here))


def planned_for(config: Config, here: Machine) -> tuple[Machine, Ranks]:
    """This machine if it has GPUs, else what `devices.assume` describes, with a rank for each of the policy's GPUs."""
    if here.gpus or not config.devices.assume:
        return here, Ranks.launched()
    machine = Machine.assume(**config.devices.assume)
    named = parse_devices("policy", config.devices.policy)
    ranks = len(named[1]) if named and named[0] == "cuda" else len(machine.gpus)
    return machine, Ranks(ranks, ranks * machine.nodes)


REPEATED = 0.1  # of a group's tokens, which its prompt may be repeated for in further rows


def with_budget(config: Config, longest: int, machine: Machine, ranks: Ranks) -> Config:
    """The config with packing.token_budget, unless it is given: few rows for a group of the longest prompt, as they
    fit.

    longest: its tokens. Over k rows a group has its prompt k times: k is the most at which that costs a tenth more, or
    the least above it whose rows the devices hold by the plan.
    """
    if config.packing.token_budget:
        return config
    group, completion, least = config.train.group_size, config.rollout.max_tokens, LEAST_ROW[bool(machine.gpus)]
    few = 1 + int(REPEATED * (longest + group * completion) / longest)
    budgets = [max(least, longest + math.ceil(group / rows) * completion) for rows in range(min(few, group), group + 1)]
    found = [replace(config, packing=replace(config.packing, token_budget=budget)) for budget in dict.fromkeys(budgets)]
    return next((one for one in found if make_plan(one, machine, ranks).fits), found[-1])


def rows_told(config: Config, longest: int) -> Iterator[str]:
    """What packing.token_budget, given or chosen, makes of the largest group of the longest prompt, for a reader."""
    budget, group, completion = config.packing.token_budget, config.train.group_size, config.rollout.max_tokens
    if config.packing.layout == "dense" or not budget:
        return
    rows = math.ceil(group / max(1, (budget - longest) // completion))
    times = (rows * longest + group * completion) / (longest + group * completion)
    yield (
        f"rows: up to {budget:,} tokens (packing.token_budget); {group} completions of {completion:,} tokens after "
        f"the longest prompt fill {rows} of them, {times:.2f} times the tokens of one"
    )
    if times > 1 + 3 * REPEATED:
        yield (
            f"WARNING: packing.token_budget={budget} repeats a prompt of {longest:,} tokens for every "
            f"{math.ceil(group / rows)} of its completions; a larger one, or 0, which chooses by prompts and memory, "
            "is faster"
        )


def gpus_for_weights(shape: Shape, number: int, machine: Machine) -> int:
    """The least GPUs that hold an engine's weights with room for its cache, among sizes that divide the heads."""
    room = WEIGHTS_SHARE * machine.gb * GIB
    sizes = [n for n in range(1, len(machine.gpus) + 1) if shape.divides(n)]
    return next((n for n in sizes if shape.parameters * number / n <= room), sizes[-1] if sizes else 1)


def engine_gpus(config: Config, machine: Machine) -> int:
    """GPUs of one engine: as rollout.vllm says, or as few as the weights need."""
    if size := server_size(config):
        return size
    try:
        shape = read_shape(config.model)
    except UnknownModelError:  # whoever loads it will say what is wrong
        return 1
    return gpus_for_weights(shape, number_bytes(config, on_gpu=bool(machine.gpus)), machine)


def server_layout(config: Config, machine: Machine) -> tuple[DeviceSet, dict[str, int]]:
    """One server over all GPUs of the machine: copies of the engine, each of as few GPUs as the weights need.

    Returns its devices, and vLLM's option for the copies. GPUs that no copy could use are left out.
    """
    if not machine.gpus:
        return DeviceSet(), {}
    each = engine_gpus(config, machine)
    copies = max(1, len(machine.gpus) // each)
    return DeviceSet(machine.gpus[: copies * each]), {"data_parallel_size": copies} if copies > 1 else {}


def serving_devices(config: Config, role: str) -> DeviceSet:
    """Devices of one server started by hand. auto: as few free GPUs as its weights need. Raises ConfigError.

    role: "rollout" or "reference".
    """
    machine = this_machine()
    named = find_devices(role, getattr(config.devices, role), machine)
    if named is not None or not machine.gpus:
        return named or DeviceSet()
    free = unheld(machine.gpus)
    each = config.reference.tensor_parallel if role == "reference" else engine_gpus(config, machine)
    if each > len(free):
        raise ConfigError(
            f"the server needs {each} GPU(s), {len(free)} of {machine} are free; name them in devices.{role}"
        )
    return DeviceSet(free[:each])


def _colocated(
    config: Config,
    machine: Machine,
    placement: Placement,
    policy: PolicyMemory,
    engine: EngineMemory,
    beside: dict[str, float],
) -> tuple[list[Load], float]:
    """The loads of GPUs that sample and train in turns, and the engine's share: what policy and reference leave.

    beside: what else lies on the policy's devices.
    """
    room, group = _room(machine), "policy and engine"
    held = policy.resting() | beside
    left = (room - sum(held.values())) / machine.gb if machine.gpus else 0.0
    share = float(
        config.rollout.vllm.get("gpu_memory_utilization") or min(SERVER_SHARE, max(0.0, int(100 * left) / 100))
    )
    awake = _named("engine", engine.fixed() | {"cache": engine.cache(share)})
    asleep = {"engine asleep": ASLEEP_GB} if machine.gpus else awake
    sampling = _load(group, (placement.policy,), "sampling", room, held | awake)
    return [sampling, _load(group, (placement.policy,), "update", room, policy.updating() | beside | asleep)], share


def _apart(
    config: Config,
    machine: Machine,
    placement: Placement,
    policy: PolicyMemory,
    engine: EngineMemory,
    beside: dict[str, float],
) -> tuple[list[Load], float]:
    """The loads of GPUs that only train, or only sample, and the engine's share (0 on a CPU, or without an engine)."""
    room, servers = _room(machine), placement.rollout_servers
    loads = [_load("policy", (placement.policy,), "update", room, policy.updating() | beside)]
    if not servers:
        return loads, 0.0
    load, share = _serving("rollout", servers, "sampling", engine, room)
    return [*loads, load], share


def _serving(
    group: str, servers: Sequence[DeviceSet], phase: str, engine: EngineMemory, room: float
) -> tuple[Load, float]:
    """The load of servers on devices of their own, and their share of a GPU (0 on a CPU)."""
    if not servers[0].on_gpu:
        held = {"weights": engine.fixed()["weights"], "cache": CPU_CACHE_GB}
        return _load(group, servers, phase, room, held), 0.0
    share = float(engine.config.rollout.vllm.get("gpu_memory_utilization") or SERVER_SHARE)
    awake = engine.fixed() | {"cache": engine.cache(share)} | _context(servers[0])
    return _load(group, servers, phase, room, awake), share


def _room(machine: Machine) -> float:
    return machine.gb * (1 - FRAGMENTS)


def _context(devices: DeviceSet) -> dict[str, float]:
    return {"context": CONTEXT_GB} if devices.on_gpu else {}


def _load(group: str, sets: Sequence[DeviceSet], phase: str, room: float, parts: Mapping[str, float]) -> Load:
    """Of any of these equal sets of devices."""
    return Load(group, " | ".join(map(str, sets)), phase, room if sets[0].on_gpu else 0.0, dict(parts))


def _named(owner: str, parts: Mapping[str, float]) -> dict[str, float]:
    return {f"{owner} {name}": gb for name, gb in parts.items()}


OFFLOAD = ("deepspeed.zero_optimization.offload_optimizer.device=cpu", "deepspeed.zero_force_ds_cpu_optimizer=false")
# What may help when something does not fit, from what costs least to what changes most.
HELPS: tuple[tuple[str, ...], ...] = (
    ("train.gradient_checkpointing=true",),
    ("packing.token_budget=4096",),
    ("deepspeed.zero_optimization.stage=3",),
    ("rollout.vllm.max_model_len=4096",),
    OFFLOAD,
    ("train.lora={r: 32, lora_alpha: 64, target_modules: all-linear}",),
    ("loss.kl_coef=0",),
)


def what_helps(config: Config, machine: Machine, ranks: Ranks) -> Iterator[str]:
    """Each single change that makes the plan fit, with what its fullest device holds then; else the first that do
    together.

    More ranks share more of the state, up to one on each GPU, which then samples in turns; fewer leave GPUs for
    servers.
    """
    told = False
    for settings in HELPS:
        if line := _if_it_fits(config, settings, machine, ranks):
            told = True
            yield line
    for counts in (range(ranks.here + 1, len(machine.gpus) + 1), range(ranks.here - 1, 0, -1)):
        lines = (_with_ranks(config, count, machine) for count in counts)
        if line := next(filter(None, lines), ""):
            told = True
            yield line
    together: tuple[str, ...] = ()
    for settings in () if told else HELPS:
        together += settings
        if line := _if_it_fits(config, together, machine, ranks):
            yield line
            return
    if not told:
        yield "nothing this library knows; use more or larger GPUs, or a smaller model"


def _with_ranks(config: Config, count: int, machine: Machine) -> str:
    free = ("rollout.placement=auto", "devices.policy=auto", "devices.rollout=auto", "devices.reference=auto")
    line = _if_it_fits(config, free, machine, Ranks(count, count * machine.nodes))
    return line and f"--num_processes {count * machine.nodes} {line}"


def _if_it_fits(config: Config, settings: Sequence[str], machine: Machine, ranks: Ranks) -> str:
    """The settings and the fullest device when the plan fits with them on top, else ""."""
    plan = _changed_plan(config, settings, machine, ranks)
    if plan is None or not plan.fits or plan.fullest is None:
        return ""
    return f"{' '.join(settings)}: {plan.fullest.group} {plan.fullest.total:.1f} of {plan.fullest.room:.1f} GB"


def _changed_plan(config: Config, settings: Sequence[str], machine: Machine, ranks: Ranks) -> Plan | None:
    """The plan with these settings on top; None when they do not go with the others."""
    try:
        changed = _changed(config, settings)
        return make_plan(changed, machine, ranks) if changed is not None else None
    except ConfigError:
        return None


def _changed(config: Config, settings: Sequence[str]) -> Config | None:
    from omegaconf import OmegaConf

    changed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(list(settings))))
    assert isinstance(changed, Config)
    try:
        validate(changed)
    except ConfigError:
        return None
    return changed


def made_to_fit(config: Config, plan: Plan) -> tuple[Config, str]:
    """The config of a run that would not fit, with its optimiser state on the host if that is enough, and what to say.

    It is the one help that changes no number of the run. Unchanged, with the other helps, when it is not.
    """
    if plan.fits:
        return config, ""
    changed = _changed(config, OFFLOAD)
    if changed is not None and make_plan(changed, plan.machine, plan.ranks).fits:
        return changed, f"the optimiser's state would not fit on the GPU and is kept on the host ({' '.join(OFFLOAD)})"
    helps = "\n  ".join(what_helps(config, plan.machine, plan.ranks))
    return config, f"by the plan this does not fit (--dry-run shows it); what would help:\n  {helps}"


def report(config: Config) -> tuple[list[str], bool]:
    """What `--dry-run` prints, and whether everything fits."""
    plan = plan_dry(config, this_machine())
    config, note = made_to_fit(config, plan)
    plan = make_plan(config, plan.machine, plan.ranks)
    return [*plan.lines(config), *note.splitlines()], plan.fits


def table(files: Sequence[Path]) -> str:
    """Markdown: what each recipe's groups hold on the machine that it names. Raises ConfigError for one that names
    none."""
    rows = [
        "| recipe | machine | trains | samples | reference | GB held of those there are | tokens cached |",
        "|---|---|---|---|---|---|--:|",
    ]
    for file in files:
        config = load_config(file)
        if not config.devices.assume:
            raise ConfigError(f"{file} names no machine (devices.assume)")
        plan = plan_dry(config, Machine())
        placement = plan.placement
        elsewhere = "by URL" if config.reference.urls else "none"
        cells = [
            f"`{file.name}`",
            str(plan.machine).replace(" (devices.assume)", ""),
            str(placement.policy),
            "the same" if placement.colocated else " + ".join(map(str, placement.rollout_servers)),
            "the same"
            if placement.reference_shares
            else " + ".join(map(str, placement.reference_replicas)) or elsewhere,
            "; ".join(f"{load.phase} {load.total:.0f} of {load.room:.0f}" for load in plan.loads),
            f"{plan.cache_tokens:,}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="print the table of recipes that stands in docs/clusters.md")
    parser.add_argument("files", nargs="+", type=Path)
    print(table(parser.parse_args().files))


if __name__ == "__main__":
    main()
