"""Each check of the first batch fires for its own fault and for no other."""

from types import SimpleNamespace

import pytest
import torch

from lingshu_rl.config import load_config
from lingshu_rl.firstbatch import CheckError, blank_vision, check_first_batch, mean_kl
from lingshu_rl.state import RunState
from lingshu_rl.types import TokenGroup, TrainGroup

TRUE = torch.tensor([-1.0, -2.0, -0.5])
BLANK = TRUE - 1.5


class FakePolicy:
    """Knows the true log-probs, those without the image, and how wrong its shared rows are."""

    layout, dtype = "shared", torch.float32

    def __init__(self, shared_error=0.0, sees=True):
        self.shared_error, self.sees = shared_error, sees

    def logprobs(self, groups, layout=None):
        out = []
        for g in groups:
            blank = g.vision and not g.vision["pixel_values"].any()
            value = BLANK if blank or not self.sees else TRUE
            out.append((value + (0.0 if layout == "dense" else self.shared_error),))
        return out


def run_for(policy, *settings):
    said = []
    run = SimpleNamespace(
        config=load_config(None, settings), policy=policy, state=RunState(), progress=SimpleNamespace(say=said.append)
    )
    return run, said


def group(sampled=TRUE, reference=TRUE):
    vision = {"pixel_values": torch.ones(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    tokens = TokenGroup("q", (1, 2), ((3, 4, 5),), vision)
    return TrainGroup(tokens, (1.0,), (tuple(sampled.tolist()),), (reference,) if reference is not None else None)


def test_a_sound_batch_passes_and_is_reported():
    run, said = run_for(FakePolicy())
    check_first_batch(run, [group()])
    assert run.state.first_batch["kl_first_step"] < 1e-9 and run.state.first_batch["max_logprob_gap_first_step"] == 0
    assert run.state.first_batch["blank_gap_first_step"] == pytest.approx(1.5) and "blank_gap" in said[0]


@pytest.mark.parametrize(
    ("policy", "one", "message"),
    [
        (FakePolicy(), group(sampled=TRUE + 0.01), "trainer and engine log-probs differ by up to 0.01"),
        (FakePolicy(), group(reference=TRUE + 0.1), "the KL to the reference is"),
        (FakePolicy(), group(sampled=BLANK), "the image is lost"),
        (FakePolicy(sees=False), group(sampled=BLANK, reference=BLANK), "the image is lost"),
        (FakePolicy(shared_error=5e-4), group(), "shared rows differ from dense rows by 0.0005"),
    ],
)
def test_every_fault_stops_the_run_with_its_figure(policy, one, message):
    run, _ = run_for(policy)
    with pytest.raises(CheckError, match=message):
        check_first_batch(run, [one])


def test_on_failure_dense_falls_back_and_warn_goes_on():
    run, said = run_for(FakePolicy(shared_error=9e-4), "check.on_failure=dense", "check.max_kl=1e-3")
    check_first_batch(run, [group()])
    assert run.policy.layout == "dense" and "going on with dense rows" in said[-1]
    run, said = run_for(FakePolicy(), "check.on_failure=warn")
    check_first_batch(run, [group(sampled=TRUE + 0.01)])
    assert said[-1].startswith("WARNING: trainer and engine")


def test_limits_are_settings_and_bfloat16_has_its_own():
    run, _ = run_for(FakePolicy(), "check.max_logprob_gap=0.1")
    check_first_batch(run, [group(sampled=TRUE + 0.01)])
    policy = FakePolicy(shared_error=0.01)
    policy.dtype = torch.bfloat16
    run, _ = run_for(policy, "check.max_logprob_gap_bf16=0.05", "check.max_dense_gap=0.0")
    check_first_batch(run, [group(sampled=TRUE + 0.01)])


def test_without_a_reference_or_images_those_checks_are_left_out():
    run, _ = run_for(FakePolicy(), "loss.kl_coef=0")
    text = TrainGroup(TokenGroup("q", (1,), ((3, 4, 5),), {}), (1.0,), (tuple(TRUE.tolist()),), None)
    check_first_batch(run, [text])
    assert "blank_gap_first_step" not in run.state.first_batch


def test_kl_is_zero_for_equal_and_positive_for_unequal():
    assert mean_kl([[TRUE]], [[TRUE]]) == 0
    assert mean_kl([[TRUE]], [[TRUE + 0.1]]) > 0 and mean_kl([[TRUE]], [[TRUE - 0.1]]) > 0


def test_blank_vision_keeps_grids():
    out = blank_vision({"pixel_values": torch.ones(2, 2), "image_grid_thw": torch.tensor([[1, 2, 2]])})
    assert not out["pixel_values"].any() and out["image_grid_thw"].tolist() == [[1, 2, 2]]
