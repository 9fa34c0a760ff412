"""Every known way for a run to end keeps its last whole step, and the same command, the cause mended, ends with the numbers of
a run that nothing happened to. The loop, the folder, the rewards and the checkpoints are real; engine and policy are fakes
that compute in microseconds."""

import asyncio
import importlib
import json
import random
from types import SimpleNamespace

import pytest
import torch

from lingshu_rl import run as runs
from lingshu_rl.checks.agreement import CheckError
from lingshu_rl.failures import PromptRefused
from lingshu_rl.imaging.files import UnreadablePicture
from lingshu_rl.model.lengths import Length
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes.fleet import Fleet
from lingshu_rl.processes.lease import Taken
from lingshu_rl.processes.mainrank import Preempted
from lingshu_rl.processes.workers import WorkerError
from lingshu_rl.progress import Progress
from lingshu_rl.reference.client import ReferenceRequestError
from lingshu_rl.rewarding import Rewards
from lingshu_rl.rollout.answers import Choice, EngineAnswer, Token, Tokens
from lingshu_rl.rollout.client import read_rollouts
from lingshu_rl.rollout.sampler import RolloutError, Sampler
from lingshu_rl.storage.checkpoints import fault as fault_of
from lingshu_rl.storage.runfolder import RunFolder, RunFolderError
from lingshu_rl.stream import PromptStream
from lingshu_rl.types import ProcessorInputs, Prompt
from rewards import Reward, RewardResult
from rewards.executor import Executor, RewardFailure

training = importlib.import_module("lingshu_rl.train")  # the package's own name of it is the function
STEPS, DRAWN, BROKEN = 5, 4, 2  # the step (from 0) in which something happens: two are whole before it
PROMPTS = [
    Prompt(f"q{i}", ({"role": "user", "content": f"Is it {i}?"},), (), "yes", (), "yesno", {}) for i in range(11)
]


class Machine:
    """What a run needs beside its folder. faults: place -> what is called there with the run, in step BROKEN."""

    def __init__(self, **faults):
        self.faults = faults
        self.weights, self.run = 0.0, None

    def at(self, place):
        # The state's step moves when the update is done; what comes after belongs to the step before.
        done = self.run.state.step - (place in ("evaluate", "refresh", "save"))
        if done == BROKEN and place in self.faults:
            self.faults[place](self.run)


class Engine(Sampler):
    """Answers that depend on seed and weights alone."""

    def __init__(self, machine):
        super().__init__(decode=lambda ids: "yes" if sum(ids) % 2 else "no", banned_ids=(), seed=0, temperature=1.0, max_tokens=8)  # fmt: skip
        self.machine, self.version = machine, 0

    weight_version = property(lambda self: self.version)

    async def _ask(self, body, prompt):
        try:
            self.machine.at("ask" if body["n"] > 1 else "evaluate")
        except PromptRefused as refusal:
            raise PromptRefused(str(refusal), prompt.id) from None
        draw = random.Random(f"{body['seed']}/{prompt.id}/{self.machine.weights}")
        chosen = [[draw.randrange(9) for _ in range(3)] for _ in range(body["n"])]
        choices = [Choice(i, ids, Tokens([Token(-0.5)] * 3), "stop") for i, ids in enumerate(chosen)]
        return EngineAnswer([1, 2], choices), self.version

    async def context_length(self):
        return 99

    async def generated_tokens(self):
        return 1

    async def close(self):
        pass


class Judge(Reward):
    name = "judge"

    def __init__(self, machine):
        self.machine = machine

    def score(self, sample):
        if "judge" in self.machine.faults and self.machine.run.state.step == BROKEN:
            raise ConnectionError("the judge is gone")
        return RewardResult(float(sample.completion == sample.gold))


class FakePolicy:
    """Weights that are one number; the update adds to it what the batch says."""

    ranks, rank, zero_stage, parameters, dtype, steps_taken = 1, 0, 2, 1, torch.float32, 0

    def __init__(self, machine):
        self.machine = machine
        self.accelerator = SimpleNamespace(is_main_process=True, log=lambda values, step: None, trackers=[])

    def share(self, value):
        return value

    def gather(self, value):
        return [value]

    def barrier(self):
        pass

    use_device = barrier

    def update(self, groups, step, judge):
        self.machine.at("update")
        self.steps_taken += 1
        self.machine.weights += sum(sum(g.advantages) * sum(map(sum, g.tokens.completions)) for g in groups)
        self.machine.at("midway")
        return {"loss": self.machine.weights}

    def save_hf(self, folder):
        self.machine.at("save" if "checkpoints" in str(folder) else "refresh")
        folder.mkdir(parents=True)
        (folder / "model").write_text("w")

    def save_state(self, folder):
        folder.mkdir()
        (folder / "w.json").write_text(json.dumps(self.machine.weights))


class Transfer:
    def __init__(self, machine, engine):
        self.machine, self.engine = machine, engine

    async def send(self, policy, version):
        self.machine.at("send")
        self.engine.version = version


