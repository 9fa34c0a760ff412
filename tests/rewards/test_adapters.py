"""Other trainers call these rewards the way they really do; the TRL test trains a model."""

import asyncio
import itertools
import json
import math
import pickle
import re
import sys
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
from launching import ROOT

from rewards.adapters import from_trl, reward_input, to_openrlhf, to_trl, to_verifiers, to_verl
from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import build
from rewards.executor import Executor, RewardFailure

HERE = "test_adapters"


class Exact(Reward):
    """Pays the gold word as the completion's last word; completions with "fail" raise."""

    name = "exact"

    def score(self, sample):
        if "fail" in sample.completion:
            raise RuntimeError("cannot")
        words = sample.completion.split()
        said = words[-1] if words else ""
        return RewardResult(float(said == sample.gold), parsed=said, reason="" if said == sample.gold else "wrong word")


class Seen(Reward):
    """Keeps what it was given."""

    def __init__(self):
        self.samples = []

    def score(self, sample):
        self.samples.append(sample)
        return RewardResult(1.0)


class Short(Reward):
    def score(self, sample):
        return RewardResult(1.0 if len(sample.completion) < 8 else 0.5)


SPEC = {
    "parts": {
        "answer": {"route": {"open": f"{HERE}:Exact"}},
        "short": {"class": f"{HERE}:Short", "multiply": 1},
    }
}


def chat(text, role="assistant"):
    return [{"role": role, "content": text}]


def test_reward_input_undoes_what_tables_do_to_rows():
    row = {
        "answer": np.float64(1.5),
        "options": np.array(["a", "b"]),
        "kind": "numeric",
        "unit": "mg",
        "tolerance": {"rel": 0.1, "abs": None},
        "meta": {"modality": "CT", "organ": None},
        "image": "x.png",
        "question": "how much?",
    }
    sample = reward_input(row, "text")
    assert sample.gold == 1.5 and type(sample.gold) is float
    assert sample.options == ("a", "b") and sample.images == ("x.png",) and sample.prompt == "how much?"
    assert sample.meta == {"modality": "CT", "unit": "mg", "tolerance": {"rel": 0.1}}
    with pytest.raises(ValueError, match=r"no field 'answer'.*its fields: kind, solution"):
        reward_input({"kind": "open", "solution": "x"}, "text")


def test_trl_reads_strings_and_chats_and_columns():
    seen = Seen()
    function = to_trl(seen, gold="solution", eos_token_ids=[2])
    values = function(
        prompts=[chat([{"type": "image"}, {"type": "text", "text": "which?"}], "user"), "which?"],
        completions=[[*chat("A"), {"role": "tool", "content": "x"}, *chat([{"type": "text", "text": "B"}])], "C"],
        completion_ids=[[5, 2], [5, 6]],
        solution=["B", "C"],
        options=[["x", "y"], None],
        kind=["option", "open"],
        meta=[{"multi": None}, {"multi": True}],
        trainer_state=object(),
    )
    assert values == [1.0, 1.0]
    first, second = seen.samples
    assert (first.completion, first.prompt, first.gold, first.options, first.truncated) == (
        "B",
        "which?",
        "B",
        ("x", "y"),
        False,
    )
    assert (second.completion, second.options, second.truncated, dict(second.meta)) == ("C", (), True, {"multi": True})


def test_trl_gets_none_for_the_unjudged_and_logs_by_name():
    logged, extra = {}, {}
    function = to_trl(Executor(SPEC, max_failed_share=1.0))
    values = function(
        ["q"] * 4,
        ["x", "y", "x and much more x", "fail"],
        answer=["x"] * 4,
        kind=["open"] * 4,
        log_metric=logged.__setitem__,
        log_extra=extra.__setitem__,
    )
    assert values == [1.0, 0.0, 0.5, None]
    name = function.__name__
    assert logged[f"{name}/answer"] == pytest.approx(2 / 3) and logged[f"{name}/unjudged"] == 0.25
    assert extra[f"{name}/status"] == ["ok", "ok", "ok", "error"] and "cannot" in extra[f"{name}/reason"][3]


def test_trl_function_can_be_pickled_unless_it_holds_an_executor():
    function = to_trl(Exact())
    function(["q"], ["x"], answer=["x"])
    assert pickle.loads(pickle.dumps(function))(["q"], ["x"], answer=["x"]) == [1.0]
    with pytest.raises(TypeError, match="give to_trl the Reward"):
        pickle.dumps(to_trl(Executor(Exact())))


