"""One evaluation: load, ask, grade, judge, score, write. `answer` and `grade_rows` are also the trainer's.

A run folder holds one folder a benchmark:
answers.jsonl judge.jsonl   raw replies as they arrived; a killed run goes on from them
results.jsonl               one graded row a question and condition, in the benchmark's order
scores.json provenance.json the scores, and what they depend on
and beside them summary.json table.md table.html table.tex.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lingshu_rl.eval.benchmarks import Benchmark, EvalError, prompt_hash
from lingshu_rl.eval.controls import CONSTANT_CONTROLS, CONTROLS, ENGINE_CONTROLS, suits
from lingshu_rl.eval.engines import (
    ChatClient,
    Engine,
    FileEngine,
    Reply,
    kind_of,
    serve,
    takes_images,
)
from lingshu_rl.eval.journal import Journal
from lingshu_rl.eval.judge import (
    OPEN_VERSION,
    RUBRIC_VERSION,
    JudgeSettings,
    apply_open,
    apply_rubric,
    ask_judge,
    client_of,
    estimate,
    open_calls,
    rubric_calls,
)
from lingshu_rl.eval.loading import Loaded, load_benchmark
from lingshu_rl.eval.metrics import choose_metrics, report_metrics
from lingshu_rl.eval.provenance import differences, environment, model_hash
from lingshu_rl.eval.scoring import MAIN, Row, make_row, reward_input, score, summarise_conditions
from lingshu_rl.eval.tables import percent, write_tables
from lingshu_rl.model.loading import DEMO_MODEL
from lingshu_rl.progress import Progress
from lingshu_rl.rollout.client import VLLM_COUNTER
from lingshu_rl.storage.runfolder import write_text
from lingshu_rl.text import hiding
from lingshu_rl.types import Prompt
from rewards.base import RewardInput, RewardResult
from rewards.chat import JUDGE_KEY_ENV, KEY_ENV
from rewards.compose import DEFAULT_SPEC
from rewards.executor import Executor
from rewards.labels import label_scores

Grade = Callable[[Sequence[RewardInput]], Awaitable[list[RewardResult]]]


@dataclass(frozen=True)
class Settings:
    """What one evaluation is. model: demo | folder | Hub id | URL | outputs.jsonl. data: folder of the benchmarks, None
    = Hub.

    limit: questions a benchmark, 0 = all. prompt: "auto" is each benchmark's own ("short" for the demo model).
    vllm: options of the server that is started for a local model.
    """

    model: str
    benchmarks: tuple[Benchmark, ...]
    out: Path
    data: str | None = None
    limit: int = 0
    controls: tuple[str, ...] = CONTROLS
    prompt: str = "auto"
    images: bool = True
    seed: int = 0
    temperature: float = 0.0
    max_tokens: int = 512
    concurrency: int = 64
    timeout_s: float = 300.0
    served_model: str = ""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    judge: JudgeSettings | None = None
    report_metrics: str = "auto"
    retry_errors: bool = False


async def answer(
    conditions: Mapping[str, Sequence[Prompt]], engine: Engine, journal: Journal, advance: Callable[[], None]
) -> dict[str, list[Reply]]:
    """The replies to every prompt of every condition; what the journal holds is not asked again.

    An error of the engine on one question is that question's Reply. Raises what means that the engine is gone.
    """

    async def one(condition: str, prompt: Prompt) -> Reply:
        reply = journal.get(condition, prompt.id)
        if reply is None:
            reply = await engine.ask(prompt, condition)
            journal.add(condition, prompt.id, reply)
        advance()
        return reply

    names = [(condition, p) for condition, prompts in conditions.items() for p in prompts]
    tasks = [asyncio.ensure_future(one(condition, p)) for condition, p in names]
    try:
        replies = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    out: dict[str, list[Reply]] = {condition: [] for condition in conditions}
    for (condition, _), reply in zip(names, replies, strict=True):
        out[condition].append(reply)
    return out


async def grade_rows(prompts: Sequence[Prompt], replies: Sequence[Reply], grade: Grade) -> list[Row]:
    """Rows of one condition. A rubric is no rule: its rows wait for the judge with value None."""
    ruled = [i for i, (p, r) in enumerate(zip(prompts, replies, strict=True)) if p.kind != "rubric" and not r.error]
    graded = await grade([reward_input(prompts[i], replies[i]) for i in ruled])
    results = dict(zip(ruled, graded, strict=True))
    waiting = RewardResult(None, "error", reason="not judged")
    return [make_row(p, r, results.get(i, waiting)) for i, (p, r) in enumerate(zip(prompts, replies, strict=True))]


def conditions_of(prompts: Sequence[Prompt], controls: Sequence[str]) -> dict[str, list[Prompt]]:
    """What the model is asked: the questions, and each engine control that says something about them."""
    asked = {MAIN: list(prompts)}
    return asked | {c: ENGINE_CONTROLS[c](prompts) for c in controls if c in ENGINE_CONTROLS and suits(c, prompts)}


def constants_of(prompts: Sequence[Prompt], controls: Sequence[str]) -> dict[str, list[Reply]]:
    """The answers of the constant controls, which need no model."""
    chosen = [c for c in controls if c in CONSTANT_CONTROLS and suits(c, prompts)]
    return {c: [Reply(text, "stop") for text in CONSTANT_CONTROLS[c](prompts)] for c in chosen}


async def run_evaluation(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Evaluate a model on the benchmarks; returns what summary.json holds. Everything is loaded before anything
    starts."""
    metrics = choose_metrics(settings.report_metrics)
    check_settings(settings)
    prompt = "short" if settings.prompt == "auto" and settings.model == DEMO_MODEL else settings.prompt
    loaded = {}
    for benchmark in settings.benchmarks:
        progress.say(f"loading {benchmark.name}")
        loaded[benchmark.name] = load_benchmark(
            benchmark, settings.data, limit=settings.limit, prompt=prompt, images=settings.images
        )
    settings = await _named(settings)
    grader = Executor({"route": DEFAULT_SPEC["parts"]["answer"]["route"]}, max_failed_share=1.0)
    try:
        provenance = await _provenance(settings, loaded, prompt)
        journals = {}
        for name in loaded:
            _same_inputs(settings.out / name, provenance[name]["inputs"])
            write_text(settings.out / name / "provenance.json", json.dumps(provenance[name], indent=1))
            journals[name] = Journal(settings.out / name / "answers.jsonl", settings.retry_errors)
        asked = {name: conditions_of(found.prompts, settings.controls) for name, found in loaded.items()}
        rows: dict[str, dict[str, list[Row]]] = {}
        open_questions = sum(
            journals[name].get(c, p.id) is None for name in asked for c, ps in asked[name].items() for p in ps
        )
        with _engine(settings, provenance, open_questions, progress) as make:
            engine = make()
            try:
                for name, found in loaded.items():
                    progress.start(f"{name}", sum(map(len, asked[name].values())))
                    replies = await answer(asked[name], engine, journals[name], progress.advance)
                    progress.stop()
                    replies |= constants_of(found.prompts, settings.controls)
                    rows[name] = {
                        condition: await grade_rows(found.prompts, given, lambda s: _grade(grader, s))
                        for condition, given in replies.items()
                    }
                    found_score = score(rows[name][MAIN])
                    progress.say(f"{name}: {percent(found_score)} on {found_score['n']} questions")
            finally:
                await engine.close()
    finally:
        grader.close()
    judged = await _judge(settings, rows, progress) if settings.judge else {}
    results = {}
    for benchmark in settings.benchmarks:
        name = benchmark.name
        scores = benchmark_scores(benchmark, loaded[name], rows[name], judged.get(name), metrics)
        text = "".join(
            json.dumps({"condition": condition, **row}, default=str) + "\n"
            for condition, found_rows in rows[name].items()
            for row in found_rows
        )
        write_text(settings.out / name / "results.jsonl", text)
        write_text(settings.out / name / "scores.json", json.dumps(scores, indent=1))
        results[name] = scores
    summary = {"model": hiding.shown(settings.model), "benchmarks": results, "provenance": provenance}
    write_text(settings.out / "summary.json", json.dumps(summary, indent=1))
    write_tables(settings.out, summary)
    return summary


