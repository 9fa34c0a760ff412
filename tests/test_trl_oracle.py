"""TRL's own loss on the same model and the same tokens: equal loss, equal gradient, through shared rows."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from test_families import gradient_gap
from tiny_models import IMAGE, VISION_FAMILIES, build, group
from torch import Tensor

from lingshu_rl.losses import policy_loss
from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import pack
from lingshu_rl.objective import LossConfig
from lingshu_rl.types import TokenGroup

PAD, EOS, MAX_TOKENS = 0, 2, 12
ADVANTAGES = [[1.1, -0.6, 0.4], [-1.3, 0.9, 0.2]]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llama"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model inside TRL's trainer, two groups of ragged completions, made-up old, rollout and reference log-probs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    family = request.param
    sees = family in VISION_FAMILIES
    model = build(family)
    groups = [
        group(family, "a", [5, 12, 2], images=1 if sees else 0, text=6),
        group(family, "b", [8, 1, 7], images=2 if sees else 0),
    ]
    # Log-probs near the model's own, as TRL lays them out: one row a completion, padded on the right.
    with torch.no_grad():
        (row,) = pack(groups, model, 1024)
        now_T = completion_logprobs(model, row).logprobs_T
    noise = {
        name: now_T + scale * torch.randn_like(now_T) for name, scale in (("old", 0.3), ("rollout", 0.1), ("ref", 0.4))
    }
    noise["rollout"] += noise["old"] - now_T
    trainer = make_trainer(model, str(tmp_path_factory.mktemp("trl")))
    return {"model": model, "groups": groups, "row": row, "trainer": trainer, **noise}


def make_trainer(model: transformers.PreTrainedModel, folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(WordLevel({"<pad>": PAD, "<unk>": 1, "<eos>": EOS, "word": 3}, unk_token="<unk>"))
    arguments = GRPOConfig(
        folder, use_cpu=True, bf16=False, gradient_checkpointing=False, num_generations=3, report_to=[],
        per_device_train_batch_size=6, gradient_accumulation_steps=1, max_completion_length=MAX_TOKENS, beta=0.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "word"}] * 2),
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
            ),
        )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_batch(case: dict[str, Any]) -> dict[str, Any]:
    samples = [(g, c) for g in case["groups"] for c in g.completions]
    widest = max(len(g.prompt_ids) for g, _ in samples)
    prompt = torch.tensor([[PAD] * (widest - len(g.prompt_ids)) + list(g.prompt_ids) for g, _ in samples])
    prompt_mask = torch.tensor([[0] * (widest - len(g.prompt_ids)) + [1] * len(g.prompt_ids) for g, _ in samples])
    lengths = [len(c) for _, c in samples]

    def padded(values_T: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values_T.split(lengths)), batch_first=True)

    completion = padded(torch.tensor([token for _, c in samples for token in c]))
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": padded(torch.ones(sum(lengths), dtype=torch.long)),
        "advantages": torch.tensor([a for one in ADVANTAGES for a in one]),
        "num_items_in_batch": torch.tensor(sum(lengths)),
        "old_per_token_logps": padded(case["old"]),
        "ref_per_token_logps": padded(case["ref"]),
        "importance_sampling_ratio": padded((case["old"] - case["rollout"]).exp().clamp(max=1.05)),
    }
    if case["groups"][0].vision:
        seen: list[TokenGroup] = [g for g, _ in samples]
        batch |= {name: torch.cat([g.vision[name] for g in seen]) for name in seen[0].vision}
        batch["num_images"] = [len(g.vision["image_grid_thw"]) for g in seen]
        batch["mm_token_type_ids"] = (torch.cat([prompt, torch.zeros_like(completion)], 1) == IMAGE).long()
    return batch


# our variant -> TRL's loss_type and importance_sampling_level
SAME = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "token"),
}


@pytest.mark.parametrize("variant", SAME)
@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize(("corrected", "kl"), [(False, "k3"), (True, "k3_unbiased")])
def test_loss_and_gradient_equal_those_of_trl(case, variant: str, first_step: bool, corrected: bool, kl: str) -> None:
    """Clip-higher, KL to a reference, with and without old log-probs and the correction for the rollout engine."""
    model, trainer, row = case["model"], case["trainer"], case["row"]
    trainer.loss_type, trainer.importance_sampling_level = SAME[variant]
    trainer.epsilon_low, trainer.epsilon_high, trainer.beta = 0.1, 0.2, 0.07
    if variant == "cispo":
        trainer.epsilon_high = 1.2  # TRL gives the cap itself, not its distance from 1
    trainer.max_completion_length = MAX_TOKENS
    trainer.use_vllm = corrected
    trainer.args.use_bias_correction_kl = kl == "k3_unbiased"
    trainer.vllm_importance_sampling_correction = True
    batch = trl_batch(case)
    if first_step:
        del batch["old_per_token_logps"]
    model.zero_grad()
    expected = trainer._compute_loss(model, batch)
    expected.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    scores = completion_logprobs(model, row, entropy=True)
    rollout_T = case["rollout"]
    if first_step:  # the correction compares with the old log-probs, which are then the present ones
        rollout_T = scores.logprobs_T.detach() - (case["old"] - case["rollout"])
    loss, metrics = policy_loss(
        scores.logprobs_T,
        sequence_T=row.sequence_T,
        advantages=torch.tensor([ADVANTAGES[g][m] for g, m, _ in row.members]),
        config=LossConfig(variant, 0.1, 0.2, kl_coef=0.07, kl_estimator=kl, importance_cap=1.05 if corrected else 0.0),
        total_tokens=len(row.target_T),
        total_sequences=len(row.members),
        max_tokens=MAX_TOKENS,
        old_logprobs_T=None if first_step else case["old"],
        rollout_logprobs_T=rollout_T,
        ref_logprobs_T=case["ref"],
        entropy_T=scores.entropy_T,
    )
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient_gap(want, got) < 1e-4
    logged = trainer._metrics["train"]
    if kl == "k3":  # else TRL logs the weighted value
        assert metrics["kl"].item() == pytest.approx(logged["kl"][-1], rel=1e-4)
    assert metrics["entropy"].item() == pytest.approx(logged["entropy"][-1], rel=1e-5)
    if variant in ("grpo", "dr_grpo", "dapo"):
        assert metrics["clip_low"].item() == pytest.approx(logged["clip_ratio/low_mean"][-1], abs=1e-6)
        assert metrics["clip_high"].item() == pytest.approx(logged["clip_ratio/high_mean"][-1], abs=1e-6)
