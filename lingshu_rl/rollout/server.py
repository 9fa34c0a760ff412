"""The command line of one rollout worker: vLLM's own OpenAI server, with our plugin for weights and token check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lingshu_rl.config import LORA_RANKS, Config, lora_rank
from lingshu_rl.model.families import cpu_options
from lingshu_rl.planning.plan import SERVER_SHARE
from lingshu_rl.processes.placement import DeviceSet, available_cores
from lingshu_rl.processes.token import TOKEN_ENV
from lingshu_rl.processes.workers import python
from lingshu_rl.rollout.vllm_plugin import BACKEND, OURS_ENV, TRANSFER_DIR_ENV


def vllm_options(
    config: Config, model: str, devices: DeviceSet, transfer: str = "file", share: float = SERVER_SHARE
) -> dict[str, Any]:
    """vLLM's own options for a server or an engine in this process; `config.rollout.vllm` wins over those chosen here.

    transfer: how weights will come, see `transfer.weight_transfer_kind`.
    share: of each GPU's memory, weights and cache together; for an engine beside the policy it is `Plan.engine_share`.
    """
    chosen: dict[str, Any] = {
        "model": model,
        "dtype": config.train.computes_in(devices.on_gpu),
        "seed": config.seed,
        # Log-probs after temperature and banned tokens: the distribution that was really sampled.
        "logprobs_mode": "processed_logprobs",
        # The model's own generation_config would change temperature or top-p behind the trainer's back.
        "generation_config": "vllm",
    }
    if devices.on_gpu:
        given = config.rollout.vllm
        others = int(given.get("pipeline_parallel_size", 1)) * int(given.get("data_parallel_size", 1))
        chosen["tensor_parallel_size"] = len(devices.gpus) // others
        chosen["gpu_memory_utilization"] = share
        chosen["max_model_len"] = -1  # the longest that the cache holds, up to the model's own limit
    else:
        chosen["enforce_eager"] = True
        # A prompt prefilled in pieces makes vLLM rewind the request's seeded generator, which CPU generators cannot do.
        chosen["enable_chunked_prefill"] = False
        # A group's samples share their prompt in whole blocks; vLLM's 128 tokens on a CPU are longer than many a
        # prompt.
        chosen["block_size"] = 32
        chosen |= cpu_options(model)
    if transfer == "adapter":
        room = next(rank for rank in LORA_RANKS if rank >= lora_rank(config.train.lora))
        chosen |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    return {**chosen, **config.rollout.vllm}


def vllm_command(
    config: Config,
    model: str,
    devices: DeviceSet,
    *,
    port: int,
    host: str = "127.0.0.1",
    transfer: str = "file",
    served_as: str = "policy",
) -> list[str]:
    """The argv of one server. transfer: how its weights will come, see `transfer.weight_transfer_kind`.

    served_as: the model's name in requests.

    The module is started rather than the `vllm` script, because the CPU package installs no working script.
    """
    served = {
        "served_model_name": served_as,
        "host": host,
        "port": port,
        "weight_transfer_config": {"backend": "nccl" if transfer == "nccl" else BACKEND},
        "middleware": "lingshu_rl.processes.token.RequireToken",
        "disable_uvicorn_access_log": True,
    }
    command = [*devices.command_prefix(), python(), "-m", "vllm.entrypoints.openai.api_server"]
    for key, value in {**served, **vllm_options(config, model, devices, transfer)}.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            command.append(flag)
        elif value is False:
            command.append("--no-" + flag[2:])
        elif value is not None:
            command += [flag, json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return command


def vllm_env(
    devices: DeviceSet, *, token: str, transfer_dir: Path, extra: dict[str, str], servers: int = 1
) -> dict[str, str]:
    """servers: how many share this host's cores where none are named."""
    env = {
        **devices.env(),
        "VLLM_SERVER_DEV_MODE": "1",  # the weight-transfer routes
        # the adapter routes, which exist with enable_lora; the token guards both
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        TOKEN_ENV: token,
        TRANSFER_DIR_ENV: str(transfer_dir),
        OURS_ENV: "1",
    }
    if not devices.on_gpu:
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
        # Left to itself vLLM binds its threads to the first cores, those of several servers to the same ones.
        if devices.cores:
            env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, devices.cores))
        elif servers > 1:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            env["OMP_NUM_THREADS"] = str(max(1, available_cores() // servers))
    return {**env, **extra}
