import re

import pytest
import torch

from lingshu_rl.data.load import load
from lingshu_rl.demo.policy import SHORT, demo_policy_dir, rebuild
from lingshu_rl.model import PromptEncoder, load_model


def test_the_shipped_policy_is_small_tied_and_answers_in_the_format():
    folder = demo_policy_dir()
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
    rebuild(tmp_path / "policy", SHORT)
    model, encoder = load_model(str(tmp_path / "policy"), torch.float32), PromptEncoder(str(tmp_path / "policy"))
    ids, vision = encoder.encode(load("demo:validation", instruction="short").prompts[0])
    assert ids.count(model.config.image_token_id) == 16 and vision["pixel_values"].shape == (64, 1176)
