"""The run's rewards before it starts."""

import asyncio
import json
import sys
import time
from types import SimpleNamespace

import pytest
from launching import ROOT

from lingshu_rl.data.load import load
from lingshu_rl.failures import ConfigError
from lingshu_rl.objective import Noise
from lingshu_rl.planning.given import load_config
from lingshu_rl.rewarding import build_rewards, read_noise, read_of, reward_of, spread, try_judges
from lingshu_rl.train import advantages_of
from rewards import Reward, RewardInput, RewardResult

sys.path.insert(0, str(ROOT / "recipes"))
from noisy_judge import serving, verdict


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


class Slow(Reward):
    """Takes 4 ms, as a program or a model may; counts."""

    asked = 0

    def score(self, sample):
        Slow.asked += 1
        time.sleep(0.004)
        return RewardResult(float(f"<answer>{sample.gold}</answer>" in sample.completion))


def test_of_a_slow_reward_as_many_labels_are_tried_as_time_allows(monkeypatch):
    monkeypatch.setattr("lingshu_rl.rewarding.LABELS_S", 0.2)
    monkeypatch.setattr("lingshu_rl.rewarding.LEAST_TRIED", 3)
    rows = [{"id": f"r{n}", "images": [], "question": "?", "answer": f"w{n}", "kind": "open"} for n in range(100)]
    said = []
    config = load_config(None, ["rewards.spec={class: 'test_rewarding:Slow'}"])
    build_rewards(config, load(rows).prompts, SimpleNamespace(say=said.append)).close()
    assert "(evenly taken of 100)" in said[-1] and Slow.asked < 300
    monkeypatch.setattr("lingshu_rl.rewarding.LABELS_S", 600.0)
    build_rewards(load_config(None, ["rewards.spec={class: OpenAnswer}"]), load(rows).prompts, SimpleNamespace(say=said.append)).close()  # fmt: skip
    assert said[-1].startswith("rewards: 100 rows")


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


# ------------------------------------------------------------------------------------------------------------- judges

OPEN = [
    {"id": f"o{n}", "images": [], "question": f"What is film {n}?", "answer": gold, "kind": "open"}
    for n, gold in enumerate(["mass", "oedema", "fracture", "effusion"] * 3)
]


def judging(tmp_path, url="", **args):
    """The setting of a judge behind the rule of open rows, beside yes and no."""
    given = {
        "url": url,
        "model": "noise-0-0" if url else "",
        "cache": str(tmp_path / "judge.sqlite"),
        "retries": 0,
        **args,
    }
    spec = {"route": {"yesno": "YesNo", "open": {"class": "JudgeReward", "args": given, "behind": "OpenAnswer"}}}
    return f"rewards.spec={json.dumps(spec)}"


def build_with(*settings, rows=OPEN):
    said = []
    progress = SimpleNamespace(say=said.append)
    config = load_config(None, settings)
    return config, build_rewards(config, load(rows).prompts, progress), progress, said


def test_the_cost_is_said_before_anything_is_asked(tmp_path):
    rows = [
        *OPEN,
        *({"id": f"y{n}", "images": [], "question": "Is it?", "answer": "yes", "kind": "yesno"} for n in range(12)),
    ]
    url = "http://127.0.0.1:9/v1"
    settings = (
        judging(tmp_path, url, price=[1, 1]),
        "train.steps=10",
        "train.prompts_per_step=5",
        "train.group_size=4",
    )
    _, rewards, _, said = build_with(*settings, "judge.probe_rows=3", rows=rows)
    rewards.close()
    assert any("its trial: 42 requests" in line and "at the given price" in line for line in said)
    assert any(
        "all steps, at the most (evaluations not counted): 100 requests" in line for line in said
    )  # half of 10 x 5 x 4 are open
    assert any("24 rows" in line and "12 of them left to a judge" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ([], r"without a url, and no judge\.model"),
        (["rewards.executor=isolated", "judge.model=demo"], r"rewards\.executor=isolated"),
        (["judge.model=demo", "advantage.noise=preflight", "rewards.preflight=false"], "rewards.preflight=true"),
        (["judge.model=demo", "advantage.noise=nowhere.json"], "nowhere.json"),
    ],
)
def test_judges_that_cannot_work_are_refused(tmp_path, settings, why):
    with pytest.raises(ConfigError, match=why):
        build_with(judging(tmp_path), *settings)


def test_what_only_judges_use_is_refused_without_one(tmp_path):
    for setting, why in (
        ("judge.model=demo", "served for nobody"),
        ("advantage.noise={false_pay: 0.1, false_refusal: 0}", "has none"),
    ):
        with pytest.raises(ConfigError, match=why):
            build_with(setting, "rewards.spec={class: OpenAnswer}")


def test_the_trial_is_kept_and_its_rates_correct_the_advantages(tmp_path):
    with serving(verdict) as url:
        settings = (judging(tmp_path, url, model="noise-50-30"), "advantage.noise=preflight", "judge.max_false_pay=1")
        config, rewards, progress, said = build_with(*settings, "judge.max_false_refusal=1")
        file = tmp_path / "judge.json"
        asyncio.run(try_judges(config, rewards, file, progress))
        kept = json.loads(file.read_text())
        assert rewards.noise == Noise(kept["false_pay"], kept["false_refusal"]) and rewards.noise.false_pay > 0
        assert any("told what to say" in line for line in said) and rewards.spent()["judge/requests"] > 100
        assert read_noise(str(file)) == rewards.noise
        strict = load_config(None, [settings[0], "judge.max_false_pay=0.05"])
        with pytest.raises(ConfigError, match=r"cannot be trusted.*(?s:.*)the limit is 5\.0%"):
            asyncio.run(try_judges(strict, rewards, file, progress))
    rewards.close()


def test_the_runs_own_judge_is_asked_where_it_is_served(tmp_path):
    _, rewards, _, _ = build_with(judging(tmp_path), "judge.model=demo")
    sample = load(OPEN).prompts[0].reward_input("<answer>tumour</answer>")
    assert asyncio.run(rewards.score([sample]))[0].value is None
    with serving(lambda body: '{"same": true}') as url:
        rewards.serve(url, "demo", "token")
        assert asyncio.run(rewards.score([sample]))[0].value == 1.0
    rewards.close()


def test_only_what_a_judge_gave_is_corrected():
    config = load_config(None, ["advantage.variant=no_std", "advantage.noise={false_pay: 0.1, false_refusal: 0.1}"])
    given = [
        RewardResult(1.0),
        RewardResult(1.0, verdict="yes"),
        RewardResult(0.0, verdict="no"),
        RewardResult(None, "error", verdict="?"),
    ]
    members = tuple(SimpleNamespace(result=r, rollout=SimpleNamespace(token_ids=())) for r in given)
    found = advantages_of(SimpleNamespace(members=members), config, read_noise(config.advantage.noise))
    mean = (1 + 1.125 - 0.125) / 3
    assert found == (pytest.approx(1 - mean), pytest.approx(1.125 - mean), pytest.approx(-0.125 - mean), None)
    assert advantages_of(SimpleNamespace(members=members), config)[0] == pytest.approx(1 / 3)
