"""The update does not depend on how its tokens are dealt: packing, micro-batches, ranks."""

import json
import os

import pytest
from launching import ROOT, launch

from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import Policy, require_ranks, row_layout, share_rows


def updates(tmp_path, cases, kept, processes=0):
    """(tensors, figures) of one update for every case, a list of settings; all in one launch (policy_cases.py)."""
    import torch

    told = [
        {
            "settings": ["loss.kl_coef=0.01", *settings],
            "kept": kept,
            "out": str(tmp_path / f"{processes}-{n}.pt"),
            **dict.fromkeys(marks, True),
        }
        for n, (settings, *marks) in enumerate(cases)
    ]
    file = tmp_path / f"cases-{processes}.json"
    file.write_text(json.dumps(told))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    done = launch([str(file)], processes=processes, script=str(ROOT / "tests" / "policy_cases.py"), env=env)
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "built").exists()  # no operator was compiled
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert [line["case"] for line in lines] == [case["out"] for case in told]
    return [(torch.load(case["out"]), line) for case, line in zip(told, lines, strict=True)]


@pytest.mark.slow
def test_gradients_are_equal_for_any_packing_and_any_ranks(tmp_path):
    """Nor on whether the images come with the groups or each rank reads those of its own rows."""
    one = [["packing.token_budget=100000"], ["packing.token_budget=120"],
           ["packing.layout=dense", "packing.token_budget=120"]]  # fmt: skip
    two = [["packing.token_budget=120"], ["packing.token_budget=60", "deepspeed.zero_optimization.stage=1"],
           ["packing.token_budget=120", "deepspeed.zero_optimization.stage=3"]]  # fmt: skip
    (base, told), *others = updates(tmp_path, [[one[0], "pixels"], *([case] for case in one[1:])], "gradient")
    others += updates(tmp_path, [[two[0], "late", "saved"], *([case] for case in two[1:])], "gradient", processes=2)
    assert told["rows"] == 1
    assert told["message"] > 1_000_000 > 20_000 > others[-1][1]["message"]  # bytes
    assert sum(bool(g.any()) for g in base.values()) > 0.9 * len(base)
    for settings, (other, info) in zip(one[1:] + two, others, strict=True):
        assert info["rows"] > 1 and info["loss"] == pytest.approx(told["loss"], rel=1e-4)
        assert_same_gradient(base, other, settings)
    saved = tmp_path / "2-0"
    require_ranks(saved, 2)
    with pytest.raises(
        ConfigError, match=r"was saved by 2 policy rank\(s\) and this launch has 3.*--num_processes 2.*model="
    ):
        require_ranks(saved, 3)


def assert_same_gradient(expected, found, where):
    for name, g in expected.items():
        worst, largest = float((g - found[name]).abs().max()), float(g.abs().max())
        assert worst <= 1e-4 * max(largest, 1e-6) + 1e-9, (where, name, worst, largest)


OFFLOAD = ["deepspeed.zero_optimization.offload_optimizer.device=cpu", "deepspeed.zero_force_ds_cpu_optimizer=false"]


@pytest.mark.slow
def test_a_steps_gradient_holds_nothing_of_the_step_before(tmp_path):
    """Rows of text come first or alone, so the vision tower's gradient is the one that DeepSpeed could leave standing."""
    still = ["train.lr=1e-12", "packing.token_budget=120"]
    three, two = "deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.stage=2"
    mixed = [[still], [[*still, three], "again"], [[*still, two, *OFFLOAD], "again"], [still, "refused"]]
    text = [[still, "text"], [[*still, three], "text", "again"], [[*still, three, *OFFLOAD], "text", "again"],
            [still, "text", "refused"]]  # fmt: skip
    found = updates(tmp_path, mixed + text, "gradient")
    for kind, cases in ((found[:4], mixed), (found[4:], text)):
        assert any("visual" in name and g.any() for name, g in kind[0][0].items()) == (cases is mixed)
        for (settings, *_), (gradient, _) in zip(cases[1:], kind[1:], strict=True):
            assert_same_gradient(kind[0][0], gradient, settings)


@pytest.mark.slow
def test_one_rank_steps_as_two_do_also_where_no_row_reached(tmp_path):
    """It has no ZeRO, which steps the vision tower on by its momentum after a batch of text; nor DeepSpeed's norm."""
    import torch

    case = [["train.lr=1e-4", "packing.token_budget=120"], "again", "text"]
    ((one, told),) = updates(tmp_path, [case], "weights")
    ((two, other),) = updates(tmp_path, [case], "weights", processes=2)
    assert (told["zero_stage"], other["zero_stage"]) == (0, 2)
    assert told["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for part in ("visual", "language_model"):
        apart = torch.cat([(one[name] - two[name]).flatten() for name in one if part in name])
        assert apart.numel() > 1000 and apart.norm() < 0.05 * 1e-4 * apart.numel() ** 0.5, part


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

    from lingshu_rl.model.families import model_spec

    plain, linear = model_spec(CONFIG_MAPPING["qwen3"]()), model_spec(CONFIG_MAPPING["jamba"]())
    config = load_config()
    assert row_layout(config, plain, False) == ("shared", "")
    layout, note = row_layout(config, linear, False)
    assert layout == "dense" and "jamba" in note and "linear_attention" in note
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


@pytest.mark.slow
def test_a_frozen_tower_runs_once_a_row_when_a_batch_takes_several_steps(tmp_path):
    """And nothing else changes: the weights are those of a run that encodes the images in every pass."""
    settings = ["train.freeze=[model.visual]", "train.optimizer_steps=2", "packing.token_budget=120", "train.lr=1e-3"]
    (kept, told), (again, told_again) = updates(tmp_path, [[settings], [settings, "encode_always"]], "weights")
    assert told_again["tower"] == 2 * told["tower"] > 0
    assert told["loss"] == pytest.approx(told_again["loss"], rel=1e-5) and told["ratio"] != 1.0
    for name, tensor in kept.items():
        assert float((tensor - again[name]).abs().max()) < 1e-5, name


@pytest.mark.slow
def test_gradients_are_clipped_at_the_limit(tmp_path):
    cases = [[["train.max_grad_norm=1.0"]], [["train.max_grad_norm=1.0e-12"]]]
    (_, free), (_, held) = updates(tmp_path, cases, "weights")
    assert held["moved"] < 1e-2 * free["moved"]
