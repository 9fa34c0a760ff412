"""The update does not depend on how its tokens are dealt: packing, micro-batches, ranks."""

import json
import subprocess

import pytest
from launching import launch

from lingshu_rl.config import ConfigError, load_config
from lingshu_rl.policy import Policy, row_layout, share_rows

SCRIPT = """
import json, os, sys, torch
from deepspeed.utils import safe_get_full_grad
from lingshu_rl.config import load_config
from lingshu_rl.data.load import load
from lingshu_rl.model import PromptEncoder
from lingshu_rl.policy import Policy
from lingshu_rl.types import TokenGroup, TrainGroup

out, *settings = sys.argv[1:]
policy = Policy(load_config(None, settings), on_gpu=False)
encoder = PromptEncoder("demo")
random = torch.Generator().manual_seed(0)
groups = []
for prompt in load("demo:validation", instruction="short").prompts[:5]:
    ids, vision = encoder.encode(prompt)
    lengths = torch.randint(1, 12, (4,), generator=random).tolist()
    completions = tuple(tuple(torch.randint(20, 300, (n,), generator=random).tolist()) for n in lengths)
    logprobs = [torch.randn(n, generator=random) - 5 for n in lengths]
    advantages = tuple(torch.randn(4, generator=random).tolist())
    groups.append(TrainGroup(TokenGroup(prompt.id, ids, completions, vision), advantages,
                             tuple(tuple(l.tolist()) for l in logprobs), tuple(logprobs)))
# And two without an image: under ZeRO, ranks must agree on when the vision tower runs.
for n in (9, 95):
    tokens = TokenGroup(f"text {n}", tuple(range(20, 20 + n)), groups[0].tokens.completions, {})
    groups.append(TrainGroup(tokens, groups[0].advantages, groups[0].rollout_logprobs, groups[0].reference_logprobs))
found = {}
def capture():
    for name, parameter in policy.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        found[name] = gradient.clone() if gradient is not None else torch.zeros(1)
policy.engine.step = capture
metrics = policy.update(groups, 0)
if policy.rank == 0:
    torch.save(found, out)
    print(json.dumps({"loss": metrics["loss"], "rows": metrics["rows"]}))
"""


def gradient(tmp_path, *settings, processes=1):
    import torch

    script = tmp_path / "gradient.py"
    script.write_text(SCRIPT)
    out = tmp_path / f"g{abs(hash((settings, processes)))}.pt"
    import os

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done: subprocess.CompletedProcess[str] = launch([str(out), "loss.kl_coef=0.01", *settings], processes=processes, script=str(script), env=env)  # fmt: skip
    assert done.returncode == 0, done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"loss"'))
    return torch.load(out), json.loads(line)


@pytest.mark.slow
def test_gradients_are_equal_for_any_packing_and_any_ranks(tmp_path):
    base, told = gradient(tmp_path, "packing.token_budget=100000")
    assert told["rows"] == 1
    largest = {name: float(g.abs().max()) for name, g in base.items()}
    assert sum(v > 0 for v in largest.values()) > 0.9 * len(largest)
    cases = [
        (["packing.token_budget=120"], 1),
        (["packing.layout=dense"], 1),
        (["packing.token_budget=120"], 2),
        (["packing.token_budget=60", "deepspeed.zero_optimization.stage=1"], 2),
        (["packing.token_budget=120", "deepspeed.zero_optimization.stage=3"], 2),
    ]
    for settings, ranks in cases:
        other, info = gradient(tmp_path, *settings, processes=ranks)
        assert info["rows"] > 1 and info["loss"] == pytest.approx(told["loss"], rel=1e-4)
        for name, g in base.items():
            worst = float((g - other[name]).abs().max())
            assert worst <= 1e-4 * max(largest[name], 1e-6) + 1e-9, (settings, ranks, name, worst, largest[name])


class Row:
    def __init__(self, tokens, images=False):
        self.tokens, self.vision = tokens, {"pixel_values": 1} if images else {}


