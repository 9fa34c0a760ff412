"""What runs beside what: groups beside groups, the next step's rollouts beside the update, restarts beside everything.

Times are virtual: a loop that jumps to the next timer instead of waiting makes them exact on any machine.
"""

import asyncio
import json
import queue
import threading
from types import SimpleNamespace

import httpx
import pytest
import torch

from lingshu_rl.failures import ConfigError
from lingshu_rl.model.lengths import Length
from lingshu_rl.overlap import Ahead
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes.fleet import Fleet
from lingshu_rl.processes.mainrank import Preempted, Stop
from lingshu_rl.processes.pool import Pool
from lingshu_rl.processes.workers import WorkerError
from lingshu_rl.reference.client import ReferenceClient
from lingshu_rl.reference.wire import decode_groups, encode_logprobs
from lingshu_rl.run import Run, reference_model
from lingshu_rl.storage.runfolder import RunFolder
from lingshu_rl.stream import PromptStream
from lingshu_rl.train import collect
from lingshu_rl.types import ProcessorInputs, Prompt, Rollout
from rewards.base import RewardResult


class VirtualLoop(asyncio.SelectorEventLoop):
    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()

    def run_in_executor(self, executor, func, *args):
        done = self.create_future()
        done.set_result(func(*args))
        return done


def virtually(coroutine):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


def now():
    return asyncio.get_running_loop().time()


class Rollouts:
    """A prompt's group lands every `every` seconds; remembers which weights were there from start to end."""

    def __init__(self, every):
        self.every, self.version, self.under_way, self.landed = every, 0, 0, {}

    async def groups(self, prompts, n, step):
        for p in prompts:
            version = self.version
            self.under_way += 1
            await asyncio.sleep(self.every)
            self.under_way -= 1
            assert self.version == version, "the weights changed under a request"
            yield tuple(Rollout(p, i, str(i % 2), (1, 2), (5, 6), (-0.1, -0.2), "stop", version) for i in range(n))


class Rewards:
    weights = {}  # noqa: RUF012
    noise = None

    def __init__(self, each):
        self.each, self.turn = each, asyncio.Lock()

    async def score(self, samples):
        async with self.turn:
            await asyncio.sleep(self.each)
        return [RewardResult(float(s.completion)) for s in samples]


def reference(each, replicas):
    """The real client before stand-ins that take `each` seconds a group."""

    async def answer(request):
        await asyncio.sleep(each)
        groups = decode_groups(await request.aread(), vocabulary=100)
        return httpx.Response(200, content=encode_logprobs([[torch.zeros(2) for _ in g.completions] for g in groups]))

    client = ReferenceClient([f"http://r{i}" for i in range(replicas)], token="t", timeout_s=5)
    client.pool.http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return client


def a_run(tmp_path, *settings, policy=None, prompts=32):
    """A real Run on stand-in parts."""
    settings = [f"run.dir={tmp_path}", f"train.prompts_per_step={prompts}", "train.group_size=2", *settings]
    policy = policy or SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True), share=lambda value: value, use_device=lambda: None, update=lambda groups, step, judge: {}, steps_taken=0
    )  # fmt: skip
    stop = Stop()
    stop.between_steps = True
    run = Run(
        load_config(None, settings),
        policy,
        SimpleNamespace(checkpoints=tmp_path),
        fleet=Fleet(),
        stop=stop,
        progress=SimpleNamespace(),
    )
    items = [Prompt(str(i), ({"role": "user", "content": "?"},), (), "A", (), "open", {}) for i in range(4 * prompts)]
    run.stream = PromptStream(items, seed=0)
    run.encoder = SimpleNamespace(inputs=lambda prompt: ProcessorInputs("?", ()))
    run.lengths = SimpleNamespace(count=lambda prompts: [Length(p.id, 2, 0) for p in prompts])
    return run


@pytest.mark.parametrize(
    ("rollout_s", "reward_s", "reference_s", "replicas"),
    [(0.25, 0.1, 0.2, 1), (0.25, 0.02, 0.4, 2), (0.1, 0.02, 0.4, 1), (0.1, 0.4, 0.2, 1)],
    ids=["rollout longest", "two replicas", "reference longest", "reward longest"],
)
def test_a_step_takes_its_longest_phase_and_the_update(tmp_path, rollout_s, reward_s, reference_s, replicas):
    """Groups flow: while one is sampled the one before is rewarded and the one before that goes to the reference."""
    groups, update_s = 32, 6.0

    async def step():
        run = a_run(tmp_path, prompts=groups)
        run.rollout, run.rewards, run.reference = (
            Rollouts(rollout_s),
            Rewards(reward_s),
            reference(reference_s, replicas),
        )
        batch = await collect(run, 0)
        await asyncio.sleep(update_s)
        assert len(batch.train) == groups
        return now()

    least = max(groups * rollout_s, groups * reward_s, groups * reference_s / replicas) + update_s
    assert least <= virtually(step()) < 1.05 * least


