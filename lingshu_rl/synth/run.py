"""`lingshu-rl synth STEP`: records in, training rows out. Steps with a writer say what they will cost before they
ask."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lingshu_rl.data.sources import Source, sources_of
from lingshu_rl.exits import exit_code
from lingshu_rl.settings import read_words
from lingshu_rl.synth.rows import Dropped, Outcome, Record, SynthError, Tally, image_fault, read_records, write_outcomes
from lingshu_rl.synth.writer import Asker, Estimator, Writer, WriterConfig
from rewards.chat import KEY_ENV, EndpointError

Step = Callable[[Record, Asker], Awaitable[list[Outcome]]]

WRITER_STEPS = {
    "captions": "captions with what doctors look for, by modality; every known fact must survive",
    "instruct": "questions that a writer invents, kept where a second reading gives the same answer",
    "thoughts": "chains of thought for rows with answers, kept where the rewards find the chain's answer right",
}
PLAIN_STEPS = {
    "template": "questions from labels, boxes and masks, right by construction",
    "render": "text questions as pictures",
    "rewrite": "multiple choice to open questions, or back",
}


def run_step(arguments: argparse.Namespace) -> int:
    def work() -> int:
        return int(asyncio.run(arguments.synthesise(arguments)))

    wrong = (SynthError, ValueError)
    return exit_code(work, "synthesis", wrong=wrong, stops=(EndpointError,), goes_on="with the replies it has")


def add_steps(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make training rows. Every step writes OUT, OUT.dropped.jsonl and OUT.summary.json."
    steps = parser.add_subparsers(dest="step", required=True)
    for name, help_text in WRITER_STEPS.items():
        step = steps.add_parser(name, help=help_text)
        _records(step)
        _out(step)
        step.add_argument("--url", required=True, help="an OpenAI-compatible endpoint, up to and with /v1")
        step.add_argument("--model", required=True, help="the model's name at that endpoint")
        step.add_argument("--cache", type=Path, help="folder of replies (default: OUT.requests)")
        step.add_argument("--estimate", action="store_true", help="say what it will cost, then stop")
        step.add_argument("--concurrency", type=int, default=32, help="requests under way at once")
        step.add_argument("--retries", type=int, default=5)
        step.add_argument("--timeout-s", type=float, default=300.0, help="limit of one request")
        step.add_argument("--temperature", type=float, default=0.7)
        step.add_argument("--max-tokens", type=int, default=1024, help="limit of one reply")
        step.add_argument("--key-env", default=KEY_ENV, help="environment variable with the key, if one is needed")
        step.add_argument("--price-in", type=float, default=0.0, help="of a million input tokens, for the estimate")
        step.add_argument("--price-out", type=float, default=0.0, help="of a million output tokens")
        step.add_argument("--limit", type=int, default=0, help="only the first N records")
        if name != "captions":
            step.add_argument("--rewards", type=Path, help="YAML with a rewards spec (default: by the row's kind)")
            step.add_argument("--least", type=float, default=1.0, help="lowest reward that counts as right")
        if name == "thoughts":
            step.add_argument("--samples", type=int, default=1, help="replies tried for a row until one is right")
        if name == "instruct":
            step.add_argument("--count", type=int, default=3, help="questions asked for each record")
        step.set_defaults(synthesise=_written)
    template = steps.add_parser("template", help=PLAIN_STEPS["template"])
    template.add_argument("spec", type=Path, help="YAML with source and questions")
    _out(template)
    template.set_defaults(synthesise=_template)
    render = steps.add_parser("render", help=PLAIN_STEPS["render"])
    _records(render)
    _out(render)
    render.add_argument(
        "--font",
        default="",
        help="TrueType file (default: DejaVu Sans where matplotlib is installed, else Pillow's, ASCII)",
    )
    render.add_argument("--font-size", type=int, default=20, help="pixels")
    render.add_argument("--width", type=int, default=640, help="pixels")
    render.add_argument("--options", choices=["image", "text"], default="image", help="where the options stand")
    render.set_defaults(synthesise=_render)
    rewrite = steps.add_parser("rewrite", help=PLAIN_STEPS["rewrite"])
    _records(rewrite)
    _out(rewrite)
    rewrite.add_argument("--to", choices=["open", "options"], required=True)
    rewrite.add_argument("--count", type=int, default=4, help="options of a question, with --to options")
    rewrite.add_argument("--seed", type=int, default=0)
    rewrite.set_defaults(synthesise=_rewrite)


def _records(step: argparse.ArgumentParser) -> None:
    step.add_argument("records", type=Path, help="JSONL records, or any source of rows")
    step.add_argument("--format", default="", help="a preset by which other people's records are read (docs/data.md)")
    step.add_argument(
        "settings", nargs="*", metavar="key=value", help="further keys of the source: where='q_lang == en'"
    )


def _out(step: argparse.ArgumentParser) -> None:
    step.add_argument("--out", type=Path, required=True, help="JSONL file to write")


def writer_config(arguments: argparse.Namespace) -> WriterConfig:
    return WriterConfig(
        url=arguments.url,
        model=arguments.model,
        cache=arguments.cache or arguments.out.with_suffix(".requests"),
        concurrency=arguments.concurrency,
        retries=arguments.retries,
        timeout_s=arguments.timeout_s,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        key_env=arguments.key_env,
        price_in=arguments.price_in,
        price_out=arguments.price_out,
    )


def check_words(arguments: argparse.Namespace) -> None:
    """What a step's words say, without its records. Raises SynthError, ValueError, EndpointError."""
    if hasattr(arguments, "records"):
        source_of(arguments)
    if arguments.step in WRITER_STEPS:
        writer_config(arguments)
        make_step(arguments)
    elif arguments.step == "template":
        from lingshu_rl.synth.template import read_spec

        read_spec(arguments.spec)