def trained(folder, machine, *settings):
    """A run to its end, or to what ends it."""
    config = load_config(None, [f"run.dir={folder}", f"train.steps={STEPS}", f"train.prompts_per_step={DRAWN}", "train.group_size=32",
                                "eval.controls=[]", "eval.limit=2", "checkpoint.every=0", "rollout.max_tokens=8", *settings])  # fmt: skip

    async def opened(config, stop, closing):
        place = RunFolder(folder)
        checkpoint = place.open(config)
        policy = FakePolicy(machine)
        run = machine.run = runs.Run(config, policy, place, fleet=Fleet(), stop=stop, progress=Progress(quiet=False))
        run.rollout, run.test, run.stream = Engine(machine), PROMPTS[:3], PromptStream(PROMPTS, seed=0)
        run.source_of = lambda name: ""
        judge = Judge(machine)
        executor = Executor(judge, max_failed_share=config.rewards.max_failed_share)
        closing.callback(executor.close)
        run.rewards = Rewards(executor, {}, judge)
        run.transfer = Transfer(machine, run.rollout)

        def inputs(prompt):
            machine.at("encode")
            return ProcessorInputs("?", ())

        run.encoder = SimpleNamespace(inputs=inputs, save=lambda folder: None)
        run.lengths = SimpleNamespace(count=lambda prompts: [Length(p.id, 2, 0) for p in prompts])
        scored = lambda tokens: [[torch.zeros(len(c)) for c in g.completions] for g in tokens]  # noqa: E731

        async def logprobs(tokens, inputs):
            machine.at("reference")
            return scored(tokens)

        run.reference = SimpleNamespace(logprobs=logprobs, pool=SimpleNamespace(up=[], servers=[], post_to=nothing))
        if checkpoint is not None:
            policy.load_state = lambda path: setattr(machine, "weights", json.loads((path / "w.json").read_text()))
            run.resume(checkpoint)
            run.rollout.version = run.version
            run.rollout.landed[run.state.step] = read_rollouts(checkpoint / "landed.jsonl", {p.id: p for p in PROMPTS})
        place.begin(config, run.state.step)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_open", opened)
        patch.setattr(training, "check_first_batch", lambda run, groups: setattr(run.state, "first_batch", {"kl": 0.0}))
        return asyncio.run(training.train(config))


async def nothing(*_, **__):
    return {}


def lines_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trained(folder, Machine())
    return lines_of(folder)


def raising(error):
    def fault(run):
        raise error

    return fault


def stopped(run):
    run.main.stop.asked.set()


def no_log(run):
    run.folder.metrics.rename(run.folder.path / "aside")
    run.folder.metrics.mkdir()


def log_again(folder):
    if (folder / "aside").exists():
        (folder / "metrics.jsonl").rmdir()
        (folder / "aside").rename(folder / "metrics.jsonl")


# place of the fault, the fault, what the run raises, what it says, steps that are kept
ENDINGS = {
    "the engine fails for good": ("ask", raising(RolloutError("no server answers")), RolloutError, "no server answers", 2),
    "a server is lost": ("ask", raising(WorkerError("rollout server 0 was killed")), WorkerError, "was killed", 2),
    "another run took the server": ("ask", raising(Taken("is in use by a run in x")), Taken, "in use by", 2),
    "all prompts are refused": ("ask", raising(PromptRefused("too long")), PromptRefused, "of 12 prompts drawn", 2),
    "a bug while sampling": ("ask", raising(KeyError("a bug")), KeyError, "a bug", 2),
    "SIGTERM": ("ask", stopped, Preempted, "stopped by SIGTERM", 2),
    "the judge is gone": ("judge", None, RewardFailure, "the judge is gone", 2),
    "the reference fails for good": ("reference", raising(ReferenceRequestError("it failed")), ReferenceRequestError, "it failed", 2),
    "the data's disk is gone": ("reference", raising(OSError(5, "Input/output error", "x.png")), OSError, "x.png", 2),
    "trainer and engine differ": ("update", raising(CheckError("log-probs differ")), CheckError, "differ", 2),
    "a number is not finite": ("update", raising(FloatingPointError("not finite")), FloatingPointError, "not finite", 2),
    "an image is cut while it is trained on": ("update", raising(UnreadablePicture("x.png is truncated")), UnreadablePicture, "truncated", 2),
    "a bug in the update": ("update", raising(ZeroDivisionError("a bug")), ZeroDivisionError, "a bug", 2),
    "a fault amid the optimiser's step": ("midway", raising(RuntimeError("out of memory")), RuntimeError, "memory", 0),
    "an engine does not take the weights": ("send", raising(RolloutError("it died")), RolloutError, "it died", 3),
    "no room for the weights": ("send", raising(OSError(28, "No space left on device", "/dev/shm/w")), OSError, "No space", 3),
    "the log cannot be written": ("log", no_log, RunFolderError, "metrics.jsonl could not be written", 3),
    "the engine dies in an evaluation": ("evaluate", raising(RolloutError("gone")), RolloutError, "gone", 3),
    "the new reference cannot be written": ("refresh", raising(OSError(30, "Read-only file system", "ref")), OSError, "Read-only", 3),
}  # fmt: skip
WITH = {"evaluate": ["eval.every=3"], "refresh": ["reference.refresh_every=3"]}


