"""Two evaluations of the same questions, benchmark by benchmark: difference, interval, test, corrected for many
tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from lingshu_rl.eval.benchmarks import EvalError
from lingshu_rl.eval.engines import outputs_of
from lingshu_rl.eval.provenance import differences
from lingshu_rl.eval.scoring import MAIN
from lingshu_rl.eval.stats import holm, mean_ci, paired_gain
from lingshu_rl.eval.tables import Cells, html_page, latex, markdown, percent, text

Row = dict[str, Any]
FLIPS = 10_000
# What makes two scores of one benchmark two different measurements.
SAME = ("data_hash", "prompt_hash", "images", "max_tokens", "temperature")
LEGEND = (
    "Difference in points, second minus first, over the questions that both answered; interval: paired bootstrap "
    "over images. p: exact McNemar test, or a sign-flip test over whole images where questions share one or scores "
    "are not right or wrong; in brackets corrected by Holm's method for all benchmarks of the table."
)


def compare(one: Path, two: Path) -> dict[str, Any]:
    """{"runs", "benchmarks": {name: ...}, "warnings"}. Raises EvalError when the runs share no benchmark."""
    first, second = read_run(one), read_run(two)
    shared = [name for name in first if name in second]
    if not shared:
        raise EvalError(f"{one} ({', '.join(first)}) and {two} ({', '.join(second)}) share no benchmark")
    warnings = [
        f"{name} is only in {where}"
        for found, other, where in ((first, second, one), (second, first, two))
        for name in found
        if name not in other
    ]
    results = {}
    for name in shared:
        results[name] = compare_rows(first[name], second[name])
        if alone := results[name]["only_in_one"]:
            warnings.append(f"{name}: {alone} questions are in one of the runs only and were left out")
        warnings += [f"{name}: {line}" for line in _measured_differently(one / name, two / name)]
    for result, p in zip(results.values(), holm([r["p"] for r in results.values()]), strict=True):
        result["p_holm"] = p
    return {"runs": [str(one), str(two)], "benchmarks": results, "warnings": warnings}


def compare_rows(first: Sequence[Row], second: Sequence[Row]) -> dict[str, Any]:
    """Rows paired by id; a pair with a value that is None is left out and counted."""
    old = {row["id"]: row for row in first}
    pairs = [(old[row["id"]], row) for row in second if row["id"] in old]
    if not pairs:
        raise EvalError("the two runs share no question of a benchmark: their ids differ")
    before, after = [a["value"] for a, _ in pairs], [b["value"] for _, b in pairs]
    images = [b.get("image") for _, b in pairs]
    judged = [(a, b, i) for a, b, i in zip(before, after, images, strict=True) if a is not None and b is not None]
    p, test = paired_p([a for a, _, _ in judged], [b for _, b, _ in judged], [i for _, _, i in judged])
    return {
        "first": mean_ci([a for a, _, _ in judged], [i for _, _, i in judged]),
        "second": mean_ci([b for _, b, _ in judged], [i for _, _, i in judged]),
        "difference": paired_gain(before, after, images),
        "p": p,
        "test": test,
        "only_in_one": len(first) + len(second) - 2 * len(pairs),
    }


def paired_p(before: Sequence[float], after: Sequence[float], clusters: Sequence[Any]) -> tuple[float, str]:
    """p of "no difference" and the name of the test. Exact McNemar for right or wrong answers without shared images."""
    names = [c for c in clusters if c]
    if len(set(names)) == len(names) and set(before) | set(after) <= {0.0, 1.0}:
        gained = sum(a < b for a, b in zip(before, after, strict=True))
        lost = sum(a > b for a, b in zip(before, after, strict=True))
        return mcnemar(gained, lost), "exact McNemar"
    return sign_flip(np.array(after) - np.array(before), clusters), "sign flips by image"


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of `gained` against `lost` discordant pairs under a fair coin (McNemar 1947)."""
    n = gained + lost
    tail = sum(comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip(differences: np.ndarray, clusters: Sequence[Any], seed: int = 0) -> float:
    """Two-sided p by flipping the signs of whole clusters' differences (10,000 flips, the observed one counted in)."""
    sums: dict[Any, float] = {}
    for i, (d, c) in enumerate(zip(differences, clusters, strict=True)):
        key = c or ("alone", i)
        sums[key] = sums.get(key, 0.0) + float(d)
    values = np.array([s for s in sums.values() if s != 0.0])
    if not len(values):
        return 1.0
    rng = np.random.default_rng(seed)
    observed = abs(values.sum()) - 1e-9
    hits = 0
    for start in range(0, FLIPS, 500):
        signs = rng.choice((-1.0, 1.0), size=(min(500, FLIPS - start), len(values)))
        hits += int((np.abs(signs @ values) >= observed).sum())
    return (hits + 1) / (FLIPS + 1)


def read_run(path: Path) -> dict[str, list[Row]]:
    """Main rows by benchmark: of an evaluation's folder, one benchmark's folder, a training run, or a file of rows."""
    if path.is_file():
        return {path.stem: _rows(path)}
    found = {file.parent.name: _rows(file) for file in sorted(path.glob("*/results.jsonl"))}
    if not found and (path / "results.jsonl").is_file():
        found = {path.name: _rows(path / "results.jsonl")}
    if not found and (path / "eval" / "after.jsonl").is_file():
        found = {"held_out": _rows(path / "eval" / "after.jsonl")}
    if not found:
        raise EvalError(
            f"{path} holds no finished evaluation (no BENCHMARK/results.jsonl, no eval/after.jsonl); give the --out "
            "folder of `lingshu-rl eval`, the folder of a training run, or a file of graded rows"
        )
    return found


def _rows(path: Path) -> list[Row]:
    rows = []
    for place, row in outputs_of(path):
        if not {"id", "value"} <= row.keys():
            raise EvalError(f"{place}: not a graded row (id, value)")
        if row.get("condition", MAIN) == MAIN:
            rows.append({"id": row["id"], "value": row["value"], "image": row.get("image", "")})
    return rows


def _measured_differently(one: Path, two: Path) -> list[str]:
    files = [folder / "provenance.json" for folder in (one, two)]
    if not all(f.is_file() for f in files):
        return []
    a, b = (json.loads(f.read_text()) for f in files)
    changed = differences({k: a["inputs"].get(k) for k in SAME}, {k: b["inputs"].get(k) for k in SAME})
    return changed + ([f"grader: {a['grader']} -> {b['grader']}"] if a["grader"] != b["grader"] else [])


def cells(result: Mapping[str, Any]) -> Cells:
    lines = [["benchmark", "n", "first", "second", "difference", "p (Holm)", "test"]]
    for name, r in result["benchmarks"].items():
        gain = r["difference"]
        points = (
            "–" if gain["points"] is None else f"{gain['points']:+.1f} [{gain['ci95'][0]:+.1f}, {gain['ci95'][1]:+.1f}]"
        )
        lines.append(
            [
                name,
                str(gain["n"]),
                percent(r["first"]),
                percent(r["second"]),
                points,
                f"{_p(r['p'])} ({_p(r['p_holm'])})",
                r["test"],
            ]
        )
    return lines


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def render(result: Mapping[str, Any], form: str) -> str:
    """form: text | markdown | html | latex | json."""
    if form == "json":
        return json.dumps(result, indent=1) + "\n"
    table, title = cells(result), f"{result['runs'][0]} (first) and {result['runs'][1]} (second)"
    if form == "html":
        return html_page(title, [table], LEGEND + "".join(f" Note: {w}." for w in result["warnings"]))
    if form == "latex":
        return latex(table, title)
    body = markdown(table) if form == "markdown" else text(table) + "\n"
    notes = "".join(f"note: {w}\n" for w in result["warnings"])
    return f"{title}\n\n{body}\n{LEGEND}\n{notes}"
