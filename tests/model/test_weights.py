"""What leaves the trainer: merged weights by name, checkpoints and adapters on disk. Nothing of it touches the model."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tiny_models import build, publish
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, revert_weight_conversion

from lingshu_rl.failures import ConfigError
from lingshu_rl.model import weights
from lingshu_rl.model.loading import load_model

QV = ["q_proj", "v_proj"]
LORAS = {
    "plain": {"r": 4, "target_modules": QV},
    "root_scaled": {"r": 4, "target_modules": QV, "use_rslora": True},
    "patterns": {"r": 4, "target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "dora": {"r": 4, "target_modules": QV, "use_dora": True},
    "biases": {"r": 4, "target_modules": ["qkv"], "bias": "all", "lora_bias": True},
    "vision": {"r": 4, "target_modules": "all-linear"},
    "patches": {"r": 4, "target_modules": ["patch_embed.proj"]},
    "whole_head": {"r": 4, "target_modules": QV, "modules_to_save": ["lm_head"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
}


def adapted(lora, dtype=torch.float32):
    """A small Qwen2.5-VL as after some training: nothing that is trained is where it started."""
    model = weights.add_adapters(build("qwen2_5_vl"), lora).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def published(model):
    """The model's tensors as transformers would save them."""
    return revert_weight_conversion(model, model.state_dict())


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_adapters_come_merged_as_peft_merges_them_under_the_models_own_names(lora):
    model = adapted(lora)
    expected = copy.deepcopy(model).merge_and_unload()
    found = {name: tensor.clone() for name, tensor in weights.weights(model)}
    before = published(build("qwen2_5_vl"))
    assert set(found) == set(before)
    for name, tensor in published(expected).items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    assert any(not torch.equal(found[name], tensor) for name, tensor in before.items())
    assert [(n, t.dtype, tuple(t.shape)) for n, t in found.items()] == weights.weight_shapes(model)


