"""Families of models as tiny folders with their real processors: log-probs, refusals, and whole runs with vLLM.

What the whole runs gave stands in results.json, of which docs/models.md is made; `python tests/families/matrix.py` writes it.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import matrix
import pytest
import torch
from folders import FAMILIES, make

from lingshu_rl.config import Config
from lingshu_rl.data.load import load
from lingshu_rl.failures import ConfigError
from lingshu_rl.launches import check_sight
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.families import cpu_options, model_spec
from lingshu_rl.model.loading import load_model
from lingshu_rl.processes.placement import DeviceSet, Placement
from lingshu_rl.reference.server import body_limit, image_inputs, image_reader
from lingshu_rl.reference.wire import decode_groups, encode_groups
from lingshu_rl.types import TokenGroup

RECORDED = json.loads(matrix.RESULTS.read_text())
IN_SHORT = ("llava", "gemma3")  # both ended at the first weight sync once
LARGE = {"smolvlm", "idefics3", "internvl", "llava_onevision"}  # 1,500 to 2,300 tokens for an image
AHEAD = {"gemma3", "gemma4_blocks"}


@pytest.fixture(params=[pytest.param(f, marks=pytest.mark.endurance if f in LARGE else ()) for f in FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("transformers' SmolVLM processor needs num2words")
    return str(request.param)


def test_rows_give_what_the_models_own_forward_gives_on_its_processors_inputs(family: str, tmp_path: Path) -> None:
    """And blank images give something else, so that a lost one would show."""
    folder = make(family, tmp_path / "model")
    rows = matrix.write_rows(tmp_path / "rows", FAMILIES[family].sees)
    here, own = matrix.logprobs(folder, rows)
    assert matrix.largest(here, own) < 1e-4
    model = load_model(str(folder), torch.float32)
    assert bool(model_spec(model).image_blocks) == (family in AHEAD)
    reference_takes(model, folder, rows)
    if FAMILIES[family].sees:
        blank, _ = matrix.logprobs(folder, matrix.write_rows(tmp_path / "blank", sees=True, blank=True))
        assert matrix.largest(here, blank) > 0.01


def reference_takes(model: torch.nn.Module, folder: Path, rows: Path) -> None:
    """What the family's processor makes of a prompt passes the reference server's checks, and is what it makes of files."""
    spec, encoder = model_spec(model), PromptEncoder(str(folder))
    reader = image_reader(str(folder), body_limit(model.config.get_text_config().max_position_embeddings))
    vocabulary, inputs = model.config.get_text_config().vocab_size, image_inputs(model, spec)
    for prompt in load(str(rows), instruction="short").prompts[:4]:
        ids, vision = encoder.encode(prompt)
        light = TokenGroup(prompt.id, ids, ((1, 2),), None if prompt.images else {})
        for body in (encode_groups([replace(light, vision=vision)]), encode_groups([light], [encoder.inputs(prompt)])):
            (back,) = decode_groups(body, vocabulary=vocabulary, images=inputs, reader=reader)
            assert back.prompt_ids == ids and back.vision.keys() == vision.keys()
            assert all(back.vision[name].equal(tensor) for name, tensor in vision.items())


@pytest.mark.endurance
def test_a_family_goes_through_the_whole_loop(family: str, tmp_path: Path) -> None:
    assert_as_recorded(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_SHORT)
def test_families_that_transformers_renames_go_through_the_whole_loop(name: str, tmp_path: Path) -> None:
    assert_as_recorded(name, tmp_path)


def assert_as_recorded(name: str, work: Path) -> None:
    """A failure that is on record, and in docs/models.md, is expected."""
    done = matrix.outcome(name, work)
    assert (done.works, done.rows, done.shares) == tuple(RECORDED[name][key] for key in ("works", "rows", "shares")), (
        done
    )


def test_every_family_is_on_record():
    assert list(RECORDED) == list(FAMILIES)


@pytest.mark.parametrize("ahead", sorted(AHEAD))
def test_images_are_refused_where_the_engine_would_read_them_causally(ahead: str, tmp_path: Path) -> None:
    """vLLM's attention on a CPU is causal: samples were off by 0.2 to 0.5 nats, which the first batch called other weights."""
    config = Config(model=str(make(ahead, tmp_path / "model")))
    seen, read = (
        load(str(matrix.write_rows(tmp_path / str(sees), sees)), instruction="short").prompts for sees in (True, False)
    )
    cpu, gpu = DeviceSet(), DeviceSet(("0",))
    for placement in (Placement(cpu, engines=(cpu,)), Placement(gpu, rollout_servers=(gpu, cpu))):
        check_sight(config, placement, read)
        check_sight(Config(), placement, seen)
        with pytest.raises(
            ConfigError, match=r"tokens of an image see those after them, which vLLM's attention on a CPU"
        ):
            check_sight(config, placement, seen)
    for placement in (Placement(gpu, engines=(gpu,)), Placement(cpu)):  # on CUDA; by rollout.urls
        check_sight(config, placement, seen)


def test_a_family_whose_whole_prompt_looks_ahead_is_refused(tmp_path: Path) -> None:
    """PaliGemma: vLLM knows it of image tokens alone, on CUDA too. Text prompts were off by 2 nats."""
    gpu = DeviceSet(("0",))
    with pytest.raises(ConfigError, match="vLLM reads its text causally"):
        check_sight(Config(model=str(make("paligemma", tmp_path))), Placement(gpu, engines=(gpu,)), [])


def test_placeholders_of_every_kind_are_kept_out_of_completions(tmp_path: Path) -> None:
    """Gemma 4 embeds a sampled `<|audio|>` as padding, vLLM as a token: the log-probs behind it were off by 3 nats."""
    folder = make("gemma4", tmp_path)
    ids = PromptEncoder(str(folder)).tokenizer.convert_tokens_to_ids(["<|image|>", "<|video|>", "<|audio|>"])
    assert list(model_spec(load_model(str(folder), torch.float32)).placeholder_ids) == ids


def test_vllms_options_follow_from_the_models_layers(tmp_path: Path) -> None:
    assert cpu_options(str(make("qwen3_5", tmp_path / "hybrid"))) == {
        "dtype": "bfloat16",
        "enable_chunked_prefill": True,
    }
    assert cpu_options(str(make("qwen3_vl", tmp_path / "plain"))) == cpu_options("demo") == {}


def test_a_processors_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    def refuse(path: str) -> None:
        raise ImportError(
            "Package `num2words` is required to run SmolVLM processor. Install it with `pip install num2words`."
        )

    folder = make("llama", tmp_path / "model")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"needs a package .*num2words"):
        PromptEncoder(str(folder))
