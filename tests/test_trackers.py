"""Which trackers a run opens: those that are installed, and no silence about the others."""

import pytest

from lingshu_rl.config import ConfigError
from lingshu_rl.policy import available_trackers


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in ("tensorboard", "mlflow") or None)
    assert available_trackers(["tensorboard", "mlflow"]) == ["tensorboard", "mlflow"]
    assert available_trackers([]) == []
    with pytest.raises(ConfigError, match=r"run.trackers names 'trackio', which is not installed: pip install trackio"):
        available_trackers(["tensorboard", "trackio"])


def test_the_default_is_left_out_quietly(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available_trackers(["tensorboard"]) == []