@pytest.mark.parametrize("lora", [LORAS["plain"], LORAS["dora"]], ids=["plain", "dora"])
def test_a_bfloat16_base_is_bitwise_the_same_after_many_sends(lora):
    model = adapted(lora, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(60):
        last = {name: tensor.clone() for name, tensor in weights.weights(model)}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    layer = model.get_submodule("base_model.model.model.language_model.layers.0.self_attn.q_proj")
    if lora is LORAS["plain"]:
        a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
        expected = (layer.base_layer.weight.float() + layer.scaling["default"] * (b @ a)).bfloat16()
        assert torch.equal(last["model.layers.0.self_attn.q_proj.weight"], expected)


def test_a_tied_head_comes_once_and_is_not_adapted():
    model = build("qwen2_5_vl")
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    names = [name for name, _ in weights.weights(model)]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    for change in ({"target_modules": ["embed_tokens"]}, {"target_modules": QV, "modules_to_save": ["lm_head"]}):
        with pytest.raises(ConfigError, match="one tensor in this model"):
            weights.add_adapters(copy.deepcopy(model), {"r": 4, **change})
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        weights.add_adapters(build("llama"), {"r": 4, "target_modules": QV, "trainable_token_indices": [1]})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3", "qwen3_moe", "llama"])
def test_a_checkpoint_in_files_is_what_transformers_would_write_in_one(family, tmp_path, monkeypatch):
    """Same names, same tensors, and no more than one file of them held at a time."""
    model = build(family)
    held = []
    original = weights._save_shard

    def spied(base, folder, file, tensors):
        held.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        return original(base, folder, file, tensors)

    monkeypatch.setattr(weights, "_save_shard", spied)
    limit = 100_000
    weights.save(model, tmp_path / "files", main=True, shard_bytes=limit)
    model.save_pretrained(tmp_path / "one")

    def tensors(folder):
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                found |= {name: (file.name, opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        return found

    files, one = tensors(tmp_path / "files"), tensors(tmp_path / "one")
    assert files.keys() == one.keys() and all(torch.equal(files[name][1], one[name][1]) for name in one)
    index = json.loads((tmp_path / "files" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in files.items()}
    assert len(held) > 2 and max(held) < sum(held) / 2
    assert {f.name for f in (tmp_path / "one").iterdir()} - {"model.safetensors"} == {
        f.name for f in (tmp_path / "files").iterdir()
    } - {*index["weight_map"].values(), "model.safetensors.index.json"}
    again, info = type(model).from_pretrained(tmp_path / "files", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())


# As their makers publish them: one name of the language model and one of the vision tower.
PUBLISHED = {
    "qwen2_vl": ("model.layers.0.mlp.up_proj.weight", "visual.patch_embed.proj.weight"),
    "qwen2_5_vl": ("model.layers.0.mlp.up_proj.weight", "visual.patch_embed.proj.weight"),
    "qwen3_vl": ("model.language_model.layers.0.mlp.up_proj.weight", "model.visual.patch_embed.proj.weight"),
    "llava": ("language_model.lm_head.weight", "vision_tower.vision_model.embeddings.patch_embedding.weight"),
    "internvl": ("language_model.model.embed_tokens.weight", "vision_tower.embeddings.cls_token"),
    "gemma3": ("language_model.model.norm.weight", "vision_tower.vision_model.embeddings.patch_embedding.weight"),
    "paligemma": ("language_model.model.norm.weight", "vision_tower.vision_model.embeddings.patch_embedding.weight"),
    "qwen3_moe": ("model.layers.0.mlp.experts.3.up_proj.weight", "lm_head.weight"),
    "qwen3_vl_moe": ("model.language_model.layers.0.mlp.experts.gate_up_proj", "model.visual.patch_embed.proj.weight"),
    "llava_onevision": ("language_model.lm_head.weight", "vision_tower.vision_model.post_layernorm.weight"),
    "smolvlm": ("model.text_model.norm.weight", "model.vision_model.embeddings.patch_embedding.weight"),
    "gemma4": ("model.language_model.norm.weight", "model.vision_tower.patch_embedder.input_proj.weight"),
    "llama": ("model.norm.weight", "lm_head.weight"),
}


def kinds_of(folder):
    """Name -> (type, shape) of every tensor of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found |= {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    return found


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_is_sent_and_saved_has_the_names_of_the_folder_it_was_loaded_from(family, tmp_path):
    """vLLM reads these alone. A tower without its `vision_model.` ended runs of LLaVA and Gemma 3 at the first sync."""
    publish(build(family), tmp_path / "published")
    kinds = kinds_of(tmp_path / "published")
    assert set(PUBLISHED[family]) <= set(kinds)
    model = load_model(str(tmp_path / "published"), torch.float32)
    sent = {name: tensor.clone() for name, tensor in weights.weights(model)}
    assert {name: ("F32", tuple(tensor.shape)) for name, tensor in sent.items()} == kinds
    assert [(n, t.dtype, tuple(t.shape)) for n, t in sent.items()] == weights.weight_shapes(model)
    weights.save(model, tmp_path / "saved", main=True, shard_bytes=100_000)
    assert kinds_of(tmp_path / "saved") == kinds


def test_experts_leave_as_they_are_published(tmp_path):
    """The model holds those of Qwen3-VL-MoE transposed. transformers' own save_pretrained leaves them so: vLLM refuses it."""
    publish(build("qwen3_vl_moe"), tmp_path)
    model = load_model(str(tmp_path), torch.float32)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    sent = {name: tensor.clone() for name, tensor in weights.weights(model)}
    assert sent[name].shape == (4, 64, 48) and torch.equal(sent[name].mT, model.get_parameter(name))


def test_under_zero_3_the_names_are_those_of_the_folder_too(tmp_path, monkeypatch):
    """transformers then notes every renaming that it knows for the family as made. This folder has new names already."""
    model = build("gemma3")
    model.save_pretrained(tmp_path)
    unused = get_model_conversion_mapping(model)
    loaded = type(model).from_pretrained(tmp_path)
    original = type(model).from_pretrained.__func__

    def noting_all(cls, *args, **options):
        made = original(cls, *args, **options)
        made._weight_conversions = [*made._weight_conversions, *(one for one in unused if not one.was_used())]
        return made

    monkeypatch.setattr(type(model), "from_pretrained", classmethod(noting_all))
    assert set(dict(weights.weights(load_model(str(tmp_path), torch.float32)))) == set(kinds_of(tmp_path))
    assert set(dict(weights.weights(loaded))) == set(kinds_of(tmp_path))


def test_tensors_that_were_one_in_the_checkpoint_are_joined_again(tmp_path):
    """Whatever layers lie between them, in a rank that holds one tensor at a time."""
    model = build("llama")
    model._weight_conversions = [
        WeightConverter(
            source_patterns="mlp.gate_up_proj.weight",
            target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            operations=[Chunk(dim=0)],
        )
    ]
    sent = {name: tensor.clone() for name, tensor in weights.weights(model)}
    assert [(n, t.dtype, tuple(t.shape)) for n, t in sent.items()] == weights.weight_shapes(model)
    for n, layer in enumerate(model.model.layers):
        both = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        assert torch.equal(sent[f"model.layers.{n}.mlp.gate_up_proj.weight"], both)
    assert not any("gate_proj" in name or "mlp.up_proj" in name for name in sent)


def test_ranks_that_do_not_write_hold_nothing(tmp_path, monkeypatch):
    """They gathered and copied the whole model once."""
    model = build("llama")

    class Passing:
        def to(self, *a, **k):
            pytest.fail("a rank that writes nothing copied a tensor")

    seen = []
    monkeypatch.setattr(weights, "weights", lambda m: ((seen.append(n), (n, Passing()))[1] for n, *_ in shapes))
    shapes = weights.weight_shapes(model)
    weights.save(model, tmp_path, main=False)
    assert len(seen) == len(shapes) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_an_adapter_on_disk_gives_peft_the_same_model(lora, tmp_path):
    model = adapted(lora)
    weights.save_adapter(model, tmp_path)
    base = build("qwen2_5_vl")
    untrained = {name: tensor.clone() for name, tensor in published(base).items()}
    again = {name: tensor.clone() for name, tensor in weights.weights(PeftModel.from_pretrained(base, tmp_path))}
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.weights(model))
    assert any(not torch.equal(again[name], tensor) for name, tensor in untrained.items())


@pytest.mark.parametrize(
    ("targets", "unfit"),
    [(QV, ""), (["gate_proj"], "model.visual"), ("all-linear", "model.visual"), (["lm_head"], "tensor")],
)
def test_adapters_beyond_what_vllm_applies_are_told_from_the_models_modules(targets, unfit):
    def told():
        return weights.unfit_for_adapters_alone("demo", {"r": 4, "target_modules": targets})

    if unfit == "tensor":
        with pytest.raises(ConfigError, match=unfit):
            told()
    else:
        assert unfit in told() and bool(told()) == bool(unfit)


def test_one_rank_alone_can_look_at_the_models_modules_under_zero_3():
    """transformers would build the model in shares of all ranks, and wait for the others."""
    from transformers.integrations import deepspeed

    sharing = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert weights.unfit_for_adapters_alone("demo", {"r": 3, "target_modules": QV}) == ""
        assert deepspeed.is_deepspeed_zero3_enabled() and sharing.is_zero3()
    finally:
        deepspeed.unset_hf_deepspeed_config()
