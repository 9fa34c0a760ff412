"""How often each reward pays wrongly or refuses wrongly, and how fast it is, on hand-written hard cases.

    python benchmarks/rewards.py [--cases DIR] [--out FILE.json]

A false payment is pay for an answer that deserves none (for reports: a worse one that earns as much as a better one); a
false refusal is less than full pay for a right answer (for reports: a wording of the same findings that earns less).
Speed is in processor seconds of one core, so that a busy machine does not change it; what was read of a report or a set
of options is forgotten before every pass, so that no row is answered from memory. math-verify, the usual choice of
other trainers, is measured on the same rows where it is installed, with the answer tags already taken off for it.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# A script's folder comes first on the path, where this file would hide the package of the same name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from rewards.base import Reward, RewardInput  # noqa: E402
from rewards.choices import option_set  # noqa: E402
from rewards.compose import build  # noqa: E402
from rewards.labels import _known  # noqa: E402
from rewards.open_answers import _accept  # noqa: E402
from rewards.option import _choice  # noqa: E402
from rewards.questions import question_of  # noqa: E402
from rewards.report.extract import _read_sentence  # noqa: E402
from rewards.report.score import _read_reference  # noqa: E402

OWN_CASES = Path(__file__).resolve().parent.parent / "tests" / "rewards"
REWARDS = {
    "option": "OptionLetter",
    "numeric": "NumericUnits",
    "report": "ReportEntities",
    "yesno": "YesNo",
    "open": "OpenAnswer",
    "labels": "LabelSet",
}
STRICT, EQUAL, AT_LEAST = "good>bad", "good==bad", "good>=bad"
EQUAL_WITHIN, LEAST_WITHIN = (
    0.1,
    0.05,
)  # how far apart two reports may be that should earn the same, or the worse one be
SHOWN = 20  # ids of wrong cases that are kept
MEASURED_S = 1.0  # processor time that a speed is taken over

Score = Callable[[RewardInput], float | None]


@dataclass(frozen=True)
class Line:
    """One line of the table. rows: cases with a firm verdict; wrong_ids: the cases that went wrong.

    scores_per_s: single scores; a report case is two of them.
    """

    reward: str
    cases: str
    rows: int
    false_payments: int
    false_refusals: int
    scores_per_s: float
    wrong_ids: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """samples: one, or for reports the better and the worse one. expected: 0 or 1, or the relation of the two."""

    id: str
    samples: tuple[RewardInput, ...]
    expected: float | str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=Path, default=OWN_CASES, help="folder with [cases_]option.jsonl and so on")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    lines: list[Line] = []
    for kind, name in REWARDS.items():
        path = next(
            (p for p in (arguments.cases / f"{prefix}{kind}.jsonl" for prefix in ("cases_", "")) if p.is_file()), None
        )
        if path is None:
            continue
        cases = read_cases(path, kind)
        lines.append(measure(name, path.name, cases, _score_with(build(name))))
        if kind in ("option", "numeric") and (other := math_verify_score()):
            lines.append(measure("math-verify", path.name, cases, other))
    if not lines:
        print(f"{arguments.cases}: no case files", file=sys.stderr)
        return 2
    lines.append(measure_format(arguments.cases))
    print(markdown(lines))
    if math_verify_score() is None:
        print("\nmath-verify is not installed; `pip install math-verify` adds its lines.")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(_figures(lines), indent=1) + "\n")
    return 0


def read_cases(path: Path, kind: str) -> list[Case]:
    """Cases with a firm verdict; those marked `policy_dependent` are left out."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [_case(row, kind) for row in rows if not row.get("policy_dependent")]


