"""A run's parts, opened and closed together: folder, servers, clients, policy. `train.py` is the algorithm over
them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from lingshu_rl.checks.agreement import Agreement, judge
from lingshu_rl.config import Config
from lingshu_rl.data.load import ById
from lingshu_rl.failures import KNOWN_FAILURES, ConfigError, PromptRefused, RunStopped
from lingshu_rl.launches import check_sight, launches, transfer_kind
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.lengths import Lengths
from lingshu_rl.model.loading import model_path
from lingshu_rl.model.optimizers import OPTIMIZERS, check_package
from lingshu_rl.planning.plan import Plan, plan_here, rows_told, with_budget
from lingshu_rl.policy import Policy, check_choices
from lingshu_rl.processes.fleet import JUDGE, REFERENCE, ROLLOUT, Fleet
from lingshu_rl.processes.lease import Lease
from lingshu_rl.processes.mainrank import MainRank, Stop
from lingshu_rl.processes.placement import Ranks
from lingshu_rl.processes.threads import in_thread
from lingshu_rl.processes.token import TOKEN_ENV
from lingshu_rl.processes.workers import Worker, address_towards
from lingshu_rl.progress import Progress
from lingshu_rl.prompts import awaited_context, count_prompts, load_prompts, told, with_context
from lingshu_rl.reference.client import ReferenceClient
from lingshu_rl.rewarding import Rewards, build_rewards, try_judges
from lingshu_rl.rollout.client import RolloutClient, read_rollouts, write_rollouts
from lingshu_rl.rollout.inprocess import InProcessEngine, InProcessTransfer
from lingshu_rl.rollout.sampler import RolloutError
from lingshu_rl.rollout.transfer import Transfer, make_transfer, remove_folder, transfer_folder
from lingshu_rl.rollout.vllm_plugin import TRANSFER_DIR_ENV
from lingshu_rl.state import RunState, data_changes, seen
from lingshu_rl.storage.disk import said
from lingshu_rl.storage.folders import own, this_process
from lingshu_rl.storage.runfolder import RunFolder, RunFolderError
from lingshu_rl.stream import PromptStream, make_stream
from lingshu_rl.timeline import Timeline
from lingshu_rl.types import Experience, ProcessorInputs, Prompt, TrainGroup

T = TypeVar("T")
MIDWAY = -1  # the version of a policy that an update left between two steps
REFUSED_OF = 100  # prompts at the least that the share of refused ones is taken of


class Run:
    """Everything a training step needs.

    Set by `open_run`: rollout, reference, rewards and lengths on the main rank alone (reference: None without a KL
    term); engine: this rank's own with rollout.placement=colocate, else None.
    """

    rollout: RolloutClient
    reference: ReferenceClient | None
    rewards: Rewards
    engine: InProcessEngine | None
    transfer: Transfer
    encoder: PromptEncoder
    lengths: Lengths
    stream: PromptStream[Prompt]
    test: Sequence[Prompt]
    source_of: Callable[[str], str]  # of a mixture, by a prompt's id

    def __init__(
        self, config: Config, policy: Policy, folder: RunFolder, *, fleet: Fleet, stop: Stop, progress: Progress
    ) -> None:
        self.config, self.policy, self.folder, self.fleet, self.progress = config, policy, folder, fleet, progress
        self.is_main = policy.accelerator.is_main_process
        self.main = MainRank(policy, self.is_main, fleet, stop, self._give_weights, lambda w: fleet.servers[w.name].url)
        self.reference = self.engine = None
        self.state = RunState()
        self.before = self.state  # as it was when the step under way began
        self.timeline = Timeline()
        self.saved_step = 0  # the step of the newest checkpoint
        self.saved_in = folder.checkpoints  # and its folder
        self.version = 0  # updates that the policy's weights hold
        self.disagreement = ""  # of trainer and engine in the latest update, in words
        self.counted_before = 0  # tokens that given servers had generated for others

    def steps(self) -> Iterator[int]:
        for step in range(self.state.step, self.config.train.steps):
            self.timeline.begin(step)
            self.before = replace(self.state)
            yield step

    async def on_main(self, work: Callable[[], Awaitable[T]], *, urgent: bool = True) -> T:
        """Run `work` on the main rank; every rank gets its result or its exception. See `MainRank.run`."""
        return await self.main.run(work, urgent=urgent)

    def inputs(self, prompt: Prompt, read: tuple[int, ...]) -> ProcessorInputs:
        """What the processor reads of a prompt, of which the engine read these tokens. On the main rank.

        Raises RunStopped when they are others than the trainer's: by their number, for which no image is decoded;
        whoever processes the images compares them one by one. Raises OSError and TemplateError for a prompt that cannot
        be read.
        """
        inputs = self.encoder.inputs(prompt)
        (length,) = self.lengths.count([prompt])
        if length.total != len(read) and self.encoder.read(inputs)[0] != read:
            raise RunStopped(
                f"prompt {prompt.id!r}: the engine read {len(read)} tokens, the trainer's processor makes "
                f"{length.total}; both must use the same processor files and pixel limits"
            )
        return inputs

    def note_draw(self, batch: Experience) -> None:
        """Count what the step drew, and say which prompts it goes without. Raises PromptRefused when they are too
        many."""
        state, refused = self.state, batch.refused
        state.cursor += batch.drawn
        state.refused += len(refused)
        if self.is_main:
            state.unjudged = self.rewards.executor.budget.window
        for reason in refused.values():
            self.progress.say(f"WARNING: set aside: {reason}")
        limit = self.config.data.max_refused_share * max(state.cursor, REFUSED_OF)
        if not batch.groups or state.refused > limit:
            raise PromptRefused(
                f"{state.refused} of {state.cursor} prompts drawn so far were refused, in this step {len(refused)}; "
                f"data.max_refused_share={self.config.data.max_refused_share:g} allows {limit:.0f}. The last: "
                + (list(refused.values()) or ["none in this step"])[-1]
            )

    def hand_device_to_policy(self) -> None:
        """A colocated engine sleeps until it gets the next weights; servers have devices of their own."""
        if self.engine is not None:
            self.engine.sleep()

    async def update(self, groups: Sequence[TrainGroup], step: int) -> dict[str, float]:
        """One batch of optimiser steps on every rank. With rollouts running beside it, in a thread of its own."""

        self.disagreement = ""

        def work() -> dict[str, float]:
            self.policy.use_device()
            return self.policy.update(groups, step, partial(self._judge, step))

        taken = self.policy.steps_taken
        try:
            with self.timeline.of("update", step):
                metrics = await in_thread(work) if self.config.train.max_staleness else work()
        except BaseException:
            if self.policy.steps_taken != taken:
                self.version = MIDWAY
            raise
        self.version = step + 1
        return metrics

    def _judge(self, step: int, agreement: Agreement) -> None:
        self.disagreement = judge(agreement, self.config, self.policy.dtype, step)
        if self.disagreement:
            self.progress.say(f"WARNING: {self.disagreement}")

    async def send_weights(self) -> None:
        """The policy's weights into every rollout engine. All ranks call this; a fault of the main one is raised by
        all."""
        await self.main.agree(lambda: self.transfer.send(self.policy, version=self.version))

    async def _give_weights(self, worker: Worker | None, url: str) -> None:
        """A server that was started again gets the weights; one that died once more is left to the supervisor."""
        if worker is None:
            with contextlib.suppress(RolloutError):  # the main rank says it to all
                await self.transfer.send(self.policy, self.version, server=url)
            return
        server, born = self.fleet.servers[worker.name], worker.restarts
        await self.transfer.start([server])
        await self.transfer.send(self.policy, self.version, server=url)
        if server.alive and worker.restarts == born:
            self.rollout.pool.mark(server, alive=True, up=True)

    def save_checkpoint(self) -> None:
        """Everything that going on from here needs, written aside and renamed. All ranks call this."""
        step = self.state.step

        def write(folder: Path) -> None:
            self.policy.save_hf(folder / "hf")
            if self.config.train.lora:
                self.policy.save_adapter(folder / "adapter" if self.is_main else None)
            self.policy.save_state(folder / "state")
            if self.is_main:
                self.encoder.save(folder / "hf")
                if landed := self.rollout.landed.get(step):
                    write_rollouts(folder / "landed.jsonl", landed)

        with self.timeline.of("checkpoint"):
            now = replace(
                self.state,
                stream=self.stream.state(),
                seconds=self.timeline.seconds,
                seconds_total=self.timeline.total_s,
                judge_costs=[judge.cost for judge in self.rewards.judges] if self.is_main else [],
            )
            self.folder.save_checkpoint(
                step,
                now.to_json(),
                write,
                is_main=self.is_main,
                barrier=self.policy.barrier,
                keep_last=self.config.checkpoint.keep_last,
                keep_best=self.config.checkpoint.keep_best,
            )
        self.saved_step, self.saved_in = step, self.folder.checkpoint(step)

    def resume(self, checkpoint: Path) -> None:
        """Put the run where the checkpoint left it. All ranks call this. Raises ConfigError when it cannot be read."""
        self.state = state = replace(RunState.read(checkpoint), data=self.state.data)
        self.saved_step = self.version = state.step
        self.saved_in = checkpoint
        self.timeline.resume(state.seconds, state.seconds_total)
        self.stream.restore(state.stream)
        try:
            self.policy.load_state(checkpoint / "state")
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}); give resume=FOLDER with an "
                "older one, or resume=never to start afresh (the old folder is kept aside)"
            ) from error
        if self.is_main:
            self.rewards.executor.budget.window = state.unjudged
            for judge, cost in zip(self.rewards.judges, state.judge_costs, strict=False):
                judge.spent = cost
        self.progress.say(f"resumed from {checkpoint}, step {state.step}")

    async def refresh_reference(self) -> None:
        """The policy as it is becomes the reference, in every replica and in every one that is started from here on.

        All ranks call this. The checkpoint names the folder; servers given by URLs must see the run folder too.
        """
        folder = self.folder.references / f"step-{self.version:06d}"
        with self.timeline.of("refresh"):
            self.policy.save_hf(folder)
            if self.is_main:
                self.encoder.save(folder)
            self.state.reference = folder.name
            await self.on_main(self.tell_references, urgent=False)

    async def tell_references(self) -> None:
        """Every replica loads `state.reference`, and so does every one that is started from here on."""
        assert self.reference is not None
        folder, pool = self.folder.references / self.state.reference, self.reference.pool
        while len(pool.up) < len(pool.servers):  # one that is just starting would come up with the old model
            await asyncio.sleep(0.2)
        for worker in self.fleet.of(REFERENCE):
            at = worker.command.index("--model") + 1
            worker.command[at] = str(folder)
        limit = self.config.reference.start_timeout_s
        await pool.post_to(pool.servers, "/refresh", timeout_s=limit, repeat=True, json={"folder": folder.name})

    def save_before_the_end(self) -> str:
        """A checkpoint of the last whole step unless there is one; says what a person can go on from."""
        if self.state.step == self.before.step:  # what a step that broke off drew and measured is not done
            self.state = self.before
        fault = ""
        if self.state.step > self.saved_step and self.version == self.state.step:  # not in the middle of an update
            try:
                self.save_checkpoint()
            except RunFolderError as error:
                fault = f"the state after step {self.state.step} could not be saved: {error}\n"
        if not self.saved_step:
            return f"{fault}no step was finished, so there is no checkpoint"
        return f"{fault}the state after step {self.saved_step} is in {self.saved_in}"

    def saves_after(self, error: Exception) -> bool:
        """Whether all ranks are here to save: one that fails alone leaves the others in the middle of something."""
        return self.policy.ranks == 1 or isinstance(error, RunStopped) or hasattr(error, "on_every_rank")


@asynccontextmanager
async def open_run(config: Config) -> AsyncIterator[Run]:
    """Start everything, yield the Run, stop everything whatever happens."""
    stop = Stop()
    stop.listen()
    async with contextlib.AsyncExitStack() as closing:
        run = await _open(config, stop, closing)
        try:
            yield run
        except Exception as error:
            if not run.saves_after(error):
                raise
            told = f"{run.save_before_the_end()}; the same command goes on from there"
            if not isinstance(error, KNOWN_FAILURES):
                run.progress.say(told)
                raise
            raise type(error)(f"{said(error) if isinstance(error, OSError) else error}\n{told}") from error


async def _open(config: Config, stop: Stop, closing: contextlib.AsyncExitStack) -> Run:
    """What is opened is closed by `closing`, also when a later part cannot be opened."""
    timeline = Timeline()
    is_main = os.environ.get("RANK", "0") == "0"
    plan = plan_here(config)
    placement = plan.placement
    transfer = transfer_kind(config, placement)  # refuses on every rank, before any waits for another
    if is_main:
        check_packages(config)
    folder, progress = RunFolder(config.run.dir), Progress(quiet=not is_main)
    if is_main:
        closing.enter_context(own(folder.path, "a run", "run.dir", afresh=config.resume == "never"))
    checkpoint = folder.open(config) if is_main else None
    encoder = PromptEncoder(config.model)
    # Servers that run elsewhere were started with a token (and folder) that the user put into both environments.
    token = os.environ.get(TOKEN_ENV) or secrets.token_urlsafe(24)
    sized: Config | None = None  # with what follows from the prompts
    if is_main:  # only this rank asks the engine, so only its prompts have to be within the engine's limit
        limit = await awaited_context(config, encoder, token)
        counted = count_prompts(config, encoder, limit, folder)
        loaded, longest = counted.sets, counted.longest()[1].total
        sized = with_context(config, counted.needed(config))
        sized = with_budget(sized, longest, plan.machine, plan.ranks)
        for line in (*told(config, counted), *rows_told(sized, longest)):
            progress.say(line)
    else:
        loaded = load_prompts(config, encoder)
    prompts, test = loaded["train"].prompts, loaded["test"].prompts
    check_sight(config, placement, chain(prompts, test))
    if is_main:
        await hold_servers(config, folder, token, progress, closing)
    if checkpoint is not None:
        folder.judge_changes(data_changes(RunState.read(checkpoint).data, seen(loaded)), "rows")
    given = os.environ.get(TRANSFER_DIR_ENV)
    shared = Path(given) if given else transfer_folder()
    if not given:
        closing.callback(remove_folder, shared)
    rewards = None
    fleet = Fleet()
    closing.push_async_callback(fleet.close)
    if sized is not None:
        progress.say(f"devices: {placement.describe()}")
        reference = reference_model(config, folder, checkpoint)
        to_start = launches(sized, placement, transfer=transfer, token=token, transfer_dir=shared, reference=reference)
        if to_start:
            progress.say(f"starting {', '.join(launch.name for launch in to_start)}; logs in {folder.logs}")
        fleet.start(to_start, folder.logs)
        stop.listen()  # Ray took it
        rewards = build_rewards(config, prompts, progress)  # their trial and the policy take no longer than the engines
        closing.callback(rewards.close)
    policy = Policy(config, on_gpu=placement.policy.on_gpu)
    asked, config = config, policy.share(sized)
    plan, policy.token_budget = plan_here(config), config.packing.token_budget  # an engine gets what such rows leave
    run = Run(config, policy, folder, fleet=fleet, stop=stop, progress=progress)
    stop.between_steps = True
    run.timeline, run.test = timeline, test
    run.state.data = seen(loaded)
    run.stream = make_stream(
        prompts, config.data.curriculum, config.seed, config.train.group_size, loaded["train"].parts
    )
    run.source_of = loaded["train"].source_of
    run.encoder = encoder
    policy.know(ById(prompts, test), run.encoder)
    if rewards is not None:
        run.rewards, run.lengths = rewards, counted.lengths["train"]
    checkpoint, token = policy.share((checkpoint, token))
    if checkpoint is not None:
        run.resume(checkpoint)
    if is_main:
        folder.begin(asked, run.state.step)  # that the same command goes on, whatever follows from prompts and machine
        for complaint in folder.complaints:
            progress.say(f"WARNING: {complaint}")
    progress.say(
        f"policy: {config.model}, {policy.parameters / 1e6:.1f} M parameters, DeepSpeed ZeRO stage "
        f"{policy.zero_stage}, "
        f"{policy.ranks} rank(s)"
    )
    if policy.layout_note:
        progress.say(policy.layout_note)
    with timeline.of("start"):
        await _connect(run, plan, transfer, token, shared, closing)
        if checkpoint is not None and is_main and not folder.forked:  # under other settings they would be other samples
            run.rollout.landed[run.state.step] = read_rollouts(checkpoint / "landed.jsonl", ById(prompts))
        if run.state.reference and config.reference.urls:
            await run.on_main(run.tell_references)
        if checkpoint is not None or config.rollout.urls or config.train.lora:
            # A server that was running already may still hold the weights of the run before; adapters it has none.
            await run.send_weights()
        if config.train.quantize and config.loss.kl_coef and not (run.state.reference or config.reference.model):
            await run.refresh_reference()  # what the 4 bits stand for, which is where the policy starts
    policy.start_trackers(folder.path)
    return run


async def _connect(
    run: Run, plan: Plan, transfer: str, token: str, shared: Path, closing: contextlib.AsyncExitStack
) -> None:
    """Wait until every engine is ready, open the clients and the way of the weights."""
    config, policy, placement = run.config, run.policy, plan.placement
    urls = config.rollout.urls
    who = run.folder.identity if run.is_main else ""
    await run.on_main(lambda: run.fleet.ready(run.progress.say))
    await run.on_main(lambda: _with_judges(run, token))
    if placement.colocated:  # a reference beside it holds its memory by now: vLLM counts what is left of the device
        devices = placement.engines[int(os.environ.get("LOCAL_RANK", "0"))]
        run.engine = InProcessEngine(
            config, model_path(config.model), devices, plan.engine_share, policy, token=token, host=_own_address()
        )
        closing.callback(run.engine.close)
        urls = [url for url in policy.gather(run.engine.url) if url]
    client: RolloutClient | None = None
    if run.is_main:
        client = run.rollout = RolloutClient(
            urls or [worker.url for worker in run.fleet.of(ROLLOUT)],
            token=token,
            decode=run.encoder.decode,
            banned_ids=policy.banned,
            end_ids=run.encoder.eos_ids,
            seed=config.seed,
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_tokens,
            timeout_s=config.rollout.request_timeout_s,
            retries=config.rollout.retries,
            concurrency=config.rollout.concurrency,
            examine=run.fleet.examine,
            run=who,
        )
        closing.push_async_callback(client.close)
        pools = {ROLLOUT: client.pool}
        if config.loss.kl_coef > 0:
            run.reference = ReferenceClient(
                config.reference.urls or [worker.url for worker in run.fleet.of(REFERENCE)],
                token=token,
                timeout_s=config.reference.request_timeout_s,
                retries=config.reference.retries,
                examine=run.fleet.examine,
                run=who,
            )
            closing.push_async_callback(run.reference.close)
            pools[REFERENCE] = run.reference.pool
    await run.on_main(lambda: run.rollout.prompt_room(config.rollout.max_tokens))
    run.transfer = (
        InProcessTransfer(run.engine, client)
        if run.engine is not None
        else make_transfer(
            transfer,
            client,
            folder=shared if run.is_main else None,
            timeout_s=config.rollout.request_timeout_s,
            dead=lambda: run.fleet.death(ROLLOUT),
            restart=run.fleet.restart,
        )
    )
    if config.rollout.urls:
        run.counted_before = await run.on_main(lambda: run.rollout.generated_tokens())
    await run.on_main(run.transfer.start)
    if run.is_main:
        run.fleet.supervise(
            pools,
            config.run.max_restarts,
            run.progress.say,
            moved=lambda worker: run.rewards.serve(worker.url, config.judge.model, token),
        )


async def _with_judges(run: Run, token: str) -> None:
    """Tell the rewards where the run's own judge answers, and try all judges."""
    for worker in run.fleet.of(JUDGE):
        run.rewards.serve(worker.url, run.config.judge.model, token)
    await try_judges(run.config, run.rewards, run.folder.judge, run.progress)


