"""Which trackers a run opens: those that are installed, and no silence about the others."""

import importlib.util
import json

import pytest
from PIL import Image

from lingshu_rl.failures import ConfigError
from lingshu_rl.imaging.images import Picture
from lingshu_rl.policy import available_trackers
from lingshu_rl.report.samples import show_samples, shows_samples
from lingshu_rl.results import nothing_learnt


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in ("tensorboard", "mlflow") or None)
    assert available_trackers(["tensorboard", "mlflow"]) == ["tensorboard", "mlflow"]
    assert available_trackers([]) == []
    with pytest.raises(ConfigError, match=r"run.trackers names 'trackio', which is not installed: pip install trackio"):
        available_trackers(["tensorboard", "trackio"])


def test_the_default_is_left_out_quietly(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available_trackers(["tensorboard"]) == []


def completions():
    """Two questions with images, and one without that teaches nothing."""
    return [
        {"prompt_id": name, "task": name, "kind": "open", "question": f"What is {name}? <b>", "gold": "a|b", "completion": f"{name} {n} | <script>",
         "value": 0.5 if name == "none" else float(n), "advantage": n - 0.5, "status": "ok", "reason": "", "member": n}
        for name in ("left", "right", "none") for n in (0, 1)
    ]  # fmt: skip


def pictures(tmp_path):
    found = {}
    for name, size in (("left", (600, 300)), ("right", (30, 60))):
        Image.new("L", size, 90).save(tmp_path / f"{name}.png")
        found[name] = Picture(str(tmp_path / f"{name}.png"))
    (tmp_path / "right.png").unlink()  # gone since the engine was asked
    return found


def started(name, folder, monkeypatch):
    """accelerate's tracker of that name, writing into a folder."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    from accelerate import tracking

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    tracker = tracking.LOGGER_TYPE_TO_CLASS[name]("run", *([str(folder)] if name == "tensorboard" else []))
    tracker.start()
    return tracker


def test_samples_in_tensorboard(tmp_path, monkeypatch):
    from accelerate.state import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState()
    tracker = started("tensorboard", tmp_path / "tb", monkeypatch)
    show_samples([tracker], 10, completions(), pictures(tmp_path))
    tracker.finish()
    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events*")).parent))
    events.Reload()
    tags = events.Tags()
    assert len([tag for tag in tags["tensors"] if tag.startswith("samples/")]) == 2  # the questions with most contrast
    (text,) = events.Tensors("samples/0/text_summary")[0].tensor_proto.string_val
    lines = text.decode().splitlines()
    assert len(lines) == 4 and all(line.count(" | ") == 6 for line in lines[2:])
    assert "a\\|b" in lines[2] and "<script>" not in text.decode() and "&lt;script>" in text.decode()
    (image,) = [events.Images(tag)[0] for tag in tags["images"]]
    assert (image.width, image.height, image.step) == (256, 128, 10)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_samples_in_a_table_of(name, tmp_path, monkeypatch):
    from accelerate.state import PartialState

    PartialState()
    tracker = started(name, tmp_path, monkeypatch)
    show_samples([tracker], 1, completions(), pictures(tmp_path))
    tracker.finish()
    tables = [json.loads(path.read_text())["data"] for path in tmp_path.rglob("*.table.json")]  # wandb's
    images = [row[-1] for table in tables for row in table if row[-1]]
    images += [path.suffix for path in tmp_path.rglob("media/**/*.png")]  # trackio's
    assert images in (["Image"] * 2, [".png"] * 2)


def test_a_tracker_without_tables_is_left_alone():
    class Other:
        name = "aim"

    show_samples([Other()], 1, completions(), {})
    assert [step for step in range(1, 25) if shows_samples(step, 24)] == [1, 10, 20, 24]


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"groups/trained": 3, "reward/std": 0.4}, ""),
        ({"groups/trained": 0, "reward/std": 0.0, "reward/mean": 0.0, "reward/status/unparsed": 1.0}, "no answer could be read"),
        ({"groups/trained": 0, "reward/std": 0.0, "reward/mean": 0.0, "reward/status/unparsed": 0.2, "reward/status/truncated": 0.6}, "in 80 % of"),
        ({"groups/trained": 0, "reward/std": 0.0, "reward/mean": 1.0, "reward/status/ok": 1.0}, "all completions earned 1.00"),
        ({"groups/trained": 0, "reward/std": 0.5, "reward/mean": 0.5, "reward/status/ok": 1.0}, "in no group do the rewards differ"),
        ({"groups/trained": 0, "reward/std": 0.0, "reward/mean": 0.0, "reward/masked": 16, "reward/status/error": 1.0}, "could not be judged"),
    ],
)  # fmt: skip
def test_a_step_that_teaches_nothing_is_said_with_its_reason(metrics, told):
    said = nothing_learnt(metrics)
    assert (told in said) if told else said == ""
