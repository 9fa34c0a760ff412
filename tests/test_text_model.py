"""A model without images, whose template concatenates strings and whose turns end with another token than its texts."""

import json
import os
import re

import pytest
from launching import ROOT, launch
from short_runs import metrics_of

pytestmark = pytest.mark.slow
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"  # fmt: skip


@pytest.fixture
def text_model(tmp_path):
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from lingshu_rl.model.loading import model_path

    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_path("demo"))
    end_of_turn = tokenizer.eos_token_id
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "<|endoftext|>"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    # Often enough for two steps to hold completions that end so.
    with torch.no_grad():
        model.lm_head.weight[end_of_turn] = model.model.embed_tokens.weight.std() * torch.randn(64)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_turn]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_model_trains_two_steps_on_questions_and_conversations(text_model, tmp_path):
    import pyarrow.parquet as pq

    folder = text_model
    question = {"images": [], "options": ["hepatic vein", "portal vein"], "answer": "A", "kind": "option"}
    turns = [{"role": "user", "content": "Which organ?"}, {"role": "assistant", "content": "liver"}, {"role": "user", "content": "Which vessel drains it?"}]  # fmt: skip
    for name in ("train", "test"):
        rows = [{**question, "id": f"{name}{n}", **({"messages": turns} if n % 2 else {"question": f"Which vessel drains it? ({n})"})} for n in range(8)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    done = launch(
        [f"model={folder}", f"data.train={tmp_path}/train.jsonl", f"data.test={tmp_path}/test.jsonl", "data.instruction=short",
         "data.system=You read studies.", "train.steps=2", "train.prompts_per_step=4", "train.group_size=8", "train.warmup_steps=1",
         "rollout.max_tokens=200", "eval.limit=4", "eval.controls=[]", "loss.kl_coef=0",
         "rewards.spec={class: 'length_reward:Length'}", "rewards.preflight=false", "run.trackers=[]", f"run.dir={run}"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CONFIGURE_LOGGING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (longest,) = re.findall(r"longest prompt: ([0-9]+) tokens", done.stdout)
    assert f"max_seq_len={int(longest) + 200}," in (run / "logs" / "rollout-0.log").read_text()
    metrics = metrics_of(run)
    assert len(metrics) == 2 and max(row["policy/rollout_gap_max"] for row in metrics) < 1e-3
    rows = [row for file in sorted(run.glob("rollouts/*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert all("<|im_end|>" not in row["completion"] for row in rows)  # the turn's end stopped it, and was taken off
    assert any(row["finish_reason"] == "stop" for row in rows)
