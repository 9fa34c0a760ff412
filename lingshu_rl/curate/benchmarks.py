"""The evaluation kit's benchmarks as rows to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def benchmark_rows(names: str, data: str) -> Iterator[tuple[str, list[dict[str, Any]] | str]]:
    """(name, its rows) for "vqa_rad,slake" or "all"; with "all", the reason instead of rows where the files are
    missing.

    data: the kit's folder of benchmark files; "" reads from the Hub. Raises EvalError for a named benchmark without
    data.
    """
    from lingshu_rl.eval.benchmarks import BENCHMARKS, EvalError, choose
    from lingshu_rl.eval.loading import load_benchmark

    for benchmark in list(BENCHMARKS.values()) if names == "all" else choose(names):
        try:
            loaded = load_benchmark(benchmark, data or None, prompt="")
        except EvalError as error:
            if names != "all":
                raise
            yield benchmark.name, str(error)
            continue
        yield benchmark.name, [_row(prompt) for prompt in loaded.prompts]


def _row(prompt: Any) -> dict[str, Any]:
    """A row of a prompt that was made without an instruction: its text is the question and then a line an option."""
    lines = prompt.text.split("\n")
    question = "\n".join(lines[: len(lines) - len(prompt.options)])
    return {
        "id": prompt.id,
        "images": [picture.source for picture in prompt.images],
        "question": question,
        "options": list(prompt.options),
        "answer": prompt.gold,
        "kind": prompt.kind,
        "meta": dict(prompt.meta),
    }
