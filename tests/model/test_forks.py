"""Layers that carry state, forked in a shared row: against the model's own forward on each completion alone, in float64."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
import transformers
from test_families import gradient_gap, logprob_gap, make_groups, own_forward, score, token_weights
from tiny_models import VISION_FAMILIES, build, group
from torch import Tensor

from lingshu_rl.model.attention import attention_masks
from lingshu_rl.model.families import STATEFUL, model_spec
from lingshu_rl.model.forks import Forks, State
from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import pack
from lingshu_rl.types import TokenGroup

HYBRIDS = (
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "olmo_hybrid",
    "lfm2",
    "lfm2_moe",
    "bamba",
    "granitemoehybrid",
)


class _Double:
    """torch, but that float32 is float64: layers cast to it by name."""

    def __getattr__(self, name: str) -> object:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch):
    """A model whose arithmetic is all in float64."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)

    def made(family: str, **changes: object) -> transformers.PreTrainedModel:
        model = build(family, **changes).double()
        model.set_experts_implementation("eager")  # grouped products take no float64
        monkeypatch.setattr(sys.modules[type(model).__module__], "torch", _Double())
        return model

    yield made
    torch.set_default_dtype(torch.float32)


def double_groups(family: str) -> list[TokenGroup]:
    """Several prompts, with one image, two and none; completions of one token and of more than a kernel's chunk."""
    torch.manual_seed(0)
    groups = [*make_groups(family), group(family, "long", [70, 1, 2, 130, 3], images=int(family in VISION_FAMILIES))]
    return [
        TokenGroup(
            g.key,
            g.prompt_ids,
            g.completions,
            {k: v.double() if v.is_floating_point() else v for k, v in g.vision.items()},
        )
        for g in groups
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", HYBRIDS)
def test_forked_state_is_exact(family: str, checkpointing: bool, double) -> None:
    model = double(family)
    groups = double_groups(family)
    weights = token_weights(groups)
    expected, gradients = own_forward(model, groups, weights)
    dense = score(model, pack(groups, model, 1, "dense"), weights)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for budget in (4096, 90):  # one row of all groups; groups split over rows
        rows = pack(groups, model, budget)
        assert not any(row.dense for row in rows) and (len(rows) == 1) == (budget == 4096)
        logprobs, found = score(model, rows, weights)
        assert logprob_gap(expected, logprobs) < 1e-11 and logprob_gap(dense[0], logprobs) < 1e-11
        assert gradient_gap(gradients, found) < 1e-9 and gradient_gap(dense[1], found) < 1e-9
    assert all(logprob.dtype == torch.float64 for logprob in logprobs.values())


@pytest.mark.parametrize("family", HYBRIDS)
def test_another_prompts_state_shows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exactness test means something only if the state counts, the convolution's and the other."""
    model = build(family)
    groups = make_groups(family)[:2]
    (row,) = pack(groups, model, 4096)
    right = State.forked

    def wrong(part: str):
        def forked(ends: Sequence[State], parent_B: Tensor) -> State:
            state = right(ends, parent_B)
            value = getattr(state, part)
            setattr(state, part, None if value is None else value.flip(0))
            return state

        return forked

    with torch.no_grad():
        expected = completion_logprobs(model, row).logprobs_T
        for part in ("conv",) if "lfm2" in family else ("conv", "recurrent"):
            monkeypatch.setattr(State, "forked", wrong(part))
            assert (completion_logprobs(model, row).logprobs_T - expected).abs().max() > 1e-3, part


def test_a_prompt_is_run_once_and_completions_with_their_like() -> None:
    """Tokens that a layer computes: prompts as they are, completions filled up to less than twice, beyond a chunk."""
    model = build("qwen3_next")
    groups = [group("qwen3_next", "a", [200, 5, 1, 130, 40], text=30), group("qwen3_next", "b", [9], text=30)]
    groups.append(group("qwen3_next", "c", [64, 64], text=50))
    (row,) = pack(groups, model, 4096)
    masks = attention_masks(row, model_spec(model), torch.device("cpu"), "sdpa", -1)
    (forks,) = (masks[kind] for kind in STATEFUL & set(masks))
    assert isinstance(forks, Forks)
    assert [list(batch.places_BL.shape) for batch in forks.prompts] == [[2, 33], [1, 53]]
    assert [list(batch.places_BL.shape) for batch in forks.completions] == [[5, 63], [2, 199]]
    assert [batch.parent_B.tolist() for batch in forks.completions] == [[0, 0, 1, 2, 2], [0, 0]]


def test_an_ordinary_forward_of_a_layer_that_reads_forks_is_the_layers_own() -> None:
    model = build("qwen3_5")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before = model(input_ids=ids, attention_mask=mask).logits
    completion_logprobs(model, pack(make_groups("qwen3_5"), model, 4096)[0])
    assert hasattr(type(model.model.language_model.layers[0].linear_attn).forward, "reads_forks")
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    tokens = model.eval().generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 7)
