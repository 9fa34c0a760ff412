"""The run's rewards before it starts."""

from types import SimpleNamespace

import pytest

from lingshu_rl.config import ConfigError, load_config
from lingshu_rl.data.load import load
from lingshu_rl.rewarding import build_rewards, spread


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
