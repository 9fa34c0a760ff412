"""A run's parts, opened and closed together: folder, processes, clients, policy. `train.py` is the algorithm over them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from lingshu_rl.config import Config, ConfigError
from lingshu_rl.data.load import load
from lingshu_rl.model.loading import DEMO_MODEL, PromptEncoder, model_path
from lingshu_rl.plan import plan_here
from lingshu_rl.policy import Policy
from lingshu_rl.processes.cluster import HOST, PORT, RayWorker, join_cluster, leave_cluster
from lingshu_rl.processes.placement import Placement, this_machine
from lingshu_rl.processes.pool import Pool, Server
from lingshu_rl.processes.token import TOKEN_ENV
from lingshu_rl.processes.workers import Supervisor, Worker, WorkerError, free_port, stop_all
from lingshu_rl.progress import Progress
from lingshu_rl.reference.client import ReferenceClient
from lingshu_rl.reference.server import reference_command
from lingshu_rl.rewarding import build_rewards
from lingshu_rl.rollout.client import RolloutClient, read_rollouts, write_rollouts
from lingshu_rl.rollout.colocated import ColocatedRollout, ColocatedTransfer
from lingshu_rl.rollout.server import vllm_command, vllm_env
from lingshu_rl.rollout.transfer import (
    AdapterTransfer,
    FileTransfer,
    NcclTransfer,
    remove_folder,
    transfer_folder,
)
from lingshu_rl.rollout.vllm_plugin import TRANSFER_DIR_ENV
from lingshu_rl.runfolder import RunFolder
from lingshu_rl.stream import PromptStream, make_stream
from lingshu_rl.types import Prompt, TrainGroup

T = TypeVar("T")
GRACE_S = 10.0  # how long SIGTERM lets a batch that runs ahead of its step come to its end; after twice that, a further
# SIGTERM ends the process without saving


class Spans(dict[str, tuple[float, float]]):
    """When each phase of a batch began and ended (time.monotonic); a name used again widens its span."""

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._widen(name, start, time.monotonic())

    def seconds(self, name: str) -> float:
        start, end = self.get(name, (0.0, 0.0))
        return end - start

    def __or__(self, more: Mapping[str, tuple[float, float]]) -> Spans:  # type: ignore[override]
        both = Spans(self)
        for name, (start, end) in more.items():
            both._widen(name, start, end)
        return both

    def _widen(self, name: str, start: float, end: float) -> None:
        first, last = self.get(name, (start, end))
        self[name] = (min(first, start), max(last, end))


class Preempted(RuntimeError):
    """SIGTERM came: the run ends between two steps, with a checkpoint."""


class Run:
    """Everything a training step needs. On ranks other than the main one the clients are None."""

    def __init__(self, config: Config, policy: Policy, folder: RunFolder, placement: Placement) -> None:
        self.config, self.policy, self.folder, self.placement = config, policy, folder, placement
        self.is_main = policy.accelerator.is_main_process
        self.workers: list[Worker] = []
        self.supervisor: Supervisor | None = None
        self.rollout: RolloutClient | None = None
        self.reference: ReferenceClient | None = None
        self.rewards: Any = None
        self.transfer: FileTransfer | AdapterTransfer | NcclTransfer | ColocatedTransfer
        self.encoder: PromptEncoder
        self.stream: PromptStream[Prompt]
        self.test: list[Prompt] = []
        self.progress: Progress
        self.first_step = 0
        self.step = 0  # steps completed and logged
        self.saved_step = 0  # the step of the newest checkpoint
        self.version = 0  # updates that the policy's weights hold
        self.cursor = 0  # prompts drawn so far, over all epochs
        self.accuracy: float | None = None  # held-out, of the latest evaluation
        self.reference_from = ""  # folder in RunFolder.references; "" = the model the run started with
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.last_seconds: dict[str, float] = {}  # of the latest time each phase ran
        self.spans: dict[str, tuple[float, float]] = {}  # when it began and ended (time.monotonic)
        self.seconds_before = 0.0  # spent before this process resumed the run
        self.first_batch: dict[str, float] = {}
        self.stopping = asyncio.Event()  # set by SIGTERM
        self.wanted: asyncio.Queue[Worker] = asyncio.Queue()  # restarted rollout servers that wait for weights
        self.server_of: dict[str, Server] = {}  # what the clients know of each worker, by its name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's wall time to `seconds_by_phase`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spans[name] = (start, time.monotonic())
            self.add_seconds(name, time.monotonic() - start)

    def add_seconds(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.last_seconds[name] = seconds

    async def update(self, groups: Sequence[TrainGroup], step: int) -> dict[str, float]:
        """One batch of optimiser steps on every rank. With rollouts running beside it, in a thread of its own."""

        def work() -> dict[str, float]:
            self.policy.use_device()
            return self.policy.update(groups, step)

        if self.rollout is not None:
            self.rollout.sleep()
        with self.phase("update"):
            metrics = await asyncio.to_thread(work) if self.config.train.max_staleness else work()
        self.version = step + 1
        return metrics

    def save_checkpoint(self, step: int) -> None:
        """Everything that going on from `step` needs, written aside and renamed. All ranks call this."""

        def write(folder: Path) -> None:
            self.policy.save_hf(folder / "hf")
            self.policy.save_state(folder / "state")
            if self.is_main:
                self.encoder.save(folder / "hf")
                assert self.rollout is not None
                if landed := self.rollout.landed.get(step):
                    write_rollouts(folder / "landed.jsonl", landed)

        with self.phase("checkpoint"):
            self.folder.save_checkpoint(
                step,
                {
                    "step": step,
                    "cursor": self.cursor,
                    "accuracy": self.accuracy,
                    "reference": self.reference_from,
                    "stream": self.stream.state(),
                    "seconds": self.seconds,
                    "seconds_total": self.seconds_before + time.monotonic() - self.started,
                    "first_batch": self.first_batch,
                    "unjudged": self.rewards.executor.budget.window if self.is_main else [],
                },
                write,
                is_main=self.is_main,
                barrier=self.policy.barrier,
                keep_last=self.config.checkpoint.keep_last,
                keep_best=self.config.checkpoint.keep_best,
            )
        self.saved_step = step

    async def refresh_reference(self, step: int) -> None:
        """The policy as it is becomes the reference, in every replica and in every one that is started from here on.

        All ranks call this. The checkpoint names the folder; servers given by URLs must see the run folder too.
        """
        folder = self.folder.references / f"step-{step:06d}"
        with self.phase("refresh"):
            self.policy.save_hf(folder)
            if self.is_main:
                self.encoder.save(folder)
            self.reference_from = folder.name
            await self.on_main(self.tell_references, urgent=False)

    async def tell_references(self) -> None:
        """Every replica loads `reference_from`, and so does every one that is started from here on."""
        assert self.reference is not None
        folder, pool = self.folder.references / self.reference_from, self.reference.pool
        while len(pool.up) < len(pool.servers):  # one that is just starting would come up with the old model
            await asyncio.sleep(0.2)
        for worker in self.workers:
            if "reference" in worker.name:
                at = worker.command.index("--model") + 1
                worker.command[at] = str(folder)
        await pool.post_to(pool.servers, "/refresh", json={"folder": folder.name})

    def save_before_the_end(self) -> str:
        """A checkpoint of the last whole step unless there is one; says what a person can go on from."""
        if self.step > self.saved_step:
            self.save_checkpoint(self.step)
        if not self.saved_step:
            return "no step was finished, so there is no checkpoint"
        return f"the state after step {self.saved_step} is in {self.folder.checkpoint(self.saved_step)}"

    async def on_main(self, work: Callable[[], Awaitable[T]], *, urgent: bool = True) -> T:
        """Run `work` on the main rank; every rank gets its result or its exception.

        Meanwhile a rollout server that was started again gets the weights, which all ranks may have to gather: those
        that wait here take part. SIGTERM and a server that is lost for good end the work with Preempted or WorkerError;
        with urgent=False that is left to the next call (the result is None), and SIGTERM waits GRACE_S for the work.
        """
        if not self.is_main:
            while True:
                kind, value = self.policy.share(None)
                if kind == "weights":
                    await self.transfer.send(self.policy, self.version, server=value)
                elif kind == "error":
                    raise value
                else:
                    return value
        task = asyncio.ensure_future(work())
        try:
            kind, value = await self._attend(task, urgent)
        except Exception as error:
            kind, value = "error", error
        finally:
            await cancelled(task)
        self.policy.share((kind, value))
        if kind == "error":
            raise value
        return value

    async def _attend(self, task: asyncio.Future[T], urgent: bool) -> tuple[str, Any]:
        """How the task ended: ("value", result) or ("error", exception)."""
        wanted = asyncio.ensure_future(self.wanted.get())
        stop = asyncio.ensure_future(self._stop_after(0 if urgent else GRACE_S))
        lost = {self.supervisor.failure} if self.supervisor is not None else set()
        try:
            while True:
                waited: set[asyncio.Future[Any]] = {task, wanted, stop, *lost}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if any(failure.done() for failure in lost):
                    return ("error", next(iter(lost)).exception()) if urgent else ("value", None)
                if urgent and self.stopping.is_set():
                    return "error", Preempted("the run was stopped by SIGTERM")
                if wanted.done():
                    await self._give_weights(wanted.result())
                    wanted = asyncio.ensure_future(self.wanted.get())
                elif task.done():
                    error = task.exception()
                    return ("error", error) if error is not None else ("value", task.result())
                elif stop.done():
                    return "value", None
        finally:
            await cancelled(wanted)
            await cancelled(stop)

    async def _stop_after(self, grace_s: float) -> None:
        await self.stopping.wait()
        await asyncio.sleep(grace_s)

    async def _give_weights(self, worker: Worker) -> None:
        """All ranks' part in making a restarted rollout server useful; one that died again is left to the supervisor."""
        assert self.rollout is not None
        server, born = self.server_of[worker.name], worker.restarts
        self.policy.share(("weights", server.url))
        await self.transfer.start([server])
        await self.transfer.send(self.policy, self.version, server=server.url)
        if server.alive and worker.restarts == born:
            self.rollout.pool.mark(server, alive=True, up=True)

    def supervise(self) -> None:
        """From here on a server that dies is started again."""
        config = self.config

        def pool_of(worker: Worker) -> Pool:
            client = self.rollout if "rollout" in worker.name else self.reference
            assert client is not None
            return client.pool

        def lost(worker: Worker) -> None:
            pool_of(worker).mark(self.server_of[worker.name], alive=False, up=False)

        def revive(worker: Worker) -> None:
            server, pool = self.server_of[worker.name], pool_of(worker)
            server.url = worker.url
            waits = self.rollout is not None and pool is self.rollout.pool
            pool.mark(server, alive=True, up=not waits)
            if waits:
                self.wanted.put_nowait(worker)

        for worker in self.workers:
            server = self.server_of[worker.name] = pool_of(worker).by_url(worker.url)
            server.name = worker.name
        self.supervisor = Supervisor(
            self.workers,
            max_restarts=config.run.max_restarts,
            start_timeout_s=lambda w: start_timeout_s(config, w),
            lost=lost,
            revive=revive,
            say=self.progress.say,
        )

    async def examine(self, server: Server) -> bool:
        """Is this server down and coming back? See `pool`."""
        return self.supervisor is not None and await self.supervisor.examine(server.name)


