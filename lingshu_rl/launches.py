"""What each server of a run is started with: command, environment, limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lingshu_rl.config import Config
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.families import model_spec
from lingshu_rl.model.loading import model_path
from lingshu_rl.model.shape import config_of
from lingshu_rl.planning.plan import judge_run
from lingshu_rl.processes.fleet import JUDGE, REFERENCE, ROLLOUT, Launch
from lingshu_rl.processes.placement import DeviceSet, Placement
from lingshu_rl.processes.token import TOKEN_ENV
from lingshu_rl.processes.workers import HOST, PORT
from lingshu_rl.reference.server import reference_command
from lingshu_rl.rollout.server import vllm_command, vllm_env
from lingshu_rl.rollout.transfer import weight_transfer_kind
from lingshu_rl.types import Prompt


def transfer_kind(config: Config, placement: Placement) -> str:
    """How weights reach the engines of this run; whoever starts a server and whoever sends to it ask here."""
    return weight_transfer_kind(
        config,
        policy_on_gpu=placement.policy.on_gpu,
        servers_on_gpu=all(devices.on_gpu for devices in placement.rollout_servers),
        ours=not config.rollout.urls and config.cluster == "local",
        colocated=placement.colocated,
    )


def check_sight(config: Config, placement: Placement, prompts: Iterable[Prompt]) -> None:
    """Raises ConfigError where prompts would be read by an engine whose attention is not the model's: vLLM's is causal,
    but among the tokens of an image on CUDA."""
    spec = model_spec(config_of(config.model)[0])
    if spec.prefix_blocks:
        raise ConfigError(
            f"model={config.model}: in {spec.model_type} all tokens of a prompt see each other, and vLLM reads its "
            "text causally: its samples would be another model's, log-probs off by nats. This family can be "
            "fine-tuned (lingshu-rl sft), not trained with rollouts"
        )
    on_cpu = not all(devices.on_gpu for devices in (*placement.engines, *placement.rollout_servers))
    if on_cpu and spec.image_blocks and any(p.images for p in prompts):
        raise ConfigError(
            f"model={config.model}: in {spec.model_type} tokens of an image see those after them, which vLLM's "
            "attention on a CPU does not know: its samples would be another model's, log-probs off by tenths of "
            "nats. Rows with images need rollout devices with CUDA (devices.rollout, or servers by rollout.urls); "
            "rows of text alone train here"
        )


def launches(
    config: Config, placement: Placement, *, transfer: str, token: str, transfer_dir: Path, reference: str
) -> list[Launch]:
    """The servers that this run starts itself. transfer: see `transfer_kind`. reference: folder or Hub id of the frozen
    model."""
    on_ray = config.cluster == "ray"
    engines = len(placement.rollout_servers) + len(placement.judges)
    where: dict[str, Any] = {"host": HOST, "port": PORT}

    def launch(
        role: str,
        number: int,
        devices: DeviceSet,
        command: list[str],
        env: dict[str, str],
        start_timeout_s: float,
        ray: Mapping[str, Any],
    ) -> Launch:
        if on_ray and devices.on_gpu:
            del env["CUDA_VISIBLE_DEVICES"]  # Ray sets it
        options = {"num_gpus": len(devices.gpus), **ray} if on_ray else None
        return Launch(role, number, command, env, start_timeout_s, config.run.stop_timeout_s, options)

    def rollout(number: int, devices: DeviceSet) -> Launch:
        sharing = 1 if on_ray else engines
        command = vllm_command(config, model_path(config.model), devices, transfer=transfer, **where)
        env = vllm_env(devices, token=token, transfer_dir=transfer_dir, extra=config.rollout.env, servers=sharing)
        return launch(ROLLOUT, number, devices, command, env, config.rollout.start_timeout_s, config.rollout.ray)

    def frozen(number: int, devices: DeviceSet) -> Launch:
        command = reference_command(config, reference, devices, **where)
        env = {**devices.env(), TOKEN_ENV: token}
        return launch(REFERENCE, number, devices, command, env, config.reference.start_timeout_s, config.reference.ray)

    def judge(number: int, devices: DeviceSet) -> Launch:
        own = judge_run(config)
        command = vllm_command(own, model_path(own.model), devices, served_as=own.model, **where)
        env = vllm_env(devices, token=token, transfer_dir=transfer_dir, extra=own.rollout.env, servers=engines)
        return launch(JUDGE, number, devices, command, env, config.judge.start_timeout_s, {})

    return [
        *(rollout(i, devices) for i, devices in enumerate(placement.rollout_servers)),
        *(frozen(i, devices) for i, devices in enumerate(placement.reference_replicas)),
        *(judge(i, devices) for i, devices in enumerate(placement.judges)),
    ]
