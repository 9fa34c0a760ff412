"""Optimisers by name: what they compute, what they hold, and where they are refused. 8 and 4 bits need bitsandbytes."""

import importlib.util
import json
import os

import pytest
import torch
from launching import ROOT, launch
from tiny_models import build

from lingshu_rl.failures import ConfigError
from lingshu_rl.model.loading import load_model
from lingshu_rl.model.optimizers import OPTIMIZERS, Place, build_optimizer, hidden_matrices
from lingshu_rl.model.weights import add_adapters
from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import Policy, make_optimizer
from lingshu_rl.sft.settings import load_sft_config

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
ZERO = "deepspeed.zero_optimization"
OFFLOAD = f"{ZERO}.offload_optimizer.device=cpu"
MUON = ["train.optimizer=muon", "train.max_grad_norm=0"]
CPU = Place(on_gpu=False, deepspeed=False)


@pytest.fixture(autouse=True)
def _without_compiling():
    """DeepSpeed compiles the steps of Muon, which takes longer here than they do."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (["train.optimizer=adam8"], "train.optimizer='adam8' is not one of adamw, adamw_8bit"),
        (["train.optimizer=muon"], "set max_grad_norm=0"),
        ([*MUON, "deepspeed.gradient_clipping=1.0"], "set max_grad_norm=0"),
        ([*MUON, f"{ZERO}.stage=3"], "reduce_scatter=false"),
        ([*MUON, OFFLOAD], "zero_force_ds_cpu_optimizer=false"),
        (["train.optimizer=adamw_8bit", OFFLOAD], "use adamw there"),
        (["train.optimizer=paged_adamw", OFFLOAD], "use adamw there"),
        (["train.optimizer_args={lr: 1}"], "optimizer_args.lr would not be used"),
        (["deepspeed.optimizer={type: AdamW}"], "leave that out"),
        (["train.quantize=nf4"], "set train.lora"),
        (["train.quantize=int3", "train.lora={r: 4}"], "train.quantize='int3' is not one of"),
        (["train.quantize=nf4", "train.lora={r: 4}", f"{ZERO}.stage=3"], "use stage 2"),
        (["train.quantize=nf4", "train.lora={r: 4}", "rollout.weight_transfer=adapter"], "use auto"),
    ],
)
def test_what_would_compute_something_else_is_refused(settings, advice):
    with pytest.raises(ConfigError) as error:
        load_config(None, settings)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        [OFFLOAD, f"{ZERO}.offload_param.device=cpu", f"{ZERO}.stage=3"],
        [*MUON, f"{ZERO}.stage=3", f"{ZERO}.reduce_scatter=false"],
        [*MUON, OFFLOAD, "deepspeed.zero_force_ds_cpu_optimizer=false"],
        ["train.optimizer=adamw_8bit", f"{ZERO}.stage=3"],
        ["train.optimizer=paged_adamw_8bit", "train.quantize=nf4", "train.lora={r: 4}"],
    ],
)
def test_and_what_the_refusals_advise_is_accepted(settings):
    load_config(None, settings)


def parameters_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def built(name, model, options=None, place=CPU, lr=1e-2, weight_decay=0.1):
    groups = [{"params": parameters_of(model), "lr": lr, "weight_decay": weight_decay}]
    return build_optimizer("train.optimizer", name, options or {}, place, model=model, groups=groups)


def test_adamw_is_one_kernel_unless_its_arguments_ask_for_another_form():
    steps = []
    for options, fused in (({}, True), ({"fused": False}, False), ({"foreach": True}, False)):
        model = build("llama")
        optimizer = built("adamw", model, options)
        assert all(group["fused"] is fused for group in optimizer.param_groups)
        for parameter in parameters_of(model):
            parameter.grad = parameter.detach().sin()
        optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in parameters_of(model)]))
    assert max((other - steps[0]).abs().max() for other in steps[1:]) < 1e-6


def test_a_missing_package_or_device_is_told_with_what_to_do(monkeypatch):
    with pytest.raises(ConfigError, match="CUDA GPU only: use adamw or adamw_8bit there"):
        built("paged_adamw", build("llama"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        with pytest.raises(ConfigError, match=rf"{name} needs bitsandbytes.*pip install 'lingshu-rl\[quant\]'"):
            built(name, build("llama"), place=Place(on_gpu=True))
    with pytest.raises(ConfigError, match=r"train\.quantize=nf4 needs bitsandbytes"):
        load_model("demo", torch.float32, quantize="nf4")


@pytest.mark.parametrize("name", ["adamw", "muon", pytest.param("adamw_8bit", marks=needs_bitsandbytes)])
def test_an_argument_that_the_package_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=f"train.optimizer_args of {name}: .*bettas"):
        built(name, build("llama"), {"bettas": (0.9, 0.95)})


def test_muon_takes_the_matrices_between_embedding_and_head():
    model = build("qwen2_5_vl")
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {names[id(p)] for p in hidden_matrices(model)}
    others = set(names.values()) - chosen
    assert all(p.ndim == 2 for p in hidden_matrices(model))
    assert all(part in " ".join(chosen) for part in ("q_proj", "down_proj", "visual.blocks.0.attn.qkv", "merger.mlp"))
    assert {n for n in others if n.endswith("weight") and "norm" not in n and "ln_q" not in n} == {
        "model.visual.patch_embed.proj.weight", "model.language_model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    assert {names[id(p)] for p in hidden_matrices(model)} == chosen
    adapted = add_adapters(build("llama"), {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    names = {id(p): name for name, p in adapted.named_parameters() if p.requires_grad}
    chosen = {names[id(p)] for p in hidden_matrices(adapted) if id(p) in names}
    assert chosen and all("lora_" in name for name in chosen) and any("lm_head" in name for name in names.values())


def with_gradients(seed=1):
    """A small model and a gradient for each of its parameters, the same for the same seed."""
    model = build("qwen2_5_vl")
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random) * 1e-3
    return model


def test_muons_step_is_that_of_torchs_muon_and_adamw():
    ours, theirs = with_gradients(), with_gradients()
    options = {"momentum": 0.9, "ns_method": "standard", "adam_lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-9}
    mine = [built("muon", ours, options)]
    hidden = list(hidden_matrices(theirs))
    chosen = set(map(id, hidden))
    rest = [p for p in theirs.parameters() if id(p) not in chosen]
    yours = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, momentum=0.9),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.8, 0.9), eps=1e-9, weight_decay=0.1),
    ]
    before = {name: p.clone() for name, p in ours.named_parameters()}
    for _ in range(2):
        gradients = [p.grad.clone() for p in ours.parameters()]  # Muon writes into them
        for optimizer in (*mine, *yours):
            optimizer.step()
        for p, gradient in zip(ours.parameters(), gradients, strict=True):
            p.grad = gradient
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert float((p - q).detach().norm()) < 0.05 * float((p - before[name]).detach().norm()), (
            name
        )  # bfloat16 in both
    assert {group["lr"] for group in mine[0].param_groups} == {1e-2, 1e-3}


@pytest.mark.parametrize(
    "name", ["adamw", "muon", *(pytest.param(n, marks=needs_bitsandbytes) for n, o in OPTIMIZERS.items() if o.package)]
)
def test_the_bytes_of_the_state_are_those_of_the_table(name):
    """Paged states are held by the classes alone here: on a CPU bitsandbytes keeps them as it keeps the others."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False), torch.nn.Linear(512, 256, bias=False))
    model.get_output_embeddings = lambda: model[1]
    optimizer = OPTIMIZERS[name].build(model, [{"params": parameters_of(model), "lr": 1e-3, "weight_decay": 0.0}], {})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert getattr(optimizer, "is_paged", False) == OPTIMIZERS[name].in_pages
    table = OPTIMIZERS[name]
    for layer, expected in zip(model, (table.matrix_state_bytes or table.state_bytes, table.state_bytes), strict=True):
        state = [x for x in optimizer.state[layer.weight].values() if torch.is_tensor(x)]
        found = sum(x.numel() * x.element_size() for x in state)
        assert found / layer.weight.numel() == pytest.approx(expected, rel=0.02)