class Ahead(Generic[T]):
    """A step's batch: collected when it is asked for or, with train.max_staleness=1, during the update before it.

    Weights are sent only when the batch collected ahead is complete, so no sample mixes two versions and none is more
    than one update old.
    """

    def __init__(self, run: Run, collect: Callable[[Run, int], Coroutine[Any, Any, T]]) -> None:
        self.run, self.collect = run, collect
        self.pending: asyncio.Task[T] | None = None

    async def batch(self, step: int) -> T:
        pending, self.pending = self.pending, None
        return await self.run.on_main(lambda: pending or self.collect(self.run, step))

    @asynccontextmanager
    async def during(self, step: int) -> AsyncIterator[None]:
        """Around the update of `step`. The first batch is checked against the engine, so nothing runs ahead of it."""
        run = self.run
        if not run.config.train.max_staleness or not run.first_batch or step + 1 >= run.config.train.steps:
            yield
            return
        if run.is_main:
            self.pending = asyncio.create_task(self.collect(run, step + 1))
        try:
            yield
        except BaseException:
            await cancelled(self.pending)
            raise
        await run.on_main(self._settle, urgent=False)
        if self.pending is not None and not self.pending.done():
            await cancelled(self.pending)
            self.pending = None

    async def _settle(self) -> None:
        assert self.pending is not None
        await asyncio.wait({self.pending})


