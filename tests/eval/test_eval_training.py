"""The trainer's held-out evaluation is the kit's: same controls, rows and grades; its report shows them."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from eval_samples import png, write_json

from lingshu_rl.eval.heldout import evaluate
from lingshu_rl.eval.scoring import make_row
from lingshu_rl.eval.stats import summarise
from lingshu_rl.failures import PromptRefused
from lingshu_rl.imaging.images import Picture
from lingshu_rl.report import write_report
from lingshu_rl.rollout.sampler import RolloutError
from lingshu_rl.state import RunState
from lingshu_rl.types import Prompt, Rollout
from rewards import default_reward


def prompts(count=6):
    content = [{"type": "image"}, {"type": "text", "text": "Is it bright?"}]
    return [
        Prompt(f"q{i}", ({"role": "user", "content": content},), (Picture(png(250 if i % 3 else 5)),), "yes" if i % 3 else "no", (), "yesno", {"task": "light"})
        for i in range(count)
    ]  # fmt: skip


class FakeRun:
    """A run whose policy sees how bright an image is, and whose server refuses one question."""

    def __init__(self, tmp_path, refuse=()):
        self.test, self.stored, self.said = prompts(), {}, []
        self.state = RunState()
        self.config = SimpleNamespace(eval=SimpleNamespace(limit=0))
        self.rollout = SimpleNamespace(sample=self.sample)
        self.rewards = SimpleNamespace(grade=self.grade)
        self.folder = SimpleNamespace(write_eval=lambda name, rows: self.stored.update({name: rows}))
        self.progress = SimpleNamespace(start=lambda *a: None, stop=lambda: None, advance=lambda: None, say=self.said.append)  # fmt: skip
        self.refuse = refuse

    async def sample(self, prompt, n, seed, temperature):
        assert (n, temperature) == (1, 0.0)
        if prompt.id in self.refuse:
            raise PromptRefused("refused: too long", prompt.id)
        shade = prompt.images[0].pixels().getpixel((1, 1))[0] if prompt.images else 128
        text = "I am not sure." if shade == 128 else f"<answer>{'yes' if shade > 100 else 'no'}</answer>"
        return (Rollout(prompt, 0, text, (1,), (2,), (0.0,), "stop", 0),)

    async def grade(self, samples):
        return default_reward().score_batch(samples)


def test_the_trainers_evaluation_is_the_kits(tmp_path):
    run = FakeRun(tmp_path, refuse={"q1"})
    asyncio.run(evaluate(run, "step-000010", ["blank", "text_only", "majority"]))
    assert set(run.stored) == {"step-000010", "step-000010_blank", "step-000010_text_only", "step-000010_majority"}
    main = run.stored["step-000010"]
    assert [r["value"] for r in main] == [1.0, None, 1.0, 1.0, 1.0, 1.0] and main[1]["status"] == "engine_error"
    assert set(main[0]) == set(make_row(run.test[0], SimpleNamespace(error="", text="", finish_reason=""), SimpleNamespace(value=0.0, status="ok", parsed=None, reason="", components={})))  # fmt: skip
    assert {r["status"] for r in run.stored["step-000010_blank"]} == {"unparsed", "engine_error"}
    assert sum(r["value"] for r in run.stored["step-000010_majority"]) == 4
    assert any("5 unread" in line for line in run.said) and any("1 errors" in line for line in run.said)


def test_an_engine_that_answers_nothing_is_a_fault(tmp_path):
    with pytest.raises(RolloutError, match="no held-out question was answered; the first: refused: too long"):
        asyncio.run(evaluate(FakeRun(tmp_path, refuse={f"q{i}" for i in range(6)}), "before"))


def test_a_server_that_fails_ends_the_evaluation_instead_of_becoming_an_unanswered_question(tmp_path):
    run = FakeRun(tmp_path)

    async def sample(*_, **__):
        raise RolloutError("http://a failed")

    run.rollout.sample = sample
    with pytest.raises(RolloutError, match="http://a failed"):
        asyncio.run(evaluate(run, "before"))


def test_the_report_of_a_run_shows_what_the_kit_found(tmp_path):
    run = FakeRun(tmp_path)
    asyncio.run(evaluate(run, "before", ["majority"]))
    asyncio.run(evaluate(run, "after", ["blank", "text_only", "majority"]))
    run.stored["after"][0] |= {"status": "unparsed", "value": 0.0, "completion": "?"}
    for name, rows in run.stored.items():
        write_json(tmp_path / "eval" / f"{name}.jsonl", json.loads(json.dumps(rows, default=str)))
    summary = summarise(run.stored)
    assert summary["majority_answer"]["accuracy"] == pytest.approx(4 / 6) and summary["text_only"]["accuracy"] == 0
    assert "before" not in summary["majority_answer"] and summary["before"]["n"] == 6
    text = write_report(tmp_path).read_text()
    assert "The most frequent label, given to all questions, scores 66.7" in text
    assert "Without any image the trained policy scores 0.0" in text and "could not be read as an answer" in text
