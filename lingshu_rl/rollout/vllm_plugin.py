"""What vLLM loads into its own processes: a weight-transfer engine for hosts without NCCL.

`register` is the entry point of the group `vllm.general_plugins`; vLLM calls it in every process it starts, also in
those of a server that has nothing to do with this library but shares the environment: there it leaves everything as it
is.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BACKEND = "lingshu_file"
LOOK_S = 2e-4  # between two looks at a queue; a decoding step of a small model takes ten milliseconds
TRANSFER_DIR_ENV = "LINGSHU_RL_TRANSFER_DIR"
OURS_ENV = "LINGSHU_RL_ENGINE"  # set in the processes of engines that this library starts


def register() -> None:
    """Make the `lingshu_file` weight-transfer backend known to this vLLM process, if it is of an engine of ours."""
    if OURS_ENV not in os.environ:
        return
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, file_engine_class())
    wait_idly_on_cpu()


def wait_idly_on_cpu() -> None:
    """Let vLLM's processes sleep between looks at their message queues, where computing needs the cores.

    They would spin for a second after every message, also through the update that follows the last rollout.
    """
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        shm_broadcast.sched_yield = lambda: time.sleep(LOOK_S)


def file_engine_class() -> Any:
    """The engine class, built here so that importing this module does not import vLLM."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclass
    class FileInitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class FileUpdateInfo(WeightTransferUpdateInfo):
        file: str  # a name inside the transfer folder, never a path

    class FileWeightTransferEngine(WeightTransferEngine):
        """Reads a safetensors file that the trainer wrote into the run's shared-memory folder."""

        init_info_cls = FileInitInfo
        update_info_cls = FileUpdateInfo

        def init_transfer_engine(self, init_info: FileInitInfo) -> None:
            self.folder = Path(os.environ[TRANSFER_DIR_ENV]).resolve()

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
            from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

            # An update that ended in the middle leaves layers which would take the rest of theirs from this one.
            if any(get_layerwise_info(layer).can_load() for layer in self.model.modules()):
                self.finish_weight_update()
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # The base class ends in torch.accelerator.synchronize(), which does not exist on CPU.
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: FileUpdateInfo) -> None:
            from safetensors.torch import load_file

            path = self.folder / update_info.file
            if path.name != update_info.file or path.resolve().parent != self.folder:
                raise ValueError(f"weight file {update_info.file!r} is not a plain name in the transfer folder")
            self.model.load_weights(iter(load_file(path, device="cpu").items()))  # type: ignore[operator]

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
            finish_reload(self.model)

        def shutdown(self) -> None:
            pass

    return FileWeightTransferEngine


def finish_reload(model: torch.nn.Module) -> None:
    """What a layer-wise reload of all weights leaves undone in vLLM, after which it would sample from others, without
    an error."""
    retie_heads(model)
    pack_experts(model)


def pack_experts(model: torch.nn.Module) -> None:
    """Bring renewed experts into the layout that the kernel of a CPU reads; vLLM does so at the first loading alone."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel is not None:
            method.moe_kernel.fused_experts.process_weights_after_loading(module)


def retie_heads(model: torch.nn.Module) -> None:
    """Point tied output heads at the reloaded embedding again.

    On CPU vLLM packs a tied head into a copy of its own while loading; a layer-wise reload renews the embedding but
    not that copy, and the engine would go on sampling from the old head without an error.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for module in model.modules():
        head = getattr(module, "lm_head", None)
        config = getattr(module, "config", None)
        if not isinstance(head, ParallelLMHead) or not getattr(config, "tie_word_embeddings", False):
            continue
        embeddings = [
            m
            for m in module.modules()
            if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead) and _sizes(m) == _sizes(head)
        ]
        if len(embeddings) != 1:
            raise RuntimeError(
                f"a tied head needs exactly one embedding of its sizes {_sizes(head)} beside it, found "
                f"{len(embeddings)}"
            )
        head.weight = embeddings[0].weight
        head.quant_method.process_weights_after_loading(head)  # type: ignore[operator]


def _sizes(embedding: Any) -> tuple[int, int]:
    """Tokens and width; Gemma 4 has a second embedding, for its layers."""
    return embedding.num_embeddings, embedding.embedding_dim
