"""What only a GPU can show: shared rows exact on CUDA, and how fast. Needs torch, transformers and this checkout alone.

    python benchmarks/gpu_check.py --out gpu_check.json                  # one CUDA device, about a minute
    python benchmarks/gpu_check.py --device cpu --tiny --out /tmp/x.json # the same code on a CPU, without flex

`exactness`: small models of every family, log-probs and gradients of shared rows (SDPA blocks, flex block masks) against
unshared rows in float32, and in bfloat16 beside what bfloat16 itself costs. `speed`: log-probs, policy loss and backward of
a random Qwen2.5-VL in bfloat16, shared rows against the usual batch of G padded copies (one forward, images G times, as
other trainers do it) and against one row a completion; medians over interleaved repeats, peak memory above the weights.
The vision tower attends in full, because transformers' SDPA runs a window at a time, which would slow the copies more.
Every part is guarded: one that fails leaves its error in the JSON, the rest is still run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from tiny_models import TEXT_FAMILIES, VISION_FAMILIES, build, group
from torch import Tensor
from workload import as_loaded

from lingshu_rl.losses import policy_loss
from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import PackedRow, pack
from lingshu_rl.objective import LossConfig
from lingshu_rl.types import TokenGroup

EXACT = 1e-4  # float32: nats, and relative for gradients
FLEX_FAMILIES = ("qwen2_5_vl", "gemma3")  # each is compiled: a plain causal one, and one with windows and image blocks


def log(message: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {message}", file=sys.stderr, flush=True)


START = time.perf_counter()


# Exactness ------------------------------------------------------------------------------------------------------------


def ragged_groups(family: str) -> list[TokenGroup]:
    """Ragged prompts and completions, one image, two images, and a prompt without any."""
    images = family in VISION_FAMILIES
    return [
        group(family, "one image", [7, 1, 12, 30], images=1 if images else 0),
        group(family, "two images", [5, 9, 40], images=2 if images else 0, text=90),
        group(family, "text", [4, 4], text=5),
    ]


def scored(model: Any, rows: list[PackedRow], weights: list[list[Tensor]], attention: str) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """All log-probs in the order of the groups, and the gradients of their weighted sum."""
    model.zero_grad()
    found: dict[tuple[int, int], Tensor] = {}
    for row in rows:
        logprobs_T = completion_logprobs(model, row, attention=attention, entropy=True).logprobs_T
        parts = logprobs_T.split([n for *_, n in row.members])
        total = torch.zeros((), device=logprobs_T.device)
        for (g, m, _), part in zip(row.members, parts, strict=True):
            found[g, m] = part.detach().float().cpu()
            total = total + (part * weights[g][m].to(part.device)).sum()
        total.backward()
    gradients = {name: p.grad.detach().float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat([found[key] for key in sorted(found)]), gradients


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two whole gradients over the norm of the second."""
    assert a.keys() == b.keys()
    difference = sum(float((a[n] - b[n]).double().square().sum()) for n in b)
    return (difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5


def exactness(family: str, device: str, backend: str) -> Iterator[dict[str, Any]]:
    """Shared rows in float32 and bfloat16 against unshared rows of the same dtype, and those against float32."""
    torch.manual_seed(0)
    model = build(family).to(device)
    groups = ragged_groups(family)
    weights = [[torch.randn(len(c)) for c in g.completions] for g in groups]
    truth, true_gradients = scored(model, pack(groups, model, 1, "dense"), weights, "sdpa")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        name = str(dtype).removeprefix("torch.")
        own, own_gradients = scored(as_loaded(model), pack(groups, model, 1, "dense"), weights, "sdpa")
        cost = (own - truth).abs()
        logprobs, gradients = scored(model, pack(groups, model, 1024), weights, backend)
        gap = (logprobs - own).abs()
        point = {
            "family": family, "dtype": name, "attention": backend,
            "logprob_gap_max": float(gap.max()), "logprob_gap_mean": float(gap.mean()),
            "gradient_gap": distance(gradients, own_gradients),
            "dtype_gap_mean": float(cost.mean()), "dtype_gradient_gap": distance(own_gradients, true_gradients),
        }  # fmt: skip
        if name == "float32":
            point["ok"] = max(point["logprob_gap_max"], point["gradient_gap"]) < EXACT
        else:  # sharing may not cost more than rounding does
            near = point["logprob_gap_mean"] < max(point["dtype_gap_mean"], 0.005)
            point["ok"] = near and point["gradient_gap"] < max(2 * point["dtype_gradient_gap"], 0.05)
        yield point


# Speed ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One workload and the model it runs on. image_side: image tokens along a side of the square image."""

    vocabulary: int
    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int
    image_side: int
    text: int
    completion: int
    group_sizes: tuple[int, ...]


LARGE = Shape(151_936, 1024, 28, 768, 16, 32, 128, 128, (8, 16))  # 0.6 B; 1024 image + 128 text tokens
TINY = Shape(512, 128, 2, 64, 2, 6, 12, 12, (4,))


def qwen(shape: Shape, device: str) -> tuple[Any, int]:
    """A random Qwen2.5-VL in bfloat16 with a tied head, in train mode, and its image token's id."""
    image = shape.vocabulary - 1
    heads = shape.hidden // 64
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": 4 * shape.hidden,
            "num_hidden_layers": shape.layers, "num_attention_heads": heads, "num_key_value_heads": max(heads // 4, 1),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        vision_config={
            "depth": shape.vision_layers, "hidden_size": shape.vision_hidden, "intermediate_size": 4 * shape.vision_hidden,
            "num_heads": shape.vision_hidden // 64, "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(range(shape.vision_layers)),
        },
        image_token_id=image, video_token_id=image - 1, vision_start_token_id=image - 2, vision_end_token_id=image - 3,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return model.to(device, torch.bfloat16).train(), image


def workload(shape: Shape, size: int, image: int) -> tuple[TokenGroup, list[float]]:
    """One group of equal completions, so that the padded batch has no padding, and its advantages."""
    generator = torch.Generator().manual_seed(size)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, shape.vocabulary - 8, (count,), generator=generator).tolist())

    side = 2 * shape.image_side
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, generator=generator)
    prompt = (image - 2, *[image] * shape.image_side**2, image - 3, *words(shape.text - 2))
    vision = {"pixel_values": pixels.bfloat16(), "image_grid_thw": torch.tensor([[1, side, side]])}
    group_ = TokenGroup("0", prompt, tuple(words(shape.completion) for _ in range(size)), vision)
    return group_, torch.randn(size, generator=generator).tolist()


