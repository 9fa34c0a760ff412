"""The model card says what the run measured, and nothing of the machine."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import yaml

from lingshu_rl.planning.given import load_config
from lingshu_rl.report.card import CardError, main, push, write_card
from lingshu_rl.settings import to_yaml
from lingshu_rl.storage import checkpoints


@pytest.fixture
def run(tmp_path):
    config = load_config(
        None,
        [
            "model=org/Base-3B", "data.train=/home/someone/secret place/my rows.jsonl", "data.test=held_out.jsonl",
            "rollout.env={WANDB_API_KEY: abcdef}", "train.lr=5e-7", "rollout.urls=['http://10.0.0.7:1']",
            "rewards.spec={class: OptionLetter}",
        ],
    )  # fmt: skip
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step-000002"
    (checkpoint / "hf").mkdir(parents=True)
    (checkpoint / "hf" / "config.json").write_text("{}")
    (checkpoint / "run.json").write_text(checkpoints.seal(checkpoint, {"step": 2}))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.6}\n')
    summary = {
        "before": {"accuracy": 0.456, "ci95": [0.4, 0.51]},
        "after": {"accuracy": 0.665, "ci95": [0.61, 0.72]},
        "blank_image": {"accuracy": 0.294, "ci95": [0.24, 0.35]},
        "gain": {"points": 20.9, "ci95": [14.8, 27.0]},
        "versions": {"torch": "2.13.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_card_tells_of_model_scores_controls_data_and_rewards(run):
    text = (write_card(run) / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "org/Base-3B" and "medical" in front["tags"]
    for said in ("| before | 45.6 % | 40.0 to 51.0 |", "| after | 66.5 %", "| blank images | 29.4 %", "20.9 points (95 % interval 14.8 to 27.0",
                 "2 updates of", "OptionLetter", "`train.lr` | `5e-07`", "my rows.jsonl", "no medical device"):  # fmt: skip
        assert said in text, said


def test_a_checkpoint_with_its_card_is_still_whole(run):
    folder = write_card(run).parent
    assert checkpoints.fault(folder) == "" and write_card(run).parent == folder


def test_the_card_keeps_paths_addresses_and_keys_to_itself(run):
    text = (write_card(run) / "README.md").read_text()
    assert not re.search(r"/home/|secret place|10\.0\.0\.7|abcdef|WANDB", text)


def test_what_has_no_model_gets_no_card(run, tmp_path, capsys):
    with pytest.raises(CardError, match="no run folder"):
        write_card(tmp_path)
    (run / "checkpoints" / "step-000002" / "run.json").unlink()
    assert main(str(run), "", private=False) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_what_is_sent_to_the_hub_is_what_its_client_takes(run, monkeypatch):
    """No hub is reached here: the calls are bound to the client's own signatures."""
    from huggingface_hub import HfApi

    calls = {}
    for name in ("create_repo", "upload_folder"):
        signature = inspect.signature(getattr(HfApi, name))

        def record(self, *given, name=name, signature=signature, **named):
            calls[name] = signature.bind(self, *given, **named).arguments

        monkeypatch.setattr(HfApi, name, record)
    push(write_card(run), "org/mine", private=True)
    assert calls["create_repo"]["private"] is True and calls["upload_folder"]["repo_id"] == "org/mine"
    assert (calls["upload_folder"]["folder_path"] / "README.md").is_file()