async def _written(arguments: argparse.Namespace) -> int:
    config = writer_config(arguments)
    step = make_step(arguments)
    estimator = Estimator(config)
    async for _ in outcomes(records_of(arguments), step, estimator, config.concurrency):
        pass
    print(estimator, flush=True)
    if arguments.estimate:
        return 0
    async with Writer(config) as writer:
        found = outcomes(records_of(arguments), step, writer, config.concurrency)
        tally = await write_outcomes(reported(found), arguments.out)
        print(f"{writer.sent:,} requests were sent, {writer.from_cache:,} replies came from {config.cache}")
    return told(tally, arguments.out)


def records_of(arguments: argparse.Namespace) -> Iterator[Record]:
    return islice(read_records(source_of(arguments)), getattr(arguments, "limit", 0) or None)


def source_of(arguments: argparse.Namespace) -> Source:
    """Raises ConfigError."""
    told = {"path": str(arguments.records), "format": arguments.format, **read_words(arguments.settings)}
    return sources_of(told, "records")[0]


def make_step(arguments: argparse.Namespace) -> Step:
    if arguments.step == "captions":
        from lingshu_rl.synth.captions import Captions

        return Captions()
    from lingshu_rl.synth.verify import Verifier

    verifier = Verifier(read_rewards(arguments.rewards), arguments.least)
    if arguments.step == "thoughts":
        from lingshu_rl.synth.thoughts import Thoughts

        return Thoughts(verifier, arguments.samples)
    from lingshu_rl.synth.instruct import Instruct

    return Instruct(verifier, arguments.count)


def read_rewards(path: Path | None) -> Any:
    if path is None:
        return None
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SynthError(f"--rewards {path}: {error}") from None


async def outcomes(records: Iterable[Record], step: Step, asker: Asker, concurrency: int) -> AsyncIterator[Outcome]:
    """Outcomes in the records' order; a bounded number of records is under way. The first error stops all."""
    under_way: deque[asyncio.Task[list[Outcome]]] = deque()
    source = iter(records)
    try:
        while True:
            for record in islice(source, 2 * concurrency - len(under_way)):
                under_way.append(asyncio.create_task(_run(step, record, asker)))
            if not under_way:
                return
            for outcome in await under_way.popleft():
                yield outcome
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _run(step: Step, record: Record, asker: Asker) -> list[Outcome]:
    if fault := image_fault(record):
        return [Dropped(str(record["id"]), *fault, record)]
    return await step(record, asker)


async def reported(found: AsyncIterator[Outcome]) -> AsyncIterator[Outcome]:
    """The same outcomes, with a line every few seconds."""
    import time

    from lingshu_rl.progress import Progress
    from lingshu_rl.synth.rows import Kept

    progress, kept, done, said = Progress(quiet=False), 0, 0, time.monotonic()
    async for outcome in found:
        done += 1
        kept += isinstance(outcome, Kept)
        if time.monotonic() - said > 5:
            said = time.monotonic()
            progress.say(f"{done:,} rows, {kept:,} kept")
        yield outcome


async def _template(arguments: argparse.Namespace) -> int:
    from lingshu_rl.synth.template import read_spec, source_records, template_rows

    spec = read_spec(arguments.spec)
    records = source_records(spec["source"], arguments.spec.resolve().parent)
    rows = template_rows(records, spec["questions"], int(spec.get("limit") or 0), int(spec.get("seed") or 0))
    return told(await write_outcomes(rows, arguments.out), arguments.out)


async def _render(arguments: argparse.Namespace) -> int:
    from lingshu_rl.synth.rendering import Page, rendered

    page = Page(arguments.font, arguments.font_size, arguments.width)
    folder = arguments.out.with_suffix(".images")
    rows = rendered(records_of(arguments), folder, page, arguments.options == "image")
    return told(await write_outcomes(rows, arguments.out), arguments.out)


async def _rewrite(arguments: argparse.Namespace) -> int:
    from lingshu_rl.synth.rewrite import to_open, to_options
    from lingshu_rl.synth.verify import Verifier

    records = records_of(arguments)
    if arguments.to == "open":
        rows = to_open(records, Verifier())
    else:
        rows = to_options(records, Verifier(), arguments.count, arguments.seed)
    return told(await write_outcomes(rows, arguments.out), arguments.out)


def told(tally: Tally, out: Path) -> int:
    """A table for people; the same numbers stand in OUT.summary.json."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "rows", title=str(out))
    for kind, count in sorted(tally.kinds.items()):
        table.add_row(f"kept: {kind}", f"{count:,}")
    for reason, count in tally.dropped.most_common():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    Console(soft_wrap=True).print(table)
    if not tally.kept:
        print(f"error: no row was kept; see {out.with_name(f'{out.stem}.dropped.jsonl')}", file=sys.stderr)
        return 1
    return 0