def by_rows(model: Any, group_: TokenGroup, advantages: list[float], layout: str, attention: str) -> Tensor:
    """Our update of one group: packing, log-probs, entropy, loss, backward. Returns the loss."""
    tokens = sum(map(len, group_.completions))
    total = 0.0
    for row in pack([group_], model, 1 << 20, layout):
        scores = completion_logprobs(model, row, entropy=True, attention=attention)
        device = scores.logprobs_T.device
        loss, _ = policy_loss(
            scores.logprobs_T, sequence_T=row.sequence_T.to(device), config=LossConfig(variant="dapo"),
            advantages=torch.tensor([advantages[m] for _, m, _ in row.members], device=device),
            total_tokens=tokens, total_sequences=len(group_.completions), max_tokens=tokens, entropy_T=scores.entropy_T,
        )  # fmt: skip
        loss.backward()
        total = total + loss.detach()
    return torch.as_tensor(total)


def by_batch(model: Any, group_: TokenGroup, advantages: list[float], at_once: int) -> Tensor:
    """The usual update: every completion behind its own copy of prompt and image, `at_once` of them a forward."""
    device = next(model.parameters()).device
    size, prompt = len(group_.completions), len(group_.prompt_ids)
    ids_BS = torch.tensor([group_.prompt_ids + c for c in group_.completions], device=device)
    tokens = ids_BS[:, prompt:].numel()
    total = torch.zeros((), device=device)
    as_loaded(model)
    for start in range(0, size, at_once):
        part_BS = ids_BS[start : start + at_once]
        copies = len(part_BS)
        logits_BTV = model(
            input_ids=part_BS,
            attention_mask=torch.ones_like(part_BS),
            mm_token_type_ids=(part_BS == model.config.image_token_id).long(),
            pixel_values=group_.vision["pixel_values"].to(device).repeat(copies, 1),
            image_grid_thw=group_.vision["image_grid_thw"].to(device).repeat(copies, 1),
            logits_to_keep=part_BS.shape[1] - prompt + 1,
            use_cache=False,
        ).logits[:, :-1]
        # One sequence at a time, as careful trainers do, so that the float32 copy stays small.
        logps_BT = torch.stack(
            [z.float().log_softmax(-1).gather(1, t[:, None])[:, 0] for z, t in zip(logits_BTV, part_BS[:, prompt:], strict=True)]
        )  # fmt: skip
        ratio_BT = torch.exp(logps_BT - logps_BT.detach())
        advantages_B = torch.tensor(advantages[start : start + copies], device=device)
        loss = -(torch.min(ratio_BT, ratio_BT.clamp(0.8, 1.2)) * advantages_B[:, None]).sum() / tokens
        loss.backward()
        total += loss.detach()
    return total


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


