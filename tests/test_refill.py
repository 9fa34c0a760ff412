"""Dynamic sampling: groups that teach nothing are made up for by the next prompts, in the bounds that were set."""

import asyncio
from types import SimpleNamespace

import pytest

from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.state import RunState
from lingshu_rl.stream import PromptStream
from lingshu_rl.timeline import Timeline
from lingshu_rl.train import collect
from lingshu_rl.types import ProcessorInputs, Prompt, Rollout
from rewards.base import RewardResult


class Rollouts:
    """Each prompt's completions say what they will be paid. Keeps what was asked for."""

    def __init__(self):
        self.asked = []

    async def groups(self, prompts, n, step):
        self.asked.append([p.id for p in prompts])
        for p in reversed(prompts):
            texts = ("1", "0") if p.meta["teaches"] else ("1", "1")
            yield tuple(Rollout(p, i, texts[i % 2], (1, 2), (5, 6), (-0.1, -0.2), "stop", step) for i in range(n))


class Rewards:
    weights = {}  # noqa: RUF012
    noise = None

    async def score(self, samples):
        return [RewardResult(float(s.completion)) for s in samples]


class Reference:
    def __init__(self):
        self.seen = []

    async def logprobs(self, groups, inputs):
        self.seen += [g.key for g in groups]
        return [tuple(None for _ in g.completions) for g in groups]


def a_run(teaches, *settings, cursor=0):
    """A run whose prompt i teaches something where teaches[i]; prompts come in the order of the list."""
    prompts = [
        Prompt(str(i), ({"role": "user", "content": "?"},), (), "A", (), "open", {"teaches": t})
        for i, t in enumerate(teaches)
    ]
    stream = PromptStream(prompts, seed=0)
    stream._cached_epoch, stream._cached_order = 0, list(range(len(prompts)))
    run = SimpleNamespace(
        config=load_config(None, ["train.prompts_per_step=3", "train.group_size=2", *settings]),
        stream=stream,
        state=RunState(cursor=cursor),
        timeline=Timeline(),
        rollout=Rollouts(),
        rewards=Rewards(),
        reference=Reference(),
        inputs=lambda prompt, read: ProcessorInputs("?", ()),
    )
    return run


def collected(run):
    batch = asyncio.run(collect(run, 0))
    return batch, [g.tokens.key for g in batch.train]


def test_without_refills_a_group_without_contrast_is_dropped_before_reference_and_update():
    run = a_run([True, False, True, True])
    batch, trained = collected(run)
    assert trained == ["0", "2"] and sorted(run.reference.seen) == ["0", "2"]
    assert batch.drawn == 3 and len(batch.groups) == 3 and batch.advantages[1] == (0.0, 0.0)


def test_refills_draw_as_many_as_are_missing_until_the_batch_is_full():
    run = a_run([True, False, False, False, True, True, True], "train.max_refills=5")
    batch, trained = collected(run)
    assert run.rollout.asked == [["0", "1", "2"], ["3", "4"], ["5"]]
    assert trained == ["0", "4", "5"] and sorted(run.reference.seen) == ["0", "4", "5"]
    assert batch.drawn == 6 and len(batch.groups) == len(batch.advantages) == 6
    assert [g.prompt.id for g in batch.groups] == ["0", "1", "2", "3", "4", "5"]


def test_refills_end_at_their_bound():
    run = a_run([False] * 20, "train.max_refills=2")
    batch, trained = collected(run)
    assert run.rollout.asked == [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"]] and batch.drawn == 9
    assert not trained


def test_a_prompt_is_sampled_once_a_step_also_where_the_epoch_turns_over():
    run = a_run([False, False, True, True], "train.max_refills=3", cursor=1)
    batch, trained = collected(run)
    asked = [name for round_ in run.rollout.asked for name in round_]
    assert sorted(asked) == ["0", "1", "2", "3"] and asked[:3] == ["1", "2", "3"]
    assert batch.drawn == 3 + 3 and trained == ["2", "3"]  # prompt 0 teaches nothing: nothing else is left to ask


def test_the_next_step_goes_on_after_everything_drawn():
    """What a checkpoint keeps is the cursor, so a resumed run draws what the uninterrupted one would have."""
    run = a_run([True, False, True, True, True, True, True, True], "train.max_refills=1")
    batch, _ = collected(run)
    again = a_run([True, False, True, True, True, True, True, True], "train.max_refills=1", cursor=batch.drawn)
    _, trained = collected(again)
    assert trained == ["4", "5", "6"]


def test_refills_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"max_refills=-1"):
        load_config(None, ["train.max_refills=-1"])
    with pytest.raises(ConfigError, match="gdpo normalises over the whole batch"):
        load_config(None, ["train.max_refills=1", "advantage.variant=gdpo"])
