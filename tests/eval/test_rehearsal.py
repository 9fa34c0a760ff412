"""A pipeline is checked to its last step before its first starts: names, settings, files, and what steps promise each other."""

from pathlib import Path

import pytest
from eval_samples import SAMPLES
from launching import ROOT

from lingshu_rl.cli import main


@pytest.fixture
def for_7b(tmp_path, monkeypatch):
    """What lingshu_7b.yaml expects of its user; returns the words that name it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "records.jsonl").write_text('{"id": "r", "images": []}\n')
    (tmp_path / "questions.jsonl").write_text('{"id": "q", "question": "Why?", "answer": "so"}\n')
    (tmp_path / "curate.yaml").write_text(
        f"sources: [{{path: {tmp_path}/questions.jsonl}}]\nsteps: [dedup_text]\nout: x\n"
    )
    for name in ("vqa_rad", "slake", "path_vqa", "pmc_vqa"):
        SAMPLES[name](tmp_path / "benchmarks", name)
    return [str(ROOT / "recipes" / "pipelines" / "lingshu_7b.yaml"), "--dry-run", f"data={tmp_path}", f"curation={tmp_path}/curate.yaml", f"dir={tmp_path}/runs"]  # fmt: skip


def test_the_plan_for_7b_is_checked_to_its_last_step(for_7b, capsys):
    assert main(["pipeline", *for_7b]) == 0, capsys.readouterr().err
    assert "checked: curate, captions, questions, thoughts, sft, rl, evaluate" in capsys.readouterr().out


# Faults of several steps at once, each with what is said of it; a step says one of its own at a time.
WRONG = [
    {
        "lingshu-rl curate": ("lingshu-rl curated", "steps.curate: argument command: invalid choice: 'curated'"),
        "synth captions {data}/records.jsonl": ("synth captions {data}/record.jsonl", "record.jsonl: no such file or folder"),
    },
    {
        "lingshu-rl curate": ("lingshu curate", "steps.curate: there is no program 'lingshu'"),
        "synth captions": ("synth caption", "steps.captions: argument step: invalid choice: 'caption'"),
        "--count 3": ("--count three", "steps.questions: argument --count: invalid int value: 'three'"),
        "--samples 4": ("--samples 0", "steps.thoughts: --samples must be at least 1"),
        "stages.shallow.data": ("stages.shalow.data", "steps.sft: "),
        "data.curriculum=pass_rate": ("data.curriculum=pass_rates", "steps.rl: data.curriculum='pass_rates' is not one of"),
        "path_vqa,": ("pathvqa,", "steps.evaluate: unknown benchmark 'pathvqa' (did you mean 'path_vqa'"),
    },
    {
        "inputs: [\"{curation}\", \"{data}\"]": ("inputs: [\"{curation}\", \"{data}\", more.csv]", "steps.curate.inputs: more.csv: no such file"),
        "writer_url: http://": ("writer_url: ", "steps.captions: url is an address such as"),
        "--num_processes {gpus}": ("--num_procs {gpus}", "steps.sft: "),
        "data.train={curate}/train.jsonl": ("data.train=gone.jsonl", "steps.rl: data.train: gone.jsonl: no such file or folder"),
        ",pmc_vqa": (",mmlu_med", "steps.evaluate: mmlu_med: no data found"),
    },
    {
        "--config_file recipes/accelerate/one_node.yaml": ("--config_file recipes/accelerate/none.yaml", "steps.rl: recipes/accelerate/none.yaml: no such file"),
        "recipes/configs/lingshu_sft_7b.yaml\n": ("recipes/configs/sft.yaml\n", "steps.sft: "),
        "hf --benchmarks": ("hf --benchmark_s", "steps.evaluate: "),
    },
    {"hf --benchmarks": ("hf --controls dark --benchmarks", "steps.evaluate: unknown control 'dark'"), "recipes/grpo_medvqa.py\n": ("recipes/grpo.py\n", "steps.rl: recipes/grpo.py: no such file")},
    {"hf --benchmarks": ("hf --report-metrics rogue --benchmarks", "steps.evaluate: "), "data.curriculum": ("data.curiculum", "steps.rl: unknown key 'data.curiculum'")},
    {"hf --benchmarks": ("hf --vllm 5 --benchmarks", "steps.evaluate: --vllm '5' is not of the form")},
    {"checkpoints/step-000500/hf --bench": ("checkpoints/step-500/hf --bench", "{rl}/checkpoints/step-500/hf is not among the outputs of rl")},
    {"{sft}/eval/deep.jsonl": ("{sft}/evals/deep.jsonl", "table: deep alignment: {sft}/evals/deep.jsonl is not among the outputs of sft, which are")},
    {"test.data={curate}/test.jsonl": ("test.data={curate}/test.json", "steps.sft: {curate}/test.json is not among the outputs of curate")},
]  # fmt: skip


@pytest.mark.parametrize("changes", WRONG)
def test_what_is_wrong_in_any_step_is_said_before_the_first_starts(for_7b, tmp_path, capsys, changes):
    text = Path(for_7b[0]).read_text()
    for old, (new, _) in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "p.yaml").write_text(text)
    assert main(["pipeline", str(tmp_path / "p.yaml"), *for_7b[2:]]) == 2
    error = capsys.readouterr().err
    assert [message for _, message in changes.values() if message not in error] == [], error
    assert not list((tmp_path / "runs").glob("*-*")), "no step was started"
