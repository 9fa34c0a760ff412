"""Rows of places from the file to the reward: what the prompt asks, which size the model saw, what SFT teaches."""

from __future__ import annotations

import json
import sys
import types

import pytest
from PIL import Image

from lingshu_rl.data.load import DataError, load
from lingshu_rl.failures import ConfigError
from lingshu_rl.imaging.images import Budget
from lingshu_rl.planning.given import load_config
from lingshu_rl.report.html import findings
from lingshu_rl.sft.examples import completion_of
from rewards import default_reward
from rewards.kinds import find
from rewards.preflight import check

ROW = {"id": "1", "images": ["a.png"], "question": "Where is the nodule?", "kind": "box", "answer": [100, 50, 300, 250]}
META = {"box_scale": "pixel", "image_size": [640, 480]}


@pytest.fixture
def rows(tmp_path):
    Image.new("L", (640, 480)).save(tmp_path / "a.png")

    def loaded(*changes, **options):
        file = tmp_path / "rows.jsonl"
        made = [{**ROW, "meta": META, "id": str(n), **change} for n, change in enumerate(changes or ({},))]
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        return load(file, **options).prompts

    return loaded


def test_the_prompt_says_the_rows_own_scale(rows):
    asked = rows(
        {},
        {"meta": {**META, "answer_scale": 1000, "answer_order": "yxyx"}},
        {"meta": {"box_scale": 1}, "answer": [0, 0, 1, 1]},
    )
    texts = [prompt.text for prompt in asked]
    assert '{"bbox_2d": [x1, y1, x2, y2], "label": name} in pixels of the image' in texts[0]
    assert '[y1, x1, y2, x2], "label": name} in numbers from 0 to 1000' in texts[1]
    assert "numbers from 0 to 1" in texts[2] and "[] if there is none" in texts[2]
    points = rows({"kind": "points", "meta": {**META, "box_order": "yxyx"}}, instruction="short")
    assert points[0].text.endswith("Answer: point, pixels of the image.")


def test_answers_in_pixels_are_meant_in_the_picture_that_the_model_sees(rows):
    (prompt,) = rows(budget=Budget(max_pixels=320 * 240))
    reward = default_reward()
    assert prompt.images[0].size == (320, 240)
    assert reward.score(prompt.reward_input("<answer>[50, 25, 150, 125]</answer>")).value == 1
    assert reward.score(prompt.reward_input("<answer>[100, 50, 300, 250]</answer>")).value < 0.5
    (rounded,) = rows(budget=Budget(multiple=100))
    assert rounded.reward_input().meta["seen_size"] == [600, 500]
    assert "seen_size" not in rows({"kind": "open", "answer": "left"})[0].reward_input().meta


def test_a_runs_pictures_get_the_sides_that_its_processor_keeps(rows, tmp_path):
    rows()
    config = load_config(
        None, [f"data.train={tmp_path / 'rows.jsonl'}", "data.test=demo:test", "data.side_multiple=28"]
    )
    (prompt,) = load(config.data.train, budget=config.data.budget).prompts
    assert prompt.reward_input().meta["seen_size"] == [644, 476]
    with pytest.raises(ConfigError, match=r"data\.side_multiple=0"):
        load_config(None, ["data.side_multiple=0"])


def test_a_size_that_is_not_the_images_is_found_before_the_run(rows):
    prompts = rows({}, {"meta": {**META, "image_size": [1024, 768]}})
    report = check([p.reward_input() for p in prompts], default_reward(), ids=[p.id for p in prompts])
    (bad,) = report.bad
    assert bad.id == "1" and "image_size is 1024 x 768, the image 640 x 480" in bad.reason


def test_controls_with_other_images_are_judged_too(rows, tmp_path):
    from lingshu_rl.eval.controls import blank, shuffled

    Image.new("L", (100, 300)).save(tmp_path / "b.png")
    other = {"images": ["b.png"], "meta": {**META, "image_size": [100, 300]}, "answer": [10, 20, 40, 60]}
    prompts = rows({}, other, budget=Budget(max_pixels=5000))
    reward = default_reward()
    for control in (blank, shuffled):
        for prompt in control(prompts):
            assert reward.score(prompt.reward_input("<answer>[1, 2, 30, 40]</answer>")).value is not None


def test_bad_rows_are_refused_by_line(rows):
    with pytest.raises(DataError, match=r"line 2 .*do not lie in the image.*box_order: xywh"):
        rows({}, {"answer": [300, 300, 200, 100]})


def test_sft_teaches_what_the_reward_pays(rows):
    gold = [{"bbox": [100, 50, 300, 250], "label": "left nodule"}, {"bbox": [0, 0, 64, 48], "label": "clip"}]
    changes = (
        {},
        {"answer": []},
        {"answer": gold},
        {"meta": {**META, "answer_scale": 1000}},
        {"kind": "points"},
        {"kind": "mask", "answer": [[0, 0, 64, 0, 64, 48]]},
    )
    for prompt in rows(*changes):
        text = completion_of(prompt, "answer")
        assert default_reward().score(prompt.reward_input(text)).value == 1, text
    assert completion_of(rows()[0], "answer") == "<answer> [100, 50, 300, 250] </answer>"


@pytest.mark.parametrize(
    "name, answer", [("box", [100, 50, 300, 250]), ("points", [100, 50, 300, 250]), ("mask", [[0, 0, 64, 0, 64, 48]])]
)
def test_these_kinds_are_added_as_anybody_adds_one(rows, monkeypatch, name, answer):
    """The record alone, under another's import path, gives the same prompt, pay and drawing."""
    theirs = types.ModuleType("another_package")
    setattr(theirs, name, find(name))
    monkeypatch.setitem(sys.modules, "another_package", theirs)
    own, other = rows({"kind": name, "answer": answer}, {"kind": f"another_package:{name}", "answer": answer})
    assert own.text == other.text
    reward = default_reward()
    results = [reward.score(prompt.reward_input(completion_of(prompt, "answer"))) for prompt in (own, other)]
    assert results[0].value == results[1].value == 1 and results[0].parsed == results[1].parsed
    drawn = [findings({"kind": p.kind, "parsed": r.parsed}) for p, r in zip((own, other), results, strict=True)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2
    report = check([other.reward_input()], reward)
    assert report.ok, report.text()
