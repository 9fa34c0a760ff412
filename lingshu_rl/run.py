"""A run's parts, opened and closed together: folder, processes, clients, policy. `train.py` is the algorithm over them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lingshu_rl.config import Config, ConfigError
from lingshu_rl.data.load import load
from lingshu_rl.model import DEMO_MODEL, PromptEncoder, model_path
from lingshu_rl.placement import DeviceSet, Placement, place, visible_gpus
from lingshu_rl.policy import Policy
from lingshu_rl.progress import Progress
from lingshu_rl.reference.client import ReferenceClient
from lingshu_rl.reference.server import reference_command
from lingshu_rl.rewarding import build_rewards
from lingshu_rl.rollout.client import RolloutClient
from lingshu_rl.rollout.server import vllm_command, vllm_env
from lingshu_rl.rollout.transfer import FileTransfer, NcclTransfer, remove_folder, transfer_folder
from lingshu_rl.rollout.vllm_plugin import TOKEN_ENV, TRANSFER_DIR_ENV
from lingshu_rl.runfolder import RunFolder
from lingshu_rl.stream import PromptStream, make_stream
from lingshu_rl.types import Prompt
from lingshu_rl.workers import Worker, free_port, stop_all

T = TypeVar("T")


class Run:
    """Everything a training step needs. On ranks other than the main one the clients are None."""

    def __init__(self, config: Config, policy: Policy, folder: RunFolder, placement: Placement) -> None:
        self.config, self.policy, self.folder, self.placement = config, policy, folder, placement
        self.is_main = policy.accelerator.is_main_process
        self.workers: list[Worker] = []
        self.rollout: RolloutClient | None = None
        self.reference: ReferenceClient | None = None
        self.rewards: Any = None
        self.transfer: FileTransfer | NcclTransfer
        self.encoder: PromptEncoder
        self.stream: PromptStream[Prompt]
        self.test: list[Prompt] = []
        self.progress: Progress
        self.first_step = 0
        self.cursor = 0  # prompts drawn so far, over all epochs
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.last_seconds: dict[str, float] = {}  # of the latest time each phase ran
        self.seconds_before = 0.0  # spent before this process resumed the run
        self.first_batch: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's wall time to `seconds_by_phase`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add_seconds(name, time.monotonic() - start)

    def add_seconds(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.last_seconds[name] = seconds

    def save_checkpoint(self, step: int) -> None:
        """Everything that going on from `step` needs, written aside and renamed. All ranks call this."""

        def write(folder: Path) -> None:
            self.policy.save_hf(folder / "hf")
            self.policy.save_state(folder / "state")
            if self.is_main:
                self.encoder.save(folder / "hf")

        with self.phase("checkpoint"):
            self.folder.save_checkpoint(
                step,
                {
                    "step": step,
                    "cursor": self.cursor,
                    "stream": self.stream.state(),
                    "seconds": self.seconds,
                    "seconds_total": self.seconds_before + time.monotonic() - self.started,
                    "first_batch": self.first_batch,
                },
                write,
                is_main=self.is_main,
                barrier=self.policy.barrier,
                keep_last=self.config.checkpoint.keep_last,
            )

    async def on_main(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` on the main rank; every rank gets its result or its exception."""
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.is_main:
            try:
                outcome = (await self.guarded(work()), None)
            except Exception as error:
                outcome = (None, error)
        value, failure = self.policy.share(outcome)
        if failure is not None:
            raise failure
        return value

    async def guarded(self, work: Awaitable[T]) -> T:
        """Await `work`, but raise WorkerError at once when a child process dies meanwhile."""
        task = asyncio.ensure_future(work)
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not task.done():
                watch.result()
            return await task
        finally:
            for pending in (task, watch):
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await pending

    async def _watch(self) -> None:
        while True:
            self.check_workers()
            await asyncio.sleep(0.5)

    def check_workers(self) -> None:
        for worker in self.workers:
            worker.check_alive()


