"""The plan against what is: DeepSpeed's bytes, saved activations, one measured GPU, published figures; and its verdicts."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from launching import ROOT, launch
from machines import machine

from lingshu_rl.cli import train_main
from lingshu_rl.model.shape import Stack, UnknownModelError, published, read_shape
from lingshu_rl.planning.given import load_config
from lingshu_rl.planning.memory import PolicyMemory, vocabulary_bytes
from lingshu_rl.planning.plan import (
    OFFLOAD,
    gpus_for_weights,
    made_to_fit,
    make_plan,
    report,
    rows_told,
    server_layout,
    what_helps,
    with_budget,
)
from lingshu_rl.processes.placement import GIB, Machine, Ranks

CONFIGS = ROOT / "recipes" / "configs"
PLANNED = sorted(p for p in CONFIGS.glob("*.yaml") if "sft" not in p.stem)
BIG = "Qwen/Qwen2.5-VL-7B-Instruct"


def memory(*settings, model="demo", ranks=2, on_gpu=False):
    config = load_config(None, [f"model={model}", *settings])
    shape = read_shape(config.model, config.train.freeze, config.train.lora)
    return PolicyMemory(config, shape, ranks, 2 if on_gpu else 4, on_gpu)


def planned(*settings, gpus=8, gb=80.0, ranks=None, nodes=1, file=None):
    here = ranks or gpus
    return make_plan(load_config(file, settings), Machine.assume(gpus, gb, nodes), Ranks(here, here * nodes))


# --- sizes of models


@pytest.mark.parametrize("name", published()["models"])
def test_published_configs_give_the_published_number_of_parameters(name):
    shape = read_shape(name)
    assert shape.parameters == shape.trained == published()["models"][name]["parameters"]
    assert "published config" in shape.source and shape.trains_vision and shape.trains_head and shape.vision.layers > 20


def test_what_is_trained_is_counted():
    frozen = read_shape("demo", freeze=["model.visual"])
    assert 0 < frozen.trained < frozen.parameters == read_shape("demo").parameters and not frozen.trains_vision
    adapters = read_shape("demo", lora={"r": 4, "target_modules": ["q_proj"]})
    assert adapters.trained == 4 * 4 * (128 + 128) and adapters.parameters == frozen.parameters + adapters.trained
    assert not adapters.trains_head and not adapters.trains_vision
    with pytest.raises(UnknownModelError, match="'nobody/nothing' is not on this machine"):
        read_shape("nobody/nothing")


def test_engines_are_spread_over_as_few_gpus_as_the_weights_need_and_the_heads_allow():
    sizes = {
        (BIG, 80): 1, (BIG, 24): 2, (BIG, 16): 2, (BIG, 12): 4,
        ("Qwen/Qwen2.5-VL-32B-Instruct", 80): 2, ("Qwen/Qwen2.5-VL-32B-Instruct", 48): 4,
        ("Qwen/Qwen2.5-VL-3B-Instruct", 24): 1, ("demo", 24): 1,
    }  # fmt: skip
    for (name, gb), expected in sizes.items():
        assert gpus_for_weights(read_shape(name), 2, machine(8, gb=gb)) == expected, (name, gb)
    assert [n for n in range(1, 9) if read_shape(BIG).divides(n)] == [1, 2, 4]  # 28 heads, 4 of keys, 16 of the tower


def test_evaluation_uses_all_gpus_by_copies_of_the_engine():
    def layout(count, *settings, model=BIG):
        devices, copies = server_layout(load_config(None, [f"model={model}", *settings]), machine(count, gb=80.0))
        return len(devices.gpus), copies

    assert layout(0) == (0, {}) and layout(1) == (1, {}) and layout(6) == (6, {"data_parallel_size": 6})
    assert layout(5, "rollout.vllm.tensor_parallel_size=2") == (4, {"data_parallel_size": 2})
    assert layout(3, model="nobody/nothing") == (3, {"data_parallel_size": 3})


# --- bytes that DeepSpeed holds


HALF_SUMS = (
    "deepspeed.data_types.grad_accum_dtype=bf16"  # what the paper and DeepSpeed's estimates count; here it is fp32
)


def test_states_are_those_of_the_zero_paper():
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters, 64 ranks: 31.4, 16.6 and 1.9 GB (10^9 bytes)."""
    for stage, expected in enumerate((31.4, 16.6, 1.9), start=1):
        policy = memory(f"deepspeed.zero_optimization.stage={stage}", HALF_SUMS, ranks=64, on_gpu=True)
        policy = replace(policy, shape=replace(policy.shape, parameters=int(7.5e9), trained=int(7.5e9)))
        held = policy.weight_bytes * policy.share(3) + policy.gradient_bytes + policy.optimizer_bytes
        assert held / 1e9 == pytest.approx(expected, abs=0.05)


