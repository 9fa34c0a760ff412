import re
from pathlib import Path

import pytest
from machines import machine
from omegaconf import OmegaConf

from lingshu_rl.cli import train_main
from lingshu_rl.config import Config
from lingshu_rl.failures import ConfigError
from lingshu_rl.names import TRL, VERL
from lingshu_rl.planning.engine_options import faults, vllm_options
from lingshu_rl.planning.given import REAL_RUN, load_config
from lingshu_rl.planning.validation import TRACKERS
from lingshu_rl.processes.placement import parse_devices
from lingshu_rl.settings import flat, read_config, to_yaml
from lingshu_rl.sft.settings import load_sft_config

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def test_defaults_then_file_then_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {lr: 1.0e-4, steps: 7}\nrollout: {vllm: {max_model_len: 99}}\n")
    config = load_config(file, ["train.steps=9", "devices.rollout=[1,2]", "rollout.vllm.seed=3"])
    assert (config.train.lr, config.train.steps, config.devices.rollout) == (1e-4, 9, [1, 2])
    assert config.rollout.vllm == {"max_model_len": 99, "seed": 3}
    assert config.train.group_size == Config().train.group_size


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", "unknown key 'train.learning_rate'"),
        ("trian.lr=1", "did you mean 'train"),
        ("lr=1e-4", "did you mean 'train.lr'"),
        ("train.lr=fast", "bad value for 'train.lr'"),
        ("train.lr", "not of the form key=value"),
        ("train.group_size=1", "train.group_size=1"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.lr=0", "train.lr"),
        ("train.dtype=fp8", "train.dtype='fp8' is not one of"),
        ("train.lr_schedule=cosin", "did you mean 'cosine'"),
        ("loss.kl_coef=-1", "loss.kl_coef"),
        ("loss.variant=ppo", "loss.variant='ppo' is not one of"),
        ("packing.layout=ragged", "packing.layout"),
        ("eval.controls=[blurred]", "eval.controls"),
        ("data.curriculum=hard", "data.curriculum='hard' is not one of"),
        ("rewards.executor=thread", "rewards.executor"),
        ("rewards.max_failed_share=2", "rewards.max_failed_share"),
        ("check.on_failure=shrug", "check.on_failure"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("rollout.weight_transfer=ipc", "rollout.weight_transfer"),
        ("deepspeed.zero_optimization.stage=4", "stage=4"),
        ("deepspeed.zero_optimization.stage=0", "stage=0 must be 1, 2 or 3"),
        ("run.dir=''", "must be set"),
        ("train.gradient_checkpointing=maybe", "train.gradient_checkpointing='maybe' is not one of"),
        ("rollout.placement=colocated", "did you mean 'colocate'"),
        ("devices.assume={gpus: 8}", "devices.assume='gpus' is not one of count, memory_gb, nodes"),
        ("devices.assume={count: 0}", "devices.assume.count=0 must be"),
        ("devices.assume={count: 1.5}", "devices.assume.count=1.5 must be a whole number"),
        (
            "devices.assume={count: 100000000}",
            "devices.assume.count=100000000 must be a whole number above 0, at most 1,024",
        ),
        ("devices.assume={memory_gb: true}", "devices.assume.memory_gb=True must be a number"),
        ("resume=nope", "resume='nope' is neither auto, never nor the folder of a checkpoint"),
        ("run.dir=/dev/null", "run.dir=/dev/null: /dev/null is no folder"),
        ("run.dir=/dev/null/runs/a", "run.dir=/dev/null/runs/a: /dev/null is no folder"),
        (f"run.dir={'x' * 300}", "cannot be a folder's name"),
        ("rollout.vllm={nope: 1}", "unknown key 'rollout.vllm.nope'"),
        ("rollout.vllm.gpu_memory_utilisation=0.5", "did you mean 'gpu_memory_utilization'"),
        ("rollout.vllm.max_model_len=x", "rollout.vllm.max_model_len='x' is a number of tokens"),
        ("rollout.vllm.max_model_len=-5", "rollout.vllm.max_model_len=-5 is a number of tokens"),
        ("rollout.vllm.max_model_len=0", "rollout.vllm.max_model_len=0 is a number of tokens"),
        ("rollout.vllm.tensor_parallel_size=0", "rollout.vllm.tensor_parallel_size=0 must be at least 1"),
        ("rollout.vllm.tensor_parallel_size=x", "rollout.vllm.tensor_parallel_size='x' must be a whole number"),
        ("rollout.vllm.pipeline_parallel_size=1.5", "pipeline_parallel_size=1.5 must be a whole number"),
        ("rollout.vllm.gpu_memory_utilization=5", "rollout.vllm.gpu_memory_utilization=5 is a share"),
        ("rollout.vllm.enforce_eager=3", "rollout.vllm.enforce_eager=3 must be true or false"),
        ("rollout.urls=['']", "rollout.urls[0] is no address such as"),
        ("rollout.urls=[localhost:8000]", "rollout.urls[0] is no address such as"),
        ("reference.urls=[x]", "reference.urls[0] is no address such as"),
        ("run.trackers=[nope]", "run.trackers='nope' is not one of tensorboard, wandb"),
        ("run.trackers=[wandbb]", "did you mean 'wandb'"),
        ("deepspeed={nope: 1}", "unknown key 'deepspeed.nope'"),
        ("deepspeed.gradient_cliping=1", "did you mean 'gradient_clipping'"),
        ("deepspeed={zero_optimization: 3}", "deepspeed.zero_optimization=3 must be a mapping such as {stage: 3}"),
        ("deepspeed.zero_optimization.ofload_optimizer={}", "did you mean 'offload_optimizer'"),
        ("train.LR=3", "did you mean 'train.lr'"),
        ("data.val=demo:test", "did you mean 'data.test'"),
        ("data.train=a\0b.jsonl", "data.train="),
    ],
)
def test_bad_settings_are_refused_with_key_and_hint(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [override])