@asynccontextmanager
async def open_run(config: Config) -> AsyncIterator[Run]:
    """Start everything, yield the Run, stop everything whatever happens."""
    start = time.monotonic()
    on_gpu = _policy_on_gpu(config)
    folder = RunFolder(config.run.dir)
    workers: list[Worker] = []
    given = os.environ.get(TRANSFER_DIR_ENV)
    shared = Path(given) if given else transfer_folder()
    policy: Policy | None = None
    cancel_on(signal.SIGTERM)
    try:
        is_main = _is_main()
        # Servers that run elsewhere were started with a token (and folder) that the user put into both environments.
        token = os.environ.get(TOKEN_ENV) or secrets.token_urlsafe(24)
        placement = place(config, visible_gpus(), _local_ranks())
        checkpoint = folder.open(config) if is_main else None
        progress = Progress(quiet=not is_main)
        prompts, test = load_prompts(config, folder, is_main)
        rewards = None
        if is_main:
            rewards = build_rewards(config, prompts, progress)
            progress.say(f"devices: {placement.describe()}")
            progress.say(
                f"starting {'rollout and reference servers' if config.loss.kl_coef else 'the rollout server'}; logs in {folder.logs}"
            )
            workers += start_workers(config, placement, folder, token, shared)
        policy = Policy(config, on_gpu=on_gpu)
        run = Run(config, policy, folder, placement)
        run.workers, run.progress, run.test, run.rewards = workers, progress, test, rewards
        run.stream = make_stream(prompts, config.data.curriculum, config.seed, config.train.group_size)
        run.encoder = PromptEncoder(config.model)
        checkpoint = policy.share(checkpoint)
        if checkpoint is not None:
            state = json.loads((checkpoint / "run.json").read_text())
            run.first_step, run.cursor = state["step"], state["cursor"]
            run.seconds, run.first_batch = state["seconds"], state["first_batch"]
            run.seconds_before = state["seconds_total"]
            run.stream.restore(state["stream"])
            policy.load_state(checkpoint / "state")
            if is_main:
                folder.cut_metrics(run.first_step)
            progress.say(f"resumed from {checkpoint}, step {run.first_step}")
        progress.say(
            f"policy: {config.model}, {policy.parameters / 1e6:.1f} M parameters, DeepSpeed ZeRO stage {policy.zero_stage}, "
            f"{policy.ranks} rank(s)"
        )
        await run.on_main(lambda: connect(run, token))
        urls = rollout_urls(run)
        kind = config.rollout.weight_transfer
        nccl = kind == "nccl" or (kind == "auto" and on_gpu and (placement.rollout is None or placement.rollout.on_gpu))
        if nccl:
            run.transfer = NcclTransfer(
                run.rollout, policy.share(urls), token, len(placement.rollout.gpus) if placement.rollout else 1
            )
        else:
            run.transfer = FileTransfer(run.rollout, shared if is_main else None)
        await run.on_main(run.transfer.start)
        if checkpoint is not None or config.rollout.urls:
            # A server that was running already may still hold the weights of the run before.
            await run.transfer.send(policy, version=run.first_step)
        run.add_seconds("start", time.monotonic() - start)
        run.policy.start_trackers(folder.path)
        yield run
    finally:
        stop_all(workers)
        if not given:
            remove_folder(shared)
        if policy is not None and "run" in locals():
            for client in (run.rollout, run.reference):
                if client is not None:
                    await client.close()
            if run.rewards is not None:
                run.rewards.close()


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


def start_workers(config: Config, placement: Placement, folder: RunFolder, token: str, shared: Path) -> list[Worker]:
    """The rollout and reference servers of this host, started together; they load while the policy loads."""
    started = []
    if placement.rollout is not None:
        started.append(_start_rollout(config, placement.rollout, folder, token, shared))
    if placement.reference is not None:
        started.append(_start_reference(config, placement.reference, folder, token))
    return started


def _start_rollout(config: Config, devices: DeviceSet, folder: RunFolder, token: str, shared: Path) -> Worker:
    port = free_port()
    command = vllm_command(config, model_path(config.model), devices, port=port)
    env = vllm_env(devices, token=token, transfer_dir=shared, extra=config.rollout.env)
    return Worker(
        "rollout server 0",
        command,
        url=f"http://127.0.0.1:{port}",
        log=folder.logs / "rollout-0.log",
        env=env,
        stop_timeout_s=config.run.stop_timeout_s,
    )


def _start_reference(config: Config, devices: DeviceSet, folder: RunFolder, token: str) -> Worker:
    port = free_port()
    command = reference_command(config, model_path(config.reference.model or config.model), devices, port=port)
    return Worker(
        "reference server 0",
        command,
        url=f"http://127.0.0.1:{port}",
        log=folder.logs / "reference-0.log",
        env={**devices.env(), TOKEN_ENV: token},
        stop_timeout_s=config.run.stop_timeout_s,
    )


async def connect(run: Run, token: str) -> None:
    """Wait until every server is ready and open the clients."""
    config = run.config
    for worker in run.workers:
        limit = config.rollout.start_timeout_s if "rollout" in worker.name else config.reference.start_timeout_s
        await asyncio.to_thread(worker.wait_healthy, limit)
        run.progress.say(f"{worker.name} is ready at {worker.url}")
    run.rollout = RolloutClient(
        rollout_urls(run),
        token=token,
        decode=run.encoder.decode,
        banned_ids=run.policy.banned,
        seed=config.seed,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        timeout_s=config.rollout.request_timeout_s,
        retries=config.rollout.retries,
        concurrency=config.rollout.concurrency,
        on_error=run.check_workers,
    )
    if config.loss.kl_coef > 0:
        urls = config.reference.urls or [w.url for w in run.workers if "reference" in w.name]
        run.reference = ReferenceClient(
            urls, token=token, timeout_s=config.reference.request_timeout_s, on_error=run.check_workers
        )


def rollout_urls(run: Run) -> list[str]:
    return list(run.config.rollout.urls) or [w.url for w in run.workers if "rollout" in w.name]


def cancel_on(number: signal.Signals) -> None:
    """Make a signal cancel the current task, as Ctrl-C does, so that the same clean-up runs."""
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError, ValueError):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def _policy_on_gpu(config: Config) -> bool:
    return (
        str(config.devices.policy) not in ("cpu",)
        and not str(config.devices.policy).startswith("cpu:")
        and visible_gpus() > 0
    )


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