async def cancelled(task: asyncio.Future[Any] | None) -> None:
    """Cancel and wait; its exception, if any, is no longer of interest."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()


@asynccontextmanager
async def open_run(config: Config) -> AsyncIterator[Run]:
    """Start everything, yield the Run, stop everything whatever happens."""
    start = time.monotonic()
    on_gpu = _policy_on_gpu(config)
    folder = RunFolder(config.run.dir)
    workers: list[Worker] = []
    given = os.environ.get(TRANSFER_DIR_ENV)
    shared = Path(given) if given else transfer_folder()
    run: Run | None = None
    main_task = asyncio.current_task()
    first = 0.0  # when SIGTERM came first

    def terminate() -> None:
        """SIGTERM ends the run between two steps; before there is a run, or when that takes too long, a further one at once.

        Launchers send it twice (from themselves, and by their death), so a second one soon after says nothing new.
        """
        nonlocal first
        first = first or time.monotonic()
        if run is not None:
            run.stopping.set()
        if run is None or time.monotonic() - first > 2 * GRACE_S:
            assert main_task is not None
            main_task.cancel()

    on_signal(signal.SIGTERM, terminate)
    try:
        is_main = _is_main()
        # Servers that run elsewhere were started with a token (and folder) that the user put into both environments.
        token = os.environ.get(TOKEN_ENV) or secrets.token_urlsafe(24)
        placement = plan_here(config).placement
        checkpoint = folder.open(config) if is_main else None
        progress = Progress(quiet=not is_main)
        for complaint in folder.complaints:
            progress.say(f"WARNING: {complaint}")
        prompts, test = load_prompts(config, folder, is_main)
        rewards = None
        if is_main:
            rewards = build_rewards(config, prompts, progress)
            progress.say(f"devices: {placement.describe()}")
            progress.say(
                f"starting {'rollout and reference servers' if config.loss.kl_coef else 'the rollout servers'}; logs in {folder.logs}"
            )
            workers += start_workers(
                config, placement, folder, token, shared, reference_model(config, folder, checkpoint)
            )
            on_signal(signal.SIGTERM, terminate)  # Ray took it
        policy = Policy(config, on_gpu=on_gpu)
        run = Run(config, policy, folder, placement)
        run.started, run.workers, run.progress, run.test, run.rewards = start, workers, progress, test, rewards
        run.stream = make_stream(prompts, config.data.curriculum, config.seed, config.train.group_size)
        run.encoder = PromptEncoder(config.model)
        checkpoint = policy.share(checkpoint)
        if checkpoint is not None:
            resume(run, checkpoint)
        progress.say(
            f"policy: {config.model}, {policy.parameters / 1e6:.1f} M parameters, DeepSpeed ZeRO stage {policy.zero_stage}, "
            f"{policy.ranks} rank(s)"
        )
        if policy.layout_note:
            progress.say(policy.layout_note)
        opened = run
        await run.on_main(lambda: connect(opened, token))
        if checkpoint is not None and run.rollout is not None:
            run.rollout.landed[run.step] = read_rollouts(checkpoint / "landed.jsonl", prompts)
        kind = config.rollout.weight_transfer
        nccl = kind == "nccl" or (kind == "auto" and on_gpu and all(d.on_gpu for d in placement.rollout_servers))
        run.transfer = (
            ColocatedTransfer(run.rollout)
            if isinstance(run.rollout, ColocatedRollout)
            else NcclTransfer(run.rollout, token, config.rollout.request_timeout_s, dead=lambda: first_death(workers))
            if nccl
            else AdapterTransfer(run.rollout, shared if is_main else None)
            if kind == "adapter"
            else FileTransfer(run.rollout, shared if is_main else None)
        )
        await run.on_main(run.transfer.start)
        if is_main:
            run.supervise()
        if run.reference_from and config.reference.urls:
            await run.on_main(run.tell_references)
        if checkpoint is not None or config.rollout.urls or kind == "adapter":
            # A server that was running already may still hold the weights of the run before; adapters it has none.
            await run.transfer.send(policy, version=run.version)
        run.add_seconds("start", time.monotonic() - start)
        run.policy.start_trackers(folder.path)
        try:
            yield run
        except (Preempted, WorkerError) as error:
            raise type(error)(f"{error}\n{run.save_before_the_end()}; the same command goes on from there") from error
    finally:
        if run is not None and run.supervisor is not None:
            await run.supervisor.close()
        stop_all(workers)
        if config.cluster == "ray" and workers:
            leave_cluster()
        if not given:
            remove_folder(shared)
        if run is not None:
            for client in (run.rollout, run.reference):
                if client is not None:
                    await client.close()
            if run.rewards is not None:
                run.rewards.close()


def resume(run: Run, checkpoint: Path) -> None:
    """Put the run where the checkpoint left it. All ranks call this. Raises ConfigError when it cannot be read."""
    state = json.loads((checkpoint / "run.json").read_text())
    run.first_step = run.step = run.saved_step = run.version = state["step"]
    run.cursor, run.accuracy, run.reference_from = state["cursor"], state.get("accuracy"), state.get("reference", "")
    run.seconds, run.first_batch = state["seconds"], state["first_batch"]
    run.seconds_before = state["seconds_total"]
    run.stream.restore(state["stream"])
    try:
        run.policy.load_state(checkpoint / "state")
    except Exception as error:
        raise ConfigError(
            f"checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}); give resume=FOLDER with an older "
            "one, or resume=never to start afresh (the old folder is kept aside)"
        ) from error
    if run.is_main:
        run.rewards.executor.budget.window = state.get("unjudged", [])
        for complaint in run.folder.cut_metrics(run.first_step):
            run.progress.say(f"WARNING: {complaint}")
    run.progress.say(f"resumed from {checkpoint}, step {run.first_step}")


def load_prompts(config: Config, folder: RunFolder, is_main: bool) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts. Refused rows are listed in the run folder, or end the run."""
    instruction = config.data.instruction
    if instruction == "auto":
        instruction = "short" if config.model == DEMO_MODEL else "full"
    sets = []
    for name, source in (("train", config.data.train), ("test", config.data.test)):
        loaded = load(source, instruction=instruction, skip_bad_rows=config.data.skip_bad_rows)
        if loaded.refused and is_main:
            folder.write_eval(f"refused_{name}", [asdict(r) for r in loaded.refused])
        sets.append(list(loaded.prompts))
    shared = {p.id for p in sets[0]} & {p.id for p in sets[1]}
    if shared:
        raise ConfigError(f"data.train and data.test share {len(shared)} row ids, for example {sorted(shared)[0]!r}")
    return sets[0], sets[1]