@pytest.mark.parametrize("name", ENDINGS)
def test_no_step_is_lost_and_none_is_done_twice(name, undisturbed, tmp_path, capsys):
    place, fault, kind, told, kept = ENDINGS[name]
    folder, settings = tmp_path / "run", WITH.get(place, [])
    machine = Machine(**{"send" if place == "log" else place: fault or (lambda run: None)})
    with pytest.raises(kind, match=told) as ending:
        trained(folder, machine, *settings)
    log_again(folder)
    said = f"{ending.value}{capsys.readouterr().out}"
    saved = sorted(folder.glob("checkpoints/step-*"))
    if kept:
        assert f"the state after step {kept} is in {folder / 'checkpoints' / f'step-{kept:06d}'}" in said
        assert [int(path.name[5:]) for path in saved] == [kept] and fault_of(saved[0]) == ""
    else:
        assert "there is no checkpoint" in said and not saved
    settings = ["reference.refresh_every=3"] if place == "refresh" else []
    trained(folder, Machine(), *settings)
    metrics = lines_of(folder)
    if place == "log":  # the step is kept, its line could not be
        assert [row["step"] for row in metrics] == [1, 2, 4, 5]
        metrics, undisturbed = metrics[2:], undisturbed[3:]
    clean = [{k: v for k, v in row.items() if k != "reference_version"} for row in metrics]
    assert clean == undisturbed
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS


def test_what_a_step_that_broke_off_drew_and_found_is_not_kept(tmp_path):
    """Two prompts in a hundred may be refused; the third ends the run, which goes on once more are allowed."""

    def refuse(run):
        raise PromptRefused("too long")

    folder = tmp_path / "run"
    with pytest.raises(PromptRefused, match="allows 2"):
        trained(folder, Machine(ask=refuse), "data.max_refused_share=0.02")
    state = json.loads((folder / "checkpoints" / "step-000002" / "run.json").read_text())
    assert (state["cursor"], state["refused"], len(state["unjudged"])) == (2 * DRAWN, 0, 2 * DRAWN * 32)
    trained(folder, Machine(), "data.max_refused_share=0.5")
    assert [row["cursor"] for row in lines_of(folder)] == [DRAWN * step for step in range(1, STEPS + 1)]


def test_a_judge_that_is_back_is_not_held_to_what_failed_without_it(undisturbed, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RewardFailure, match=r"limit is 5\.0%"):
        trained(folder, Machine(judge=None))
    state = json.loads((folder / "checkpoints" / "step-000002" / "run.json").read_text())
    assert not any(state["unjudged"])
    trained(folder, Machine())
    assert lines_of(folder) == undisturbed


def test_an_image_that_is_cut_after_it_was_sampled_costs_its_own_group(tmp_path):
    cut = iter([True])

    def once(run):
        if next(cut, False):
            raise UnreadablePicture("unreadable image x.png: image file is truncated")

    folder = tmp_path / "run"
    trained(folder, Machine(encode=once))
    refused = [row.get("refused", {}) for row in lines_of(folder)]
    assert [len(found) for found in refused] == [0, 0, 1, 0, 0]
    assert "cannot read prompt 'q" in next(iter(refused[BROKEN].values()))


def test_a_checkpoint_that_fails_at_the_end_hides_neither_cause(tmp_path):
    def both(run):
        run.machine_full = True
        raise RolloutError("the engine is gone")

    machine = Machine(ask=both)
    whole = FakePolicy.save_state

    def full(self, folder):
        if hasattr(self.machine.run, "machine_full"):
            raise OSError(28, "No space left on device")
        whole(self, folder)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RolloutError) as ending:
        patch.setattr(FakePolicy, "save_state", full)
        trained(tmp_path / "run", machine, "checkpoint.every=1")
    told = str(ending.value)
    assert "the engine is gone" in told and "the state after step 2 is in" in told  # saved when it was due
    machine = Machine(ask=both)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RolloutError) as ending:
        patch.setattr(FakePolicy, "save_state", full)
        trained(tmp_path / "other", machine)
    told = str(ending.value)
    assert "the engine is gone" in told and "could not be saved" in told and "No space left" in told
    assert "there is no checkpoint" in told


def test_with_several_ranks_one_that_fails_alone_does_not_wait_for_the_others(tmp_path):
    """They stand in a collective of the update, where a checkpoint's would never meet theirs."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="alone"):
        patch.setattr(FakePolicy, "ranks", 2)
        trained(tmp_path / "run", Machine(update=raising(OSError("alone"))))
    assert not list(tmp_path.glob("run/checkpoints/step-*"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="for all") as ending:
        patch.setattr(FakePolicy, "ranks", 2)
        trained(tmp_path / "run", Machine(ask=raising(OSError("for all"))), "resume=never")
    assert "the state after step 2 is in" in str(ending.value)
