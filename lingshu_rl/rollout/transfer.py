"""Sending the policy's weights into the running vLLM servers, through vLLM's own weight-transfer interface.

file: safetensors in a shared-memory folder, for servers on the same host (and on CPU, where NCCL does not exist).
nccl: vLLM's trainer-side NCCL engine, packed; needs CUDA. What of it runs without (tests/contract) runs there.
adapter: LoRA adapters alone, which vLLM applies beside the weights it was started with.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from lingshu_rl.config import Config, more_than_adapters
from lingshu_rl.failures import ConfigError
from lingshu_rl.policy import Policy
from lingshu_rl.processes.pool import Pool, Server
from lingshu_rl.processes.workers import address_towards, free_port
from lingshu_rl.rollout.client import RolloutClient, RolloutError
from lingshu_rl.storage.disk import writing

if TYPE_CHECKING:
    import torch

START, UPDATE, FINISH = "/start_weight_update", "/update_weights", "/finish_weight_update"
PREFIX_CACHE, IMAGE_CACHES = "/reset_prefix_cache", ("/reset_mm_cache", "/reset_encoder_cache")
FILE_BYTES = 1 << 30  # weights are sent in files of about this size, so that no second full copy is made
# vLLM's two buffers, on either side, come on top of what the engine reserved: 8 % of a 24 GB card are free then. A
# tensor larger than a buffer (the embedding) gets one of its own.
PACKED_BUFFER_BYTES = 128 << 20
RESET_S = 60.0  # in which a server must let go of the cache; aborted requests hold it for a step or two


class Transfer(Protocol):
    """All ranks call `send`; ranks other than the main one only take part in gathering the weights."""

    async def start(self, servers: Sequence[Server] | None = None) -> None:
        """Make the servers (default: all) ready to receive. Only the main rank does anything."""

    async def send(self, policy: Policy, version: int, server: str | None = None) -> None:
        """To every server that is up, or to the one of this URL whatever its state. One that dies meanwhile is left
        out."""


def weight_transfer_kind(
    config: Config, *, policy_on_gpu: bool, servers_on_gpu: bool, ours: bool, colocated: bool = False
) -> str:
    """How weights reach the servers: what rollout.weight_transfer names; with `auto`, the adapters alone where they
    can.

    ours: the servers are started by this run on this host, with the run's model. Whoever starts a server and whoever
    sends to it must ask with the same arguments. colocated: each rank loads its own engine ("in_process").
    Raises ConfigError for what cannot work.
    """
    asked = config.rollout.weight_transfer
    if colocated and asked == "auto":
        return "in_process"
    if colocated:
        raise ConfigError(
            f"rollout.weight_transfer={asked} is for servers, and the policy's processes sample themselves here "
            "(rollout.placement); use auto"
        )
    if asked == "nccl" and not (policy_on_gpu and servers_on_gpu):
        raise ConfigError("rollout.weight_transfer=nccl needs policy and rollout on GPUs; use auto")
    alone = config.train.lora and not config.train.quantize and ours  # the servers' base is not in 4 bits
    if asked == "adapter" or (asked == "auto" and alone):
        from lingshu_rl.model.weights import unfit_for_adapters_alone

        unfit = more_than_adapters(config.train.lora) or unfit_for_adapters_alone(config.model, config.train.lora)
        if not unfit:
            return "adapter"
        if asked == "adapter":
            raise ConfigError(f"rollout.weight_transfer=adapter: {unfit}; use auto, which sends merged weights")
    if asked != "auto":
        return asked
    return "nccl" if policy_on_gpu and servers_on_gpu else "file"


# Kills a server that this run started, so that it is started again and gets the weights then; False for any other.
Restart = Callable[[Server], Awaitable[bool]]


async def never(server: Server) -> bool:
    """For servers that nobody watches."""
    return False


def make_transfer(
    kind: str,
    client: RolloutClient | None,
    *,
    folder: Path | None,
    timeout_s: float,
    dead: Callable[[], str],
    restart: Restart = never,
) -> Transfer:
    """client, folder: None on ranks other than the main one. dead: what is known to have died ("" = nothing)."""
    if kind == "nccl":
        return NcclTransfer(client, timeout_s, dead, restart)
    return (AdapterTransfer if kind == "adapter" else FileTransfer)(client, folder, restart)


class HttpTransfer(ABC):
    """Weights that every server is told to fetch. A transfer that failed is begun anew, whole, as often as a request
    is.

    What a failed one left behind is cleared before: it may have been carried out although its answer was lost, or have
    ended in the middle, after which an engine would go on with some of the old tensors and some of the new.
    """

    def __init__(self, client: RolloutClient | None, folder: Path | None, restart: Restart = never) -> None:
        self.client, self.folder, self.restart = client, folder, restart
        self.pool = client.pool if client is not None else None

    async def send(self, policy: Policy, version: int, server: str | None = None) -> None:
        tries = 0
        while True:
            fault: Exception | None = None
            try:
                await self._send(policy, version, server, again=tries > 0)
            except Exception as error:
                fault = error
            tries += 1
            again = isinstance(fault, RolloutError) and self.pool is not None and tries <= self.pool.retries
            told, again = policy.share((fault, again))
            if told is not None and not again:
                raise told
            if told is None:
                return

    @abstractmethod
    async def _send(self, policy: Policy, version: int, server: str | None, *, again: bool) -> None:
        """Once. The ranks gather together to the end, whatever the main one meets. again: an earlier try failed."""


class FileTransfer(HttpTransfer):
    """Files of about FILE_BYTES, one at a time, in a folder that the servers see."""

    async def start(self, servers: Sequence[Server] | None = None) -> None:
        if self.pool is not None:
            to = servers or self.pool.servers
            await self.pool.post_to(to, "/init_weight_transfer_engine", repeat=True, json={"init_info": {}})

    async def _send(self, policy: Policy, version: int, server: str | None, *, again: bool) -> None:
        weights = policy.weights()
        try:
            if self.pool is not None:
                to = [self.pool.by_url(server)] if server else self.pool.up
                if again:
                    await put_in_order(self.pool, to, self.restart)
                await self._update(self.pool, weights, to, version)
        finally:
            for _ in weights:  # the other ranks gather to the end, whatever went wrong here
                pass

    async def _update(
        self, pool: Pool, weights: Iterable[tuple[str, torch.Tensor]], to: Sequence[Server], version: int
    ) -> None:
        await pool.post_to(to, START)
        part: dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in weights:
            part[name] = tensor.to("cpu", copy=True)
            size += tensor.numel() * tensor.element_size()
            if size >= FILE_BYTES:
                await self._send_part(pool, part, to)
                part, size = {}, 0
        if part:
            await self._send_part(pool, part, to)
        await pool.post_to(to, FINISH, json={"weight_version": str(version)})
        await reset_caches(pool, to, version)

    async def _send_part(self, pool: Pool, part: dict[str, torch.Tensor], to: Sequence[Server]) -> None:
        from safetensors.torch import save_file

        assert self.folder is not None
        file = self.folder / "weights.safetensors"
        try:
            with writing(file):
                save_file(part, file)
            await pool.post_to(to, UPDATE, json={"update_info": {"file": file.name}})
        finally:
            with contextlib.suppress(OSError):  # what kept it from being written has been said
                file.unlink(missing_ok=True)


class AdapterTransfer(HttpTransfer):
    """The adapters of a LoRA policy alone, through vLLM's own adapter routes: megabytes in place of the model.

    For servers that were started with the run's model and see `folder`. Each sending has a name of its own, under which
    it is sampled, so that nothing computed with an older one, of this run or of one before it, can be mistaken for it.
    """

    def __init__(self, client: RolloutClient | None, folder: Path | None, restart: Restart = never) -> None:
        super().__init__(client, folder, restart)
        self.prefix, self.sent, self.version = f"policy-{secrets.token_hex(4)}", 0, -1
        self.loaded: dict[str, str] = {}  # by server URL

    async def start(self, servers: Sequence[Server] | None = None) -> None:
        """vLLM takes adapters as it is."""

    async def _send(self, policy: Policy, version: int, server: str | None, *, again: bool) -> None:
        if server is None or version != self.version:  # a server that was started again gets what the others have
            self.sent, self.version = self.sent + 1, version
        name = f"{self.prefix}-{version}-{self.sent}"
        folder = self.folder / name if self.folder is not None else None
        with writing(folder) if folder is not None else contextlib.nullcontext():
            policy.save_adapter(folder)
        if self.client is None:
            return
        assert folder is not None
        pool = self.client.pool
        to = [pool.by_url(server)] if server else pool.up
        try:
            for one in to:
                old, self.loaded[one.url] = self.loaded.get(one.url), name
                if old is not None and (again or server is None):  # one that was started again holds none
                    with contextlib.suppress(RolloutError):  # nor does one that was told so before and could not say
                        await pool.post_to([one], "/v1/unload_lora_adapter", json={"lora_name": old})
            await pool.post_to(to, "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        finally:
            remove_folder(folder)
        self.client.sampling["model"] = name
        await reset_caches(pool, to, version)


async def put_in_order(pool: Pool, servers: Sequence[Server], restart: Restart = never) -> None:
    """Bring servers, whatever a failed update left of their engine, to where the next one is all that counts.

    An update that is open is finished. Where none is, layers may still wait for the rest of theirs: the next would be
    added to what they have. An empty update ends that. Raises RolloutError for a server that does neither and was not
    started by this run.
    """

    async def one(server: Server) -> None:
        try:
            try:
                await pool.post_to([server], FINISH, json={})
            except RolloutError:
                await pool.post_to([server], START)
                await pool.post_to([server], FINISH, json={})
        except RolloutError as error:
            if not await restart(server):
                raise RolloutError(f"{error}\n{server.url} cannot take new weights any more: start it again") from error

    await asyncio.gather(*map(one, servers))


class NcclTransfer:
    """vLLM's `nccl` back end: one communicator of the main rank and every server, one broadcast for all of them.

    Under ZeRO-3 each tensor is gathered, sent and freed before the next. A server that joins again gets the weights
    over a communicator of its own, so that the others go on generating; the next send joins all anew. Runs on CUDA
    only; on CPU, vLLM's two ends of it were run against each other with a stand-in for the communicator.
    """

    def __init__(
        self,
        client: RolloutClient | None,
        timeout_s: float,
        dead: Callable[[], str] = lambda: "",
        restart: Restart = never,
    ) -> None:
        """dead: asked while a broadcast runs."""
        self.pool, self.timeout_s, self.dead, self.restart = client.pool if client else None, timeout_s, dead, restart
        self.engine: Any = None
        self.members: list[str] = []
        self.joined: set[str] = set()  # servers that hold a communicator, the present one or an older one

    async def start(self, servers: Sequence[Server] | None = None) -> None:
        """Finish what a run that was killed may have left open, with which no communicator can be opened; that is
        opened at the first `send`, when the policy exists on every rank."""
        if self.pool is None:
            return
        for one in servers or self.pool.servers:
            with contextlib.suppress(RolloutError):  # none was open
                await self.pool.post_to([one], FINISH, json={})

    async def send(self, policy: Policy, version: int, server: str | None = None) -> None:
        """Ranks that wait in a broadcast cannot be called back, so it is not begun anew: its servers are put in order,
        or started again, and the run ends with a checkpoint."""
        urls = policy.share(([server] if server else [s.url for s in self.pool.up]) if self.pool else [])
        if not urls:  # all are down; they get the weights when they are back
            for _ in policy.weights():
                pass
            return
        try:
            await self._broadcast(policy, version, urls)
        except Exception:
            self.members = []
            if self.pool is not None:
                with contextlib.suppress(RolloutError):
                    await put_in_order(self.pool, [self.pool.by_url(url) for url in urls], self.restart)
            raise

    async def _broadcast(self, policy: Policy, version: int, urls: list[str]) -> None:
        if urls != self.members:
            await self._watched(lambda: self._connect(policy, urls), "opening the weight communicator")
            self.members = urls
        # send_weights runs start, update and finish itself, the broadcast beside the servers' receive.
        await self._watched(lambda: self._send(policy), "sending the weights")
        if self.pool is not None:
            await reset_caches(self.pool, [self.pool.by_url(url) for url in urls], version)

    def _send(self, policy: Policy) -> None:
        policy.use_device()
        self.engine.send_weights()

    async def _watched(self, call: Callable[[], None], what: str) -> None:
        await watched(call, what=what, timeout_s=self.timeout_s, dead=self.dead)

    def _connect(self, policy: Policy, urls: list[str]) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        policy.use_device()
        fan_out = FanOut(urls, self.pool.http.headers if self.pool is not None else {}, self.timeout_s)
        if policy.rank == 0:
            if self.engine is not None:
                self.engine.shutdown()
            fan_out.shutdown(self.joined & set(urls))
            self.joined |= set(urls)
        info = NCCLTrainerInitInfo(
            master_address=master_address(urls),
            master_port=free_port(),
            world_size=1 + sum(fan_out.sizes()) if policy.rank == 0 else 1,
            rank=policy.rank,
            # Packed one after another, tensors of different types would start at addresses that a type cannot have.
            packed=len({dtype for _, dtype, _ in policy.weight_shapes()}) == 1,
            packed_buffer_size_bytes=PACKED_BUFFER_BYTES,
        )
        self.engine = WeightTransferTrainerFactory.trainer_init(info, client=fan_out, source=policy_source(policy))


class FanOut:
    """vLLM's weight-sync client protocol for several servers at once: the same call to each, with its own rank
    offset."""

    def __init__(self, urls: Sequence[str], headers: Mapping[str, str], timeout_s: float) -> None:
        import httpx

        self.urls = list(urls)
        self.http = httpx.Client(timeout=timeout_s, headers=headers, transport=httpx.HTTPTransport())

    def sizes(self) -> list[int]:
        """GPUs of each server, as it says itself."""
        return [int(self._ok(self.http.get(f"{url}/get_world_size"), url)["world_size"]) for url in self.urls]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offset = init_info["rank_offset"]
        bodies = []
        for size in self.sizes():
            bodies.append({"init_info": {**init_info, "rank_offset": offset}})
            offset += size
        self._post("init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._post("update_weights", [{"update_info": update_info}] * len(self.urls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update", [{"weight_version": weight_version}] * len(self.urls))

    def shutdown(self, urls: Iterable[str]) -> None:
        """Close the communicator that these servers hold."""
        for url in urls:
            self._ok(self.http.post(f"{url}/shutdown_weight_transfer_engine"), url)

    def _post(self, route: str, bodies: Sequence[Any] | None = None) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(self.urls)) as threads:
            jobs = [
                (url, threads.submit(self.http.post, f"{url}/{route}", json=body))
                for url, body in zip(self.urls, bodies or [None] * len(self.urls), strict=True)
            ]
            for url, job in jobs:
                self._ok(job.result(), url)

    @staticmethod
    def _ok(response: Any, url: str) -> Any:
        if response.status_code != 200:
            raise RolloutError(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
        return response.json()


async def watched(call: Callable[[], None], *, what: str, timeout_s: float, dead: Callable[[], str]) -> None:
    """Run a call that may never return (a collective with a dead member) beside a clock and a look at its members.

    The thread is a daemon: when the call is given up it cannot be ended, but does not keep the process from ending.
    Raises what `call` raises, or RolloutError naming what died or how long it took.
    """
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True, name=what)
    thread.start()
    began, checked = time.monotonic(), 0.0
    while not outcome:
        await asyncio.sleep(0.005)
        waited = time.monotonic() - began
        if waited - checked > 0.5:
            checked = waited
            if found := dead():
                raise RolloutError(f"{what} cannot finish: {found}")
        if waited > timeout_s:
            raise RolloutError(f"{what} took over {timeout_s:.0f} s (rollout.request_timeout_s); is a server hanging?")
    if outcome[0] is not None:
        raise outcome[0]


def master_address(urls: Sequence[str]) -> str:
    """The address of this host under which all servers can reach it: one that its way to them starts from (IPv4).

    A server on this host reaches any of them, one elsewhere does not reach loopback.
    """
    ours = [local_address(url) for url in urls]
    return next((address for address in ours if not address.startswith("127.")), ours[0])


def local_address(url: str) -> str:
    """Where connections from here to this URL come from. Nothing is sent."""
    to = urlsplit(url)
    return address_towards(to.hostname or "", to.port or 80, socket.AF_INET)


async def reset_caches(pool: Pool, servers: Sequence[Server], version: int) -> None:
    """Without this, prompts and images would be served from what the old weights made of them.

    vLLM keeps a prefix cache, and answers so, as long as a request holds blocks of it; those that were given up end
    soon. Raises RolloutError for a server that keeps it for RESET_S.
    """
    holding, wait, began = list(servers), 0.02, time.monotonic()
    while holding:
        answers = await pool.post_to(holding, PREFIX_CACHE, repeat=True)
        holding = [server for server, answer in answers.items() if answer.json().get("success") is False]
        if holding and time.monotonic() - began > RESET_S:
            raise RolloutError(
                f"{holding[0].url} still keeps its prefix cache {RESET_S:.0f} s after new weights: a request holds "
                "it; who else uses this server?"
            )
        await asyncio.sleep(wait if holding else 0)
        wait = min(2 * wait, 1.0)
    for route in IMAGE_CACHES:
        await pool.post_to(servers, route, repeat=True)
    for server in servers:
        server.version = version


def transfer_folder() -> Path:
    """A private folder in shared memory where there is one."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="lingshu-rl-", dir=shared if shared.is_dir() else None))


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def policy_source(policy: Policy) -> Any:
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class PolicySource(WeightSource):
        """The policy's weights as vLLM's trainer side reads them: shapes first, then one gathered tensor at a time."""

        def metadata(self) -> list[Any]:
            return [ParamMeta(*shape) for shape in policy.weight_shapes()]

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            yield from policy.weights()

    return PolicySource()
