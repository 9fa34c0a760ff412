"""Sending the policy's weights into the running vLLM servers, through vLLM's own weight-transfer interface.

file: safetensors in a shared-memory folder, for servers on the same host (and on CPU, where NCCL does not exist).
nccl: vLLM's trainer-side NCCL engine, layer by layer; needs CUDA and was not run on a machine without it.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.policy import Policy
from lingshu_rl.rollout.client import RolloutClient
from lingshu_rl.workers import free_port

if TYPE_CHECKING:
    import torch

CACHES = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")
FILE_BYTES = 1 << 30  # weights are sent in files of about this size, so that no second full copy is made


class FileTransfer:
    """All ranks call `send`; ranks other than the main one only take part in gathering the weights."""

    def __init__(self, client: RolloutClient | None, folder: Path | None) -> None:
        self.client, self.folder = client, folder

    async def start(self) -> None:
        if self.client is not None:
            await self.client.post_all("/init_weight_transfer_engine", {"init_info": {}})

    async def send(self, policy: Policy, version: int) -> None:
        if self.client is None:
            for _ in policy.weights():
                pass
            return
        await self.client.post_all("/start_weight_update")
        part: dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in policy.weights():
            part[name] = tensor.cpu().clone()
            size += tensor.numel() * tensor.element_size()
            if size >= FILE_BYTES:
                await self._send_part(part)
                part, size = {}, 0
        if part:
            await self._send_part(part)
        await finish(self.client, version)

    async def _send_part(self, part: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        assert self.client is not None and self.folder is not None
        file = self.folder / "weights.safetensors"
        save_file(part, file)
        await self.client.post_all("/update_weights", {"update_info": {"file": file.name}})
        file.unlink()


class NcclTransfer:
    """vLLM's `nccl` back end, one communicator a server. Runs on CUDA only."""

    def __init__(self, client: RolloutClient | None, urls: list[str], token: str, gpus_per_server: int) -> None:
        self.client, self.urls, self.token, self.gpus_per_server = client, urls, token, gpus_per_server
        self.engines: list[Any] = []

    async def start(self) -> None:
        """The communicators are opened at the first `send`, when the policy exists on every rank."""

    async def send(self, policy: Policy, version: int) -> None:
        if not self.engines:
            self.engines = [await asyncio.to_thread(self._connect, policy, url) for url in self.urls]
        for engine in self.engines:
            # send_weights runs start, update and finish itself, the broadcast beside the server's receive.
            await asyncio.to_thread(engine.send_weights)
        if self.client is not None:
            await reset_caches(self.client)
            self.client.weight_version = version

    def _connect(self, policy: Policy, url: str) -> Any:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = "127.0.0.1" if "127.0.0.1" in url else socket.gethostbyname(socket.gethostname())
        info = NCCLTrainerInitInfo(
            master_address=address,
            master_port=free_port(),
            world_size=1 + self.gpus_per_server,
            rank=policy.rank,
        )
        return WeightTransferTrainerFactory.trainer_init(
            info, client=_token_client(url, self.token), source=_policy_source(policy)
        )


async def finish(client: RolloutClient, version: int) -> None:
    await client.post_all("/finish_weight_update", {"weight_version": str(version)})
    await reset_caches(client)
    client.weight_version = version


async def reset_caches(client: RolloutClient) -> None:
    """Cached prefixes and image features belong to the old weights."""
    for route in CACHES:
        await client.post_all(route)


def transfer_folder() -> Path:
    """A private folder in shared memory where there is one."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="lingshu-rl-", dir=shared if shared.is_dir() else None))


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _policy_source(policy: Policy) -> Any:
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class PolicySource(WeightSource):
        """The policy's weights as vLLM's trainer side reads them: shapes first, then one gathered tensor at a time."""

        def metadata(self) -> list[Any]:
            return [ParamMeta(*shape) for shape in policy.weight_shapes()]

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            yield from policy.weights()

    return PolicySource()


def _token_client(url: str, token: str) -> Any:
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient

    class TokenClient(HTTPVLLMWeightSyncClient):
        def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
            import httpx

            response = httpx.post(
                f"{self.base_url}/{path}", json=json, timeout=self.timeout, headers={"Authorization": f"Bearer {token}"}
            )
            response.raise_for_status()

    return TokenClient(url)