@pytest.mark.parametrize("path", ["~nouser/t.jsonl", "x" * 300 + ".jsonl", "a/" + "y" * 5000, "~nouser/*.jsonl"])
def test_a_source_that_can_be_no_path_is_refused_with_its_key(path):
    with pytest.raises(ConfigError, match=r"data\.train=.* cannot be a path") as error:
        load_config(None, [f"data.train={path}", "data.test=demo:test"])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("cores", ["5-2", "0-99999999999", "0,7-3"])
def test_a_range_of_cores_runs_upwards_and_has_an_end(cores):
    with pytest.raises(ConfigError, match="counts from the lower number up"):
        parse_devices("policy", f"cpu:{cores}")


def test_trackers_are_accelerates():
    from accelerate.utils import LoggerType

    assert set(TRACKERS) == {str(one.value) for one in LoggerType} - {"all"}


def test_the_names_of_engines_options_are_those_of_the_installed_packages():
    """All that this library sets itself is among them, and what the recipes and the documentation name."""
    known = vllm_options()
    assert {
        "max_model_len",
        "gpu_memory_utilization",
        "limit_mm_per_prompt",
        "enable_lora",
        "middleware",
        "enable_log_requests",
    } <= set(known)
    assert known["gpu_memory_utilization"] == "float" and known["enforce_eager"] == "bool"
    given = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "overlap_comm": True,
        "stage3_param_persistence_threshold": 1,
    }
    more = {
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {},
        "activation_checkpointing": {},
        "bf16": {"enabled": True},
        "flops_profiler": {},
        "wall_clock_breakdown": True,
        "communication_data_type": "fp32",
    }
    assert list(faults({}, {"zero_optimization": given, **more})) == []


def test_a_reference_model_that_is_nowhere_is_told_before_the_start(capsys):
    assert train_main(["--dry-run", "reference.model=nowhere/at-all"]) == 1
    assert "the run would not start: reference.model=nowhere/at-all" in capsys.readouterr().err


def test_impossible_combinations_are_refused():
    adapter = "rollout.weight_transfer=adapter"
    with pytest.raises(ConfigError, match=r"sends train\.lora's adapters: set train\.lora"):
        load_config(None, [adapter])
    with pytest.raises(ConfigError, match="colocate has the weights"):
        load_config(None, [adapter, "train.lora={r: 4}", "rollout.placement=colocate"])
    extra = {"modules_to_save: [lm_head]": "modules_to_save", "use_dora: true": "use_dora", "bias: all": "bias",
             "init_lora_weights: pissa": "pissa", "r: 600": "rank of 600"}  # fmt: skip
    for more, named in extra.items():
        with pytest.raises(ConfigError, match=rf"{named}.* is more than vLLM's adapters hold"):
            load_config(None, [adapter, f"train.lora={{{more}}}"])
    load_config(None, [adapter, "train.lora={r: 4, use_dora: false, bias: none}"])
    with pytest.raises(ConfigError, match="uses no reference"):
        load_config(None, ["reference.urls=[http://a]", "loss.kl_coef=0"])
    with pytest.raises(ConfigError, match=r"devices\.rollout has no effect"):
        load_config(None, ["rollout.urls=[http://a]", "devices.rollout=cpu"])
    with pytest.raises(ConfigError, match=r"devices\.reference has no effect"):
        load_config(None, ["reference.urls=[http://a]", "devices.reference=cpu"])


