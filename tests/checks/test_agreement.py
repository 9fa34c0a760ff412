"""What is told and what ends the run when trainer and engine do not agree on a batch."""

import pytest
import torch

from lingshu_rl.checks.agreement import Agreement, CheckError, judge
from lingshu_rl.planning.given import load_config

TOKENS = 200


def found(**gaps):
    """Prompts by name with a constant gap in nats; each has two completions."""
    sampled_T = torch.linspace(-3, -0.1, TOKENS)
    return Agreement.of((name, sampled_T + gap, sampled_T) for name, gap in gaps.items() for _ in range(2))


def settings(*more):
    return load_config(None, [*more])


def test_metrics_are_over_all_tokens_of_all_prompts():
    agreement = found(a=0.0, b=0.5)
    assert agreement.metrics() == pytest.approx(
        {"rollout_gap": 0.25, "rollout_gap_p99": 0.5, "rollout_gap_max": 0.5, "rollout_gap_far": 0.0}
    )
    assert agreement.prompts["b"].mean == pytest.approx(0.5) and agreement.prompts["a"].max == 0.0


def test_rounding_is_not_told():
    assert judge(found(a=1e-5, b=2e-5), settings(), torch.float32, 0) == ""
    assert judge(found(a=0.05, b=0.02), settings(), torch.bfloat16, 0) == ""


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 0.02), (torch.bfloat16, 0.18)])
def test_an_engine_with_other_weights_ends_the_run(dtype, gap):
    wrong = found(a=gap, b=gap, c=gap)
    with pytest.raises(CheckError, match=r"differ in step 3, nats:.*nothing was learnt"):
        judge(wrong, settings(), dtype, 2)
    assert "differ in step 3" in judge(wrong, settings("check.on_failure=warn"), dtype, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_that_the_two_sides_see_differently_is_named(dtype):
    """One of 150 prompts: not enough for the batch's 99th percentile or mean."""
    others = {f"row-{i}": 1e-6 for i in range(149)}
    told = judge(found(odd=0.4, **others), settings(), dtype, 0)
    assert "1 of 150 prompts deviate: 'odd' (mean 0.4)" in told


def test_a_policy_one_update_ahead_of_its_engine_is_never_stopped():
    ahead = settings("train.max_staleness=1")
    assert judge(found(a=0.05), ahead, torch.float32, 0) == ""
    assert "prompts deviate" in judge(found(a=0.9), ahead, torch.float32, 0)


def test_a_log_prob_that_is_no_number_is_infinitely_far():
    with pytest.raises(CheckError, match="inf"):
        judge(found(a=float("nan")), settings(), torch.float32, 0)