@needs_bitsandbytes
def test_eight_bits_step_nearly_as_thirty_two():
    ours, theirs = with_gradients(), with_gradients()
    before = {name: p.clone() for name, p in ours.named_parameters()}
    mine, yours = built("adamw_8bit", ours, {"min_8bit_size": 16}), built("adamw", theirs)
    for _ in range(3):
        mine.step()
        yours.step()
    gaps = []
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        gaps.append(float((p - q).detach().norm() / (q - before[name]).detach().norm()))
    assert max(gaps) > 0 and sorted(gaps)[len(gaps) // 2] < 0.1, gaps


def test_a_run_builds_what_it_names_and_the_schedule_keeps_the_groups_relation():
    model = build("qwen2_5_vl")
    config = load_config(None, ["train.optimizer_args.eps=1e-5", "train.lr=0.5", "train.weight_decay=0.25"])
    (group,) = make_optimizer(config, model, False).param_groups
    told = (group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"])
    assert told == (0.5, 0.25, (0.9, 0.95), 1e-5)

    policy = Policy.__new__(Policy)
    policy.optimizer = make_optimizer(
        load_config(None, [*MUON, "train.lr=0.02", "train.optimizer_args={momentum: 0.8, adam_lr: 5.0e-4}"]),
        model,
        False,
    )
    policy.lr_shares = [group["lr"] / 0.02 for group in policy.optimizer.param_groups]
    policy._set_lr(0.01)
    muon, adam = policy.optimizer.param_groups
    assert (muon["lr"], muon["momentum"], adam["lr"]) == (0.01, 0.8, pytest.approx(2.5e-4))


def test_fine_tuning_takes_its_optimiser_from_the_same_table(tmp_path):
    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.progress import Progress
    from lingshu_rl.sft.rows import stage_examples
    from lingshu_rl.sft.trainer import build_trainer, sft_arguments

    def optimizer_of(*settings):
        stage = ["stages.a.data=[demo:validation]", "stages.a.limit=4", "stages.a.lr={vision: 0.02, language: 0.01}"]
        config = load_sft_config(None, ["model=demo", *stage, "trainer.adam_beta2=0.9", *settings])
        a = config.stages["a"]
        examples = stage_examples(config, "a", a, PromptEncoder("demo"))
        arguments = sft_arguments(config, a, tmp_path, False)
        return build_trainer(config, "a", a, "demo", examples, arguments, Progress(quiet=True)).create_optimizer()

    plain = optimizer_of("optimizer_args.eps=1e-4")
    assert type(plain) is torch.optim.AdamW
    assert {(tuple(g["betas"]), g["eps"]) for g in plain.param_groups} == {((0.9, 0.9), 1e-4)}
    muon = optimizer_of("optimizer=muon", "optimizer_args={adam_lr: 0.001}").param_groups
    assert {(g["part"], g["use_muon"], g["lr"]) for g in muon} == {
        ("vision", True, 0.02), ("vision", False, 0.001), ("language", True, 0.01), ("language", False, 0.001),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"trainer\.optim is set by the stage"):
        optimizer_of("trainer.optim=adafactor")


def cases(tmp_path, told, processes=0, **env):
    """The tensors of each case of policy_cases.py; all in one launch."""
    told = [{"out": str(tmp_path / f"{processes}-{n}.pt"), **case} for n, case in enumerate(told)]
    for case in told:
        case["settings"] = ["train.warmup_steps=0", "train.lr_schedule=constant", *case["settings"]]
    file = tmp_path / f"cases-{processes}.json"
    file.write_text(json.dumps(told))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **env}
    done = launch([str(file)], processes=processes, script=str(ROOT / "tests" / "policy_cases.py"), env=env)
    assert done.returncode == 0, done.stdout
    return [torch.load(case["out"]) for case in told]


PLAIN = ["train.max_grad_norm=0", "train.weight_decay=0.1", "train.lr=1e-3"]
ADAMW, MUON_ = "train.optimizer=adamw", "train.optimizer=muon"
BY_HAND = [f"{ZERO}.offload_optimizer.device=cpu", "deepspeed.zero_force_ds_cpu_optimizer=false"]
WHOLE = [f"{ZERO}.stage=3", f"{ZERO}.reduce_scatter=false"]
EIGHT = ["train.optimizer=adamw_8bit"] if HAS_BITSANDBYTES else []


@pytest.mark.slow
def test_zeros_shards_are_stepped_as_the_whole_model_would_be(tmp_path):
    """ZeRO 2 and 3, offload, one rank and two, each against the package's own step on the unwrapped model."""
    one = [[ADAMW], [ADAMW, *BY_HAND], [MUON_], [MUON_, *WHOLE], [MUON_, *BY_HAND], *([EIGHT] if EIGHT else [])]
    two = [[ADAMW], [MUON_], [MUON_, *WHOLE]]
    kept = {"kept": "weights"}
    gradient, *found = cases(
        tmp_path, [{"settings": PLAIN, "kept": "gradient"}, *({"settings": [*PLAIN, *c], **kept} for c in one)]
    )
    found += cases(tmp_path, [{"settings": [*PLAIN, *c, "packing.token_budget=120"], **kept} for c in two], processes=2)
    start = dict(load_model("demo", torch.float32).named_parameters())
    steps = {}
    for name in ("adamw", "muon", *(["adamw_8bit"] if EIGHT else [])):
        model = load_model("demo", torch.float32)
        for key, parameter in model.named_parameters():
            parameter.grad = gradient[key].reshape(parameter.shape).clone()
        built(name, model, {"betas": (0.9, 0.95)}, lr=1e-3).step()
        steps[name] = {key: p.detach() - start[key].detach() for key, p in model.named_parameters()}
    matrices = {key for key in start if key.endswith("proj.weight") and "patch" not in key}
    for case, weights in zip(one + two, found, strict=True):
        name = case[0].partition("=")[2]
        for key in matrices:
            moved = weights[key] - start[key].detach()
            gap = float((moved - steps[name][key]).norm() / steps[name][key].norm())
            assert gap < 0.05, (case, key, gap)
            other = "muon" if name == "adamw" else "adamw"
            if name != "adamw_8bit":
                assert float((moved - steps[other][key]).norm()) > 0.5 * float(steps[name][key].norm()), (case, key)


@pytest.mark.endurance
def test_deepspeeds_own_cpu_adam_holds_the_states_when_they_are_offloaded(tmp_path):
    """It is compiled here, for about a minute. Parameters may be offloaded as well. Other betas would move 9 % elsewhere."""
    offload = [f"{ZERO}.offload_optimizer.device=cpu"]
    all_of_it = [*offload, f"{ZERO}.offload_param.device=cpu", f"{ZERO}.stage=3"]
    steps = [*PLAIN, "train.optimizer_steps=2", "train.optimizer_args={betas: [0.5, 0.6]}"]
    told = [{"settings": [*steps, *more], "kept": "weights"} for more in ([], offload, all_of_it)]
    plain, *others = cases(tmp_path, told, TORCH_EXTENSIONS_DIR=str(tmp_path / "built"))
    assert any((tmp_path / "built").rglob("*.so"))  # or it was not DeepSpeed's
    start = load_model("demo", torch.float32).state_dict()
    # The bias of the keys has no gradient (softmax does not see it), so Adam moves it by rounding alone.
    names = [key for key in plain if not key.endswith("k_proj.bias")]
    for other in others:
        gaps = [float((plain[key] - other[key]).norm() / (plain[key] - start[key]).norm()) for key in names]
        assert max(gaps) < 0.01