def reference_model(config: Config, folder: RunFolder, checkpoint: Path | None) -> str:
    """What the reference is at the checkpoint (None: at the start)."""
    name = json.loads((checkpoint / "run.json").read_text()).get("reference") if checkpoint else ""
    if not name:
        return model_path(config.reference.model or config.model)
    if not (folder.references / name).is_dir():
        raise ConfigError(
            f"checkpoint {checkpoint} was made with the reference {folder.references / name}, which is gone"
        )
    return str(folder.references / name)


def start_workers(
    config: Config, placement: Placement, folder: RunFolder, token: str, shared: Path, frozen: str
) -> list[Worker]:
    """The rollout and reference servers of this host, started together; they load while the policy loads.

    frozen: the reference model.
    """
    model = model_path(config.model)
    groups = [("rollout", i, devices) for i, devices in enumerate(placement.rollout_servers)]
    groups += [("reference", i, devices) for i, devices in enumerate(placement.reference_replicas)]
    on_ray = config.cluster == "ray" and groups
    if on_ray:
        join_cluster()
    workers: list[Worker] = []
    for role, i, devices in groups:
        where: dict[str, Any] = {"host": HOST, "port": PORT} if on_ray else {"host": "127.0.0.1", "port": free_port()}
        if role == "rollout":
            command = vllm_command(config, model, devices, **where)
            sharing = 1 if on_ray else len(placement.rollout_servers)
            env = vllm_env(devices, token=token, transfer_dir=shared, extra=config.rollout.env, servers=sharing)
        else:
            command = reference_command(config, frozen, devices, **where)
            env = {**devices.env(), TOKEN_ENV: token}
        common: dict[str, Any] = {
            "log": folder.logs / f"{role}-{i}.log",
            "env": env,
            "stop_timeout_s": config.run.stop_timeout_s,
        }
        name = f"{role} server {i}"
        if on_ray:
            if devices.on_gpu:
                del env["CUDA_VISIBLE_DEVICES"]  # Ray sets it
            options = config.rollout.ray if role == "rollout" else config.reference.ray
            workers.append(RayWorker(name, command, options={"num_gpus": len(devices.gpus), **options}, **common))
        else:
            workers.append(Worker(name, command, url=f"http://127.0.0.1:{where['port']}", **common))
    return workers