def _case(row: Mapping[str, Any], kind: str) -> Case:
    if kind == "report":
        pair = tuple(RewardInput(row[side], gold=row["reference"], kind=kind) for side in ("hyp_good", "hyp_bad"))
        return Case(row["id"], pair, row["relation"])
    meta = dict(row.get("meta") or {})
    if kind == "numeric":
        given = {"unit": row.get("gold_unit"), "kind": row.get("gold_kind")}
        given |= {key: row.get(key) for key in ("tolerance", "analyte", "unit_policy")}
        meta |= {key: value for key, value in given.items() if value is not None}
    if row.get("multi"):
        meta["multi"] = True
    sample = RewardInput(
        row["output"],
        gold=row["gold"],
        options=tuple(row.get("options") or ()),
        prompt=row.get("question", ""),
        kind=kind,
        meta=meta,
    )
    return Case(row["id"], (sample,), float(row["expected_reward"]))


def measure(name: str, cases_name: str, cases: Sequence[Case], score: Score) -> Line:
    paid, refused = [], []
    for case in cases:
        values = [score(sample) or 0.0 for sample in case.samples]
        if isinstance(case.expected, str):
            gap = values[0] - values[1]
            if (case.expected == STRICT and gap <= 0) or (case.expected == AT_LEAST and gap < -LEAST_WITHIN):
                paid.append(case.id)
            elif case.expected == EQUAL and abs(gap) > EQUAL_WITHIN:
                refused.append(case.id)
        elif values[0] > case.expected + 1e-9:
            paid.append(case.id)
        elif values[0] < case.expected - 1e-9:
            refused.append(case.id)
    samples = [sample for case in cases for sample in case.samples]
    speed = scores_per_second(score, samples)
    return Line(name, cases_name, len(cases), len(paid), len(refused), speed, (*paid, *refused))


def measure_format(folder: Path) -> Line:
    """Only the speed of the format check: the case files say nothing about formats."""
    texts = [
        row for path in sorted(folder.glob("*option.jsonl")) for row in path.read_text().splitlines() if row.strip()
    ]
    samples = [RewardInput(json.loads(text)["output"], gold=None) for text in texts]
    return Line(
        "ThinkAnswerFormat", "", 0, 0, 0, scores_per_second(_score_with(build("ThinkAnswerFormat")), samples), ()
    )


def scores_per_second(score: Score, samples: Sequence[RewardInput]) -> float:
    """Over whole passes, after one pass to warm up."""
    for sample in samples:
        score(sample)
    count, spent = 0, 0.0
    while spent < MEASURED_S:
        forget()
        began = time.process_time()
        for sample in samples:
            score(sample)
        spent += time.process_time() - began
        count += len(samples)
    return count / spent


def forget() -> None:
    """Empty the caches that hold what rows said; those of tables and compiled patterns stay."""
    for cached in (_read_sentence, _read_reference, option_set, _choice, question_of, _accept, _known):
        cached.cache_clear()


def _score_with(reward: Reward) -> Score:
    return lambda sample: reward.score(sample).value


def math_verify_score() -> Score | None:
    """math-verify on the text in the last pair of answer tags, or on all of it where there are none."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify
    except ImportError:
        return None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    number = [LatexExtractionConfig(), ExprExtractionConfig()]
    letters = [StringExtractionConfig(strings=tuple("ABCDEFGHIJ"))]
    tags = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

    def score(sample: RewardInput) -> float:
        found = tags.findall(sample.completion)
        text = found[-1] if found else sample.completion
        config = letters if sample.kind == "option" else number
        return float(verify(parse(str(sample.gold), config), parse(text, config)))

    return score


def markdown(lines: Sequence[Line]) -> str:
    head = "| reward | cases | rows | false payments | false refusals | scores/s |\n|---|---|--:|--:|--:|--:|"
    rows = []
    for line in lines:
        wrong = (line.rows, line.false_payments, line.false_refusals) if line.rows else ("", "", "")
        rows.append(" | ".join(str(cell) for cell in (line.reward, line.cases, *wrong, f"{line.scores_per_s:,.0f}")))
    return "\n".join([head, *(f"| {row} |" for row in rows)])


def _figures(lines: Sequence[Line]) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "math_verify": _version("math-verify"),
        "lines": [asdict(line) | {"wrong_ids": line.wrong_ids[:SHOWN]} for line in lines],
    }


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
