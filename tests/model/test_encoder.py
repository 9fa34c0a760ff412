"""What a prompt becomes under templates of every kind, and which rows a model cannot be asked."""

import asyncio
import json

import pytest
import torch

from lingshu_rl.data.load import DataError, load
from lingshu_rl.data.rows import RowError, row_to_prompt
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.encoder import PromptEncoder, TemplateError
from lingshu_rl.model.loading import empty_model, load_model, model_path
from lingshu_rl.processes.threads import in_thread

CONCATENATES = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"  # fmt: skip
PARTS_ALONE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"  # fmt: skip
PRINTS_LISTS = CONCATENATES.replace("m['content'] +", "m['content'] ~")
ALTERNATES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CONCATENATES  # fmt: skip
TEXT_OF = "<|im_start|>user\nWhat is it?\nAnswer: words.<|im_end|>\n<|im_start|>assistant\n"
ROW = {"id": "a", "images": [], "question": "What is it?", "answer": "a vein", "kind": "open"}


@pytest.fixture
def model(tmp_path):
    """A folder with the demo's tokenizer alone, its template and generation config replaced."""

    def make(template, ends=(2,), with_processor=False):
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(model_path("demo"))
        kept = processor if with_processor else processor.tokenizer
        kept.chat_template = template
        if with_processor:
            processor.tokenizer.chat_template = None
        kept.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
        text = {"model_type": "qwen2", "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 610}
        (tmp_path / "config.json").write_text(json.dumps(text))
        return PromptEncoder(str(tmp_path))

    return make


def prompt(**changes):
    row = {**ROW, **changes}
    system = row.pop("system", "")
    return row_to_prompt({k: v for k, v in row.items() if v is not None}, instruction="short", system=system)


@pytest.mark.parametrize("template", [CONCATENATES, PARTS_ALONE, PRINTS_LISTS, ALTERNATES])
def test_every_kind_of_template_gets_content_in_its_form(model, template):
    encoder = model(template)
    assert encoder.processor is None and encoder.takes_parts == (template is PARTS_ALONE)
    assert encoder.render(prompt()) == TEXT_OF and encoder.fault(prompt()) is None
    ids, vision = encoder.encode(prompt())
    assert encoder.tokenizer.decode(ids) == TEXT_OF and not vision


def test_the_processors_template_serves_when_the_tokenizer_has_none(model):
    assert model(PARTS_ALONE, with_processor=True).render(prompt()) == TEXT_OF


def test_a_model_without_a_template_is_named_with_what_to_do(model):
    with pytest.raises(TemplateError, match=r"model=.*has no chat template.*chat_template\.jinja"):
        model(None)


def test_any_end_token_ends_a_completion_and_is_stripped(model):
    encoder = model(CONCATENATES, ends=(0, 2))
    assert encoder.eos_ids == {0, 2}
    yes = encoder.tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert encoder.decode([*yes, 0]) == encoder.decode([*yes, 2]) == encoder.decode(yes) == "yes"


@pytest.mark.parametrize(
    ("template", "ends", "end"),
    [
        (CONCATENATES, (0, 2), "<|im_end|>"),  # two tokens end a completion; the template writes this one
        (PARTS_ALONE, (2,), "<|im_end|>"),
        (CONCATENATES.replace("<|im_end|>", "<|endoftext|>"), (0, 2), "<|endoftext|>"),
        (CONCATENATES.replace("<|im_end|>", ""), (2,), "<|im_end|>"),  # it ends no turn: the tokenizer's own end
        ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}x", (2,), "<|im_end|>"),
    ],
)  # fmt: skip
def test_an_answer_ends_as_the_template_ends_it(model, template, ends, end):
    assert model(template, ends).end_of_turn() == end


def test_a_system_turn_is_written_or_its_refusal_named(model):
    asked = prompt(system="Be brief.")
    assert asked.messages[0] == {"role": "system", "content": "Be brief."}
    assert model(CONCATENATES).render(asked).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert "System role not supported" in model(ALTERNATES).fault(asked)


