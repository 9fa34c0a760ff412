"""Staged fine-tuning: what is trained, at which rate, on what; and that a stage survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny_models import TEXT_FAMILIES, VISION_FAMILIES, build

from lingshu_rl.cli import main
from lingshu_rl.data.load import DataError, load
from lingshu_rl.data.rows import row_to_prompt
from lingshu_rl.failures import ConfigError
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.progress import Progress
from lingshu_rl.sft.examples import completion_fault, completion_of
from lingshu_rl.sft.held_out import answer, table
from lingshu_rl.sft.parts import parameter_groups, parameters_by_part
from lingshu_rl.sft.rows import stage_examples
from lingshu_rl.sft.settings import load_sft_config
from lingshu_rl.sft.stages import run_sft
from lingshu_rl.sft.trainer import build_trainer, packing_fault, sft_arguments

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"max_steps": 4, "per_device_train_batch_size": 4, "warmup_steps": 0, "logging_steps": 1, "save_steps": 2}


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_every_parameter_of_every_family_belongs_to_one_part(family):
    found = parameters_by_part(build(family))
    assert all(found.values()), {part: len(members) for part, members in found.items()}
    assert all("merger" in n or "project" in n for n, _ in found["projector"])
    assert all("language" in n or "lm_head" in n for n, _ in found["language"])


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_model_that_does_not_see_is_language_alone(family):
    found = parameters_by_part(build(family))
    assert found["language"] and not found["vision"] and not found["projector"]


def test_the_parts_of_the_real_qwen_2_5_vl():
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig())
    found = parameters_by_part(model)
    assert {n.split(".")[2] for n, _ in found["projector"]} == {"merger"}
    assert {n.split(".")[2] for n, _ in found["vision"]} == {"blocks", "patch_embed"}
    assert sum(map(len, found.values())) == len(list(model.named_parameters()))
    rates = {"vision": 2e-6, "projector": 1e-5, "language": 1e-5}
    decayed = {n for n, p in model.named_parameters() if p.ndim > 1}
    groups = parameter_groups(model, rates, 0.1, decayed)
    assert {(g["part"], g["lr"]) for g in groups} == set(rates.items())
    assert all((g["weight_decay"] == 0.1) == all(p.ndim > 1 for p in g["params"]) for g in groups)
    for _, parameter in found["language"]:
        parameter.requires_grad_(False)
    assert {g["part"] for g in parameter_groups(model, rates, 0.1, decayed)} == {"vision", "projector"}


def test_an_unknown_part_is_named_and_can_be_told():
    model = build("qwen2_5_vl")
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"adapter\.weight belongs to no known part"):
        parameters_by_part(model)
    assert {n for n, _ in parameters_by_part(model, {"projector": ["adapter"]})["projector"]} >= {"adapter.weight"}


def test_packing_is_safe_only_where_packed_rows_do_not_see_each_other():
    assert packing_fault(build("llama")) == ""
    assert packing_fault(build("qwen2")) == ""
    model = build("llama")
    plain = model.forward
    model.forward = lambda *a, position_ids=None, **k: plain(*a, **k)  # a family that ignores where rows begin
    assert "sees the one before it" in packing_fault(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stages.a.lr.vision=1e-5"], "stages.a.data is empty"),
        (["stages.a.data=[x.jsonl]"], "stages.a.lr is empty"),
        (["stages.a.data=[x.jsonl]", "stages.a.lr.eyes=1"], "unknown part 'eyes'"),
        (["stages.a.data=[x.jsonl]", "stages.a.lr.vision=0"], "to freeze the part, leave it out"),
        (["stages.a.data=[x.jsonl]", "stages.a.lr.vision=1", "stages.a.target=all"], "stages.a.target='all'"),
        (["stages.a.data=[x.jsonl]", "stages.a.lr.vision=1", "trainer.learning_rate=1"], "trainer.learning_rate is set by"),
        (["stages.a.data=[x.jsonl]", "stages.a.lr.vision=1", "trainer.save_total_limit=1"], "at least 2"),
        (["stages.a.data=[x.jsonl]", "stages.a.lr.vision=1", "stages.a.packing=always"], "needs trainer.max_length"),
        (["stages.a.dat=[x.jsonl]"], "did you mean"),
        (["stages.start.data=[x.jsonl]"], "not 'start'"),
        (["resume=maybe"], "stages is empty"),
        (["stages.a.data=[x.jsonl]", "stages.a.lr.vision=1", "dtype=half"], "dtype='half'"),
        (["stages.a.data=[x.jsonl]", "stages.a.lr.vision=1", "parts.eyes=[x]"], "parts names eyes"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError) as error:
        load_sft_config(None, ["model=demo", *settings])
    assert message in str(error.value)


def row(**fields):
    return row_to_prompt({"id": "a", "images": [], "question": "Which?", "kind": "option", "options": ["CT", "MRI"], "answer": "B", **fields})  # fmt: skip


def test_completions_by_target():
    chain = row(meta={"think": "bright fluid"})
    assert completion_of(chain, "auto") == "<think> bright fluid </think><answer> B </answer>"
    assert completion_of(row(), "auto") == completion_of(chain, "answer") == "<answer> B </answer>"
    assert completion_of(chain, "plain") == "B"
    encoder = PromptEncoder("demo")
    assert (
        "has no meta.think" in completion_fault(encoder, row(), "think")
        and completion_fault(encoder, chain, "think") is None
    )
    marked = row(meta={"think": "bright <|im_end|> fluid"})
    assert (
        "reads as a control token" in completion_fault(encoder, marked, "auto")
        and completion_fault(encoder, marked, "answer") is None
    )


def test_rows_of_a_stage_are_chosen_by_kind_and_number(tmp_path):
    rows = [
        {"id": str(n), "images": [], "question": "Q", "kind": k, "answer": "yes"}
        for n, k in enumerate(("open", "yesno") * 3)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = load_sft_config(None, ["model=demo", f"stages.a.data=[{tmp_path / 'r.jsonl'}]", "stages.a.lr.language=1e-4",
                                   "stages.a.kinds=[yesno]", "stages.a.limit=2"])  # fmt: skip
    stage, encoder = config.stages["a"], PromptEncoder("demo")
    assert len(stage_examples(config, "a", stage, encoder)) == 2
    stage.kinds = ["report"]
    with pytest.raises(ConfigError, match=r"no row of .* is of kind report"):
        stage_examples(config, "a", stage, encoder)


def test_no_answer_is_cut(tmp_path, caplog):
    """A row over trainer.max_length is refused with its lengths, or left out and counted; one token less is trained whole."""
    Image.new("L", (160, 96), 90).save(tmp_path / "i.png")
    answer = "A chest radiograph with clear lungs and a normal heart."
    common = {"images": ["i.png"], "question": "What is seen?", "kind": "report"}
    rows = [{"id": "long", **common, "answer": answer}, {"id": "short", **common, "answer": "Clear."}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["model=demo", f"stages.a.data=[{tmp_path / 'r.jsonl'}]", "stages.a.lr.language=1e-4"]
    encoder = PromptEncoder("demo")

    def lengths(*more):
        config = load_sft_config(None, [*words, *more])
        found = stage_examples(config, "a", config.stages["a"], encoder)
        made = [encoder.processor(text=[e["prompt"] + e["completion"]], images=[e["images"]], add_special_tokens=False) for e in found]  # fmt: skip
        return [len(one["input_ids"][0]) for one in made]

    long, short = lengths()
    assert lengths(f"trainer.max_length={long}") == [long, short]
    with pytest.raises(
        DataError,
        match=rf"(?s)id long\): its prompt with its answer has {long} tokens \(text \d+, images \d+\), over the {long - 1} that trainer.max_length={long - 1} keeps.*too_long=drop",
    ):
        lengths(f"trainer.max_length={long - 1}")
    assert lengths(f"trainer.max_length={long - 1}", "too_long=drop") == [short]
    assert "1 of 2 rows are left out as too long" in caplog.text
    with pytest.raises(DataError, match="No usable row is left"):  # the images alone are over the limit
        lengths("trainer.max_length=4", "too_long=drop")
    assert main(["sft", str(write_yaml(tmp_path)), *words, f"dir={tmp_path / 'out'}", "trainer.max_length=40"]) == 2
    assert not list(tmp_path.glob("out/a/done.json"))


def write_yaml(folder):
    (folder / "s.yaml").write_text("trainer: {max_steps: 1}\n")
    return folder / "s.yaml"


def test_a_stage_mixes_sources_of_any_layout(tmp_path):
    """By their epochs; two sources may hold the same questions, say with and without chains."""
    rows = [{"id": str(n), "images": [], "question": "Q", "kind": "yesno", "answer": "yes"} for n in range(4)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "s.jsonl").write_text(
        "".join(json.dumps({"instruction": f"Q{n}", "output": "no"}) + "\n" for n in range(4))
    )
    sources = [{"path": str(tmp_path / "r.jsonl"), "epochs": 1.5}, {"path": str(tmp_path / "r.jsonl"), "name": "again", "epochs": 0.5},
               {"path": str(tmp_path / "s.jsonl"), "format": "alpaca"}]  # fmt: skip
    config = load_sft_config(None, ["model=demo", f"stages.a.data={json.dumps(sources)}", "stages.a.lr.language=1e-4"])
    examples = stage_examples(config, "a", config.stages["a"], PromptEncoder("demo"))
    times = Counter(examples.places)
    assert len(examples) == 6 + 2 + 4 and [times[n] for n in range(8, 12)] == [1] * 4
    assert sum(times[n] for n in range(4)) == 6 and sum(times[n] for n in range(4, 8)) == 2
    labels = {tuple(t for t in examples[n]["labels"] if t != -100) for n in range(12)}
    assert len(labels) == 2  # yes and no
    with pytest.raises(ConfigError, match=r"stages.a.data\[0\].fromat: unknown key"):
        load_sft_config(None, ["model=demo", "stages.a.data=[{path: x, fromat: llava}]", "stages.a.lr.language=1e-4"])
    with pytest.raises(ConfigError, match=r"test\.data\.format: no preset"):
        load_sft_config(
            None, ["model=demo", "stages.a.data=[x]", "stages.a.lr.language=1", "test.data={path: x, format: y}"]
        )


@pytest.mark.parametrize("seen", [True, False])
def test_a_stage_teaches_the_prompt_that_a_run_would_ask(tmp_path, seen):
    """System turn, history and all: what TRL's own collator makes of a row is the run's prompt and then the answer."""
    Image.new("RGB", (112, 112), "gray").save(tmp_path / "scan.png")
    images = {"images": [str(tmp_path / "scan.png")] * seen}
    turns = [
        {"role": "user", "content": "Is this slice axial?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Is this slice coronal?"},
    ]
    rows = [
        {"id": "a", **images, "messages": turns, "kind": "yesno", "answer": "no"},
        {"id": "b", **images, "question": "Is this a brain?", "kind": "yesno", "answer": "yes"},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stage = [f"stages.a.data=[{tmp_path / 'r.jsonl'}]", "stages.a.instruction=short", "stages.a.lr.language=1e-3"]
    config = load_sft_config(None, ["model=demo", "system=Answer.", "trainer.per_device_train_batch_size=2", *stage])
    a, encoder = config.stages["a"], PromptEncoder("demo")
    examples = stage_examples(config, "a", a, encoder)
    arguments = sft_arguments(config, a, tmp_path, False)
    trainer = build_trainer(config, "a", a, "demo", examples, arguments, Progress(quiet=True))
    (batch,) = trainer.get_train_dataloader()
    prompts = load(tmp_path / "r.jsonl", instruction="short", system="Answer.").prompts
    end = encoder.end_of_turn()
    assert end == "<|im_end|>"
    wanted = {}
    for prompt in prompts:
        answered = encoder.tokenizer(completion_of(prompt, "auto") + end, add_special_tokens=False)["input_ids"]
        wanted[encoder.encode(prompt)[0]] = answered
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        kept, taught = ids[mask.bool()].tolist(), labels[labels != -100].tolist()
        assert wanted.pop(tuple(kept[: len(kept) - len(taught)])) == taught == kept[len(kept) - len(taught) :]
    assert ("pixel_values" in batch) is seen


def demo_config(folder, **changes):
    settings = [
        f"dir={folder}",
        "model=demo",
        "test.data=demo:test",
        "test.limit=12",
        "test.max_tokens=24",
        "test.instruction=short",
    ]
    settings += [f"trainer.{key}={value}" for key, value in QUICK.items()]
    for name, lr in changes.pop("stages", {"a": {"projector": 1e-3}}).items():
        settings += [f"stages.{name}.data=[demo:train]", f"stages.{name}.instruction=short", f"stages.{name}.limit=24"]
        settings += [f"stages.{name}.lr.{part}={rate}" for part, rate in lr.items()]
    return [*settings, *(f"{k}={v}" for k, v in changes.items())]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_a_stage_trains_its_parts_and_no_other_and_the_next_starts_from_it(tmp_path):
    stages = {"shallow": {"vision": 1e-4, "projector": 1e-3}, "deep": {"language": 1e-3}}
    config = load_sft_config(None, demo_config(tmp_path, stages=stages))
    summary = run_sft(config)
    start = load_file(ROOT / "lingshu_rl" / "demo" / "weights" / "model.safetensors")
    shallow, deep = weights(tmp_path / "shallow"), weights(tmp_path / "deep")

    def moved(a, b):
        return {("projector" if "merger" in n else "vision" if "visual" in n else "language") for n in a if not torch.equal(a[n], b[n])}  # fmt: skip

    assert moved(start, shallow) == {"vision", "projector"} and moved(shallow, deep) == {"language"}
    # AdamW's first steps move every weight by about the learning rate, so the parts' distances show their rates.
    step = {part: max((shallow[n] - start[n]).abs().max() for n in start if key(n)) for part, key in
            {"vision": lambda n: "visual.blocks" in n, "projector": lambda n: "merger" in n}.items()}  # fmt: skip
    assert step["projector"] / step["vision"] == pytest.approx(10, rel=0.5)
    assert [r["stage"] for r in summary["rows"]] == ["start", "shallow", "deep"]
    assert all("gain" in r and len(r["gain"]["ci95"]) == 2 and r["n"] == 12 for r in summary["rows"][1:])
    assert summary["rows"][-1]["blank_image"]["n"] == 12
    assert (tmp_path / "table.md").read_text() == table(summary["rows"]) and "| deep |" in table(summary["rows"])
    losses = [json.loads(line) for line in (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "loss" in line] == [1, 2, 3, 4]
    assert not (tmp_path / "deep" / "checkpoints").exists()
    # Done stages are found again; other settings in the same folder are refused.
    before = (tmp_path / "deep" / "model" / "model.safetensors").stat().st_mtime_ns
    run_sft(config)
    assert (tmp_path / "deep" / "model" / "model.safetensors").stat().st_mtime_ns == before
    config.stages["shallow"].lr["vision"] = 5e-4
    with pytest.raises(ConfigError, match="another dir, or resume=never"):
        run_sft(config)


def test_batched_answers_are_those_of_one_at_a_time_and_a_cut_is_seen():
    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.model.loading import load_model

    model, encoder = load_model("demo", torch.float32), PromptEncoder("demo")
    prompts = list(load("demo:test", instruction="short").prompts[:6])
    text = row_to_prompt({"id": "t", "images": [], "question": "Is this slice axial?", "kind": "yesno", "answer": "yes"}, instruction="short")  # fmt: skip
    mixed = [prompts[0], text, *prompts[1:]]
    together = answer(model, encoder, mixed, 4, 24)
    assert together == [answer(model, encoder, [p], 1, 24)[0] for p in mixed]
    assert all("<answer>" in said and not cut for said, cut in together[:1] + together[2:])
    assert all(cut for _, cut in answer(model, encoder, mixed, 4, 2))


def text_model(folder):
    """A language model that loads by itself, with the demo's chat template."""
    from lingshu_rl.demo.model import CHAT_TEMPLATE, build_tokenizer

    tokenizer = build_tokenizer(["the liver is dark", "the spleen is dark"] * 2)
    tokenizer.chat_template = CHAT_TEMPLATE
    build("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_text_rows_are_packed_where_it_is_safe_and_rows_with_images_never(tmp_path, capsys):
    text_model(tmp_path / "llama")
    rows = [
        {"id": str(n), "images": [], "question": f"Is {n} even?", "kind": "yesno", "answer": "yes"} for n in range(40)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = [f"model={tmp_path / 'llama'}", f"stages.a.data=[{tmp_path / 'r.jsonl'}]", "stages.a.lr.language=1e-3",
                'stages.a.instruction=""', "trainer.max_steps=-1", "trainer.per_device_train_batch_size=1",
                "trainer.logging_steps=1", "trainer.max_length=128"]  # fmt: skip
    steps = {}
    for packing in ("auto", "never"):
        run_sft(load_sft_config(None, [*settings, f"dir={tmp_path / packing}", f"stages.a.packing={packing}"]))
        steps[packing] = json.loads((tmp_path / packing / "a" / "done.json").read_text())["steps"]
    assert "a: rows are packed" in capsys.readouterr().out
    assert steps["never"] == 40 and steps["auto"] < 20
    seen = demo_config(
        tmp_path / "seen", **{"stages.a.packing": "always", "trainer.max_length": 128, "test.data": "''"}
    )
    with pytest.raises(ConfigError, match="not safe: rows have images"):
        run_sft(load_sft_config(None, seen))


def test_a_part_that_the_model_lacks_and_unknown_arguments_are_refused(tmp_path):
    text_model(tmp_path / "llama")
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"id": "a", "images": [], "question": "Q", "kind": "open", "answer": "x"})
    )
    settings = [f"dir={tmp_path / 'run'}", f"model={tmp_path / 'llama'}", f"stages.a.data=[{tmp_path / 'r.jsonl'}]"]
    with pytest.raises(ConfigError, match=r"stages.a.lr.vision: .* has no vision part"):
        run_sft(load_sft_config(None, [*settings, "stages.a.lr.vision=1e-4"]))
    with pytest.raises(ConfigError, match="max_stepz"):
        run_sft(
            load_sft_config(
                None, [*settings, "stages.a.lr.language=1e-4", "trainer.max_stepz=3", f"dir={tmp_path / 'b'}"]
            )
        )


