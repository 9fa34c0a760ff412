"""Bytes that one rank, engine or reference replica needs: arithmetic on a model's shape and the settings.

Sources of the formulas stand beside them; tests/planning/test_plan.py measures what a CPU can: parameters, gradients
and optimiser state to the byte, activations, and the peak once measured on an H100. GB are 2^30 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lingshu_rl.config import Config
from lingshu_rl.model import quantized
from lingshu_rl.model.optimizers import OPTIMIZERS
from lingshu_rl.model.shape import Shape, Stack
from lingshu_rl.processes.placement import GIB, Placement

STEP_WORK = 4.0  # bytes a trained parameter that an optimiser takes in a step: torch's AdamW over lists takes a root
MASTER = 4.0  # float32 copy of the trained weights that DeepSpeed steps on
GRAPHS_GB = 1.0  # CUDA graphs of an engine that is awake
IMAGE_SHARE = 0.5  # assumed share of image tokens in a packed row


LEAST_ROW = {
    True: 8192,
    False: 4096,
}  # tokens of a row, on a GPU and on a CPU, where packing.token_budget is left to the run


def row_tokens(config: Config, on_gpu: bool) -> int:
    """packing.token_budget; where it is left to the run, the least that `plan.with_budget` chooses."""
    return config.packing.token_budget or LEAST_ROW[on_gpu]


def number_bytes(config: Config, on_gpu: bool) -> int:
    return 2 if config.train.computes_in(on_gpu) == "bfloat16" else 4


def zero_settings(config: Config, ranks: int, on_gpu: bool) -> dict[str, Any]:
    """The run's ZeRO settings. One rank in float32 has nothing to divide: stages 1 and 2 would hold every weight twice
    and copy every gradient four times. It gets stage 0, unless the optimiser is offloaded."""
    zero = dict(config.deepspeed.get("zero_optimization") or {})
    alone = ranks == 1 and number_bytes(config, on_gpu) == 4 and "offload_optimizer" not in zero
    return {**zero, "stage": 0} if alone and zero.get("stage") in (1, 2) else zero


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
        return zero_settings(self.config, self.ranks, self.on_gpu)

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
        whole = min(frozen, 2 * self.shape.largest) if self.config.train.quantize else frozen  # embedding and head stay
        return (self.shape.trained + whole) * self.number + (frozen - whole) * quantized.BYTES

    @property
    def state_bytes(self) -> float:
        """Of the optimiser on the device, for each trained parameter; pages count as the host's."""
        optimizer = OPTIMIZERS[self.config.train.optimizer]
        return 0.0 if optimizer.in_pages else optimizer.state_bytes

    @property
    def optimizer_bytes(self) -> float:
        """Master weights and state of this rank, wherever they lie."""
        master = MASTER if self.stage else 0.0
        return self.shape.trained * (master + self.state_bytes) * self.share(1)

    @property
    def gradient_number(self) -> int:
        """Bytes of a gradient's number where rows add up, float32 unless the run's own keys say otherwise."""
        wide = (self.config.deepspeed.get("data_types") or {}).get("grad_accum_dtype", "fp32") == "fp32"
        return 4 if wide else self.number

    @property
    def gradient_bytes(self) -> float:
        """What stays between backward passes, in DeepSpeed's data_types.grad_accum_dtype."""
        return self.shape.trained * self.gradient_number * self.share(2)

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
        return in_gb(parts)

    def updating(self) -> dict[str, float]:
        """At the larger of two peaks: the backward pass, and the step, when activations are gone.

        In the step the gradients are put together in their dtype, then in float32, and the optimiser works on them
        (stages 1 and 2: all of the rank's at once; stage 3: sub_group_size of them).
        """
        stepped = self.shape.trained * self.share(1)
        if self.stage == 3:
            stepped = min(stepped, int(self.zero.get("sub_group_size", 1e9)))
        again = 0.0 if self.gradient_number == 4 and self.stage < 3 else 4.0
        wide = (again + STEP_WORK) * stepped
        flat = self.gradient_number * self.shape.trained * self.share(1) if self.stage in (1, 2) else 0.0
        step = 0.0 if self.offloads("optimizer") else wide + flat
        backward = {"gathered": self._gathered(), **self.activations()}
        fixed = self.resting() | in_gb(self._gradients())
        peaks = [in_gb(backward), in_gb({"step": step})]
        return fixed | max(peaks, key=lambda parts: sum(parts.values()))

    def _gradients(self) -> dict[str, float]:
        """Gradients, and the buffers in which they are reduced (two when communication overlaps, stage 3's default)."""
        buffers = 0 if not self.stage else 2 if self.zero.get("overlap_comm", self.stage == 3) else 1
        bucket = int(self.zero.get("reduce_bucket_size", 5e8)) * self.number * buffers
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
        tokens = row_tokens(self.config, self.on_gpu)
        recompute = self.config.train.recomputes(self.on_gpu)
        kept = _kept(self.shape.text, tokens, self.number, recompute)
        if self.shape.vision is not None and self.shape.trains_vision:
            patches = int(tokens * IMAGE_SHARE) * self.shape.patches
            kept += _kept(self.shape.vision, patches, self.number, recompute)
        return {"activations": kept, "vocabulary": vocabulary_bytes(self.shape, tokens, self.number, self.on_gpu)}


def _kept(stack: Stack, tokens: int, number: int, recompute: bool) -> float:
    """Of all layers, or of the one being computed again plus every layer's input; and one layer's gradients in
    flight."""
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
        return in_gb(
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


def reference_parts(config: Config, shape: Shape, number: int, on_gpu: bool) -> dict[str, float]:
    """One GPU of a frozen replica: weights, and what one layer and the head's chunk need for a row."""
    tokens = row_tokens(config, on_gpu)
    layer = tokens * shape.text.saved_numbers(number, singles=4)
    head = vocabulary_bytes(replace(shape, trains_head=False), tokens, number, on_gpu)
    weights = shape.parameters * number / config.reference.tensor_parallel
    return in_gb({"weights": weights, "work": float(layer + head)})


def sent_bytes(config: Config, shape: Shape, number: int) -> float:
    if config.train.lora and config.rollout.weight_transfer in ("auto", "adapter"):
        return float(shape.trained * number)
    return float(shape.parameters * number)


def in_gb(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: count / GIB for name, count in parts.items()}
