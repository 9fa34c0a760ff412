"""Losses against the equations written out token by token, and the invariances that packing and ranks rely on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lingshu_rl.failures import ConfigError
from lingshu_rl.losses import KL, VARIANTS, policy_loss
from lingshu_rl.objective import IMPORTANCE_LEVELS, IMPORTANCE_RULES, LossConfig
from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import check_choices

LENGTHS = [3, 7, 1, 5]
ADVANTAGES = [1.2, -0.7, 0.3, -1.1]
MAX_TOKENS = 10


def batch(seed: int = 0, spread: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    old = -2 * torch.rand(total, generator=generator)

    def near(scale: float) -> Tensor:
        return old + scale * torch.randn(total, generator=generator)

    return {"now": near(spread), "old": old, "rollout": near(0.05), "ref": near(spread)}


SEQUENCE = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def ours(config: LossConfig, tensors: dict[str, Tensor], part: list[int] | None = None, **changes):
    """Loss and metrics of the sequences in `part` (all by default), normalised over all of them."""
    part = list(range(len(LENGTHS))) if part is None else part
    keep = torch.isin(SEQUENCE, torch.tensor(part))
    order = {n: i for i, n in enumerate(part)}
    arguments = {
        "sequence_T": torch.tensor([order[n] for n in SEQUENCE[keep].tolist()]),
        "advantages": torch.tensor([ADVANTAGES[n] for n in part]),
        "config": config,
        "total_tokens": sum(LENGTHS),
        "total_sequences": len(LENGTHS),
        "max_tokens": MAX_TOKENS,
        "old_logprobs_T": tensors["old"][keep],
        "rollout_logprobs_T": tensors["rollout"][keep],
        "ref_logprobs_T": tensors["ref"][keep],
    }
    return policy_loss(tensors["now"][keep], **(arguments | changes))


def by_hand(config: LossConfig, tensors: dict[str, Tensor]) -> float:
    """The formulas, one token after another, in plain floats."""
    total, start = 0.0, 0
    for length, advantage in zip(LENGTHS, ADVANTAGES, strict=True):
        rows = range(start, start + length)
        start += length
        now, old, rollout, ref = (tensors[key].tolist() for key in ("now", "old", "rollout", "ref"))
        mean = math.exp(sum(now[t] - old[t] for t in rows) / length)
        low, high = 1 - config.clip_low, 1 + config.clip_high
        product = 1.0
        for t in rows:  # GMPO: the product of what is left of each ratio, its root below
            ratio = math.exp(now[t] - old[t])
            product *= min(ratio, high) if advantage > 0 else max(ratio, low)
        for t in rows:
            ratio = mean if config.variant == "gspo" else math.exp(now[t] - old[t])
            if config.variant == "cispo":
                value = -min(ratio, 1 + config.clip_high) * advantage * now[t]
            elif config.variant == "gmpo":
                value = -advantage * product ** (1 / length)
            elif config.variant == "sapo":
                tau = config.soft_up if advantage > 0 else config.soft_down
                value = -advantage / (1 + math.exp(-tau * (ratio - 1))) * 4 / tau
            elif config.variant == "dppo":
                ratio = math.exp(now[t] - rollout[t])
                rise = math.exp(now[t]) - math.exp(rollout[t])
                beyond = rise > config.clip_high if advantage > 0 else rise < -config.clip_low
                value = 0.0 if beyond else -ratio * advantage
            else:
                clipped = min(max(ratio, low), high)
                value = -min(ratio * advantage, clipped * advantage)
            if config.importance_cap and config.variant != "dppo":
                gaps = [old[i] - rollout[i] for i in rows]
                over = {"token": old[t] - rollout[t], "sequence": sum(gaps), "geometric": sum(gaps) / length}
                weight = math.exp(over[config.importance_level])
                kept = min(max(weight, config.importance_floor), config.importance_cap)
                value *= kept if config.importance_rule == "truncate" or kept == weight else 0.0
            d = ref[t] - now[t]
            kl = {"k1": -d, "k2": d * d / 2}.get(config.kl_estimator, math.exp(d) - d - 1)
            value += config.kl_coef * kl * (ratio if config.kl_estimator == "k3_unbiased" else 1)
            if config.variant in ("grpo", "gspo", "gmpo", "sapo"):
                total += value / length / len(LENGTHS)
            elif config.variant == "dr_grpo":
                total += value / (len(LENGTHS) * MAX_TOKENS)
            else:
                total += value / sum(LENGTHS)
    return total


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("cap", [0.0, 1.02])
def test_loss_is_the_written_equation(variant: str, kl: str, cap: float) -> None:
    config = LossConfig(variant, clip_low=0.1, clip_high=0.25, kl_coef=0.3, kl_estimator=kl, importance_cap=cap)
    tensors = batch()
    loss, metrics = ours(config, tensors)
    assert loss.item() == pytest.approx(by_hand(config, tensors), rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(loss.item())


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("rule", IMPORTANCE_RULES)
def test_weights_of_the_engine_are_the_written_equation(level: str, rule: str) -> None:
    """A range that some of the weights are in and some are not, on either side."""
    width = 0.005 if level == "geometric" else 0.02
    config = LossConfig(
        importance_level=level, importance_rule=rule, importance_floor=1 - width, importance_cap=1 + width
    )
    tensors = batch()
    loss, metrics = ours(config, tensors)
    assert loss.item() == pytest.approx(by_hand(config, tensors), rel=1e-5)
    assert 0 < metrics["importance_capped"].item() < 1


def test_a_frequent_token_is_held_and_a_rare_one_is_not_by_dppo() -> None:
    """Both ratios are far over any clip; the rare token's probability hardly moved."""
    rollout, now = torch.tensor([-0.9, -9.0]), torch.tensor([-0.1, -7.0], requires_grad=True)
    loss, _ = policy_loss(
        now, sequence_T=torch.tensor([0, 0]), advantages=torch.tensor([1.0]), config=LossConfig("dppo"),
        total_tokens=2, total_sequences=1, max_tokens=4, rollout_logprobs_T=rollout,
    )  # fmt: skip
    loss.backward()
    assert now.grad[0] == 0 and now.grad[1] == pytest.approx(-math.exp(2.0) / 2)