def test_the_recipes_are_read_and_hold_the_published_figures(capsys):
    lingshu = load_sft_config(ROOT / "recipes" / "configs" / "lingshu_sft_7b.yaml")
    assert list(lingshu.stages) == ["shallow", "deep", "instruct"]
    assert set(lingshu.stages["shallow"].lr) == {"vision", "projector"}
    assert (
        lingshu.stages["instruct"].lr
        == lingshu.stages["deep"].lr
        == {"vision": 2e-6, "projector": 1e-5, "language": 1e-5}
    )
    assert lingshu.trainer["warmup_steps"] == 100 and lingshu.trainer["max_length"] == 8192
    assert lingshu.stages["instruct"].trainer["num_train_epochs"] == 2
    assert main(["sft", str(ROOT / "recipes" / "configs" / "sft_demo.yaml"), "--dry-run", "model=demo"]) == 1
    said = capsys.readouterr()
    assert "shallow" in said.out and "runs/miniature/base/texts.jsonl: no such file" in said.err  # an earlier step's
    assert (
        main(["sft", str(ROOT / "recipes" / "configs" / "sft_demo.yaml"), "model=demo", "stages.shallow.target=x"]) == 2
    )


@pytest.mark.endurance
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(tmp_path):
    stages = {"a": {"projector": 1e-3, "language": 1e-3}}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(folder):
        settings = demo_config(
            folder, stages=stages, **{"trainer.max_steps": 12, "trainer.save_steps": 3, "test.limit": 4}
        )
        (tmp_path / "empty.yaml").write_text("{}")
        return [sys.executable, "-m", "lingshu_rl.cli", "sft", str(tmp_path / "empty.yaml"), *settings]

    process = subprocess.Popen(command(tmp_path / "killed"), env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    deadline = time.monotonic() + 900
    while not list((tmp_path / "killed" / "a" / "checkpoints").glob("checkpoint-*/complete")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read().decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "a" / "done.json").exists()
    for name in ("killed", "straight"):
        done = subprocess.run(command(tmp_path / name), env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("goes on from" in done.stdout) is (name == "killed")
    for name in (
        "a/model/model.safetensors",
        "a/metrics.jsonl",
        "eval/a.jsonl",
        "eval/start.jsonl",
        "summary.json",
        "table.md",
    ):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("killed", "straight"))
        assert one.replace(b"/killed/", b"/straight/") == two, name
