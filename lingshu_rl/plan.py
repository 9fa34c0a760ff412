"""What a run will hold on each device, before anything is loaded: arithmetic on the model's config and the settings.

`--dry-run` prints it. A GB is 2^30 bytes. Sources of the formulas stand beside them; tests/test_plan.py measures what a CPU
can (parameters, gradients and optimiser state to the byte, activations, one H100 figure) and docs/clusters.md compares
with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lingshu_rl.config import Config, ConfigError, validate
from lingshu_rl.model.shape import Shape, Stack, UnknownModelError, read_shape
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

# Bytes of optimiser state for each trained parameter, on the device, beside the float32 master weights.
OPTIMIZER_STATE = {"adamw": 8.0}
# Bytes of a frozen weight, by how it is loaded; another one that is quantised is a further entry.
FROZEN_WEIGHT = {"bfloat16": 2.0, "float32": 4.0}
MASTER = 4.0  # float32 copy of the trained weights that DeepSpeed steps on
CONTEXT_GB = 1.0  # of a process on a GPU: CUDA context, libraries, NCCL's buffers
FRAGMENTS = 0.05  # share of a GPU that the allocator cannot hand out in one piece
ASLEEP_GB = 1.5  # what a sleeping engine keeps: captured graphs, workspaces
GRAPHS_GB = 1.0  # CUDA graphs of an engine that is awake
SERVER_SHARE = 0.9  # of a GPU that a rollout server of its own takes (vLLM's gpu_memory_utilization)
WEIGHTS_SHARE = 0.6  # an engine is spread over more GPUs when its weights take more than this of one
IMAGE_SHARE = 0.5  # assumed share of image tokens in a packed row


@dataclass(frozen=True)
class Load:
    """Most that one device of a group holds in a phase. parts: GB by what they are. room: 0 = not a device of its own."""

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
    except UnknownModelError as error:
        return Plan(machine, ranks, place(config, machine, ranks.here), about=f"sizes are unknown: {error}")
    number = number_bytes(config, on_gpu=bool(machine.gpus))
    placement = place(config, machine, ranks.here, gpus_for_weights(shape, number, machine))
    policy = PolicyMemory(config, shape, ranks.all, number, placement.policy.on_gpu)
    sampler = EngineMemory(config, shape, number, machine.gb, placement)
    reference = reference_parts(config, frozen, number) if placement.reference_replicas else {}
    loads, share = _loads(config, machine, placement, policy, sampler, reference)
    return Plan(
        machine,
        ranks,
        placement,
        loads,
        share,
        cache_tokens=sampler.tokens(share),
        sent_gb=sent_bytes(config, shape, number) / GIB,
        host_gb=policy.host_bytes * ranks.here / GIB,
        about=f"{shape.name}: {shape.parameters / 1e9:.2f} billion parameters, {shape.trained / 1e9:.3g} trained, by "
        f"{shape.source}",
    )


def plan_here(config: Config) -> Plan:
    """The plan of the run that this process is a rank of."""
    return make_plan(config, this_machine(), Ranks.launched())


def plan_dry(config: Config) -> Plan:
    """The plan for this machine if it has GPUs, else for `devices.assume`, with a rank for each of the policy's GPUs."""
    if this_machine().gpus or not config.devices.assume:
        return plan_here(config)
    machine = Machine.assume(**config.devices.assume)
    named = parse_devices("policy", config.devices.policy)
    here = len(named[1]) if named and named[0] == "cuda" else len(machine.gpus)
    return make_plan(config, machine, Ranks(here, here * machine.nodes))


def number_bytes(config: Config, on_gpu: bool) -> int:
    return 2 if on_gpu and config.train.dtype != "float32" else 4


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