def speed(shape: Shape, device: str, repeats: int, attentions: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    model, image = qwen(shape, device)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"model of {parameters / 1e6:.0f} M parameters")

    def seconds(work: Callable[[], Any]) -> float:
        model.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for size in shape.group_sizes:
        group_, advantages = workload(shape, size, image)
        ways: dict[str, Callable[[], Tensor]] = {
            f"shared_{a}": partial(by_rows, model, group_, advantages, "shared", a) for a in attentions
        }
        ways["dense_rows"] = partial(by_rows, model, group_, advantages, "dense", "sdpa")
        for at_once in sorted({4, size}):
            ways[f"batch_of_{at_once}"] = partial(by_batch, model, group_, advantages, at_once)
        results: dict[str, dict[str, Any]] = {}
        gradients: dict[str, dict[str, Tensor]] = {}
        for name in list(ways):
            try:
                first = seconds(ways[name])
                model.zero_grad()
                with memory(device) as peak:
                    loss = float(ways[name]())
                kept = {n: p.grad.detach().float().cpu() for n, p in model.named_parameters() if "layers.0." in n}
                gradients[name] = kept
                results[name] = {"loss": loss, "peak_mb": peak["mb"], "first_s": first, "all_s": []}
            except Exception as error:  # out of memory, a kernel that does not compile: the others still count
                results[name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
                del ways[name]
                model.zero_grad()
                if device != "cpu":
                    torch.cuda.empty_cache()
        for _ in range(repeats):
            for name, way in ways.items():
                results[name]["all_s"].append(seconds(way))
        for name in ways:
            results[name]["seconds"] = statistics.median(results[name]["all_s"])
            if "dense_rows" in gradients:
                results[name]["gradient_gap_to_dense_rows"] = distance(gradients[name], gradients["dense_rows"])
        batches = [r["seconds"] for n, r in results.items() if n.startswith("batch") and "seconds" in r]
        prompt, row = len(group_.prompt_ids), pack([group_], model, 1 << 20)[0]
        ours = [(r["seconds"], n) for n, r in results.items() if n.startswith("shared") and "seconds" in r]
        yield {
            "prompt_tokens": prompt, "image_tokens": shape.image_side**2, "completion_tokens": shape.completion,
            "group_size": size, "parameters": parameters, "dtype": "bfloat16",
            "token_ratio": size * (prompt + shape.completion) / row.tokens,
            "ours_s": min(ours)[0] if ours else None, "ours_setting": min(ours)[1] if ours else None,
            "batch_s": min(batches, default=None),
            "speedup": min(batches) / min(ours)[0] if ours and batches else None,
            "ways": results,
        }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a model and a workload that a CPU runs in seconds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["exactness", "speed", "flex"], help="one part alone")
    parser.add_argument("--out", type=Path, help="JSON to write, after every point; it is printed in any case")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 gaps must show float32 arithmetic
    cuda = options.device != "cpu"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]},
        "exactness": [], "speed": [], "errors": [],
    }  # fmt: skip

    def collect(part: str, work: Iterator[dict[str, Any]]) -> None:
        try:
            for point in work:
                found[part].append(point)
                log(f"{part}: {json.dumps({k: v for k, v in point.items() if k != 'ways'})}")
                if not point.get("ok", True):
                    found["errors"].append(f"not exact: {point}")
        except Exception:
            found["errors"].append(f"{part}: {traceback.format_exc(limit=-4)}")
            log(found["errors"][-1])
        found["seconds"] = round(time.perf_counter() - START, 1)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")

    # What matters most comes first: flex compiles a kernel for every family, dtype and direction.
    if options.only in (None, "exactness"):
        for family in (*VISION_FAMILIES, *TEXT_FAMILIES):
            collect("exactness", exactness(family, options.device, "sdpa"))
    if options.only in (None, "speed"):
        shape = TINY if options.tiny else LARGE
        collect("speed", speed(shape, options.device, options.repeats, ("sdpa", "flex") if cuda else ("sdpa",)))
    if options.only in (None, "flex") and cuda:
        for family in FLEX_FAMILIES:
            collect("exactness", exactness(family, options.device, "flex"))
    print(json.dumps(found, indent=1))
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