def test_an_engine_without_room_for_a_prompt_or_without_counts_is_refused():
    with pytest.raises(ConfigError, match=r"max_model_len=64 .* rollout.max_tokens=64 leaves none of it to the prompt"):
        load_config(None, ["rollout.vllm.max_model_len=64", "rollout.max_tokens=64"])
    for fitting in ("65", "-1", "auto", "8k"):  # vLLM's own words for what fits its memory, and for thousands
        load_config(None, [f"rollout.vllm.max_model_len={fitting}", "rollout.max_tokens=64"])
    with pytest.raises(ConfigError, match="a busy server is told from a stuck one"):
        load_config(None, ["rollout.vllm.disable_log_stats=true"])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    file.write_text("train: [unclosed")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not readable YAML"):
        load_config(file)
    file.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="keys and values"):
        load_config(file)
    file.write_text("train: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'train.lrr' in .*bad\.yaml \(did you mean 'train.lr'"):
        load_config(file)


def test_resolved_yaml_reads_back_to_the_same_config(tmp_path):
    config = load_config(None, ["train.lora.r=8", "loss.kl_estimator=k1", "train.freeze=[model.visual]"])
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    "file", sorted([*(RECIPES / "configs").glob("*.yaml"), *(RECIPES / "text").glob("*.yaml")]), ids=lambda p: p.stem
)
def test_shipped_configs_load(file):
    (load_sft_config if "sft" in file.stem else load_config)(file)


@pytest.mark.parametrize("file", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_accelerate_configs_load(file):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(file))
    assert config.num_processes == OmegaConf.load(file).num_processes


def test_dry_run_prints_settings_and_devices_and_loads_no_model(capsys, monkeypatch):
    monkeypatch.setattr("lingshu_rl.policy.load_model", lambda *a: pytest.fail("a dry run loaded a model"))
    assert train_main(["--dry-run", "train.lr=3e-4"]) == 0
    out = capsys.readouterr().out
    assert "lr: 0.0003" in out and "# devices: policy:" in out and "# devices: rollout:" in out
    assert train_main(["--dry-run", "train.lrr=3e-4"]) == 2
    assert "did you mean 'train.lr'" in capsys.readouterr().err


def test_engine_options_reach_the_engines_command_lines(tmp_path):
    from lingshu_rl.processes.placement import DeviceSet
    from lingshu_rl.rollout.server import vllm_command, vllm_env

    settings = [
        "rollout.vllm={max_model_len: 99, enable_prefix_caching: false, limit_mm_per_prompt: {image: 2}}",
        "seed=5",
    ]
    command = vllm_command(load_config(None, settings), "m", DeviceSet(), port=1)
    text = " ".join(command)
    assert "--max-model-len 99" in text and "--no-enable-prefix-caching" in text and "--seed 5" in text
    assert '--limit-mm-per-prompt {"image": 2}' in text and "--dtype float32" in text
    narrow = vllm_command(load_config(None, ["train.dtype=bfloat16"]), "m", DeviceSet(), port=1)
    assert "--dtype bfloat16" in " ".join(narrow)  # as the policy computes, on a CPU too
    gpus = DeviceSet(machine(4).gpus[2:])
    gpu = vllm_command(load_config(None, ["rollout.vllm.dtype=float16"]), "m", gpus, port=1, transfer="nccl")
    assert "--tensor-parallel-size 2" in " ".join(gpu) and "--dtype float16" in " ".join(gpu)
    assert '"backend": "nccl"' in " ".join(gpu)
    lora = load_config(None, ["train.lora={r: 9, rank_pattern: {q_proj: 33}}"])
    adapters = vllm_command(lora, "m", DeviceSet(), port=1, transfer="adapter")
    assert "--enable-lora" in adapters and adapters[adapters.index("--max-lora-rank") + 1] == "64"
    for merged in (vllm_command(lora, "m", gpus, port=1, transfer="file"), command):
        assert '"backend": "lingshu_file"' in " ".join(merged) and "--enable-lora" not in merged
    env = vllm_env(DeviceSet(), token="t", transfer_dir=tmp_path, extra={"VLLM_CPU_KVCACHE_SPACE": "3"})
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "3" and env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in env
    env = vllm_env(DeviceSet(cores=(0, 5)), token="t", transfer_dir=tmp_path, extra={}, servers=2)
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0,5"
    env = vllm_env(DeviceSet(), token="t", transfer_dir=tmp_path, extra={}, servers=2)
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" and int(env["OMP_NUM_THREADS"]) >= 1