async def train_steps(run, steps, update_s, log):
    """The order of train.train on stand-ins."""

    class Transfer:
        async def send(self, policy, version, server=None):
            assert run.rollout.under_way == 0
            run.rollout.version = version

    def work(groups, step):
        log.append(("update", step))
        return {}

    run.transfer = Transfer()
    ahead = Ahead(run, collect)
    for step in range(steps):
        batch = await ahead.batch(step)
        run.state.first_batch = {"kl": 0.0}
        run.state.cursor += batch.drawn
        async with ahead.during(step):
            await asyncio.sleep(update_s)
            await run.update(batch.train, step)
        await run.send_weights()
        versions = {m.rollout.weight_version for g in batch.groups for m in g.members}
        log.append((step, versions, [g.prompt.id for g in batch.groups]))
    return now()


@pytest.mark.parametrize("staleness", [0, 1])
def test_rollouts_run_beside_the_update_and_are_never_older_than_the_bound(tmp_path, staleness):
    async def several():
        run = a_run(tmp_path, f"train.max_staleness={staleness}", "train.steps=5", prompts=8)
        run.rollout, run.rewards, run.reference = Rollouts(1.0), Rewards(0.01), reference(0.01, 1)
        policy_updates = []
        run.policy.update = lambda groups, step, judge: policy_updates.append(step) or {}
        log = []
        took = await train_steps(run, 5, 7.0, log)
        return took, [entry for entry in log if entry[0] != "update"], policy_updates, run.stream

    took, steps, updates, stream = virtually(several())
    assert updates == [0, 1, 2, 3, 4]
    gaps = [step - min(versions) for step, versions, _ in steps]
    assert all(len(versions) == 1 for _, versions, _ in steps)
    assert gaps == ([0] * 5 if staleness == 0 else [0, 1, 1, 1, 1])
    # Every prompt once, in the stream's order, whatever runs ahead.
    assert [name for *_, names in steps for name in names] == [p.id for p in stream.take(0, 40)]
    longest = 5 * (8 + 7) if staleness == 0 else 8 + 4 * max(8, 7) + 7
    assert longest <= took < 1.02 * longest


def test_a_batch_that_fails_ahead_of_its_step_fails_that_step(tmp_path):
    async def fail(run, step):
        if step == 1:
            raise ValueError("a reward is broken")
        return SimpleNamespace(train=(), drawn=0)

    async def two():
        run = a_run(tmp_path, "train.max_staleness=1", "train.steps=3")
        run.state.first_batch = {"kl": 0.0}
        ahead = Ahead(run, fail)
        await ahead.batch(0)
        async with ahead.during(0):
            pass
        with pytest.raises(ValueError, match="a reward is broken"):
            await ahead.batch(1)

    virtually(two())


def test_staleness_needs_its_correction():
    with pytest.raises(ConfigError, match="importance_cap"):
        load_config(None, ["train.max_staleness=1", "loss.importance_cap=0"])
    with pytest.raises(ConfigError, match="not one of 0, 1"):
        load_config(None, ["train.max_staleness=2"])


class Ranks:
    """Two ranks of one run, the second in a thread: `share` hands the main rank's value over, as a broadcast does."""

    def __init__(self, tmp_path):
        box = queue.Queue()

        def make(main):
            def share(value):
                if main:
                    box.put(value)
                    return value
                return box.get(timeout=10)

            policy = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=main), share=share)
            run = a_run(tmp_path, policy=policy)
            run.sent = []

            async def send(policy, version, server=None):
                run.sent.append((version, server))

            async def start(servers):
                run.sent.append("start")

            run.transfer, run.version = SimpleNamespace(send=send, start=start), 3
            return run

        self.make = make

    def on_main(self, work, prepare):
        """Both ranks call on_main; returns (outcome of main, outcome of other, both runs)."""
        outcomes = {}

        async def call(main):
            run = self.make(main)
            if main:
                prepare(run)
            try:
                outcomes[main] = await run.on_main(lambda: work(run)), run
            except Exception as error:
                outcomes[main] = error, run

        other = threading.Thread(target=lambda: asyncio.run(call(False)))
        other.start()
        asyncio.run(call(True))
        other.join(10)
        return outcomes[True][0], outcomes[False][0], outcomes[True][1], outcomes[False][1]