def test_verl_results_have_the_same_keys_for_every_sample():
    compute_score = to_verl(build(SPEC), unjudged=0.0)
    good = compute_score(
        data_source="vqa", solution_str="x", ground_truth="x", extra_info={"kind": "open", "num_turns": 1}
    )
    lost = compute_score("vqa", "fail", "x", {"kind": "open"}, reward_router_address=None)
    assert (good["score"], good["answer"], good["pred"], good["unjudged"]) == (1.0, 1.0, "x", 0.0)
    assert (
        good.keys() == lost.keys() and lost["unjudged"] == 1.0 and lost["score"] == 0.0 and math.isnan(lost["answer"])
    )
    with pytest.raises(RewardFailure, match=r"verl cannot mask"):
        to_verl(build(SPEC))("vqa", "fail", "x", {"kind": "open"})


def test_openrlhf_finds_the_completion_and_the_label():
    torch = pytest.importorskip("torch")
    reward_func = to_openrlhf(build(SPEC))
    prompt = "<|im_start|>user\n<|image_pad|>Which one?<|im_end|>\n<|im_start|>assistant\n"
    grown = prompt.replace("<|image_pad|>", "<|image_pad|>" * 40)
    label = '{"answer": "x", "kind": "open"}'
    result = reward_func([prompt + "x", grown + "y"], [prompt, prompt], [label, label])
    assert torch.equal(result["rewards"], torch.tensor([1.0, 0.0])) and torch.equal(result["scores"], result["rewards"])
    assert result["extra_logs"]["answer"].tolist() == [1.0, 0.0]
    assert to_openrlhf(Exact())(["q x"], ["q "], ["x"])["rewards"].tolist() == [1.0]
    with pytest.raises(ValueError, match="does not occur in the query"):
        reward_func(["something else"], [prompt], [label])
    with pytest.raises(RewardFailure, match="OpenRLHF cannot mask"):
        reward_func([prompt + "fail"], [prompt], [label])


def test_a_short_prompt_is_not_found_by_a_piece_of_it():
    with pytest.raises(ValueError, match="does not occur"):
        to_openrlhf(Exact())(["the answer is x"], ["is it?"], ["x"])


def test_verifiers_scores_a_trace_and_fails_the_unjudged():
    vf = pytest.importorskip("verifiers.v1")

    class Data(vf.TaskData):
        answer: str
        kind: str = "open"

    class Vqa(vf.Task[Data]):
        medical = vf.reward(to_verifiers(build(SPEC)))

    def scored(reply):
        data = Data(prompt="Which one?", answer="x")
        task = Vqa(data)
        trace = vf.Trace(
            task=vf.TraceTask(type="Vqa", data=data), agent=vf.AgentInfo.model_construct(), root_reply=reply
        )
        asyncio.run(task.score(trace))
        return trace

    trace = scored("x")
    assert trace.reward == 1.0 and trace.metrics["answer"] == 1.0
    assert scored("wrong and long").reward == 0.0
    with pytest.raises(Exception, match="cannot mask"):
        scored("fail")


def test_from_trl_reads_columns_scales_and_masks():
    def length(prompts, completions, solution, modality, **columns):
        assert prompts[0][0]["role"] == "user" and columns["kind"] == ["open", "open", ""]
        return [None if s is None else len(c[0]["content"]) for c, s in zip(completions, solution, strict=True)]

    reward = from_trl(length, gold="solution", low=0, high=4)
    samples = [
        RewardInput("ab", gold="x", kind="open", meta={"modality": "CT"}),
        RewardInput("abcd", gold=None, kind="open"),
        RewardInput("abcd", gold="x"),
    ]
    results = reward.score_batch(samples)
    assert [r.value for r in results] == [0.5, None, 1.0] and results[1].status == "gold_invalid"
    assert reward.name == "length"
    with pytest.raises(ValueError, match="outside of its range"):
        from_trl(lambda completions, **_: [2.0]).score(samples[0])
    with pytest.raises(ValueError, match="completion_ids"):
        from_trl(lambda completion_ids, **_: [0.0])


def test_from_trl_runs_async_functions():
    async def half(completions, **_):
        await asyncio.sleep(0)
        return [0.5] * len(completions)

    assert from_trl(half).score(RewardInput("x", gold="x")).value == 0.5


class Trouble(Exact):
    """Exact, but some words make it hang in C code (one where no signal is seen) or allocate without end."""

    def score(self, sample):
        if "hang" in sample.completion:
            deque(itertools.repeat(0), maxlen=0)
        if "regex" in sample.completion:
            re.fullmatch(r"(a+)+b", "a" * 40)
        if "hog" in sample.completion:
            bytearray(64 << 30)
        return super().score(sample)


