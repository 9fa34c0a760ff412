import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lingshu_rl.data.load import load
from lingshu_rl.data.rows import row_to_prompt
from lingshu_rl.demo import seeing
from lingshu_rl.demo.careless import careless_text
from lingshu_rl.demo.policy import RECIPES, _described, _unseen, rebuild, training_rows
from lingshu_rl.demo.reward import demo_spec
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.loading import load_model, model_path
from rewards.base import RewardInput
from rewards.compose import build


def test_the_shipped_policy_is_small_tied_and_answers_in_the_format():
    folder = Path(model_path("demo"))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 10 * 2**20
    model, encoder = load_model("demo", torch.float32), PromptEncoder("demo")
    assert model.config.model_type == "qwen2_5_vl" and model.config.tie_word_embeddings
    well_formed = 0
    prompts = load("demo:validation", instruction="short").prompts[:12]
    for prompt in prompts:
        ids, vision = encoder.encode(prompt)
        tokens = torch.tensor([ids])
        types = (tokens == model.config.image_token_id).long()
        out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), mm_token_type_ids=types, max_new_tokens=40,
                             do_sample=False, **vision)  # fmt: skip
        text = encoder.decode(out[0, len(ids) :].tolist())
        well_formed += re.fullmatch(r"<think>[^<]+</think><answer>[^<]+</answer>", text) is not None
    assert well_formed >= 11


def test_words_and_letters_are_the_same_tokens_in_options_and_answers():
    tokenizer = PromptEncoder("demo").tokenizer
    option = tokenizer("A. coronal\nB. axial", add_special_tokens=False)["input_ids"]
    answer = tokenizer("<think> coronal </think><answer> B </answer>", add_special_tokens=False)["input_ids"]
    assert set(answer) & set(option) >= {option[2], tokenizer.convert_tokens_to_ids("B")}


@pytest.mark.slow
def test_the_rebuild_command_makes_a_folder_that_loads(tmp_path):
    rebuild(tmp_path / "policy", RECIPES["short"])
    model, encoder = load_model(str(tmp_path / "policy"), torch.float32), PromptEncoder(str(tmp_path / "policy"))
    ids, vision = encoder.encode(load("demo:validation", instruction="short").prompts[0])
    assert ids.count(model.config.image_token_id) == 16 and vision["pixel_values"].shape == (64, 1176)


def test_patches_are_those_of_the_image_processor():
    pixels = np.random.default_rng(0).integers(0, 255, (2, 112, 112, 3), dtype=np.uint8)
    images = [Image.fromarray(p) for p in pixels]
    wanted = PromptEncoder("demo").processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(seeing.patches(torch.from_numpy(pixels)), wanted, atol=1e-5)


def test_what_a_picture_tells_covers_tasks_and_report_fields():
    told = seeing.told({"modality": "MRI", "plane": "axial", "position_mm": 50, "width_mm": 121, "inverted": True})
    assert told["plane"] == told["is_plane"] == told["Plane"] == "axial" and told["inverted"] == "white"
    assert told["width"] == "120 mm" and told["Level"] == told["level"] == "high" and told["modality"] == "MRI"
    assert "window" not in told and "map" not in told


def test_what_is_taught_apart_is_right_and_never_together():
    """Of each row, its plain words hold the label and no tag; in the asked form its picture is one grey."""
    rows, folder = training_rows()
    reward = build(demo_spec())
    for row in {row["meta"]["task"]: row for row in rows}.values():
        told = _described(row, folder)
        assert "<" not in told["completion"][0]["content"] and "answer" not in told["prompt"][0]["content"].lower()
        label = row["meta"]["think"] if row["kind"] == "option" else row["answer"]
        assert label in told["completion"][0]["content"] and len(told["image"].getcolors(20_000)) > 10
        form = _unseen(row, folder, random.Random(0))
        prompt = row_to_prompt(row, base_dir=folder, instruction="short")
        assert form["prompt"][0]["content"] == prompt.text and len(form["image"].getcolors()) == 1
        sample = RewardInput(
            form["completion"][0]["content"], prompt.gold, prompt.options, kind=prompt.kind, meta=prompt.meta
        )
        assert reward.score(sample).value == 1


def test_a_careless_annotator_is_consistent_and_off_by_a_class():
    rows, _ = training_rows()
    reward = build(demo_spec())
    pays = defaultdict(list)
    for row in rows:
        prompt = row_to_prompt(row, base_dir="/", instruction="short")
        for share in (0.0, 1.0):
            text = careless_text(row, random.Random(row["id"]), share)
            sample = RewardInput(text, gold=prompt.gold, options=prompt.options, kind=prompt.kind, meta=prompt.meta)
            pays[row["kind"], share].append(reward.score(sample).value)
            if row["kind"] == "option":  # the letter is that of the thought
                think, letter = text.removeprefix("<think> ").removesuffix(" </answer>").split(" </think><answer> ")
                assert prompt.options["ABCD".index(letter)] == think
    assert all(min(pays[kind, 0.0]) == 1 for kind in ("option", "yesno", "numeric", "report"))
    assert max(pays["option", 1.0]) == max(pays["report", 1.0]) == 0
    assert sum(pays["numeric", 1.0]) < 0.05 * len(pays["numeric", 1.0])  # a volume may be rounded right again
    assert sum(pays["yesno", 1.0]) < 0.4 * len(pays["yesno", 1.0])  # "no" stays right where the slip is no match either
