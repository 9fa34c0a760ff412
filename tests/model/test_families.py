"""Shared rows against unshared ones: log-probs and gradients of every family, with weights that sharpen attention."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import pytest
import torch
import transformers
from tiny_models import IMAGE, TEXT, TEXT_FAMILIES, VIDEO, VISION_FAMILIES, build, group
from torch import Tensor

from lingshu_rl.model.attention import NAME, WINDOWS, Sight, use_shared_attention
from lingshu_rl.model.families import model_spec, supports_sharing, unwrap
from lingshu_rl.model.groups import group_logprobs
from lingshu_rl.model.logprobs import completion_logprobs, trains_vision, with_image_features
from lingshu_rl.model.packing import PackedRow, pack
from lingshu_rl.types import TokenGroup

FAMILIES = (*VISION_FAMILIES, *TEXT_FAMILIES)
# Rounding of the model's own gradient: 4e-4 from that in float64, in which test_forks.py compares it.
ROUNDING = {"qwen3_5": 5e-4}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_groups(family: str) -> list[TokenGroup]:
    """Ragged prompts and completions, one and two images, and a text-only prompt."""
    sees = family in VISION_FAMILIES
    return [
        group(family, "one image", [7, 1, 12], images=1 if sees else 0),
        group(family, "two images", [5, 9], images=2 if sees else 0, text=14),
        group(family, "text", [4], text=5),
    ]


def token_weights(groups: Sequence[TokenGroup]) -> list[list[Tensor]]:
    return [[torch.randn(len(c)) for c in g.completions] for g in groups]


def score(
    model, rows: Sequence[PackedRow], weights, **options
) -> tuple[dict[tuple[int, int], Tensor], dict[str, Tensor]]:
    """Log-probs by (group, member), and the gradients of their weighted sum."""
    model.zero_grad()
    found = {}
    for row in rows:
        logprobs_T = completion_logprobs(model, row, **options).logprobs_T
        total = torch.zeros(())
        for (g, m, _), part in zip(row.members, logprobs_T.split([n for *_, n in row.members]), strict=True):
            found[g, m] = part.detach()
            total = total + (part * weights[g][m]).sum()
        total.backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_forward(
    model, groups: Sequence[TokenGroup], weights: Sequence[Sequence[Tensor]]
) -> tuple[dict[tuple[int, int], Tensor], dict[str, Tensor]]:
    """As `score`, from the model's logits on what its processor returns for a prompt, with the completion behind it."""
    model.zero_grad()
    found = {}
    for g, one in enumerate(groups):
        for m, completion in enumerate(one.completions):
            ids = torch.tensor([[*one.prompt_ids, *completion]])
            inputs = one.vision | own_token_types(model, ids, len(one.prompt_ids))
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).logits[0]
            start = len(one.prompt_ids) - 1
            logprobs = logits.log_softmax(-1)[range(start, ids.shape[1] - 1), list(completion)]
            (logprobs * weights[g][m]).sum().backward()
            found[g, m] = logprobs.detach()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_token_types(model, ids_1S: Tensor, prompt: int) -> dict[str, Tensor]:
    """What processors return beside ids: which tokens are image (Qwen-VL, GLM-4.6V, Gemma) or answer (PaliGemma)."""
    if model.config.model_type == "paligemma":
        return {"token_type_ids": (torch.arange(ids_1S.shape[1]) >= prompt).long()[None]}
    if model.config.model_type == "gemma3":
        return {"token_type_ids": (ids_1S == IMAGE).long()}
    if model.config.model_type == "gemma4" or hasattr(model.base_model, "get_rope_index"):
        return {"mm_token_type_ids": (ids_1S == IMAGE).long()}
    return {}


def flat_logprobs(model, groups: Sequence[TokenGroup], layout: str = "shared", **options) -> Tensor:
    found = group_logprobs(model, groups, token_budget=512, layout=layout, banned_ids=(), temperature=1.0, **options)
    return torch.cat([part for one in found for part in one])


