"""The speed part of gpu_check.py: one update of as many groups as fill the token budget, in shared rows and as other trainers
do it, every completion behind its own copy of prompt and image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from workload import as_loaded

from lingshu_rl.losses import policy_loss
from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import pack
from lingshu_rl.objective import LossConfig
from lingshu_rl.types import TokenGroup

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "A10": 125, "L4": 121}  # dense bfloat16


@dataclass(frozen=True)
class Shape:
    """A model in Qwen2.5-VL's form, and one workload. image_side: image tokens along a side of the square image.

    vision: hidden size and layers of the tower. budget: tokens of a forward. oracle: also one row a completion.
    """

    vocabulary: int
    hidden: int
    wide: int
    layers: int
    heads: int
    kv_heads: int
    vision: tuple[int, int]
    image_side: int = 32
    text: int = 128
    completion: int = 128
    budget: int = 16_384
    group_sizes: tuple[int, ...] = (8, 16)
    oracle: bool = False
    checkpointing: bool = False


SHAPES = {  # widths of Qwen2.5-VL's 3B and 7B; 1,024 image and 128 text tokens, then 128 of completion
    "0.75B": Shape(151_936, 1024, 4096, 28, 16, 4, (768, 16), oracle=True),
    "3B": Shape(151_936, 2048, 11_008, 36, 16, 2, (1280, 32), checkpointing=True),
    "7B": Shape(152_064, 3584, 18_944, 28, 28, 4, (1280, 32), group_sizes=(8,), checkpointing=True),
}
TINY = Shape(512, 128, 512, 2, 2, 1, (64, 2), 6, 12, 12, budget=256, group_sizes=(4,), oracle=True)


def qwen(shape: Shape, device: str) -> tuple[Any, int]:
    """A random model in bfloat16 with a tied head, in train mode, and its image token's id.

    The vision tower attends in full: transformers' SDPA runs a window at a time, which would slow padded copies more.
    """
    image = shape.vocabulary - 1
    vision, depth = shape.vision
    head = shape.hidden // shape.heads
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": shape.wide,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16]},
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32_768,
        },
        vision_config={
            "depth": depth, "hidden_size": vision, "intermediate_size": 4 * vision, "num_heads": vision // 64,
            "out_hidden_size": shape.hidden, "fullatt_block_indexes": list(range(depth)),
        },
        image_token_id=image, video_token_id=image - 1, vision_start_token_id=image - 2, vision_end_token_id=image - 3,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    if shape.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).train(), image


def workload(shape: Shape, size: int, image: int, seed: int) -> TokenGroup:
    """One group of equal completions, so that a padded batch has no padding."""
    generator = torch.Generator().manual_seed(1000 * seed + size)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, shape.vocabulary - 8, (count,), generator=generator).tolist())

    side = 2 * shape.image_side
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, generator=generator)
    prompt = (image - 2, *[image] * shape.image_side**2, image - 3, *words(shape.text - 2))
    vision = {"pixel_values": pixels.bfloat16(), "image_grid_thw": torch.tensor([[1, side, side]])}
    return TokenGroup(str(seed), prompt, tuple(words(shape.completion) for _ in range(size)), vision)


def filling(shape: Shape, size: int, image: int) -> list[TokenGroup]:
    """As many groups as fill one shared row."""
    tokens = shape.image_side**2 + shape.text + size * (shape.completion - 1)
    return [workload(shape, size, image, seed) for seed in range(max(1, shape.budget // tokens))]


@contextmanager
def memory(device: str) -> Iterator[dict[str, float]]:
    """Yields a dict whose "mb" is set on leaving: peak above the level on entry, in MiB (0 on a CPU)."""
    result = {"mb": 0.0}
    if device == "cpu":
        yield result
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield result
    torch.cuda.synchronize()
    result["mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20


def by_rows(
    model: Any, groups: list[TokenGroup], advantages: Tensor, budget: int, layout: str, attention: str
) -> Tensor:
    """Our update: packing, log-probs, entropy, loss, backward. Returns the loss. advantages: (groups, members)."""
    tokens = sum(len(c) for g in groups for c in g.completions)
    total = torch.zeros(())
    for row in pack(groups, model, budget, layout):
        scores = completion_logprobs(model, row, entropy=True, attention=attention)
        device = scores.logprobs_T.device
        loss, _ = policy_loss(
            scores.logprobs_T, sequence_T=row.sequence_T.to(device), config=LossConfig(variant="dapo"),
            advantages=torch.stack([advantages[g, m] for g, m, _ in row.members]).to(device),
            total_tokens=tokens, total_sequences=advantages.numel(), max_tokens=tokens, entropy_T=scores.entropy_T,
        )  # fmt: skip
        loss.backward()
        total = total + loss.detach().cpu()
    return total


def by_batch(model: Any, groups: list[TokenGroup], advantages: Tensor, at_once: int) -> Tensor:
    """The usual update: every completion behind its own copy of prompt and image, `at_once` of them a forward."""
    device = next(model.parameters()).device
    samples = [(g, c) for g in groups for c in g.completions]
    prompt, tokens = len(groups[0].prompt_ids), sum(len(c) for _, c in samples)
    total = torch.zeros(())
    as_loaded(model)
    for start in range(0, len(samples), at_once):
        part = samples[start : start + at_once]
        ids_BS = torch.tensor([g.prompt_ids + c for g, c in part], device=device)
        logits_BTV = model(
            input_ids=ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            mm_token_type_ids=(ids_BS == model.config.image_token_id).long(),
            **{name: torch.cat([g.vision[name] for g, _ in part]).to(device) for name in part[0][0].vision},
            logits_to_keep=ids_BS.shape[1] - prompt + 1,
            use_cache=False,
        ).logits[:, :-1]
        # One sequence at a time, as careful trainers do, so that the float32 copy stays small.
        logps_BT = torch.stack(
            [z.float().log_softmax(-1).gather(1, t[:, None])[:, 0] for z, t in zip(logits_BTV, ids_BS[:, prompt:], strict=True)]
        )  # fmt: skip
        ratio_BT = torch.exp(logps_BT - logps_BT.detach())
        advantages_B = advantages.flatten()[start : start + at_once].to(device)
        loss = -(torch.min(ratio_BT, ratio_BT.clamp(0.8, 1.2)) * advantages_B[:, None]).sum() / tokens
        loss.backward()
        total = total + loss.detach().cpu()
    return total


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two whole gradients over the norm of the second."""
    assert a.keys() == b.keys()
    difference = sum(float((a[n] - b[n]).double().square().sum()) for n in b)
    return (difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5


def speed(device: str, tiny: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """A point for each model that fits and each group size."""
    for name, shape in {"tiny": TINY}.items() if tiny else SHAPES.items():
        text, (vision, depth) = shape.hidden, shape.vision
        parameters = (
            shape.vocabulary * text + shape.layers * text * (3 * shape.wide + 2.5 * text) + 12 * depth * vision**2
        )
        room = 4 * parameters + 8 * 2**30  # weights and gradients in bfloat16, and what a forward keeps
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else room
        if room > free:
            yield {"model": name, "skipped": f"needs about {room / 2**30:.0f} GiB, {free / 2**30:.0f} are free"}
            continue
        model, image = qwen(shape, device)
        for size in shape.group_sizes:
            yield {"model": name, **speed_point(model, shape, filling(shape, size, image), device, repeats)}
        del model


def speed_point(model: Any, shape: Shape, groups: list[TokenGroup], device: str, repeats: int) -> dict[str, Any]:
    """Log-probs, policy loss and backward of the same groups, each way: the first time, memory, arithmetic, then in turns."""
    size, prompt = len(groups[0].completions), len(groups[0].prompt_ids)
    advantages = torch.randn(len(groups), size, generator=torch.Generator().manual_seed(0))
    work = partial(by_rows, model, groups, advantages, shape.budget)
    ways: dict[str, Callable[[], Tensor]] = {"shared_sdpa": partial(work, "shared", "sdpa")}
    if device == "cuda":
        ways["shared_flex"] = partial(work, "shared", "flex")
    full = max(1, shape.budget // (prompt + shape.completion))
    for at_once in (full, max(1, full // 4)):  # copies of the prompt take more memory than one of it
        ways[f"padded_{at_once}"] = partial(by_batch, model, groups, advantages, at_once)
    if shape.oracle:
        ways["dense_rows"] = partial(work, "dense", "sdpa")
    results: dict[str, dict[str, Any]] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for name, way in list(ways.items()):
        try:
            first = seconds(model, way)
            model.zero_grad()
            with memory(device) as peak, FlopCounterMode(display=False) as counter:
                loss = float(way())
            gradients[name] = {
                n: p.grad.detach().float().cpu() for n, p in model.named_parameters() if "layers.0." in n
            }
            flops = counter.get_total_flops()
            results[name] = {"loss": loss, "peak_mb": peak["mb"], "tflop": flops / 1e12, "first_s": first, "all_s": []}
        except Exception as error:  # out of memory, a kernel that does not compile: the others still count
            results[name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
            del ways[name]
            model.zero_grad()
    for _ in range(repeats):
        for name, way in ways.items():
            results[name]["all_s"].append(seconds(model, way))
    oracle = gradients.get("dense_rows") or next((gradients[n] for n in gradients if n.startswith("padded")), None)
    for name in ways:
        result = results[name]
        result["seconds"] = statistics.median(result["all_s"])
        result["mfu"] = utilisation(result["tflop"], result["seconds"], device)
        result["gradient_gap"] = distance(gradients[name], oracle) if oracle else None
    ours, padded = (
        min((results[n]["seconds"] for n in ways if n.startswith(kind)), default=None) for kind in ("shared", "padded")
    )
    row = pack(groups, model, shape.budget)[0]
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "prompts": len(groups), "prompt_tokens": prompt,
        "completion_tokens": shape.completion, "group_size": size, "budget": shape.budget, "row_tokens": row.tokens,
        "token_ratio": len(groups) * size * (prompt + shape.completion) / row.tokens,
        "speedup": padded / ours if ours and padded else None, "ways": results,
    }  # fmt: skip


def seconds(model: Any, work: Callable[[], Any]) -> float:
    model.zero_grad()
    wait = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def utilisation(tflop: float, spent_s: float, device: str) -> float | None:
    """Arithmetic that was done over what the card could have done; None for a card that is not in the table.

    torch's counter does not see into flex attention, whose own share is missing there.
    """
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in card), None)
    return tflop / spent_s / peak if peak else None