@dataclass(frozen=True)
class PolicyMemory:
    """One policy rank by DeepSpeed's stages (ZeRO, arXiv:1910.02054, and DeepSpeed 0.19's own buffers).

    ranks: of all nodes. number: bytes of a weight.
    """

    config: Config
    shape: Shape
    ranks: int
    number: int
    on_gpu: bool

    @property
    def zero(self) -> dict[str, Any]:
        return dict(self.config.deepspeed.get("zero_optimization") or {})

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 0))

    def offloads(self, what: str) -> bool:
        """what: "optimizer" or "param"."""
        return (self.zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

    def share(self, stage: int) -> float:
        """The part of a quantity that a rank holds when it is partitioned from `stage` on."""
        return 1 / self.ranks if self.stage >= stage else 1.0

    @property
    def weight_bytes(self) -> float:
        """Of the whole model: trained weights in the compute dtype, frozen ones as they were loaded."""
        frozen = self.shape.parameters - self.shape.trained
        kind = "bfloat16" if self.number == 2 else "float32"
        return self.shape.trained * self.number + frozen * FROZEN_WEIGHT[kind]

    @property
    def optimizer_bytes(self) -> float:
        """Master weights and state of this rank, wherever they lie. Plain float32 without ZeRO has no master weights."""
        master = MASTER if self.stage or self.number == 2 else 0.0
        state = OPTIMIZER_STATE[getattr(self.config.train, "optimizer", "adamw")]
        return self.shape.trained * (master + state) * self.share(1)

    @property
    def gradient_bytes(self) -> float:
        """What stays between backward passes, in DeepSpeed's data_types.grad_accum_dtype."""
        wide = (self.config.deepspeed.get("data_types") or {}).get("grad_accum_dtype") == "fp32"
        return self.shape.trained * (4 if wide else self.number) * self.share(2)

    @property
    def host_bytes(self) -> float:
        held = self.optimizer_bytes + 4 * self.shape.trained * self.share(2) if self.offloads("optimizer") else 0.0
        return held + (self.weight_bytes * self.share(3) if self.offloads("param") else 0.0)

    def resting(self) -> dict[str, float]:
        """While engines sample."""
        parts = {
            "weights": 0.0 if self.offloads("param") else self.weight_bytes * self.share(3),
            "optimiser": 0.0 if self.offloads("optimizer") else self.optimizer_bytes,
        }
        if self.stage == 3:  # allocated once, at the start
            parts |= self._gradients()
        return _gb(parts)

    def updating(self) -> dict[str, float]:
        """At the larger of two peaks: the backward pass, and the step, when activations are gone.

        In the step the gradients are put together in the weights' dtype, then in float32 (stages 1 and 2: all of the
        rank's at once; stage 3: sub_group_size of them).
        """
        wide = 4.0 * self.shape.trained * self.share(1)
        if self.stage == 3:
            wide = min(wide, 4.0 * int(self.zero.get("sub_group_size", 1e9)))
        flat = self.number * self.shape.trained * self.share(1) if self.stage < 3 else 0.0
        step = 0.0 if self.offloads("optimizer") else wide + flat
        backward = {"gathered": self._gathered(), **self.activations()}
        fixed = self.resting() | _gb(self._gradients())
        peaks = [_gb(backward), _gb({"step": step})]
        return fixed | max(peaks, key=lambda parts: sum(parts.values()))

    def _gradients(self) -> dict[str, float]:
        """Gradients, and the buffers in which they are reduced (two when communication overlaps, stage 3's default)."""
        buffers = 2 if self.zero.get("overlap_comm", self.stage == 3) else 1
        bucket = int(self.zero.get("reduce_bucket_size", 5e8)) * self.number * buffers if self.stage else 0
        return {
            "gradients": 0.0 if self.offloads("optimizer") else self.gradient_bytes,
            "buckets": float(bucket),
        }

    def _gathered(self) -> float:
        """Stage 3: whole weights of the layers that are computed or fetched ahead."""
        if self.stage < 3:
            return 0.0
        live = int(self.zero.get("stage3_max_live_parameters", self.zero.get("max_live_parameters", 1e9)))
        return min(self.shape.parameters, live) * float(self.number)

    def activations(self) -> dict[str, float]:
        """Bytes of one row of packing.token_budget tokens, half of them an image's, and of the output head's chunk."""
        tokens = self.config.packing.token_budget
        recompute = self.config.train.recomputes(self.on_gpu)
        kept = _kept(self.shape.text, tokens, self.number, recompute)
        if self.shape.vision is not None and self.shape.trains_vision:
            patches = int(tokens * IMAGE_SHARE) * self.shape.patches
            kept += _kept(self.shape.vision, patches, self.number, recompute)
        return {"activations": kept, "vocabulary": vocabulary_bytes(self.shape, tokens, self.number, self.on_gpu)}


def _kept(stack: Stack, tokens: int, number: int, recompute: bool) -> float:
    """Of all layers, or of the one being computed again plus every layer's input; and one layer's gradients in flight."""
    layer = float(tokens * stack.saved_numbers(number, singles=4))
    inputs = float(tokens * stack.hidden * number)
    return (stack.layers + 1) * inputs + 2 * layer if recompute else (stack.layers + 1) * layer


def vocabulary_bytes(shape: Shape, tokens: int, number: int, on_gpu: bool) -> float:
    """model/vocab.py: a chunk of float32 logits, their gradient and its copy, and the head's gradient in float32."""
    logits = min(2**27 if on_gpu else 2**24, tokens * shape.vocab)
    head = shape.vocab * shape.text.hidden * (4 + number) if shape.trains_head else 0
    return float(logits * (8 + number) + head)


@dataclass(frozen=True)
class EngineMemory:
    """One GPU of an engine. gb: of the GPU."""

    config: Config
    shape: Shape
    number: int
    gb: float
    placement: Placement

    @property
    def size(self) -> int:
        """GPUs of an engine."""
        given = self.config.rollout.vllm
        servers = self.placement.rollout_servers
        return max(1, len(servers[0].gpus)) if servers else int(given.get("tensor_parallel_size", 1))

    @property
    def token_bytes(self) -> float:
        """Keys and values of one token on one GPU."""
        text, pipeline = self.shape.text, int(self.config.rollout.vllm.get("pipeline_parallel_size", 1))
        heads = max(1, text.kv_heads // max(1, self.size // pipeline))
        return 2 * text.layers / pipeline * heads * text.head_dim * self.number

    @property
    def least_tokens(self) -> int:
        """What the cache has to hold: rollout.vllm.max_model_len, or a completion after a prompt of 4,096 tokens."""
        given = int(self.config.rollout.vllm.get("max_model_len") or -1)
        return given if given > 0 else min(self.shape.max_length, self.config.rollout.max_tokens + 4096)

    def fixed(self) -> dict[str, float]:
        """Weights and working memory. vLLM's own limits of a batch depend on the card and on server or process."""
        given, large, server = self.config.rollout.vllm, self.gb >= 70, not self.placement.colocated
        batched = int(
            given.get("max_num_batched_tokens")
            or (16384 if large else 8192) // (1 if not server else 2 if large else 4)
        )
        sequences = int(given.get("max_num_seqs") or (1024 if large else 256))
        text, vision = self.shape.text, self.shape.vision
        layers = batched * (4 * text.hidden + 3 * text.intermediate / self.size) * self.number
        tower = 0.0
        if vision is not None:
            tower = batched * self.shape.patches * (6 * vision.hidden + 3 * vision.intermediate) * self.number
        logits = 2 * 4.0 * sequences * self.shape.vocab
        graphs = 0.0 if given.get("enforce_eager") else GRAPHS_GB * GIB
        return _gb(
            {
                "weights": self.shape.parameters * self.number / self.size,
                "work": max(layers + logits, tower) + graphs,
            }
        )

    def cache(self, share: float) -> float:
        """GB left for keys and values; at least those of one sequence, without which vLLM does not start."""
        least = self.token_bytes * self.least_tokens / GIB
        return max(least, share * self.gb - sum(self.fixed().values()))

    def tokens(self, share: float) -> int:
        """That the cache holds over all sequences."""
        return int(self.cache(share) * GIB / self.token_bytes) if share else 0


def reference_parts(config: Config, shape: Shape, number: int) -> dict[str, float]:
    """One GPU of a frozen replica: weights, and what one layer and the head's chunk need for a row."""
    tokens = config.packing.token_budget
    layer = tokens * shape.text.saved_numbers(number, singles=4)
    head = vocabulary_bytes(replace(shape, trains_head=False), tokens, number, on_gpu=number == 2)
    weights = shape.parameters * number / config.reference.tensor_parallel
    return _gb({"weights": weights, "work": float(layer + head)})


def sent_bytes(config: Config, shape: Shape, number: int) -> float:
    if config.train.lora and config.rollout.weight_transfer in ("auto", "adapter"):
        return float(shape.trained * number)
    return float(shape.parameters * number)


def _loads(
    config: Config,
    machine: Machine,
    placement: Placement,
    policy: PolicyMemory,
    sampler: EngineMemory,
    reference: Mapping[str, float],
) -> tuple[tuple[Load, ...], float]:
    """The loads, and the engines' share of a GPU."""
    room = machine.gb * (1 - FRAGMENTS)
    on = placement.policy.on_gpu
    beside = _named("reference", {**reference, "context": CONTEXT_GB}) if placement.reference_shares else {}
    own = {"context": CONTEXT_GB} if on else {}
    given = config.rollout.vllm.get("gpu_memory_utilization")
    loads = []
    if placement.colocated:
        held = policy.resting() | own | beside
        left = max(0.0, (room - sum(held.values())) / machine.gb) if machine.gpus else 0.0
        share = float(given or min(SERVER_SHARE, int(100 * left) / 100))
        engine = _named("engine", sampler.fixed() | {"cache": sampler.cache(share)})
        loads.append(_load("policy and engine", placement.policy, "sampling", room, held | engine))
        asleep = {"engine asleep": ASLEEP_GB} if on else _named("engine", sampler.fixed())
        loads.append(
            _load("policy and engine", placement.policy, "update", room, policy.updating() | own | asleep | beside)
        )
    else:
        share = float(given or SERVER_SHARE) if any(d.on_gpu for d in placement.rollout_servers) else 0.0
        loads.append(_load("policy", placement.policy, "update", room, policy.updating() | own | beside))
    for devices in placement.rollout_servers[:1]:
        every = "|".join(map(str, placement.rollout_servers))
        cache = sampler.cache(share) if devices.on_gpu else 1.0
        fixed = sampler.fixed() if devices.on_gpu else {"weights": sampler.fixed()["weights"]}
        parts = fixed | {"cache": cache} | ({"context": CONTEXT_GB} if devices.on_gpu else {})
        loads.append(replace(_load("rollout", devices, "sampling", room, parts), devices=every))
    for devices in placement.reference_replicas[:1] if not placement.reference_shares else ():
        every = "|".join(map(str, placement.reference_replicas))
        parts = dict(reference) | ({"context": CONTEXT_GB} if devices.on_gpu else {})
        loads.append(replace(_load("reference", devices, "scoring", room, parts), devices=every))
    return tuple(loads), share


def _load(group: str, devices: DeviceSet, phase: str, room: float, parts: Mapping[str, float]) -> Load:
    return Load(group, str(devices), phase, room if devices.on_gpu else 0.0, dict(parts))


def _named(owner: str, parts: Mapping[str, float]) -> dict[str, float]:
    return {f"{owner} {name}": gb for name, gb in parts.items()}


def _gb(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: count / GIB for name, count in parts.items()}


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
    """Each single change that makes the plan fit, with what its fullest device holds then; else the first that do together.

    More ranks share more of the state, up to one on each GPU, which then samples in turns; fewer leave GPUs for servers.
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
    plan = plan_dry(config)
    lines = list(plan.lines(config))
    if not plan.fits:
        lines += [
            "it does not fit; what would help:",
            *(f"  {line}" for line in what_helps(config, plan.machine, plan.ranks)),
        ]
    return lines, plan.fits