def test_a_curriculum_does_not_run_ahead():
    with pytest.raises(ConfigError, match="unset one of them"):
        load_config(None, ["data.curriculum=pass_rate", "train.max_staleness=1"])


def test_the_demos_settings_are_the_demos_alone():
    assert load_config() == read_config(Config) == load_config(None, ["model=demo"])
    assert load_config().train.lr == 4e-4 and load_config().rollout.max_tokens == 40
    real = load_config(None, ["model=org/Some-VL-7B"])
    assert real.run.dir == "runs/Some-VL-7B" and real.rollout.max_tokens >= 1024 and real.train.lr == 1e-6
    known = flat(OmegaConf.to_container(OmegaConf.structured(real)))
    assert {key: known[key] for key in REAL_RUN} == REAL_RUN


def test_what_a_user_gives_stands_over_the_defaults_of_a_real_run(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: org/m\ntrain: {lr: 3.0e-6}\nrun: {dir: here}\n")
    config = load_config(file, ["rollout.max_tokens=77"])
    assert (config.train.lr, config.run.dir, config.rollout.max_tokens) == (3e-6, "here", 77)
    assert load_config(file, ["model=demo"]).train.prompts_per_step == Config().train.prompts_per_step
    assert load_config(None, ["model=org/m", "train.lora={r: 8}"]).train.lr == 1e-5
    assert load_config(None, ["model=org/m", "data.instruction=short"]).rollout.max_tokens == 64


def test_rows_of_ones_own_need_both_sources(tmp_path):
    for key, other in (("data.train", "data.test"), ("data.test", "data.train")):
        with pytest.raises(ConfigError, match=f"{key}=mine.jsonl needs a {other}"):
            load_config(None, [f"{key}=mine.jsonl"])
        load_config(None, [f"{key}=mine.jsonl", f"{other}=demo:validation"])
    load_config(None, ["data.train=demo:validation"])
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(load_config(None, ["data.train=a.jsonl", "data.test=b.jsonl"])))
    assert load_config(file).data.train == "a.jsonl"


def test_dry_run_says_where_settings_come_from(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 9}\n")
    assert train_main(["--dry-run", "--config", str(file), "seed=3"]) == 0
    out = capsys.readouterr().out
    assert f"# from {file}: train.steps" in out and "# from the command: seed" in out and "real run" not in out
    train_main(["--dry-run", "model=nobody/nothing", "train.lr=2e-6"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "defaults of a real run" in line)
    assert "rollout.max_tokens=1024" in line and "train.lr=" not in line


@pytest.mark.parametrize("name", [*TRL, *VERL])
def test_names_of_other_libraries_are_answered_with_ours(name):
    ours = {**TRL, **VERL}[name].key
    with pytest.raises(ConfigError) as refused:
        load_config(None, [f"{name}=1"])
    assert (f"is {ours} here" if ours else "has no setting here") in str(refused.value)
    if ours:
        node = Config()
        for part in ours.split("."):
            node = {} if isinstance(node, dict) else getattr(node, part)  # passed on to vLLM, peft


def test_the_names_of_trl_are_trls():
    """GRPOConfig's own and those of its script; what else people type stood in earlier releases, or nowhere."""
    from dataclasses import fields

    from trl import GRPOConfig, ModelConfig, ScriptArguments
    from trl.scripts.grpo import GRPOScriptArguments

    theirs = {f.name for c in (GRPOConfig, ModelConfig, ScriptArguments, GRPOScriptArguments) for f in fields(c)}
    assert set(TRL) - theirs <= {"batch_size", "warmup_ratio"}


def test_the_pixel_budget_of_a_run_is_that_of_its_pictures():
    budget = load_config(None, ["data.max_pixels=10000", "data.min_pixels=400"]).data.budget
    assert budget.fit(400, 100) == (200, 50) and budget.fit(5, 5) == (20, 20) and budget.fit(90, 80) == (90, 80)
    with pytest.raises(ConfigError, match=r"data\.min_pixels=3136 must be .* data\.max_pixels=100"):
        load_config(None, ["data.max_pixels=100"])