def tiny_policy(words):
    """A random one-layer model over whitespace-separated words, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *words]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    return model, tokenizer


def grpo(tmp_path, reward, words, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = tiny_policy(words)
    row = {"prompt": "which ?", "answer": "x", "kind": "open", "options": None}
    shared = {
        "output_dir": str(tmp_path), "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "seed": 0, "bf16": False,
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**shared, **options),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([row] * 64),
    )
    trainer.train()
    return trainer.state.log_history


@pytest.mark.slow
def test_trl_trains_on_these_rewards(tmp_path):
    """GRPO on a tiny random model: the reward rises, its parts are logged, an unjudged sample is masked."""
    pytest.importorskip("trl")
    reward = to_trl(Executor(SPEC, max_failed_share=1.0), eos_token_ids=[1])
    history = grpo(
        tmp_path, reward, ["which", "?", "x", "y", "z", "fail", "so"],
        per_device_train_batch_size=16, num_generations=8, max_completion_length=3, max_steps=25, learning_rate=0.02,
    )  # fmt: skip
    logs = [entry for entry in history if "rewards/compose/mean" in entry]
    assert len(logs) == 25
    early = sum(entry["reward"] for entry in logs[:5]) / 5
    late = sum(entry["reward"] for entry in logs[-5:]) / 5
    assert late > early + 0.2
    assert max(entry["compose/unjudged"] for entry in logs) > 0
    assert all(0 <= entry["compose/short"] <= 1 for entry in logs)
    assert all(math.isfinite(entry["loss"]) for entry in logs)


@pytest.mark.slow
def test_a_training_run_outlives_rewards_that_raise_hang_and_hog(tmp_path):
    pytest.importorskip("trl")
    said: list[str] = []
    with Executor(f"{HERE}:Trouble", mode="isolated", timeout_s=0.3, memory_mb=2048, max_failed_share=1.0) as executor:
        function = to_trl(executor)

        def recorded(prompts, completions, **columns):
            said.extend(completions)
            return function(prompts, completions, **columns)

        history = grpo(
            tmp_path, recorded, ["which", "?", "x", "fail", "hang", "regex", "hog"],
            per_device_train_batch_size=8, num_generations=8, max_completion_length=1, max_steps=8, learning_rate=1e-4,
        )  # fmt: skip
        counts, masked = executor.budget.counts, executor.budget.masked
    words = Counter(word for text in said for word in text.split())
    assert len(said) == 64 and sum(1 for entry in history if "loss" in entry) == 8
    assert all(words[word] for word in ("hang", "regex", "hog", "fail", "x")), words
    stuck = words["hang"] + words["regex"]
    assert counts["timeout"] == stuck
    assert counts["error"] == words["hog"] + words["fail"]
    assert masked == stuck + words["hog"] + words["fail"]
    assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)


@pytest.fixture
def judged(tmp_path):
    """A judge behind the rule for words, over HTTP; it pays whatever ends with "clot" and fails on "stall"."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from noisy_judge import serving, texts_of

    def say(body):
        text = texts_of(body)[2]
        return 400 if "stall" in text else json.dumps({"same": text.endswith("clot")})

    with serving(say) as url:
        args = {"url": url, "model": "m", "cache": str(tmp_path / "judge.sqlite"), "retries": 0}
        yield build({"class": "JudgeReward", "args": args, "behind": "OpenAnswer"})


def test_a_judge_travels_to_every_trainer(judged):
    texts = ["<answer>embolism</answer>", "<answer>a clot</answer>", "<answer>mass</answer>", "<answer>stall</answer>"]
    columns = {"answer": ["embolism"] * 4, "kind": ["open"] * 4}
    function = pickle.loads(pickle.dumps(to_trl(judged)))
    logged = {}
    got = function(
        prompts=["What?"] * 4, completions=[chat(t) for t in texts], log_metric=logged.__setitem__, **columns
    )
    assert got == [1.0, 1.0, 0.0, None] and logged["behind/unjudged"] == 0.25
    compute = to_verl(judged)
    assert [compute("d", t, "embolism", {"kind": "open", "question": "What?"})["score"] for t in texts[:3]] == got[:3]
    with pytest.raises(RewardFailure, match="HTTP 400"):
        compute("d", texts[3], "embolism", {"kind": "open", "question": "What?"})
    label = json.dumps({"answer": "embolism", "kind": "open"})
    found = to_openrlhf(judged, unjudged=0.5)([f"What?{t}" for t in texts], ["What?"] * 4, [label] * 4)
    assert found["rewards"].tolist() == [1.0, 1.0, 0.0, 0.5]
    data = SimpleNamespace(model_dump=lambda: {"answer": "embolism", "kind": "open"}, prompt_text="What?")
    metrics = {}
    trace = SimpleNamespace(last_reply=texts[1], is_truncated=False, record_metrics=metrics.update)
    assert asyncio.run(to_verifiers(judged)(SimpleNamespace(data=data), trace)) == 1.0 and metrics["asked"] == 1.0
