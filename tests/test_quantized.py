"""A base in 4 bits: what leaves the trainer computes what the trainer computes. bitsandbytes runs on this CPU as on CUDA."""

import copy
import os

import pytest
import torch
from launching import launch
from policy_cases import make_groups
from short_runs import SHORT, metrics_of

from lingshu_rl.model import weights
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.groups import group_logprobs
from lingshu_rl.model.loading import load_model
from lingshu_rl.model.quantized import BYTES, as_unquantized, dense, dense_kind

pytest.importorskip("bitsandbytes")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "qkv", "down_proj"]}


def adapted(lora, quantize="nf4", dtype=torch.float32):
    """The demo model in 4 bits under adapters that are not where they started."""
    torch.manual_seed(0)
    model = as_unquantized(weights.add_adapters(load_model("demo", dtype, quantize=quantize), lora)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def logprobs_of(model):
    groups = [g.tokens for g in make_groups(PromptEncoder("demo"))[:2]]
    scored = group_logprobs(model, groups, token_budget=4096, layout="shared", banned_ids=(5, 6), temperature=1.0)
    return torch.cat([part for group in scored for part in group])


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["qkv"]}])
def test_weights_written_out_give_the_log_probs_of_the_trainer(quantize, more):
    model = adapted({**LORA, **more}, quantize)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sent = {name: tensor.clone() for name, tensor in weights.weights(model)}
    assert [(n, t.dtype, tuple(t.shape)) for n, t in sent.items()] == weights.weight_shapes(model)
    plain = load_model("demo", torch.float32)
    config = copy.deepcopy(plain.config)  # scoring routes the attention of the one it uses
    rounded = logprobs_of(plain)
    plain, found = type(plain).from_pretrained(None, config=config, state_dict=sent, output_loading_info=True)
    assert not found["unexpected_keys"] and not found["missing_keys"]
    own = logprobs_of(model)
    assert float((logprobs_of(plain) - own).abs().max()) < 1e-3
    assert float((rounded - own).abs().max()) > 0.1  # the weights that were rounded give others
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_adapters_are_added_in_float32_to_what_the_bits_stand_for():
    model = adapted(LORA, dtype=torch.bfloat16)
    name = "model.language_model.layers.1.mlp.down_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    base = layer.base_layer.weight
    assert base.dtype == torch.uint8 and dense_kind(base) == (torch.bfloat16, (128, 320))
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    expected = (dense(base).float() + layer.scaling["default"] * (b @ a)).bfloat16()
    sent = {n: t.clone() for n, t in weights.weights(model)}
    assert torch.equal(sent["model.layers.1.mlp.down_proj.weight"], expected)  # its published name
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is torch.nn.Linear and head.weight.dtype == embedding.weight.dtype == torch.bfloat16


def test_the_bytes_of_a_weight_are_those_of_the_plan():
    layer = next(m for m in load_model("demo", torch.float32, quantize="nf4").modules() if "4bit" in type(m).__name__)
    state = layer.weight.quant_state
    scales = [state.absmax, state.state2.absmax]
    found = sum(t.numel() * t.element_size() for t in (layer.weight, *scales)) / state.shape.numel()
    assert found == pytest.approx(BYTES, rel=0.02)


@pytest.mark.parametrize(
    "processes", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.endurance)]
)
def test_a_run_over_four_bits_agrees_with_engine_and_reference_and_goes_on_from_its_checkpoint(
    servers, tmp_path, processes
):
    """One rank and two, ZeRO-2, the reference server of the run. The first-batch check would stop it at another base."""
    folder = tmp_path / "run"
    settings = [*SHORT, f"rollout.urls=[{servers.rollout}]", f"run.dir={folder}", "train.quantize=nf4", "run.trackers=[]",
                "train.lora={r: 4, target_modules: [q_proj, v_proj]}", "train.lr=2e-3", "eval.controls=[]"]  # fmt: skip
    env = {**servers.env, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    done = launch(settings, processes=processes, env=env)
    assert done.returncode == 0, done.stdout
    again = launch([*settings, "train.steps=3"], processes=processes, env=env)
    assert again.returncode == 0, again.stdout
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(row["policy/rollout_gap_max"] for row in rows) < 1e-3
    assert rows[0]["policy/kl"] < 1e-5 < rows[2]["policy/kl"]
    saved = load_model(str(folder / "checkpoints" / "step-000003" / "hf"), torch.float32)
    assert not hasattr(saved.config, "quantization_config")
