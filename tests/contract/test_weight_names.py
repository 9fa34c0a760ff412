"""vLLM's own model classes take the weights that a run sends, by name and shape, in every family that both sides know.

No engine is started: the class is built as an engine would build it, filled with NaN and given what a run sends; what it
did not take is still NaN. Asked of the installed CPU package; the CUDA package builds these classes with its kernels only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import OTHER_FAMILIES, TEXT_FAMILIES, VISION_FAMILIES, build, publish

from lingshu_rl.model import weights
from lingshu_rl.model.loading import load_model
from lingshu_rl.rollout import vllm_plugin

pytestmark = pytest.mark.slow  # half a minute of CPU for thirty classes
Weights = list[tuple[str, torch.Tensor]]
# vLLM builds these with Triton (bamba), from keys that tiny configs lack (lfm2), or not at all (olmo_hybrid).
NOT_BUILT = {"bamba", "lfm2", "lfm2_vl", "olmo_hybrid"}
KNOWN = {*VISION_FAMILIES, *TEXT_FAMILIES, *OTHER_FAMILIES} - NOT_BUILT
FAMILIES = sorted(f for f in KNOWN if not f.endswith("_window"))
RENAMED = ("llava", "llava_onevision", "gemma3", "paligemma")  # by transformers, in a way that vLLM does not know


@pytest.fixture(autouse=True)
def _classes_are_looked_at_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM starts a process for each that it has not seen on this machine, which takes a quarter of a minute."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())


@contextlib.contextmanager
def class_of_the_engine(folder: Path) -> Iterator[Any]:
    """vLLM's class for the folder's model, every weight NaN."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        str(folder), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=128
    ).create_engine_config()
    try:
        with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
            init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            model = initialize_model(config)
            record_metadata_for_reloading(model)
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)
            yield model
    finally:
        cleanup_dist_env_and_memory()


def ready(engine: Any) -> None:
    """Bring loaded weights into the layouts that kernels read, as an engine does."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    process_weights_after_loading(engine, get_current_vllm_config().model_config, torch.device("cpu"))


def renew(engine: Any, sent: Weights) -> None:
    """As both kinds of engine take new weights."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(engine)
    engine.load_weights(iter(sent))
    finalize_layerwise_reload(engine, get_current_vllm_config().model_config)
    vllm_plugin.finish_reload(engine)


def held(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in (*engine.named_parameters(), *engine.named_buffers())}


def left_out(engine: Any) -> list[str]:
    return [name for name, parameter in engine.named_parameters() if parameter.isnan().any()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_takes_every_name_that_is_sent(family: str, tmp_path: Path) -> None:
    publish(build(family), tmp_path)
    model = load_model(str(tmp_path), torch.float32)
    sent = [(name, tensor.detach().clone()) for name, tensor in weights.weights(model)]
    with class_of_the_engine(tmp_path) as engine:
        engine.load_weights(iter(sent))
        assert not left_out(engine)
        vllm_plugin.retie_heads(engine)  # finds the embedding of a tied head, beside which Gemma 4 has another
    if family in RENAMED:
        with class_of_the_engine(tmp_path) as engine, pytest.raises(ValueError, match=r"no module .* 'vision_tower"):
            engine.load_weights(iter(model.state_dict().items()))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_moe", "gemma4", "qwen2_5_vl"])
def test_renewed_weights_are_what_newly_loaded_ones_are(family: str, tmp_path: Path) -> None:
    """Experts stayed in the layout of files, which the CPU's kernel read as its own: log-probs were off by 0.004 nats."""
    model = build(family, **{"moe_intermediate_size": 32} if "moe" in family else {})  # a multiple, of which files are
    publish(model, tmp_path)
    model = load_model(str(tmp_path), torch.bfloat16)
    old = [(name, tensor.detach().clone()) for name, tensor in weights.weights(model)]
    new = [(name, tensor + torch.randn_like(tensor) / 8) for name, tensor in old]
    with class_of_the_engine(tmp_path) as engine:
        engine.load_weights(iter(old))
        ready(engine)
        before = held(engine)
        renew(engine, new)
        renewed = held(engine)
    with class_of_the_engine(tmp_path) as engine:
        engine.load_weights(iter(new))
        ready(engine)
        fresh = held(engine)
    assert renewed.keys() == fresh.keys()
    assert not [name for name in fresh if not torch.equal(renewed[name], fresh[name])]
    assert sum(not torch.equal(renewed[name], before[name]) for name in fresh) > 20


@pytest.mark.parametrize("family", sorted({*RENAMED, "qwen2_5_vl", "qwen3_vl", "internvl", "llama"}))
def test_the_engine_finds_the_modules_of_adapters_that_are_sent_alone(family: str, tmp_path: Path) -> None:
    """Adapters are written by peft under transformers' own names, which vLLM maps as it does those of weights."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    publish(build(family), tmp_path)
    base = load_model(str(tmp_path), torch.float32)
    reached = r".*(?<!vision_model\.encoder\.)layers\.\d+\.self_attn\.[qv]_proj"
    model = weights.add_adapters(base, {"r": 4, "target_modules": reached, "exclude_modules": r".*vision_tower.*"})
    weights.save_adapter(model, tmp_path / "adapter")
    with class_of_the_engine(tmp_path) as engine:
        loaded = LoRAModel.from_local_checkpoint(
            str(tmp_path / "adapter"), {"q_proj", "v_proj"}, PEFTHelper.from_local_dir(str(tmp_path / "adapter"), None),
            lora_model_id=1, device="cpu", dtype=torch.float32,
            weights_mapper=engine.hf_to_vllm_mapper.get_rename_mapper(),
        )  # fmt: skip
        attentions = {name for name, _ in engine.named_modules() if name.endswith("self_attn")}
    assert len(loaded.loras) == 6 and {name.rpartition(".")[0] for name in loaded.loras} <= attentions
