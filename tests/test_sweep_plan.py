"""What a sweep file means, and what is refused."""

import json

import pytest
from launching import ROOT

from lingshu_rl.planning.given import load_config
from lingshu_rl.sweep.plan import SweepError, differences, load_sweep, parse_sweep, select

GRID = {"name": "g", "seeds": [3, 5], "axes": {"loss.kl_coef": [0, 0.001], "train.group_size": [4, 8]}}


def test_a_grid_is_every_combination_times_seeds():
    sweep = parse_sweep(GRID)
    assert [v.name for v in sweep.variants] == ["kl_coef=0 group_size=4", "kl_coef=0 group_size=8", "kl_coef=0.001 group_size=4", "kl_coef=0.001 group_size=8"]  # fmt: skip
    runs = sweep.runs()
    assert len(runs) == 8 and len({r.folder for r in runs}) == 8
    assert [r.seed for r in runs] == [3] * 4 + [5] * 4  # cut short, all variants have been compared
    assert set(runs[1].overrides) >= {"loss.kl_coef=0", "train.group_size=8", "seed=3"}
    assert sweep.baseline == "kl_coef=0 group_size=4"
    assert differences(sweep.variants[3], sweep.variants[0]) == {"loss.kl_coef": 0.001, "train.group_size": 8}


def test_the_baseline_by_place_or_by_name():
    placed = parse_sweep({**GRID, "baseline": {"loss.kl_coef": 0.001, "train.group_size": 8}})
    assert placed.baseline == "kl_coef=0.001 group_size=8"
    named = parse_sweep({"variants": {"a": None, "b": {"train": {"lr": 1e-5}}}, "baseline": "b"})
    assert named.baseline == "b" and named.variant("b").settings == {"train.lr": 1e-5}


def test_an_axis_of_named_settings_and_the_training_command_read_them_alike():
    spec = {"parts": {"answer": {"class": "OptionLetter"}, "format": {"class": "ThinkAnswerFormat", "gate": 1.0}}}
    sweep = parse_sweep({
        "base": {"train": {"steps": 7, "lr": 1e-5}, "rollout": {"vllm": {"max_model_len": 64}}},
        "axes": {"rewards": {"plain": None, "gate": {"rewards.spec": spec}}, "train.group_size": [2, 4]},
        "seeds": 1,
    })  # fmt: skip
    run = next(r for r in sweep.runs() if r.variant.name == "rewards=gate group_size=4")
    config = load_config(None, run.overrides)
    assert config.rewards.spec == spec and config.train.steps == 7 and config.train.lr == 1e-5
    assert config.rollout.vllm == {"max_model_len": 64} and config.run.dir == str(run.folder)


def test_select_by_variant_and_by_run():
    runs = parse_sweep(GRID).runs()
    assert len(select(runs, ["kl_coef=0_*"])) == 4
    assert [r.name for r in select(runs, ["*size=8/seed-5"])] == ["kl_coef=0_group_size=8/seed-5", "kl_coef=0.001_group_size=8/seed-5"]  # fmt: skip
    with pytest.raises(SweepError, match=r"'nope' matches no run; variants are kl_coef=0"):
        select(runs, ["nope"])


def test_settings_of_the_command_line_go_over_the_base(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text("base: {train.steps: 100}\naxes:\n  train.lr: [1e-5, 2e-5]\n")
    sweep = load_sweep(file, ["train.steps=5", "eval.limit=8"])
    assert sweep.name == "short" and sweep.base == {"train.steps": 5, "eval.limit": 8}
    assert load_config(None, sweep.runs()[1].overrides).train.steps == 5


def test_a_setting_inside_a_mapping_leaves_the_rest_of_it(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text("base: {deepspeed: {gradient_clipping: 0.5}}\naxes:\n  train.lr: [1e-5, 2e-5]\n")
    sweep = load_sweep(file, ["deepspeed.zero_optimization.stage=1"])
    held = load_config(None, sweep.runs()[0].overrides).deepspeed
    assert held["gradient_clipping"] == 0.5 and held["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("content, words", [
    ({"axis": {}, "variants": {"a": None, "b": None}}, r"unknown key 'axis' in sweep file \(did you mean 'axes'"),
    ({}, "nothing to compare"),
    ({"axes": {"train.lr": [1e-5]}}, r"axes.train.lr needs at least two values"),
    ({"axes": {"train.lr": 3}}, r"axes.train.lr must be a list"),
    ({"axes": {"train.lr": [1, 1]}}, "holds a value twice"),
    ({"axes": {"seed": [1, 2]}}, "list them under `seeds`"),
    ({"variants": {"a": {"run.dir": "x"}, "b": None}}, "sets run.dir, which the sweep sets"),
    ({"variants": {"a b": None, "a_b": None}}, "would share the folder 'a_b'"),
    ({"variants": {"a": None, "b": {"train.lrr": 1}}}, r"variant 'b': unknown key 'train.lrr'.*did you mean 'train.lr'"),
    ({"variants": {"a": None, "b": {"train.group_size": 1}}}, r"variant 'b': train.group_size=1 gives every advantage 0"),
    ({**GRID, "baseline": "no"}, "baseline 'no' is none of the variants"),
    ({**GRID, "seeds": 0}, "seeds=0"),
    ({**GRID, "seeds": [1, 1]}, "names a seed twice"),
    ({**GRID, "devices": [[0, 1], [1, 2]]}, r"device sets \[0, 1\] and \[1, 2\] overlap"),
    ({**GRID, "devices": ["gpu"]}, "devices='gpu': use auto"),
    ({**GRID, "timeout_s": -1}, "timeout_s=-1 must be a number above 0"),
    ({"axes": {"train.lr": [1, 2], "b": {"x": {"train.lr": 1}, "y": None}}}, "two axes set train.lr"),
    ({"search": {"trials": 3, "space": {}}}, "search.space is empty"),
    ({"search": {"space": {"train.lr": [1, 2]}}}, "search.trials"),
    ({"search": {"trials": 2, "space": {"train.lr": {"low": 2, "high": 1}}}}, "low < high"),
    ({"search": {"trials": 2, "method": "grid", "space": {"train.lr": [1, 2]}}}, "is not one of random, tpe"),
    ({"search": {"trials": 2, "space": {"train.lr": [1, 2]}}, "axes": {"a": [1, 2]}}, "search stands alone"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_by_key(content, words):
    with pytest.raises(SweepError, match=words):
        parse_sweep(content)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SweepError, match="does not exist"):
        load_sweep(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(SweepError, match="keys and values"):
        load_sweep(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(SweepError, match="not readable YAML"):
        load_sweep(tmp_path / "bad.yaml")


def test_the_ready_sweeps_are_valid_and_short():
    files = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
    wanted = {"kl_and_group_size", "losses", "reward_composition", "prompt_sharing", "difficulty"}
    assert wanted <= {f.stem for f in files}
    for file in files:
        sweep = load_sweep(file)
        assert sweep.question and sweep.seconds_per_run
        for run in sweep.runs():
            config = load_config(sweep.config, run.overrides)
            assert config.model == "demo" and config.train.steps <= 40, file
            assert json.dumps(run.overrides)
