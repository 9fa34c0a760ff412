"""What settings of TRL, verl and EasyR1 are called here: the answer to a key that this library does not know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ours:
    """key: the setting here, or "" where there is none. note: what differs."""

    key: str
    note: str = ""


COMPLETIONS = "counts prompts, each with train.group_size completions, over all ranks together"
EPOCHS = "steps, not epochs: epochs x rows / train.prompts_per_step"
BUDGET = "rows are filled up to so many tokens instead of a number of samples"
STEPS = "in steps: share x train.steps"

# GRPOConfig of TRL, with what it has from transformers.TrainingArguments, and its script's own words.
TRL = {
    "model_name_or_path": Ours("model"),
    "dataset_name": Ours("data.train", "a file, a folder or a Hub id"),
    "dataset_test_split": Ours("data.test", "a source of its own: NAME:SPLIT"),
    "output_dir": Ours("run.dir"),
    "report_to": Ours("run.trackers"),
    "resume_from_checkpoint": Ours("resume"),
    "learning_rate": Ours("train.lr"),
    "lr_scheduler_type": Ours("train.lr_schedule"),
    "warmup_ratio": Ours("train.warmup_steps", STEPS),
    "warmup_steps": Ours("train.warmup_steps"),
    "weight_decay": Ours("train.weight_decay"),
    "max_grad_norm": Ours("train.max_grad_norm"),
    "optim": Ours("train.optimizer"),
    "max_steps": Ours("train.steps"),
    "num_train_epochs": Ours("train.steps", EPOCHS),
    "per_device_train_batch_size": Ours("train.prompts_per_step", COMPLETIONS),
    "generation_batch_size": Ours("train.prompts_per_step", COMPLETIONS),
    "gradient_accumulation_steps": Ours("packing.token_budget", BUDGET),
    "num_iterations": Ours("train.optimizer_steps"),
    "gradient_checkpointing": Ours("train.gradient_checkpointing"),
    "bf16": Ours("train.dtype", "bfloat16"),
    "use_peft": Ours("train.lora", "peft.LoraConfig's arguments"),
    "num_generations": Ours("train.group_size"),
    "max_completion_length": Ours("rollout.max_tokens"),
    "temperature": Ours("rollout.temperature"),
    "beta": Ours("loss.kl_coef"),
    "loss_type": Ours("loss.variant"),
    "epsilon": Ours("loss.clip_low"),
    "epsilon_high": Ours("loss.clip_high"),
    "importance_sampling_level": Ours("loss.variant", "gspo weighs whole sequences"),
    "mask_truncated_completions": Ours("loss.mask_truncated"),
    "sapo_temperature_pos": Ours("loss.soft_up"),
    "sapo_temperature_neg": Ours("loss.soft_down"),
    "vllm_importance_sampling_cap": Ours("loss.importance_cap"),
    "vllm_importance_sampling_clip_max": Ours("loss.importance_cap"),
    "vllm_importance_sampling_clip_min": Ours("loss.importance_floor"),
    "vllm_importance_sampling_mode": Ours("loss.importance_level", "and loss.importance_rule"),
    "scale_rewards": Ours("advantage.variant", "no_std for scale_rewards=none"),
    "multi_objective_aggregation": Ours("advantage.variant", "gdpo for normalize_then_sum"),
    "reward_weights": Ours("rewards.spec", "each part has its weight"),
    "reward_funcs": Ours("rewards.spec"),
    "ref_model_sync_steps": Ours("reference.refresh_every"),
    "use_vllm": Ours("rollout.placement", "vLLM always samples"),
    "vllm_mode": Ours("rollout.placement"),
    "vllm_server_base_url": Ours("rollout.urls"),
    "vllm_gpu_memory_utilization": Ours("rollout.vllm.gpu_memory_utilization"),
    "vllm_max_model_length": Ours("rollout.vllm.max_model_len"),
    "vllm_tensor_parallel_size": Ours("rollout.vllm.tensor_parallel_size"),
    "eval_steps": Ours("eval.every"),
    "save_steps": Ours("checkpoint.every"),
    "save_total_limit": Ours("checkpoint.keep_last"),
    "batch_size": Ours("train.prompts_per_step", COMPLETIONS),
}

# Both of these projects' words: verl's by actor_rollout_ref, EasyR1's by worker.
VERL = {
    "data.train_files": Ours("data.train"),
    "data.val_files": Ours("data.test"),
    "data.train_batch_size": Ours("train.prompts_per_step"),
    "data.rollout_batch_size": Ours("train.prompts_per_step"),
    "data.max_response_length": Ours("rollout.max_tokens"),
    "data.max_prompt_length": Ours(
        "rollout.vllm.max_model_len", "prompt and completion together; rollout.max_tokens is the completion's part"
    ),
    "data.filter_overlong_prompts": Ours("data.too_long", "true is drop; others are refused at load, by row"),
    "data.truncation": Ours("data.too_long", "prompts are never cut: refuse or drop those that are too long"),
    "data.prompt_key": Ours("", "rows have fixed names: the question is under 'question'"),
    "data.answer_key": Ours("", "rows have fixed names: the label is under 'answer'"),
    "data.image_key": Ours("", "rows have fixed names: images are under 'images'"),
    "data.format_prompt": Ours("data.instruction"),
    "data.seed": Ours("seed"),
    "actor_rollout_ref.model.path": Ours("model"),
    "actor_rollout_ref.model.lora_rank": Ours("train.lora.r"),
    "actor_rollout_ref.model.enable_gradient_checkpointing": Ours("train.gradient_checkpointing"),
    "actor_rollout_ref.actor.optim.lr": Ours("train.lr"),
    "actor_rollout_ref.actor.optim.lr_warmup_steps": Ours("train.warmup_steps"),
    "actor_rollout_ref.actor.optim.weight_decay": Ours("train.weight_decay"),
    "actor_rollout_ref.actor.grad_clip": Ours("train.max_grad_norm"),
    "actor_rollout_ref.actor.ppo_epochs": Ours("train.optimizer_steps", "optimiser steps a batch"),
    "actor_rollout_ref.actor.ppo_mini_batch_size": Ours(
        "train.optimizer_steps", "how many mini-batches a batch is cut into"
    ),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": Ours("packing.token_budget", BUDGET),
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": Ours("packing.token_budget"),
    "actor_rollout_ref.actor.use_kl_loss": Ours("loss.kl_coef", "above 0"),
    "actor_rollout_ref.actor.kl_loss_coef": Ours("loss.kl_coef"),
    "actor_rollout_ref.actor.kl_loss_type": Ours("loss.kl_estimator", "low_var_kl is k3"),
    "actor_rollout_ref.actor.clip_ratio": Ours("loss.clip_low", "and loss.clip_high"),
    "actor_rollout_ref.actor.clip_ratio_low": Ours("loss.clip_low"),
    "actor_rollout_ref.actor.clip_ratio_high": Ours("loss.clip_high"),
    "actor_rollout_ref.rollout.n": Ours("train.group_size"),
    "actor_rollout_ref.rollout.temperature": Ours("rollout.temperature"),
    "actor_rollout_ref.rollout.gpu_memory_utilization": Ours("rollout.vllm.gpu_memory_utilization"),
    "actor_rollout_ref.rollout.tensor_model_parallel_size": Ours("rollout.vllm.tensor_parallel_size"),
    "actor_rollout_ref.rollout.max_num_seqs": Ours("rollout.vllm.max_num_seqs"),
    "actor_rollout_ref.rollout.max_model_len": Ours("rollout.vllm.max_model_len"),
    "worker.actor.model.model_path": Ours("model"),
    "worker.actor.model.enable_gradient_checkpointing": Ours("train.gradient_checkpointing"),
    "worker.actor.model.freeze_vision_tower": Ours("train.freeze", "parameter name prefixes, such as [model.visual]"),
    "worker.actor.optim.lr": Ours("train.lr"),
    "worker.actor.optim.lr_warmup_ratio": Ours("train.warmup_steps", STEPS),
    "worker.actor.optim.weight_decay": Ours("train.weight_decay"),
    "worker.actor.max_grad_norm": Ours("train.max_grad_norm"),
    "worker.actor.global_batch_size": Ours("train.optimizer_steps", "how many mini-batches a batch is cut into"),
    "worker.actor.micro_batch_size_per_device_for_update": Ours("packing.token_budget", BUDGET),
    "worker.actor.clip_ratio_low": Ours("loss.clip_low"),
    "worker.actor.clip_ratio_high": Ours("loss.clip_high"),
    "worker.rollout.n": Ours("train.group_size"),
    "worker.rollout.temperature": Ours("rollout.temperature"),
    "worker.rollout.limit_images": Ours("rollout.vllm.limit_mm_per_prompt.image"),
    "worker.rollout.gpu_memory_utilization": Ours("rollout.vllm.gpu_memory_utilization"),
    "worker.rollout.tensor_parallel_size": Ours("rollout.vllm.tensor_parallel_size"),
    "worker.rollout.max_model_len": Ours("rollout.vllm.max_model_len"),
    "worker.reward.reward_function": Ours("rewards.spec", "{class: module:Class}"),
    "custom_reward_function.path": Ours("rewards.spec", "{class: module:Class}"),
    "algorithm.adv_estimator": Ours("advantage.variant", "group for grpo, leave_one_out for rloo"),
    "algorithm.norm_adv_by_std_in_grpo": Ours("advantage.variant", "no_std for false"),
    "algorithm.kl_ctrl.kl_coef": Ours("loss.kl_coef", "the KL is part of the loss, not of the reward"),
    "algorithm.kl_coef": Ours("loss.kl_coef"),
    "algorithm.disable_kl": Ours("loss.kl_coef", "0 for true"),
    "algorithm.kl_penalty": Ours("loss.kl_estimator", "low_var_kl is k3"),
    "algorithm.filter_groups.enable": Ours("train.max_refills", "above 0"),
    "algorithm.online_filtering": Ours("train.max_refills", "above 0"),
    "trainer.total_epochs": Ours("train.steps", EPOCHS),
    "trainer.total_training_steps": Ours("train.steps"),
    "trainer.max_steps": Ours("train.steps"),
    "trainer.n_gpus_per_node": Ours("devices.policy", "as many ranks as accelerate launch starts"),
    "trainer.logger": Ours("run.trackers"),
    "trainer.default_local_dir": Ours("run.dir"),
    "trainer.save_checkpoint_path": Ours("run.dir"),
    "trainer.experiment_name": Ours("run.dir"),
    "trainer.save_freq": Ours("checkpoint.every"),
    "trainer.max_actor_ckpt_to_keep": Ours("checkpoint.keep_last"),
    "trainer.test_freq": Ours("eval.every"),
    "trainer.val_freq": Ours("eval.every"),
    "trainer.resume_mode": Ours("resume"),
    "trainer.load_checkpoint_path": Ours("resume"),
}


def known_elsewhere(key: str) -> str:
    """`key` in this library's words, as the rest of an error message, or "" for what no peer has.

    A name of TRL is also known under a section of ours (`train.num_generations`).
    """
    key = key.lstrip("+")
    found = VERL.get(key) or TRL.get(key.rsplit(".", 1)[-1])
    if found is None:
        return ""
    said = f"{key.rsplit('.', 1)[-1]} is {found.key} here" if found.key else f"{key} has no setting here"
    return f"; {said}{f' ({found.note})' if found.note else ''}"