def test_a_loss_of_ones_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_loss.py").write_text(
        "from lingshu_rl.losses import LossVariant\n\n"
        "def reinforce(terms, config):\n"
        "    return terms.log_ratio_T.exp(), -terms.advantage_T * terms.logprobs_T\n\n"
        "PLAIN = LossVariant(reinforce, per='token', bounds=())\n"
    )
    monkeypatch.chdir(tmp_path)
    tensors = batch()
    loss, metrics = ours(LossConfig("own_loss:PLAIN", importance_cap=0.0), tensors, ref_logprobs_T=None)
    assert loss.item() == pytest.approx(
        -(tensors["now"] * torch.tensor(ADVANTAGES)[SEQUENCE]).sum().item() / sum(LENGTHS)
    )
    assert "clip_high" not in metrics
    for path, reason in (
        ("own_loss:reinforce", "not a lingshu_rl.losses.Variant"),
        ("own_loss:PLAN", "did you mean 'PLAIN'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_choices(load_config(None, [f"loss.variant={path}"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_of_any_split_add_up(variant: str) -> None:
    """1, 2 and 4 micro-batches: the same loss, gradient and metrics."""
    config = LossConfig(variant, kl_coef=0.1, importance_level="sequence")
    results = []
    for parts in ([[0, 1, 2, 3]], [[0, 2], [3, 1]], [[0], [1], [2], [3]]):
        tensors = batch()
        tensors["now"].requires_grad_()
        total, sums = 0.0, {}
        for part in parts:
            loss, metrics = ours(config, tensors, part, entropy_T=torch.ones(sum(LENGTHS[n] for n in part)))
            loss.backward()
            total += loss.item()
            for key, value in metrics.items():
                sums[key] = (
                    max(sums.get(key, 0.0), value.item()) if key.endswith("_max") else sums.get(key, 0) + value.item()
                )
        results.append((total, tensors["now"].grad, sums))
    for total, gradient, sums in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        assert torch.allclose(gradient, results[0][1], rtol=1e-5, atol=1e-8)
        assert sums == pytest.approx(results[0][2], rel=1e-5)
    assert results[0][2]["entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_that_of_the_policy(variant: str) -> None:
    """On the first step every variant is REINFORCE with its own weights: d loss / d logp_t = -w_t A_n."""
    tensors = batch()
    tensors["now"].requires_grad_()
    loss, metrics = ours(
        LossConfig(variant), tensors, old_logprobs_T=None, rollout_logprobs_T=None, ref_logprobs_T=None
    )
    loss.backward()
    assert metrics["ratio"].item() == pytest.approx(1.0)
    lengths = torch.tensor(LENGTHS)[SEQUENCE]
    weight = {
        "grpo": 1 / lengths / len(LENGTHS), "gspo": 1 / lengths / len(LENGTHS),
        "dr_grpo": torch.full_like(lengths, 1, dtype=torch.float) / (len(LENGTHS) * MAX_TOKENS),
        "dapo": torch.full_like(lengths, 1, dtype=torch.float) / sum(LENGTHS),
        "cispo": torch.full_like(lengths, 1, dtype=torch.float) / sum(LENGTHS),
        "dppo": torch.full_like(lengths, 1, dtype=torch.float) / sum(LENGTHS),
        "gmpo": 1 / lengths / len(LENGTHS), "sapo": 1 / lengths / len(LENGTHS),
    }[variant]  # fmt: skip
    assert torch.allclose(tensors["now"].grad, -weight * torch.tensor(ADVANTAGES)[SEQUENCE], rtol=1e-5)


def test_clipping_stops_the_gradient_except_in_cispo() -> None:
    tensors = {key: torch.full((sum(LENGTHS),), -1.0) for key in ("old", "rollout", "ref")}
    for variant in [name for name, one in VARIANTS.items() if one.bounds]:
        tensors["now"] = torch.zeros(sum(LENGTHS), requires_grad=True)  # ratio e, far above the clip
        loss, metrics = ours(LossConfig(variant, importance_cap=0.0), tensors, ref_logprobs_T=None)
        loss.backward()
        up = torch.tensor(ADVANTAGES)[SEQUENCE] > 0
        assert bool((tensors["now"].grad[up] == 0).all()) == (variant != "cispo")
        assert (tensors["now"].grad[~up] != 0).all()
        assert metrics["clip_high"].item() == pytest.approx(up.float().mean().item())


def test_importance_weights() -> None:
    tensors = batch()
    _, metrics = ours(LossConfig(importance_cap=1.01), tensors)
    gap = tensors["old"] - tensors["rollout"]
    assert metrics["importance_weight"].item() == pytest.approx(gap.exp().clamp(max=1.01).mean().item())
    assert metrics["importance_capped"].item() == pytest.approx((gap.exp() > 1.01).float().mean().item())
    assert metrics["importance_capped"].item() < 1


def test_kl_estimators_measure_and_pull() -> None:
    """k1 and k3 estimate the KL of the policy to the reference; the gradients of k2 and k3 at the reference are 0."""
    torch.manual_seed(0)
    policy, reference = torch.randn(6), torch.randn(6)
    p, q = policy.log_softmax(0), reference.log_softmax(0)
    exact = (p.exp() * (p - q)).sum().item()
    for name in ("k1", "k3"):
        assert (p.exp() * KL[name](p, q)).sum().item() == pytest.approx(exact, rel=1e-5)
    for name, slope in (("k1", 1.0), ("k2", 0.0), ("k3", 0.0)):
        x = torch.tensor([-1.0], requires_grad=True)
        KL[name](x, x.detach()).sum().backward()
        assert x.grad.item() == slope


def test_a_missing_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        ours(LossConfig(kl_coef=0.1), batch(), ref_logprobs_T=None)


def test_a_completion_without_tokens_is_harmless() -> None:
    loss, _ = policy_loss(
        torch.zeros(2, requires_grad=True), sequence_T=torch.tensor([1, 1]), advantages=torch.tensor([1.0, 1.0]),
        config=LossConfig("gspo"), total_tokens=2, total_sequences=2, max_tokens=4,
    )  # fmt: skip
    assert loss.item() == pytest.approx(-0.5)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"loss\.variant='ppo' is not one of grpo"):
        LossConfig("ppo")
    with pytest.raises(ValueError, match=r"loss\.kl_estimator='k4'"):
        LossConfig(kl_estimator="k4")
    with pytest.raises(ValueError, match="clip_low"):
        LossConfig(clip_low=1.5)
    with pytest.raises(ValueError, match="kl_coef"):
        LossConfig(kl_coef=-1.0)
    with pytest.raises(ValueError, match=r"loss\.importance_level='prompt'"):
        LossConfig(importance_level="prompt")
    with pytest.raises(ValueError, match=r"loss\.importance_rule='drop'"):
        LossConfig(importance_rule="drop")
    with pytest.raises(ValueError, match="importance_floor=3"):
        LossConfig(importance_floor=3.0)
    with pytest.raises(ValueError, match="soft_up=0"):
        LossConfig(soft_up=0)


def test_unbiased_k3_has_the_gradient_of_the_reverse_kl() -> None:
    """Summed over the whole distribution, i.e. the expectation over samples; plain k3 has another one."""
    torch.manual_seed(0)
    logits, reference = torch.randn(6), torch.randn(6).log_softmax(0)

    def gradient(estimator: str | None) -> Tensor:
        x = logits.clone().requires_grad_()
        p = x.log_softmax(0)
        if estimator is None:
            (p.exp() * (p - reference)).sum().backward()
            return x.grad
        config = LossConfig(kl_coef=1.0, kl_estimator=estimator)
        probabilities = p.detach().exp()
        for token in range(6):  # sampling token i has probability p_i
            loss, _ = policy_loss(
                p[token][None], sequence_T=torch.tensor([0]), advantages=torch.zeros(1), config=config, total_tokens=1,
                total_sequences=1, max_tokens=1, ref_logprobs_T=reference[token][None],
            )  # fmt: skip
            (loss * probabilities[token]).backward(retain_graph=True)
        return x.grad

    assert torch.allclose(gradient("k3_unbiased"), gradient(None), atol=1e-6)
    assert not torch.allclose(gradient("k3"), gradient(None), atol=1e-2)
    assert torch.allclose(gradient("k2"), gradient(None), atol=1e-6)