def test_every_rank_gets_the_main_ranks_result_or_error(tmp_path):
    async def seven(run):
        return 7

    async def fail(run):
        raise ValueError("no")

    main, other, *_ = Ranks(tmp_path).on_main(seven, lambda run: None)
    assert main == other == 7
    main, other, *_ = Ranks(tmp_path).on_main(fail, lambda run: None)
    assert isinstance(main, ValueError) and isinstance(other, ValueError)


def test_a_restarted_server_gets_the_weights_from_all_ranks_while_the_work_goes_on(tmp_path):
    def prepare(run):
        run.rollout = SimpleNamespace(
            pool=Pool("rollout", ["http://a"], token="", timeout_s=1, retries=0, error=ValueError)
        )
        run.fleet.servers = {"rollout server 0": run.rollout.pool.servers[0]}
        run.rollout.pool.mark(run.rollout.pool.servers[0], alive=True, up=False)
        run.fleet.wanted.put_nowait(SimpleNamespace(name="rollout server 0", restarts=1))

    async def work(run):
        server = await run.rollout.pool.take(1)  # waits until the server has the weights
        return server.url

    main, other, first, second = Ranks(tmp_path).on_main(work, prepare)
    assert main == other == "http://a"
    assert first.sent == ["start", (3, "http://a")] and second.sent == [(3, "http://a")]


def test_sigterm_and_lost_servers_end_the_work_on_every_rank(tmp_path):
    async def forever(run):
        await asyncio.sleep(1000)

    main, other, *_ = Ranks(tmp_path).on_main(forever, lambda run: run.main.stop.asked.set())
    assert isinstance(main, Preempted) and isinstance(other, Preempted)

    def lose(run):
        failure = asyncio.get_running_loop().create_future()
        failure.set_exception(WorkerError("rollout server 0 was killed"))
        run.fleet.supervisor = SimpleNamespace(failure=failure)

    main, other, *_ = Ranks(tmp_path).on_main(forever, lose)
    assert isinstance(main, WorkerError) and isinstance(other, WorkerError)


def test_sigterm_waits_a_little_for_a_batch_that_runs_ahead(tmp_path):
    """Finished in time it is kept whole; otherwise it is given up, and the groups that landed are in the checkpoint."""

    async def ahead_of(seconds):
        async def slow(run, step):
            await asyncio.sleep(seconds if step else 0)
            return SimpleNamespace(train=(), drawn=0)

        run = a_run(tmp_path, "train.max_staleness=1", "train.steps=3")
        run.state.first_batch = {"kl": 0.0}
        ahead = Ahead(run, slow)
        await ahead.batch(0)
        async with ahead.during(0):
            run.main.stop.asked.set()
        kept, at = ahead.pending is not None, now()
        with pytest.raises(Preempted):
            await ahead.batch(1)
        return kept, at

    assert virtually(ahead_of(5)) == (True, 5.0)
    assert virtually(ahead_of(500)) == (False, 10.0)


def test_a_refreshed_reference_is_told_to_every_replica_and_to_those_started_later(tmp_path):
    told = []

    def answer(request):
        told.append((request.url.host, request.url.path, json.loads(request.content)))
        return httpx.Response(200)

    async def refresh():
        run = a_run(tmp_path, "reference.refresh_every=2")
        run.folder, run.progress = RunFolder(tmp_path), None
        run.policy.save_hf = lambda folder: folder.mkdir(parents=True)
        run.encoder.save = lambda folder: (folder / "tokenizer.json").touch()
        run.reference = reference(0, 2)
        run.reference.pool.http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        run.fleet.workers = [
            SimpleNamespace(role=role, command=["python", "--model", "start", "--port", "1"])
            for role in ("rollout", "reference")
        ]
        run.version = 2
        await run.refresh_reference()
        return run

    run = asyncio.run(refresh())
    folder = tmp_path / "reference" / "step-000002"
    assert run.state.reference == folder.name and (folder / "tokenizer.json").exists()
    assert sorted(told) == [(host, "/refresh", {"folder": folder.name}) for host in ("r0", "r1")]
    assert [w.command[2] for w in run.fleet.workers] == ["start", str(folder)]
    assert reference_model(run.config, run.folder, None).endswith("weights")
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"step": 2, "reference": folder.name}))
    assert reference_model(run.config, run.folder, checkpoint) == str(folder)
    for wrong in ("loss.kl_coef=0", "train.max_staleness=1"):
        with pytest.raises(ConfigError, match=r"reference\.refresh_every needs"):
            load_config(None, ["reference.refresh_every=2", wrong])