def test_one_rank_in_float32_holds_nothing_twice():
    """Weights, two moments and a gradient of 4 bytes each; with two ranks, or offloaded, ZeRO's own buffers as well."""
    alone, pair = memory(ranks=1, on_gpu=False), memory(ranks=2, on_gpu=False)
    parts, four = alone.updating(), 4 * alone.shape.trained / GIB
    assert alone.stage == 0 and pair.stage == 2 and memory(*OFFLOAD, ranks=1, on_gpu=False).stage == 2
    assert parts["optimiser"] == pytest.approx(2 * four) and parts["gradients"] == pytest.approx(four)
    assert parts["buckets"] == 0 < pair.updating()["buckets"]
    assert pair.resting()["optimiser"] == pytest.approx(3 * four / 2)


def test_peaks_agree_with_deepspeeds_own_estimates():
    """Theirs is the states and the float32 gradients of the step; ours has also what the step puts together and takes."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    shape, few = read_shape(BIG), ["packing.token_budget=64", HALF_SUMS]
    for ranks in (1, 2, 8):
        for stage, offload, theirs in (
            (2, [], zero2(shape.parameters, ranks, 1, cpu_offload=False)[1]),
            (2, OFFLOAD, zero2(shape.parameters, ranks, 1, cpu_offload=True)[1]),
            (3, [], zero3(shape.parameters, shape.largest, ranks, 1, cpu_offload=False, cpu_offload_params=False, zero_init=True)[1]),
        ):  # fmt: skip
            stage_is = f"deepspeed.zero_optimization.stage={stage}"
            parts = memory(*few, stage_is, *offload, model=BIG, ranks=ranks, on_gpu=True).updating()
            ours = sum(
                gb for name, gb in parts.items() if name not in ("activations", "vocabulary", "buckets", "gathered")
            )
            assert 0.75 < ours * GIB / theirs < 1.35, (stage, ranks, parts)


@pytest.mark.slow
def test_weights_gradients_and_optimiser_state_are_exact(tmp_path):
    """Two gloo ranks, stages 1 to 3, LoRA and offload: what DeepSpeed holds before a step, to the byte."""
    stages = [[f"deepspeed.zero_optimization.stage={n}"] for n in (1, 2, 3)]
    more = [["train.lora={r: 4, target_modules: [q_proj, v_proj]}"], [*OFFLOAD]]
    cases = [["loss.kl_coef=0.01", *case] for case in (*stages, *more)]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = launch([str(file)], processes=2, script=str(ROOT / "tests" / "plan_cases.py"), env=env)
    assert done.returncode == 0, done.stdout
    decoder, told, place = json.JSONDecoder(), [], 0
    while (place := done.stdout.find('{"case"', place)) >= 0:  # the ranks write at once
        found, place = decoder.raw_decode(done.stdout, place)
        told.append(found)
    assert len(told) == 2 * len(cases)
    for line in told:
        policy = memory(*line["case"])
        assert line["weights"] == policy.weight_bytes * policy.share(3), line
        assert line["optimizer"] == policy.optimizer_bytes, line
        if policy.stage == 1:
            continue  # reduced and let go before the step, where it is measured
        assert line["gradients"] == (0 if policy.offloads("optimizer") else policy.gradient_bytes), line


# --- activations


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_within_a_tenth_and_recomputed_ones_within_two_fifths(family, dtype, recompute):
    """Bytes that autograd keeps of a row; the layers' inputs alone when they are computed again."""
    import torch
    from tiny_models import build, group

    from lingshu_rl.model.logprobs import completion_logprobs
    from lingshu_rl.model.packing import pack
    from lingshu_rl.model.shape import _text_stack

    size = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "num_hidden_layers": 12}
    if family != "llama":
        size["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    if family == "qwen2_5_vl":
        size["layer_types"] = ["full_attention"] * 12
    if family == "qwen3_vl":
        size["rope_parameters"]["mrope_interleaved"] = True
    model = build(family, **size).to(getattr(torch, dtype))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    row = pack([group(family, "a", [60] * 5, text=300)], model, 4096)[0]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor):
        block = tensor.untyped_storage()
        if block.data_ptr() not in own:
            kept[block.data_ptr()] = block.nbytes()
            alive.append(tensor)  # so that no other block gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_logprobs(model, row, entropy=True)
    stack = _text_stack(model.config.get_text_config(), [name for name, _ in model.named_parameters()])
    number = 4 if dtype == "float32" else 2
    layers = (stack.layers + 1) * stack.hidden * number if recompute else stack.layers * stack.saved_numbers(number, 4)
    factor = 1.4 if recompute else 1.1
    assert 1 / factor < sum(kept.values()) / (row.tokens * layers) < factor