async def hold_servers(
    config: Config, folder: RunFolder, token: str, progress: Progress, closing: contextlib.AsyncExitStack
) -> None:
    """Take the given servers that this run will change, until it ends: the engines, and a reference that is refreshed.

    Raises Taken for one that another run holds.
    """
    changed = [*config.rollout.urls, *(config.reference.urls if config.reference.refresh_every else ())]
    if not changed:
        return
    lease = Lease(changed, run=folder.identity, holder=f"a run in {folder.path} ({this_process()})", token=token)
    for url in await in_thread(closing.enter_context, lease.held()):
        progress.say(f"WARNING: {url} keeps no leases: see to it that no other run uses it at the same time")


def reference_model(config: Config, folder: RunFolder, checkpoint: Path | None) -> str:
    """What the reference is at the checkpoint (None: at the start)."""
    name = RunState.read(checkpoint).reference if checkpoint else ""
    if not name:
        return model_path(config.reference.model or config.model)
    if not (folder.references / name).is_dir():
        raise ConfigError(
            f"checkpoint {checkpoint} was made with the reference {folder.references / name}, which is gone"
        )
    return str(folder.references / name)


def check_packages(config: Config) -> None:
    """Raises ConfigError for a package that the optimiser or the quantisation needs and this environment lacks, and for
    what `check_choices` refuses."""
    t = config.train
    check_package(OPTIMIZERS[t.optimizer].package, f"train.optimizer={t.optimizer}")
    check_choices(config)
    check_package("bitsandbytes" if t.quantize else "", f"train.quantize={t.quantize}")


def _own_address() -> str:
    """Where the main rank reaches this one: the loopback address when all ranks are on this host."""
    ranks = Ranks.launched()
    return "127.0.0.1" if ranks.here == ranks.all else address_towards(os.environ["MASTER_ADDR"], family=socket.AF_INET)
