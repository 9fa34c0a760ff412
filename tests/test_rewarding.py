"""The run's rewards before it starts."""

from types import SimpleNamespace

import pytest

from lingshu_rl.config import ConfigError, load_config
from lingshu_rl.data.load import load
from lingshu_rl.rewarding import build_rewards, read_of, reward_of, spread
from rewards import RewardInput


def test_a_spread_is_all_or_evenly_taken():
    assert spread(range(5), 5) == range(5) and spread([1, 2], 9) == [1, 2]
    assert spread(range(100), 4) == [0, 25, 50, 75]


def test_labels_of_a_large_set_are_tried_on_a_part_of_it_and_that_is_said(monkeypatch):
    """The one option row is one that this reward cannot judge."""
    rows = [{"id": f"r{n}", "images": [], "question": "?", "answer": "yes", "kind": "yesno"} for n in range(30)]
    rows[10] |= {"kind": "option", "options": ["a", "b"], "answer": "A"}
    prompts, said = load(rows).prompts, []
    config = load_config(None, ["rewards.spec={class: YesNo}"])
    with pytest.raises(ConfigError, match="r10"):
        build_rewards(config, prompts, SimpleNamespace(say=said.append))
    monkeypatch.setattr("lingshu_rl.rewarding.LABELS_TRIED", 4)
    build_rewards(config, prompts, SimpleNamespace(say=said.append)).close()
    assert "30 rows" in said[0] and "4 rows" in said[1] and "(evenly taken of 30)" in said[1]


@pytest.mark.parametrize(
    ("options", "closed"),
    [
        (["data.instruction=full"], True),
        (["data.instruction=short"], False),
        (["data.instruction='Put the answer into <answer> tags.'"], True),
        (["data.instruction=short", "data.system='Answer within <answer> and </answer>.'"], True),
        (["data.instruction=full", "rewards.read=prose"], False),
        (["data.instruction=short", "rewards.read=closed"], True),
    ],
)
def test_the_default_reads_closed_answers_only_where_the_instruction_asks_for_tags(options, closed):
    config = load_config(None, ["data.train=rows.jsonl", "data.test=rows.jsonl", *options])
    reward = reward_of(config.rewards.spec, read=read_of(config))
    for kind, gold in (("option", "A"), ("yesno", "yes"), ("open", "edema"), ("numeric", "5 mg")):
        said = {"options": ("edema", "mass")} if kind == "option" else {}
        for text, value in (
            (f"The answer is {gold}.", float(not closed)),
            (f"<answer>{gold}</answer>", 1.0),
            (gold, 1.0),
        ):
            assert reward.score(RewardInput(text, gold, kind=kind, **said)).value == value, (kind, text)


def test_read_belongs_to_the_default_composition():
    with pytest.raises(ConfigError, match=r"rewards\.read"):
        load_config(None, ["rewards.read=closed", "rewards.spec={class: YesNo}"])