def test_the_peak_measured_on_an_h100_is_met():
    """benchmarks/baselines/gpu_check.json: what log-probs, loss and backward of one shared row took above the weights.

    0.75 billion parameters in bfloat16, nothing recomputed. Half of the plan's row is an image; the measured row had
    fewer or more image tokens, so the difference is added.
    """
    text, vision = Stack(28, 1024, 16, 4, 64, 4096, gated=True), Stack(16, 768, 12, 12, 64, 3072, gated=True)
    for case in json.loads((ROOT / "benchmarks" / "baselines" / "gpu_check.json").read_text())["speed"]:
        tokens = case["prompt_tokens"] + case["group_size"] * (case["completion_tokens"] - 1)
        shape = replace(read_shape("demo"), text=text, vision=vision, vocab=151_936, parameters=case["parameters"])
        policy = memory("train.gradient_checkpointing=false", f"packing.token_budget={tokens}", on_gpu=True)
        parts = replace(policy, shape=shape).activations()
        images = (case["image_tokens"] - tokens // 2) * shape.patches * (vision.layers + 1) * vision.saved_numbers(2, 4)
        measured = case["ways"]["shared_sdpa"]["peak_mb"] * 2**20
        assert 0.8 < measured / (sum(parts.values()) + images) < 1.25, (case["group_size"], parts, images)


def test_the_vocabularys_chunk_is_bounded():
    shape = read_shape(BIG)
    head = shape.vocab * shape.text.hidden * 6
    assert vocabulary_bytes(shape, 10**6, 2, on_gpu=True) == 2**27 * 10 + head
    assert vocabulary_bytes(shape, 100, 2, on_gpu=True) == 100 * shape.vocab * 10 + head


# --- tokens of a row


def budget(longest, *settings, machine=None):
    config = load_config(None, [f"model={BIG}", "packing.token_budget=0", *settings])
    machine = machine or Machine.assume(8)
    sized = with_budget(config, longest, machine, Ranks(4, 4))
    return sized.packing.token_budget, list(rows_told(sized, longest))


GOAL = ["train.group_size=16", "rollout.max_tokens=1024"]


@pytest.mark.parametrize(
    ("longest", "settings", "expected"),
    [
        (600, ["train.group_size=8", "rollout.max_tokens=64"], 8192),  # several groups fill it
        (4100, ["train.group_size=8", "rollout.max_tokens=1024"], 4100 + 8 * 1024),
        (1400, GOAL, 1400 + 8 * 1024),  # the prompt twice: 8 % more
        (300, GOAL, 8192),
        (9000, ["train.group_size=8", "rollout.max_tokens=64"], 9000 + 8 * 64),
    ],
)
def test_a_group_of_the_longest_prompt_fills_few_rows(longest, settings, expected):
    chosen, told = budget(longest, *settings)
    assert chosen == expected and len(told) == 1 and f"{expected:,} tokens" in told[0]


def test_rows_are_no_larger_than_the_devices_hold():
    settings = ["train.group_size=16", "rollout.max_tokens=8192", "train.gradient_checkpointing=false"]
    large, _ = budget(30_000, *settings, machine=Machine.assume(8, 2000.0))
    small, told = budget(30_000, *settings)
    assert large == 30_000 + 16 * 8192 > small >= 30_000 + 8192
    config = load_config(None, [f"model={BIG}", f"packing.token_budget={small}", *settings])
    more = replace(config, packing=replace(config.packing, token_budget=large))
    assert not make_plan(more, Machine.assume(8), Ranks(4, 4)).fits
    assert "times the tokens of one" in told[0]


def test_a_given_budget_stays_and_one_that_repeats_prompts_is_warned_of():
    """A prompt of 4,100 tokens at 4,096: eight rows for eight short completions."""
    given = ["packing.token_budget=4096", "train.group_size=8", "rollout.max_tokens=16"]
    chosen, told = budget(4100, *given)
    assert (
        chosen == 4096 and "fill 8 of them, 7.79 times the tokens" in told[0] and told[1].startswith("WARNING: packing")
    )
    assert len(budget(1000, *given)[1]) == 1 and not budget(4100, *given, "packing.layout=dense")[1]


# --- verdicts


def first_command():
    """The settings of the README's first training command."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    line = next(
        line for line in text.splitlines() if line.startswith("accelerate launch recipes/grpo_medvqa.py model=")
    )
    return [word for word in shlex.split(line) if "=" in word]


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 0])
def test_the_readmes_first_command_starts(gpus, ranks):
    """accelerate starts a rank a GPU, or one with --num_processes 1; on cards of 80 GB."""
    config = load_config(None, first_command())
    plan = make_plan(config, Machine.assume(gpus), Ranks(ranks or gpus, ranks or gpus))
    config, _ = made_to_fit(config, plan)
    plan = make_plan(config, plan.machine, plan.ranks)
    assert plan.fits, "\n".join(plan.lines(config))
    assert not plan.placement.idle.gpus and plan.placement.colocated == (plan.ranks.here == gpus)


def test_the_optimiser_goes_to_the_host_only_where_that_makes_room():
    big = load_config(None, ["model=Qwen/Qwen2.5-VL-3B-Instruct"])
    here = Machine.assume(1)
    offloaded, said = made_to_fit(big, make_plan(big, here, Ranks()))
    assert offloaded.deepspeed["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert "kept on the host" in said and "offload_optimizer" not in big.deepspeed["zero_optimization"]
    assert make_plan(offloaded, here, Ranks()).host_gb == pytest.approx(3754622976 * 16 / GIB)
    same, said = made_to_fit(big, make_plan(big, Machine.assume(1, 24.0), Ranks()))
    assert same is big and "what would help" in said
    fits = load_config()
    assert made_to_fit(fits, make_plan(fits, Machine.assume(1), Ranks())) == (fits, "")


@pytest.mark.parametrize("file", PLANNED, ids=lambda p: p.stem)
def test_shipped_recipes_fit_the_machine_they_name_and_leave_no_gpu_idle(file, capsys):
    assert train_main(["--dry-run", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert "(devices.assume)" in out and "DOES NOT FIT" not in out and "# devices: idle" not in out and " GB (" in out


def test_what_does_not_fit_is_marked_and_what_helps_is_told(capsys):
    settings = [f"model={BIG}", "packing.token_budget=131072", "devices.assume={count: 8, memory_gb: 80}"]
    assert train_main(["--dry-run", *settings]) == 1
    out = capsys.readouterr().out
    helps = [line for line in out.splitlines() if line.startswith("#   ")]
    assert "DOES NOT FIT" in out and "what would help" in out and "packing.token_budget=4096: policy" in helps[0]
    for line in helps:  # each was planned, and holds
        words = shlex_settings(line[4:].rsplit(": ", 1)[0])
        assert line.startswith("#   --num_processes") or train_main(["--dry-run", *settings, *words]) == 0, line
    capsys.readouterr()
    hopeless = list(
        what_helps(load_config(None, ["model=Qwen/Qwen2.5-VL-32B-Instruct"]), Machine.assume(1, 16.0), Ranks())
    )
    assert len(hopeless) == 1 and "more or larger GPUs" in hopeless[0]


def shlex_settings(line):
    """ "a=1 b={c: 2, d: 3}" -> ["a=1", "b={c: 2, d: 3}"]"""
    words = []
    for word in line.split(" "):
        if "=" in word:
            words.append(word)
        else:
            words[-1] += " " + word
    return words


def test_each_help_is_found_where_it_is_one():
    cases = {
        "train.gradient_checkpointing=true": (8, ["train.gradient_checkpointing=false", "packing.token_budget=8192"]),
        "packing.token_budget=4096": (8, ["packing.token_budget=131072"]),
        "deepspeed.zero_optimization.stage=3": (8, ["deepspeed.zero_optimization.stage=1", "packing.token_budget=16384"]),
        "rollout.vllm.max_model_len=4096": (8, ["rollout.vllm.max_model_len=1000000"]),
        "loss.kl_coef=0": (8, ["packing.token_budget=24576"]),
        "--num_processes 4 rollout.placement=auto": (2, ["devices.rollout=[7]"]),  # more ranks share the state
        "--num_processes 6 rollout.placement=auto": (8, ["model=Qwen/Qwen2.5-VL-32B-Instruct", "loss.kl_coef=0",
                                                         "deepspeed.zero_optimization.stage=3", *OFFLOAD]),
    }  # fmt: skip
    for help_, (ranks, settings) in cases.items():
        config, here = load_config(None, [f"model={BIG}", *settings]), Machine.assume(8)
        assert not make_plan(config, here, Ranks(ranks, ranks)).fits, help_
        helps = list(what_helps(config, here, Ranks(ranks, ranks)))
        assert any(line.startswith(help_) for line in helps), (help_, helps)


def test_a_colocated_engine_gets_what_the_policy_and_the_reference_leave():
    alone = planned(
        "model=Qwen/Qwen2.5-VL-3B-Instruct", "loss.kl_coef=0", "train.lora={r: 8, target_modules: all-linear}", gpus=1
    )
    shared = planned("model=Qwen/Qwen2.5-VL-3B-Instruct", "train.lora={r: 8, target_modules: all-linear}", gpus=1)
    full = planned("model=Qwen/Qwen2.5-VL-3B-Instruct", gpus=8)
    assert 0.9 >= alone.engine_share > shared.engine_share > 0.5 and alone.engine_share > full.engine_share
    assert all(load.total <= load.room for plan in (alone, shared, full) for load in plan.loads)
    given = planned("model=Qwen/Qwen2.5-VL-3B-Instruct", "rollout.vllm.gpu_memory_utilization=0.3", gpus=8)
    assert given.engine_share == 0.3
    server = planned("model=Qwen/Qwen2.5-VL-3B-Instruct", gpus=4, ranks=2)
    assert not server.placement.colocated and server.engine_share == 0.9 and server.cache_tokens > 10**6


def test_a_plan_counts_the_ranks_that_the_launcher_started(monkeypatch, capsys):
    """The dry run of a launched command says what all ranks hold, once."""
    monkeypatch.setattr("lingshu_rl.planning.plan.this_machine", lambda: machine(8, "0,1,2,3,4,5,6,7"))
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    lines, fits = report(load_config(None, [f"model={BIG}", "devices.assume={count: 1}"]))
    assert fits and "8 GPU(s) of 80 GB, 16 policy rank(s)" in lines[0] and "devices.assume" not in lines[0]
    monkeypatch.setenv("RANK", "3")
    assert train_main(["--dry-run", f"model={BIG}"]) == 0 and capsys.readouterr().out == ""


def test_the_plan_of_a_cpu_and_of_an_unknown_model():
    lines, fits = report(load_config())
    assert fits and "the CPU, 1 policy rank(s)" in lines[0] and any("rollout on cpu" in line for line in lines)
    lines, fits = report(load_config(None, ["model=nobody/nothing"]))
    assert fits and "sizes are unknown" in lines[-1] and "devices: policy: cpu" in lines


@pytest.mark.parametrize("gpus", [0, 2])
def test_what_runs_elsewhere_is_not_planned(gpus):
    urls = ["rollout.urls=[http://a]", "reference.urls=[http://b]"]
    plan = make_plan(load_config(None, urls), machine(gpus), Ranks(2, 2))
    assert [load.group for load in plan.loads] == ["policy"] and plan.fits and not plan.cache_tokens
    one = make_plan(load_config(None, urls[:1]), machine(gpus), Ranks())
    assert [load.group for load in one.loads] == ["policy", "reference"]
    ray = make_plan(load_config(None, ["cluster=ray"]), machine(gpus), Ranks(2, 2))
    assert [load.group for load in ray.loads] == ["policy", "rollout", "reference"]


def test_planning_loads_no_weights_and_needs_no_network():
    code = (
        "import sys; from lingshu_rl.cli import train_main; "
        f"code = train_main(['--dry-run', '--config', {str(CONFIGS / 'lingshu_32b_2x8.yaml')!r}]); "
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 4000  # MiB; the weights would be 63,000


@pytest.mark.parametrize("gpus", [0, 4])
def test_the_judges_server_is_counted(gpus):
    def load(*settings):
        return next(x for x in planned("judge.model=demo", *settings, gpus=gpus, ranks=1).loads if x.group == "judge")

    assert load().phase == "judging" and load().parts["weights"] > 0 and load().fits
    if gpus:
        assert load("judge.vllm={gpu_memory_utilization: 0.5}").total < load().total
    assert not [x for x in planned(gpus=gpus, ranks=1).loads if x.group == "judge"]