def test_a_template_that_drops_a_turn_is_seen(model):
    encoder = model(CONCATENATES.replace("{{ '<|im", "{% if m['role'] == 'user' %}{{ '<|im", 1).replace("{% endfor %}", "{% endif %}{% endfor %}", 1))  # fmt: skip
    assert encoder.fault(prompt()) is None
    assert "leaves out" in encoder.fault(prompt(system="Be brief."))


PLACEHOLDERS = ["<|image_pad|>", "<|vision_start|>", "<|video_pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]


@pytest.mark.parametrize("text", PLACEHOLDERS)
@pytest.mark.parametrize("place", ["question", "options", "system", "messages"])
def test_control_tokens_in_a_rows_text_are_refused_wherever_they_stand(place, text):
    encoder = PromptEncoder("demo")
    held = f"a {text} b"
    changed = {
        "question": {"question": held},
        "options": {"options": [held, "c"], "answer": "A", "kind": "option"},
        "system": {"system": held},
        "messages": {"question": None, "messages": [{"role": "user", "content": held}]},
    }[place]
    assert repr(text) in encoder.fault(prompt(**changed))


@pytest.mark.parametrize("text", ["<think>", "<answer>x</answer>", "a < b > c", "[INST]", "<image>", "{{ x }}"])
def test_other_text_stays_text(text):
    """`<image>` is a placeholder of other families, plain text here."""
    encoder = PromptEncoder("demo")
    asked = prompt(question=text)
    assert encoder.fault(asked) is None and text in encoder.render(asked)


def test_the_row_that_hung_a_run_is_refused_by_id(shared_data):
    encoder = PromptEncoder("demo")
    with pytest.raises(DataError, match=r"<\|vision_start\|>") as caught:
        load(shared_data / "cases/door/run/placeholder_in_question.jsonl", instruction="short", fault=encoder.fault)
    assert [bad.id for bad in caught.value.refused] == ["n3", "n5", "n6", "n7"]


def test_a_processor_that_runs_out_of_images_ends_the_wait_with_the_rows_id(shared_data):
    file = shared_data / "cases/door/run/placeholder_in_question.jsonl"
    bad = load(file, instruction="short").prompts[3]
    with pytest.raises(TemplateError, match="'n3'"):
        asyncio.run(asyncio.wait_for(in_thread(PromptEncoder("demo").encode, bad), 20))


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which plane?"}]},
    {"role": "assistant", "content": "axial"},
    {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]},
]


def test_a_conversation_keeps_its_turns_and_the_place_of_its_images():
    asked = prompt(question=None, messages=TURNS, images=["a.png", "b.png"], system="not this one")
    assert [m["role"] for m in asked.messages] == ["system", "user", "assistant", "user"]
    assert asked.messages[0]["content"] == "Be brief." and asked.messages[2]["content"] == "axial"
    assert asked.messages[1]["content"] == TURNS[1]["content"]
    assert asked.messages[3]["content"] == [*TURNS[3]["content"], {"type": "text", "text": "Answer: words."}]
    unplaced = prompt(question=None, messages=[{"role": "user", "content": "What is it?"}], images=["a.png"])
    assert unplaced.messages == prompt(images=["a.png"]).messages


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": TURNS}, "either a question or messages"),
        ({"question": None}, "'question' is missing"),
        ({"question": None, "messages": TURNS}, "place 2 images and the row has 0"),
        ({"question": None, "messages": TURNS[:3], "images": ["a.png"]}, "ending with user"),
        ({"question": None, "messages": [{"role": "tool", "content": "x"}]}, "turn 1: role must be"),
        ({"question": None, "messages": [{"role": "user", "content": " "}]}, "turn 1: content is empty"),
        ({"question": None, "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "turn 1: a part is"),
        ({"question": None, "messages": [{"role": "user", "text": "x"}]}, "turn 1: a turn is a mapping"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(changes, reason):
    with pytest.raises(RowError, match=reason):
        prompt(**changes)


def test_a_model_that_is_not_there_is_named_with_what_to_do(tmp_path):
    for read in (PromptEncoder, empty_model, lambda name: load_model(name, torch.float32)):
        with pytest.raises(ConfigError, match=r"cannot be read:[\s\S]*Hub id"):
            read(str(tmp_path / "nothing"))
