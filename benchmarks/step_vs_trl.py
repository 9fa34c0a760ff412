"""One whole GRPO step against TRL's on the same machine: rollout, reward, reference, update, weights into the sampler.

    python benchmarks/step_vs_trl.py --out benchmarks/baselines/step_vs_trl.json

Both train the same random Qwen2.5-VL on the same questions and images, with the same number of prompts, completions and
tokens a completion. Ours: vLLM server, reference process, DeepSpeed, as `accelerate launch` runs them. TRL: GRPOTrainer in
the only mode that works for it on a CPU, generation by transformers (use_vllm=True refuses or fails there), float32, without
gradient checkpointing. Figures are those of the fastest step after the first; `*_all_s` holds every one of them. Writes a
plot beside the JSON. About 3 minutes on two cores; `--quick` takes two steps of two prompts, to see that it works.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workload import write

from rewards import Reward, RewardInput, RewardResult

COMPLETION, IMAGE_PIXELS = 24, 336  # tokens; 336 x 336 pixels are 144 image tokens
PHASES = ("rollout", "reward", "reference", "update", "weight_sync")


class LengthReward(Reward):
    """Differs between completions of a random policy, so that every group has something to learn on both sides."""

    name = "length"

    def score(self, sample: RewardInput) -> RewardResult:
        return RewardResult(len(set(sample.completion)) % 17 / 16)


def make_model(folder: Path) -> int:
    """A random Qwen2.5-VL of some 9 M parameters with the demo's tokenizer; returns its parameter count."""
    import torch
    from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

    from lingshu_rl.model.loading import model_path

    config = AutoConfig.from_pretrained(model_path("demo"))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 1024, 6
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 4, 2, None
    text.max_position_embeddings = 1024
    text.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 4, 160, 320, 5
    vision.out_hidden_size, vision.fullatt_block_indexes = 256, [3]
    config = type(config)(**config.to_dict())
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(model_path("demo"))
    processor.image_processor.size = {"shortest_edge": IMAGE_PIXELS**2, "longest_edge": IMAGE_PIXELS**2}
    processor.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_data(folder: Path, rows: int) -> Path:
    """The demo's option questions, asked at length so that the text is about 60 tokens."""
    from lingshu_rl.demo.build import build_demo

    source = build_demo()
    kept = [
        row for row in map(json.loads, (source / "train.jsonl").read_text().splitlines()) if row["kind"] == "option"
    ]
    for row in kept:
        row["question"] = "Look at the image. " * 6 + row["question"]
        row["images"] = [str(source / name) for name in row["images"]]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in kept[:rows]))
    return file


def ours(model: Path, data: Path, run_dir: Path, *, prompts: int, group: int, steps: int) -> dict[str, Any]:
    from lingshu_rl.planning.given import load_config
    from lingshu_rl.train import train

    settings = [
        f"model={model}", f"data.train={data}", "data.test=demo:test", "data.instruction=short", f"run.dir={run_dir}",
        f"train.steps={steps}", f"train.prompts_per_step={prompts}", f"train.group_size={group}", "train.lr=1e-6",
        f"rollout.max_tokens={COMPLETION}", "eval.limit=1", "eval.controls=[]", "checkpoint.every=0", "run.trackers=[]",
        "rewards.preflight=false", "rewards.spec={class: 'step_vs_trl:LengthReward'}",
    ]  # fmt: skip
    asyncio.run(train(load_config(None, settings)))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    fastest = min(rows, key=lambda row: row["time/step"])
    phases = {name: fastest[f"time/{name}"] for name in PHASES}
    return {"all_s": [r["time/step"] for r in rows], "phases": phases,
            "tokens": statistics.median(r["tokens/generated"] for r in rows)}  # fmt: skip


