"""`lingshu-rl eval`: evaluate a model, compare two evaluations, grade other tools' outputs again."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lingshu_rl.eval.benchmarks import BENCHMARKS, PROMPT_NAMES, EvalError, choose
from lingshu_rl.exits import exit_code
from lingshu_rl.storage.folders import own

if TYPE_CHECKING:
    from lingshu_rl.eval.runner import Settings

CONTROL_NAMES = ("blank", "shuffled", "text_only", "majority", "normal_report")


def add_arguments(parser: argparse.ArgumentParser):  # type: ignore[no-untyped-def]
    """The options of a plain evaluation, and its sub-commands; returns what further sub-commands are added to."""
    parser.set_defaults(run=run)
    parser.add_argument("--model", help="demo | folder | Hub id | http://URL of a server | outputs.jsonl")
    parser.add_argument("--benchmarks", help="names joined by commas; --list shows them")
    parser.add_argument("--list", action="store_true", help="show the benchmarks and where their data belong")
    parser.add_argument("--data", help="folder with one folder a benchmark (default: the Hugging Face Hub)")
    parser.add_argument("--limit", type=int, default=0, help="questions a benchmark, drawn by hash (default: all)")
    parser.add_argument("--controls", default="all", help=f"all | none | some of {','.join(CONTROL_NAMES)}")
    parser.add_argument(
        "--prompt", default="auto", help=f"{' | '.join(PROMPT_NAMES)} | own last line of every question"
    )
    parser.add_argument("--no-images", action="store_true", help="ask image questions without their images")
    parser.add_argument("--out", help="run folder (default: runs/eval/MODEL); the same one goes on where it stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer")
    parser.add_argument("--concurrency", type=int, default=64, help="requests under way at once")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="limit of one answer")
    parser.add_argument("--served-model", default="", help="model name to ask a URL for (default: its first)")
    parser.add_argument(
        "--vllm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the vLLM server started here, such as max_model_len=4096",
    )
    parser.add_argument(
        "--report-metrics",
        default="auto",
        help="of report benchmarks: rouge_l,bleu,cider,meteor,labels,ratescore,radgraph,chexbert,green,radcliq",
    )
    parser.add_argument("--retry-errors", action="store_true", help="ask questions again whose answer was an error")
    parser.add_argument(
        "--judge", metavar="URL", help="OpenAI-compatible endpoint that judges open answers and rubrics"
    )
    parser.add_argument("--judge-model", default="", help="its model (default: its first)")
    parser.add_argument("--judge-swapped", type=int, default=50, help="open answers that are judged in both orders")
    parser.add_argument("--judge-timeout-s", type=float, default=60.0)
    parser.add_argument(
        "--judge-price", default="0,0", metavar="IN,OUT", help="price of a million tokens, for the estimate"
    )
    tasks = parser.add_subparsers(dest="task", title="sub-commands", metavar="")
    compare = tasks.add_parser("compare", help="two evaluations of the same questions, tested pair by pair")
    compare.add_argument("runs", nargs=2, metavar="RUN", help="run folder of `lingshu-rl eval`, or of a training run")
    compare.add_argument("--format", choices=["text", "markdown", "html", "latex", "json"], default="text")
    compare.add_argument("--out", help="file to write instead of the terminal")
    compare.set_defaults(run=run_compare)
    rescore = tasks.add_parser("rescore", help="grade stored outputs of MedEvalKit, lmms-eval or plain JSONL again")
    rescore.add_argument("file")
    rescore.add_argument("--kind", help="option | yesno | open | numeric | report, where rows do not say it")
    rescore.add_argument("--out", help="file for the graded rows (default: FILE with .rescored.jsonl)")
    rescore.set_defaults(run=run_rescore)
    return tasks


def run(arguments: argparse.Namespace) -> int:
    from lingshu_rl.failures import ConfigError
    from lingshu_rl.processes.workers import WorkerError
    from rewards.chat import EndpointError

    def work() -> int:
        if arguments.list:
            print(listing())
            return 0
        return _evaluate(arguments)

    return exit_code(work, "the evaluation", wrong=(EvalError, ConfigError), stops=(EndpointError, WorkerError))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Raises EvalError naming the option."""
    from lingshu_rl.eval.runner import Settings

    if not arguments.model or not arguments.benchmarks:
        raise EvalError("give --model and --benchmarks (or --list, compare, rescore)")
    controls = {"all": CONTROL_NAMES, "none": ()}.get(arguments.controls) or tuple(
        c.strip() for c in arguments.controls.split(",") if arguments.controls != "none"
    )
    return Settings(
        model=arguments.model,
        benchmarks=tuple(choose(arguments.benchmarks)),
        out=Path(arguments.out or f"runs/eval/{_folder_name(arguments.model)}"),
        data=arguments.data,
        limit=arguments.limit,
        controls=controls,
        prompt=arguments.prompt,
        images=not arguments.no_images,
        seed=arguments.seed,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        concurrency=arguments.concurrency,
        timeout_s=arguments.timeout_s,
        served_model=arguments.served_model,
        vllm=dict(_option(text) for text in arguments.vllm),
        judge=_judge(arguments),
        report_metrics=arguments.report_metrics,
        retry_errors=arguments.retry_errors,
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from lingshu_rl.eval.runner import run_evaluation
    from lingshu_rl.eval.tables import LEGEND, report_table, score_table, text
    from lingshu_rl.progress import Progress

    settings = settings_of(arguments)
    with own(settings.out, "an evaluation", "--out"):
        summary = asyncio.run(run_evaluation(settings, Progress(quiet=False)))
    print("\n" + text(score_table(summary)))
    if reports := report_table(summary):
        print("\n" + text(reports))
    print(f"\n{LEGEND}")
    for name, scores in summary["benchmarks"].items():
        for line in remarks(name, scores):
            print(line)
    print(f"tables, rows and provenance: {settings.out}")
    return 0


def remarks(name: str, scores: dict) -> list[str]:  # type: ignore[type-arg]
    """What a reader of the score has to know."""
    out = []
    if scores["expected"] and scores["total"] != scores["expected"]:
        out.append(f"{name}: {scores['total']} rows were read, the published set has {scores['expected']}")
    if scores["asked"] < scores["total"] - len(scores["excluded"]):
        out.append(f"{name}: a sample of {scores['asked']} questions")
    if scores["excluded"]:
        first = scores["excluded"][0]
        out.append(f"{name}: {len(scores['excluded'])} rows left out, the first: {first['row']}: {first['reason']}")
    if scores["note"]:
        out.append(f"{name}: {scores['note']}")
    judge = scores.get("judge")
    if judge and "agrees_with_rules" in judge:
        shares = {
            "the rules": judge["agrees_with_rules"],
            "its own verdict in the other order": judge["agrees_when_swapped"],
            "itself asked again": judge["agrees_with_itself"],
        }
        told = ", ".join(f"{who} {100 * s['share']:.0f} % of {s['n']}" for who, s in shares.items() if s["n"])
        out.append(
            f"{name}: the judge {judge['model']} ({judge['prompt']}) agrees with {told or 'nothing: no verdict'}; "
            f"{judge['not_judged']} not judged"
        )
    elif judge:
        out.append(
            f"{name}: the judge {judge['model']} ({judge['prompt']}) left {judge['criteria_not_judged']} of "
            f"{judge['criteria']} criteria without a verdict"
        )
    return out


def listing() -> str:
    from lingshu_rl.eval.tables import text

    cells = [["name", "kind", "rows", "Hub", "under --data DIR", "licence", "loader tried on"]]
    for b in BENCHMARKS.values():
        place = f"{b.folder or b.name}/{next(iter(b.files))}"
        cells.append([b.name, "+".join(b.kinds), str(b.expected or "–"), b.hub or "–", place, b.licence, b.tried])
    return text(cells)


def _folder_name(model: str) -> str:
    name = model.rstrip("/")
    name = name if name.startswith("http") or name.count("/") == 1 else Path(name).name
    return re.sub(r"[^\w.-]+", "_", name)


def _option(words: str) -> tuple[str, object]:
    key, equals, value = words.partition("=")
    if not equals:
        raise EvalError(f"--vllm {words!r} is not of the form key=value, for example max_model_len=4096")
    try:
        return key.replace("-", "_"), json.loads(value)
    except ValueError:
        return key.replace("-", "_"), value


def _judge(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from lingshu_rl.eval.judge import JudgeSettings

    if not arguments.judge:
        return None
    try:
        price = tuple(float(part) for part in arguments.judge_price.split(","))
        assert len(price) == 2
    except (ValueError, AssertionError):
        raise EvalError(f"--judge-price {arguments.judge_price!r}: give two numbers, such as 0.15,0.60") from None
    return JudgeSettings(
        arguments.judge, arguments.judge_model, arguments.judge_swapped, price, arguments.judge_timeout_s
    )


def run_compare(arguments: argparse.Namespace) -> int:
    from lingshu_rl.eval.compare import compare, render

    def work() -> None:
        text = render(compare(Path(arguments.runs[0]), Path(arguments.runs[1])), arguments.format)
        if arguments.out:
            Path(arguments.out).write_text(text, encoding="utf-8")
        else:
            print(text.rstrip())

    return exit_code(work, "the comparison", wrong=(EvalError,))


def run_rescore(arguments: argparse.Namespace) -> int:
    from lingshu_rl.eval.rescore import render, rescore

    def work() -> None:
        print(render(rescore(Path(arguments.file), arguments.kind, Path(arguments.out) if arguments.out else None)))

    return exit_code(work, "grading", wrong=(EvalError,))