@pytest.mark.parametrize("sizes", [[5], [9, 1, 1, 1], [3, 3, 3, 3, 3], [7, 2, 6, 1, 1, 8, 4]])
@pytest.mark.parametrize("images", [lambda i: False, lambda i: True, lambda i: i % 3 == 0, lambda i: i == 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_are_dealt_once_and_ranks_run_the_same_parts_of_the_model(sizes, images, ranks):
    rows = [Row(n, images(i)) for i, n in enumerate(sizes)]
    shares = [share_rows(rows, rank, ranks) for rank in range(ranks)]
    counted = [row for share in shares for row, counts in share if counts]
    assert sorted(map(id, counted)) == sorted(map(id, rows))
    kinds = [[bool(row.vision) for row, _ in share] for share in shares]
    assert kinds[0] and all(kind == kinds[0] == sorted(kind) for kind in kinds)


def test_a_model_that_cannot_share_is_said_and_gets_rows_of_its_own():
    from transformers import CONFIG_MAPPING

    from lingshu_rl.families import model_spec

    plain, linear = model_spec(CONFIG_MAPPING["qwen3"]()), model_spec(CONFIG_MAPPING["qwen3_next"]())
    config = load_config()
    assert row_layout(config, plain, False) == ("shared", "")
    layout, note = row_layout(config, linear, False)
    assert layout == "dense" and "qwen3_next" in note and "linear_attention" in note
    assert row_layout(load_config(None, ["packing.layout=dense"]), linear, False) == ("dense", "")
    flex = load_config(None, ["packing.attention=flex"])
    assert row_layout(flex, plain, True) == ("shared", "")
    with pytest.raises(ConfigError, match="flex has no gradient on a CPU"):
        row_layout(flex, plain, False)


def test_learning_rate_warms_up_and_follows_its_schedule():
    def rates(schedule):
        policy = Policy.__new__(Policy)
        policy.config = load_config(
            None, ["train.lr=1.0", "train.warmup_steps=4", "train.steps=12", f"train.lr_schedule={schedule}"]
        )
        return [policy.lr_at(step) for step in range(12)]

    assert rates("constant") == [0.25, 0.5, 0.75, 1.0] + [1.0] * 8
    assert rates("linear")[4] == 1.0 and rates("linear")[8] == pytest.approx(0.5)
    assert rates("cosine")[8] == pytest.approx(0.5) and rates("cosine")[11] < 0.1


SEVERAL = (
    SCRIPT.replace(
        "policy.engine.step = capture",
        """
import lingshu_rl.logprobs as module
calls = []
def tower(*args): calls.append(1)
policy.module.model.visual.register_forward_hook(tower)
if os.environ.get("PIXELS"): module.with_image_features = lambda model, row: row
""",
    )
    .replace("torch.save(found, out)", "torch.save({n: t.clone() for n, t in policy.weights()}, out)")
    .replace('"rows": metrics["rows"]', '"rows": metrics["rows"], "tower": len(calls), "clip": metrics["ratio"]')
)


@pytest.mark.slow
def test_a_frozen_tower_runs_once_a_row_when_a_batch_takes_several_steps(tmp_path, monkeypatch):
    """And nothing else changes: the weights are those of a run that encodes the images in every pass."""
    monkeypatch.setattr("test_policy.SCRIPT", SEVERAL)
    settings = ["train.freeze=[model.visual]", "train.optimizer_steps=2", "packing.token_budget=120", "train.lr=1e-3"]
    kept, told = gradient(tmp_path, *settings)
    monkeypatch.setenv("PIXELS", "1")
    again, told_again = gradient(tmp_path, *settings, "checkpoint.every=7")
    assert told_again["tower"] == 2 * told["tower"] > 0
    assert told["loss"] == pytest.approx(told_again["loss"], rel=1e-5) and told["clip"] != 1.0
    for name, tensor in kept.items():
        assert float((tensor - again[name]).abs().max()) < 1e-5, name


CLIP = SCRIPT.replace(
    "policy.engine.step = capture", "before = {n: t.detach().clone() for n, t in policy.weights()}"
).replace('"rows": metrics["rows"]', '"rows": max(float((t - before[n]).abs().max()) for n, t in policy.weights())')


@pytest.mark.slow
def test_gradients_are_clipped_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("test_policy.SCRIPT", CLIP)
    _, free = gradient(tmp_path, "train.max_grad_norm=1.0")
    _, held = gradient(tmp_path, "train.max_grad_norm=1.0e-12")
    assert held["rows"] < 1e-2 * free["rows"]