def trl(model: Path, data: Path, *, prompts: int, group: int, steps: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lingshu_rl.data.load import load
    from rewards.adapters import to_trl

    asked = load(data, instruction="short").prompts
    rows = [{"prompt": [{"role": "user", "content": p.text}], "image": p.images[0].pixels(), "kind": p.kind,
             "answer": p.gold, "options": list(p.options)} for p in asked]  # fmt: skip
    seconds: dict[str, list[float]] = {"step": [], "rollout": [], "reference": [], "reward": []}
    tokens: list[float] = []

    class Timed(GRPOTrainer):
        """Adds up what each part of a step takes; the rest of the step is the update."""

        def _timed(self, name: str, call: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = call(*args, **kwargs)
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began
            return out

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            return self._timed("rollout", super()._generate, *args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            return self._timed("reward", super()._calculate_rewards, *args, **kwargs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            import torch

            name = "update" if torch.is_grad_enabled() else "reference"
            return self._timed(name, super()._get_per_token_logps_and_entropies, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began, trainer.spent = time.perf_counter(), {}

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds["step"].append(time.perf_counter() - self.began)
            for name in ("rollout", "reference", "reward"):
                seconds[name].append(trainer.spent.get(name, 0.0))

    processor = AutoProcessor.from_pretrained(model)
    config = Qwen2_5_VLForConditionalGeneration.from_pretrained(model).config
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, use_vllm=False, beta=1e-3,
        num_generations=group, per_device_train_batch_size=group * prompts, gradient_accumulation_steps=1, max_steps=steps,
        max_completion_length=COMPLETION, learning_rate=1e-6, report_to=[], disable_tqdm=True, save_strategy="no",
        generation_kwargs={"suppress_tokens": [config.image_token_id, config.video_token_id]}, seed=0,
    )  # fmt: skip
    trainer = Timed(model=str(model), reward_funcs=to_trl(LengthReward()), args=arguments, train_dataset=Dataset.from_list(rows),
                    processing_class=processor, callbacks=[Clock()])  # fmt: skip
    trainer.spent = {}
    trainer.train()
    tokens = [
        entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry
    ]
    fastest = min(range(1, len(seconds["step"])), key=lambda i: seconds["step"][i])
    phases = {name: values[fastest] for name, values in seconds.items() if name != "step"}
    phases["update"] = seconds["step"][fastest] - sum(phases.values())
    return {
        "all_s": seconds["step"][1:],
        "phases": phases,
        "tokens": (statistics.median(tokens) if tokens else COMPLETION) * group * prompts,
    }


def plot(point: dict[str, Any], path: Path) -> None:
    """A bar of phases for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 2.6), layout="constrained")
    left = {"ours": 0.0, "trl": 0.0}
    for name in PHASES:
        widths = {who: point["seconds_by_phase"][who].get(name, 0.0) for who in left}
        panel.barh(["lingshu-rl", "TRL"], widths.values(), left=list(left.values()), label=name.replace("_", " "))
        left = {who: left[who] + widths[who] for who in left}
    panel.invert_yaxis()
    panel.set(
        xlabel="seconds a step", title=f"one step of {point['prompts']} prompts x {point['group_size']} completions"
    )
    panel.legend(ncols=len(PHASES), fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; a PNG goes beside it")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="the first is not counted")
    parser.add_argument("--quick", action="store_true", help="two steps of two prompts x two completions")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.group, args.steps = 2, 2, 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_model(folder / "model")
        data = make_data(folder, rows=64)
        size = {"prompts": args.prompts, "group": args.group, "steps": args.steps}
        mine = ours(folder / "model", data, folder / "run", **size)
        theirs = trl(folder / "model", data, **size)
        prompt_tokens = prompt_length(folder / "model", data)
    ours_s, trl_s = min(mine["all_s"]), min(theirs["all_s"])
    point = {
        "prompt_tokens": prompt_tokens, "completion_tokens": COMPLETION, "group_size": args.group, "parameters": parameters,
        "prompts": args.prompts, "ours_s": ours_s, "trl_s": trl_s, "speedup": trl_s / ours_s,
        "speedup_median": statistics.median(theirs["all_s"]) / statistics.median(mine["all_s"]),
        "ours_tokens": mine["tokens"], "trl_tokens": theirs["tokens"],
        "seconds_by_phase": {"ours": mine["phases"], "trl": theirs["phases"]},
        "ours_all_s": mine["all_s"], "trl_all_s": theirs["all_s"],
        "trl_setting": "GRPOTrainer, generation by transformers (use_vllm=False), float32, no gradient checkpointing, beta=1e-3",
    }  # fmt: skip
    print(f"whole step: ours {ours_s:.2f} s, TRL {trl_s:.2f} s: {point['speedup']:.1f}x")
    for name in PHASES:
        print(
            f"  {name:12s} ours {mine['phases'].get(name, 0.0):7.3f} s   TRL {theirs['phases'].get(name, 0.0):7.3f} s"
        )
    write(args.out, [point])
    plot(point, args.out.with_suffix(".png"))


def prompt_length(model: Path, data: Path) -> int:
    from lingshu_rl.data.load import load
    from lingshu_rl.model.encoder import PromptEncoder

    return len(PromptEncoder(str(model)).encode(load(data, instruction="short").prompts[0])[0])


if __name__ == "__main__":
    main()