def start_timeout_s(config: Config, worker: Worker) -> float:
    return config.rollout.start_timeout_s if "rollout" in worker.name else config.reference.start_timeout_s


def first_death(workers: Sequence[Worker]) -> str:
    """What ended one of the rollout servers, or "" when all live."""
    for worker in workers:
        if "rollout" in worker.name:
            try:
                worker.check_alive()
            except WorkerError as error:
                return str(error)
    return ""


async def connect(run: Run, token: str) -> None:
    """Wait until every server is ready and open the clients."""
    config = run.config

    async def ready(worker: Worker) -> None:
        await asyncio.to_thread(worker.wait_healthy, start_timeout_s(config, worker))
        run.progress.say(f"{worker.name} is ready at {worker.url}")

    await asyncio.gather(*map(ready, run.workers))
    reading: dict[str, Any] = {"decode": run.encoder.decode, "banned_ids": run.policy.banned}
    if run.placement.colocated:
        run.rollout = ColocatedRollout(config, model_path(config.model), run.placement.policy, **reading)
    else:
        run.rollout = RolloutClient(
            config.rollout.urls or [w.url for w in run.workers if "rollout" in w.name],
            token=token,
            seed=config.seed,
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_tokens,
            timeout_s=config.rollout.request_timeout_s,
            retries=config.rollout.retries,
            concurrency=config.rollout.concurrency,
            examine=run.examine,
            **reading,
        )
    if config.loss.kl_coef > 0:
        run.reference = ReferenceClient(
            config.reference.urls or [w.url for w in run.workers if "reference" in w.name],
            token=token,
            timeout_s=config.reference.request_timeout_s,
            retries=config.reference.retries,
            examine=run.examine,
        )


def on_signal(number: signal.Signals, act: Callable[[], None]) -> None:
    with contextlib.suppress(NotImplementedError, ValueError):
        asyncio.get_running_loop().add_signal_handler(number, act)


def _policy_on_gpu(config: Config) -> bool:
    return (
        str(config.devices.policy) not in ("cpu",)
        and not str(config.devices.policy).startswith("cpu:")
        and bool(this_machine().gpus)
    )


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