def benchmark_scores(
    benchmark: Benchmark,
    loaded: Loaded,
    rows: Mapping[str, Sequence[Row]],
    judged: dict[str, Any] | None,
    metrics: Sequence[str],
) -> dict[str, Any]:
    """What scores.json holds of one benchmark."""
    out = {
        "title": benchmark.title,
        "metric": benchmark.metric,
        "source": loaded.source,
        "expected": benchmark.expected,
        "total": loaded.total,
        "asked": len(loaded.prompts),
        "excluded": [{"row": place, "reason": reason} for place, reason in loaded.excluded],
        "tried": benchmark.tried,
        "note": benchmark.note,
        **summarise_conditions(rows),
    }
    if judged is not None:
        out["judge"] = judged
    if labels := _labels(rows[MAIN]):
        out["labels"] = labels
    if benchmark.metric == "report":
        out["report"] = {c: _report(rows[c], metrics) for c in rows if c in (MAIN, "normal_report")}
    return out


def _labels(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Scores of each label over the rows whose kind is judged as a set of labels; unread answers miss all of theirs."""
    kinds = {r["kind"] for r in rows if any(name.endswith("label_f1") for name in r["components"])}
    return label_scores((r["gold"], r["parsed"] or ()) for r in rows if r["kind"] in kinds and r["value"] is not None)


def _report(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Means of what the rules read, and the word metrics, over the rows that have an answer."""
    answered = [r for r in rows if r["status"] != "engine_error"]
    judged = [r for r in answered if r["value"] is not None]
    means = {
        f"entity_{name}" if name != "contradiction_rate" else name: sum(r["components"].get(name, 0.0) for r in judged)
        / len(judged)
        for name in ("f1", "precision", "recall", "contradiction_rate")
        if judged
    }
    return {
        "n": len(answered),
        **means,
        **report_metrics([r["gold"] for r in answered], [r["completion"] for r in answered], metrics),
    }


async def _grade(grader: Executor, samples: Sequence[RewardInput]) -> list[RewardResult]:
    return await asyncio.wrap_future(grader.submit(samples, counted=False))


def check_settings(settings: Settings, model_is_there: bool = True) -> None:
    """Raises EvalError for what cannot be asked so. model_is_there: else a local model is not looked at."""
    choose_metrics(settings.report_metrics)
    for control in settings.controls:
        if control not in CONTROLS:
            raise EvalError(f"unknown control {control!r}; there are {', '.join(CONTROLS)}, or none")
    rubrics = [b.name for b in settings.benchmarks if b.metric == "rubric"]
    if rubrics and settings.judge is None:
        raise EvalError(f"{', '.join(rubrics)}: scored by a judge alone; give --judge URL")
    kind = kind_of(settings.model)
    seeing = [b.name for b in settings.benchmarks if b.images]
    local = kind == "local" and model_is_there
    if local and settings.images and seeing and not takes_images(settings.model):
        raise EvalError(
            f"{settings.model} takes no images, but {', '.join(seeing)} has them; leave it out, or ask without "
            "images: --no-images"
        )
    if kind != "local" and settings.vllm:
        raise EvalError("--vllm sets options of a server that is started here; this model is served elsewhere")
    if kind == "file" and model_is_there and not Path(settings.model).is_file():
        raise EvalError(f"{settings.model}: no such file of outputs")


async def _named(settings: Settings) -> Settings:
    """With the name of the model that a URL serves."""
    if kind_of(settings.model) != "url" or settings.served_model:
        return settings
    client = ChatClient(settings.model, token=os.environ.get(KEY_ENV, ""), sampling={})
    try:
        return replace(settings, served_model=await client.served_model())
    finally:
        await client.close()


async def _provenance(settings: Settings, loaded: Mapping[str, Loaded], prompt: str) -> dict[str, dict[str, Any]]:
    kind = kind_of(settings.model)
    around = environment()
    engine: dict[str, Any] = {"kind": kind}
    if kind == "local":
        engine |= {"options": dict(settings.vllm)} | {
            p: around["versions"].get(p, "") for p in ("vllm", "torch", "transformers")
        }
        known = model_hash(settings.model)
    elif kind == "file":
        import hashlib

        known = hashlib.sha256(Path(settings.model).read_bytes()).hexdigest()[:16]
    else:
        known = ""
    out = {}
    for benchmark in settings.benchmarks:
        found = loaded[benchmark.name]
        own = prompt if prompt != "auto" else benchmark.prompt
        inputs = {
            "benchmark": benchmark.name,
            "source": found.source,
            "data_hash": found.data_hash,
            "questions": len(found.prompts),
            "limit": settings.limit,
            "images": settings.images,
            "prompt": own,
            "prompt_hash": prompt_hash(own),
            "model": settings.served_model if kind == "url" else settings.model,
            "model_hash": known or "not known: served elsewhere",
            "engine": engine,
            "seed": settings.seed,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        judge = settings.judge
        out[benchmark.name] = {
            "inputs": inputs,
            "controls": list(settings.controls),
            "url": hiding.shown(settings.model) if kind == "url" else "",
            "judge": {"url": hiding.shown(judge.url), "model": judge.model} if judge else None,
            **around,
        }
    return out


def _same_inputs(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to mix answers: a folder goes on only with the inputs it was begun with."""
    file = folder / "provenance.json"
    if not file.exists():
        return
    changed = differences(json.loads(file.read_text())["inputs"], json.loads(json.dumps(inputs)))
    if changed:
        raise EvalError(
            f"{folder} holds answers of another evaluation ({'; '.join(changed[:4])}); give another --out, or remove it"
        )


@contextlib.contextmanager
def _engine(
    settings: Settings, provenance: Mapping[str, Any], open_questions: int, progress: Progress
) -> Iterator[Callable[[], Engine]]:
    """Makes the engine; a server is started only when a question is left to ask."""
    kind = kind_of(settings.model)
    if kind == "file":
        yield lambda: FileEngine(Path(settings.model))
        return
    sampling = {
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
    }

    common: dict[str, Any] = {"timeout_s": settings.timeout_s, "concurrency": settings.concurrency}

    if kind == "url":
        yield lambda: ChatClient(
            settings.model, model=settings.served_model, token=os.environ.get(KEY_ENV, ""), sampling=sampling, **common
        )
    elif not open_questions:
        yield lambda: ChatClient("http://no-server-was-started.invalid", sampling=sampling, **common)
    else:
        log = settings.out / "vllm.log"
        progress.say(f"starting vLLM for {settings.model}; its log is {log}")
        with serve(settings.model, seed=settings.seed, vllm=settings.vllm, log=log) as (url, token, check):
            progress.say(f"vLLM is ready at {url}; {open_questions} questions to ask")
            # Tags such as <answer> may be special tokens; the graders want to see them.
            shown = sampling | {"skip_special_tokens": False}
            yield lambda: ChatClient(
                url, model="policy", token=token, sampling=shown, on_error=check, counter=VLLM_COUNTER, **common
            )


async def _judge(
    settings: Settings, rows: Mapping[str, Mapping[str, list[Row]]], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Judge the main condition of every benchmark that has open or rubric questions."""
    judge = settings.judge
    assert judge is not None
    calls = {name: [*open_calls(r[MAIN], judge.swapped), *rubric_calls(r[MAIN])] for name, r in rows.items()}
    calls = {
        name: found
        for name, found in calls.items()
        if found or any(r["kind"] in ("open", "rubric") for r in rows[name][MAIN])
    }
    if not calls:
        progress.say("judge: no open question and no rubric among these benchmarks")
        return {}
    progress.say("judge: " + estimate([call for found in calls.values() for call in found], judge.price))
    client = client_of(judge, judge.model, os.environ.get(JUDGE_KEY_ENV, ""))
    out = {}
    try:
        if not judge.model:
            client.model = await client.served_model()
        for name, found in calls.items():
            progress.start(f"judging {name}", len(found))
            main = rows[name][MAIN]
            rubric = any(row["kind"] == "rubric" for row in main)
            apply, version = (apply_rubric, RUBRIC_VERSION) if rubric else (apply_open, OPEN_VERSION)
            file = f"judge-{version}-{client.model.replace('/', '_')}.jsonl"
            journal = Journal(settings.out / name / file, settings.retry_errors)
            replies = await ask_judge(found, client, journal, progress.advance)
            progress.stop()
            out[name] = apply(main, replies, client.model)
    finally:
        progress.stop()
        await client.close()
    return out