def logprob_gap(a, b) -> float:
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def gradient_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference in a parameter's gradient relative to that gradient.

    Some gradients are 0 in exact arithmetic (a key's bias shifts all scores alike), so they are rounding noise in both;
    they count by how far they rise above the noise.
    """
    assert a.keys() == b.keys()
    noise = 1e-6 * max(g.abs().max().item() for g in a.values())
    gaps = [((a[n] - b[n]).abs().max().item(), a[n].abs().max().item()) for n in a]
    return max(difference / size if size > noise else max(difference - noise, 0) / noise for difference, size in gaps)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_exact(family: str) -> None:
    """Against the model's own forward, one completion after another."""
    model = build(family)
    groups = make_groups(family)
    weights = token_weights(groups)
    logprobs, gradients = own_forward(model, groups, weights)
    # One shared row; groups split over rows; one batch of all completions; some; one after another.
    for layout, budget in (("shared", 512), ("shared", 40), ("dense", 512), ("dense", 120), ("dense", 1)):
        rows = pack(groups, model, budget, layout)
        assert (len(rows) == 1) == (budget == 512) and (len(rows) == 6) == (budget == 1)
        assert all(row.dense == (layout == "dense") for row in rows)
        found = score(model, rows, weights)
        assert logprob_gap(logprobs, found[0]) < 1e-4
        assert gradient_gap(gradients, found[1]) < ROUNDING.get(family, 1e-4)
    assert unwrap(model).config.get_text_config()._attn_implementation == NAME


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_mask_or_wrong_positions_show(family: str) -> None:
    """The exactness test means something only if these weights make mistakes visible."""
    model = build(family)
    groups = make_groups(family)[:2]
    row = pack(groups, model, 512)[0]
    with torch.no_grad():
        right = completion_logprobs(model, row).logprobs_T
        # Completions see those before them; positions go on instead of starting over.
        leaky = dataclasses.replace(row, branch_S=torch.where(row.branch_S < 0, -1, 0), logical_S=row.group_S * 0)
        leaky = dataclasses.replace(leaky, logical_S=torch.arange(row.tokens))
        moved = dataclasses.replace(row, positions=torch.arange(row.tokens).expand_as(row.positions))
        assert (completion_logprobs(model, leaky).logprobs_T - right).abs().max() > 0.05
        assert (completion_logprobs(model, moved).logprobs_T - right).abs().max() > 0.05


@pytest.mark.parametrize(
    ("family", "size"), [(f, n) for f in FAMILIES for n in (1, 16)] + [("qwen2_5_vl", 2), ("qwen2_5_vl", 5)]
)
def test_any_group_size(family: str, size: int) -> None:
    model = build(family)
    lengths = torch.randint(1, 11, (size,)).tolist()
    images = int(family in VISION_FAMILIES)
    groups = [group(family, "a", lengths, images=images), group(family, "b", lengths[::-1], images=2 * images)]
    weights = token_weights(groups)
    dense = score(model, pack(groups, model, 1, "dense"), weights)
    shared = score(model, pack(groups, model, 1024), weights)
    assert logprob_gap(dense[0], shared[0]) < 1e-4
    assert gradient_gap(dense[1], shared[1]) < 1e-4


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_features_of_a_frozen_tower_stand_in_for_the_pixels(family: str) -> None:
    model = build(family)
    text = {id(p) for m in (model.get_decoder(), model.get_output_embeddings()) for p in m.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in text)
    assert not trains_vision(model)
    groups = make_groups(family)
    weights = token_weights(groups)
    for layout in ("shared", "dense"):
        rows = pack(groups, model, 512, layout)
        logprobs, gradients = score(model, rows, weights)
        kept = [with_image_features(model, row) for row in rows]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model.base_model), "get_image_features", None)  # whoever encodes again fails
            again, gradients_again = score(model, kept, weights)
        assert logprob_gap(logprobs, again) < 1e-6 and gradient_gap(gradients, gradients_again) < 1e-5
        pixels, encoded = (flat_logprobs(model, groups, layout, features=f) for f in (False, True))
        assert (pixels - encoded).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_windows_of_the_vision_tower_in_batches(family: str) -> None:
    """The features and their gradients are those of transformers' own attention, window after window."""
    found = []
    for routed in (False, True):
        torch.manual_seed(0)
        model = build(family)
        vision = group(family, "a", [1], images=3).vision  # windows of several lengths
        if routed:
            use_shared_attention(model, model_spec(model))
            assert model.model.visual.blocks[0].attn.config._attn_implementation == WINDOWS
        features = torch.cat(model.get_image_features(**vision, return_dict=True).pooler_output)
        features.backward(torch.linspace(-1, 1, features.numel()).view_as(features))
        found.append((features, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-5
    assert gradient_gap(found[0][1], found[1][1]) < 1e-5


def test_who_trains_the_vision_tower() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(targets: object) -> object:
        return get_peft_model(build("qwen2_5_vl"), LoraConfig(r=2, target_modules=targets))

    assert trains_vision(build("qwen2_5_vl"))
    assert not trains_vision(build("llama"))
    assert not trains_vision(adapted(["q_proj", "v_proj"]))  # the tower's layer is called qkv
    assert trains_vision(adapted("all-linear"))


def test_completions_of_one_token_and_a_long_prompt() -> None:
    """A first-token-only group has no completion tokens in its row; long prompts make several blocks of completions."""
    model = build("qwen3")
    groups = [group("qwen3", "letters", [1, 1, 1]), group("qwen3", "long", [40, 30, 50, 20], text=60)]
    weights = token_weights(groups)
    dense = score(model, pack(groups, model, 1, "dense"), weights)
    shared = score(model, pack(groups, model, 1024), weights)
    assert logprob_gap(dense[0], shared[0]) < 1e-4
    assert gradient_gap(dense[1], shared[1]) < 1e-4


@pytest.mark.parametrize(
    ("family", "reentrant"), [(f, False) for f in FAMILIES] + [(f, True) for f in ("qwen2_5_vl", "gemma3", "llama")]
)
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    model = build(family)
    groups = make_groups(family)
    weights = token_weights(groups)
    rows = pack(groups, model, 512)
    plain = score(model, rows, weights)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = score(model, rows, weights)
    assert logprob_gap(plain[0], again[0]) < 1e-5
    assert gradient_gap(plain[1], again[1]) < 1e-5


@pytest.mark.parametrize(
    ("family", "checkpointing"), [(f, False) for f in FAMILIES] + [(f, True) for f in (*VISION_FAMILIES, "qwen2")]
)
def test_lora(family: str, checkpointing: bool) -> None:
    """Adapters on every linear layer, the vision tower included; with adapters off the model is the reference."""
    from peft import LoraConfig, get_peft_model

    base = build(family)
    groups = make_groups(family)
    before = flat_logprobs(base, groups)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        model.enable_input_require_grads()
    weights = token_weights(groups)
    dense = score(model, pack(groups, model, 1, "dense"), weights)
    shared = score(model, pack(groups, model, 512), weights)
    assert logprob_gap(dense[0], shared[0]) < 1e-4
    assert gradient_gap(dense[1], shared[1]) < 1e-4
    assert all("lora_" in name for name in shared[1])
    with model.disable_adapter():
        reference = flat_logprobs(model, groups)
    assert (before - reference).abs().max() < 1e-5


def test_a_fully_trained_head_beside_lora() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("qwen2"), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    groups = make_groups("qwen2")
    weights = token_weights(groups)
    dense = score(model, pack(groups, model, 1, "dense"), weights)
    shared = score(model, pack(groups, model, 512), weights)
    assert any("lm_head" in name for name in shared[1])
    assert gradient_gap(dense[1], shared[1]) < 1e-4


def test_lora_on_the_head_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("qwen2"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(TypeError, match="target_modules"):
        completion_logprobs(model, pack(make_groups("qwen2"), model, 512)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast(family: str) -> None:
    """Within what bfloat16 itself costs: sharing changes less than the rounding does."""
    model = build(family)
    groups = make_groups(family)
    exact = flat_logprobs(model, groups)
    with torch.autocast("cpu", torch.bfloat16):
        dense = flat_logprobs(model, groups, layout="dense")
        shared = flat_logprobs(model, groups)
        logprobs_T = completion_logprobs(model, pack(groups, model, 512)[0]).logprobs_T
    rounding, sharing = (exact - dense).abs().mean().item(), (dense - shared).abs().mean().item()
    assert logprobs_T.dtype == torch.float32
    assert sharing < max(rounding, 5e-3)
    assert sharing < 0.03


def reference_logprobs(model, g: TokenGroup, member: int, transform) -> Tensor:
    """Straight from the model's logits, in one plain call."""
    ids = torch.tensor([g.prompt_ids + g.completions[member]])
    logits = transform(model(input_ids=ids).logits[0].float())
    start = len(g.prompt_ids)
    return logits.log_softmax(-1)[range(start - 1, ids.shape[1] - 1), list(g.completions[member])]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 2.5}),
    ],
)
def test_scaled_and_capped_logits(family: str, changes: dict[str, float]) -> None:
    """What the model's class does to its logits is done here too, with the temperature of sampling on top."""
    from tiny_models import redraw

    config = transformers.CONFIG_MAPPING[family](**(TEXT | {"tie_word_embeddings": False} | changes))
    if family == "gemma2":
        config.layer_types = ["full_attention"] * 3
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    redraw(model)
    g = group("qwen2", "a", [6, 3])
    for chunk in (0, 4):
        scores = completion_logprobs(model, pack([g], model, 512)[0], temperature=0.7, chunk=chunk)
        weights_T = torch.randn_like(scores.logprobs_T)
        (scores.logprobs_T * weights_T).sum().backward()
        got = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        expected_T = torch.cat([reference_logprobs(model, g, m, lambda z: z / 0.7) for m in range(2)])
        (expected_T * weights_T).sum().backward()
        want = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        assert (scores.logprobs_T - expected_T).abs().max() < 1e-4
        assert gradient_gap(want, got) < 1e-4


