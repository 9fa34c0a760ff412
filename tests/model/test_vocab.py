"""The chunked log-softmax: equal to the plain formula, and never as large as it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lingshu_rl.model.vocab import LogitTransform, logprobs_of

PLACES, PAIRS, HIDDEN, VOCAB = 37, 50, 8, 301


class Sizes(TorchDispatchMode):
    """Numbers in each tensor that an operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        given = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        new = (x for x in outputs if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given)
        self.seen += [x.numel() for x in new]
        return result


def inputs(places: int = PLACES, vocab: int = VOCAB) -> dict[str, Any]:
    """Several pairs of one place, as at the end of a prompt, and places out of order."""
    torch.manual_seed(0)
    return {
        "hidden_UH": torch.randn(places, HIDDEN),
        "weight_VH": torch.randn(vocab, HIDDEN),
        "bias_V": torch.randn(vocab),
        "row_T": torch.cat([torch.randperm(places), torch.zeros(PAIRS - PLACES, dtype=torch.long)]),
        "target_T": torch.randint(3, vocab, (places + PAIRS - PLACES,)),
    }


def plain(hidden_UH, weight_VH, bias_V, row_T, target_T, transform: LogitTransform, banned: Tensor) -> Tensor:
    z = (hidden_UH @ weight_VH.t() + bias_V) * transform.scale
    if transform.softcap:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = (z / transform.temperature).index_fill(1, banned, -torch.inf)
    return z.log_softmax(-1)[row_T, target_T]


@pytest.mark.parametrize("chunk", [0, 1, 5, 36, 37, 100])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 2.0, 0.7), LogitTransform(1.3, None, 1.5)])
def test_values_and_gradients_are_those_of_the_plain_formula(chunk: int, transform: LogitTransform) -> None:
    given, banned = inputs(), torch.tensor([0, 2])
    leaves = [given[name].requires_grad_() for name in ("hidden_UH", "weight_VH", "bias_V")]
    weights_T = torch.randn(PAIRS)
    expected_T = plain(**given, transform=transform, banned=banned)
    want = torch.autograd.grad((expected_T * weights_T).sum(), leaves)
    got_T, entropy_T = logprobs_of(**given, transform=transform, banned=banned, chunk=chunk)
    got = torch.autograd.grad((got_T * weights_T).sum(), leaves)
    assert entropy_T is None
    assert torch.allclose(got_T, expected_T, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained_head", [True, False])
def test_nothing_is_as_large_as_all_logits(trained_head: bool) -> None:
    """Forward and backward stay at one chunk of logits, and the head gets one gradient, not one a chunk."""
    places, vocab, chunk = 200, 5000, 10
    given = inputs(places, vocab)
    given["hidden_UH"].requires_grad_()
    given["weight_VH"].requires_grad_(trained_head)
    with Sizes() as sizes:
        logprobs_T, _ = logprobs_of(**given, transform=LogitTransform(softcap=30.0), entropy=True, chunk=chunk)
        logprobs_T.sum().backward()
    assert max(sizes.seen) <= chunk * vocab
    assert sum(size == vocab * HIDDEN for size in sizes.seen) == (1 if trained_head else 0)


@pytest.mark.parametrize("chunk", [0, 5])
def test_bfloat16_rounds_the_product_and_nothing_after_it(chunk: int) -> None:
    given = inputs()
    for name in ("hidden_UH", "weight_VH", "bias_V"):
        given[name] = given[name].bfloat16()
    given["weight_VH"].requires_grad_()
    got_T, _ = logprobs_of(**given, transform=LogitTransform(), chunk=chunk)
    z = torch.mm(given["hidden_UH"], given["weight_VH"].t()).float() + given["bias_V"].float()
    assert got_T.dtype == torch.float32
    assert torch.allclose(got_T, z.log_softmax(-1)[given["row_T"], given["target_T"]], atol=1e-5)
    got_T.sum().backward()
    exact = {name: value.detach().float() if value.is_floating_point() else value for name, value in given.items()}
    exact["weight_VH"].requires_grad_()
    logprobs_of(**exact, transform=LogitTransform())[0].sum().backward()
    gradient, want = given["weight_VH"].grad, exact["weight_VH"].grad
    assert gradient.dtype == torch.bfloat16
    assert (gradient.float() - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "cohere", "logit_scale": 0.25}, LogitTransform(0.25)),
        ({"model_type": "granite", "logits_scaling": 4.0}, LogitTransform(0.25)),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, LogitTransform(1.0, 30.0)),
        ({"model_type": "recurrent_gemma", "logits_soft_cap": 30.0}, LogitTransform(1.0, 30.0)),
        ({"model_type": "qwen2"}, LogitTransform()),
    ],
)
def test_transforms_are_read_from_the_config(config: dict[str, Any], expected: LogitTransform) -> None:
    from transformers import CONFIG_MAPPING

    name = config.pop("model_type")
    assert LogitTransform.of(CONFIG_MAPPING[name](**config), 1.0) == expected