def test_banned_ids_leave_the_normalisation_and_entropy_is_that_of_the_rest() -> None:
    model = build("qwen2")
    g = group("qwen2", "a", [6, 3])
    banned = (IMAGE, VIDEO, 141)

    def without(logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor(banned), -torch.inf)

    row = pack([g], model, 512)[0]
    scores = completion_logprobs(model, row, banned_ids=banned, entropy=True, temperature=1.3)
    expected_T = torch.cat([reference_logprobs(model, g, m, lambda z: without(z / 1.3)) for m in range(2)])
    assert (scores.logprobs_T - expected_T).abs().max() < 1e-5
    ids = torch.tensor([g.prompt_ids + g.completions[0]])
    first = without(model(input_ids=ids).logits[0, len(g.prompt_ids) - 1 :][:1] / 1.3)
    entropy = torch.distributions.Categorical(logits=first[0]).entropy()
    assert scores.entropy_T is not None and not scores.entropy_T.requires_grad
    assert (scores.entropy_T[0] - entropy).abs() < 1e-5
    assert scores.entropy_T[0] == scores.entropy_T[6]  # both completions start at the same place
    beyond_the_head = completion_logprobs(model, row, banned_ids=(*banned, 10_000), temperature=1.3)
    assert torch.equal(beyond_the_head.logprobs_T, scores.logprobs_T)
    with pytest.raises(ValueError, match="banned token"):
        completion_logprobs(model, row, banned_ids=(g.completions[0][0],))


def test_the_model_is_left_as_it_was() -> None:
    """No patched forward stays behind, also when the forward fails, and ordinary calls give the same logits."""
    model = build("qwen2_5_vl")
    groups = make_groups("qwen2_5_vl")
    ids = torch.tensor([groups[2].prompt_ids])
    before = model(input_ids=ids).logits
    row = pack(groups, model, 512)[0]
    completion_logprobs(model, row)
    broken = dataclasses.replace(row, vision={"pixel_values": row.vision["pixel_values"][:4]})
    with contextlib.suppress(Exception):
        completion_logprobs(model, broken)
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())
    assert torch.equal(before, model(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_flex_attention_is_exact_in_the_forward(family: str) -> None:
    """Block masks are for CUDA: on the CPU flex attention is compiled first and has no backward."""
    torch._dynamo.reset()  # the CPU's kernels for a second length of row do not always compile
    model = build(family)
    (row,) = pack(make_groups(family), model, 512)
    with torch.no_grad():
        masked_T = completion_logprobs(model, row).logprobs_T
        blocks_T = completion_logprobs(model, row, attention="flex").logprobs_T
    assert (masked_T - blocks_T).abs().max() < 1e-5


def tiny_config(model_type: str, **changes: object) -> transformers.PretrainedConfig:
    return transformers.CONFIG_MAPPING[model_type](**changes)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny_config("jamba"), "linear_attention"),
        (tiny_config("kimi_linear"), "linear_attention"),
        (tiny_config("falcon_h1"), "hybrid"),
        (tiny_config("recurrent_gemma"), "state"),
        (tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (tiny_config("llama4"), "chunked_attention"),
        (tiny_config("t5"), "encoder"),
        (tiny_config("llama", attn_implementation="eager"), "eager"),
        (tiny_config("paligemma", text_config={"model_type": "gemma2", "num_hidden_layers": 2}), "sliding"),
        (tiny_config("glm46v"), "multi-axis"),
    ],
)
def test_families_that_cannot_share_are_named(config: transformers.PretrainedConfig, reason: str) -> None:
    shareable, why = supports_sharing(config)
    assert not shareable
    assert reason in why and config.model_type in why


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_can_share(family: str) -> None:
    assert supports_sharing(build(family).config) == (True, "")


def test_a_broken_mask_shows_in_the_gap_that_a_run_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense rows do not go through this library's masks, so the first batch finds a mask that is wrong."""
    model = build("qwen2_5_vl")
    groups = make_groups("qwen2_5_vl")
    dense = flat_logprobs(model, groups, layout="dense")
    right = Sight.of
    monkeypatch.setattr(
        Sight, "of", lambda row, *args: right(dataclasses.replace(row, branch_S=row.branch_S * 0 - 1), *args)
    )
    assert (flat_logprobs(model, groups) - dense).abs().max() > 0.05
