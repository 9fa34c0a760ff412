"""Disable each branch of the report modules in turn, and name those that no case notices.

    python tests/rewards/every_report_rule.py [MODULE ...]

The cases: the pairs of cases_report.jsonl, the texts of cases_reading.tsv, and at the edges (cases_report_edges.jsonl)
packs, label schemes, references, coverage lists and texts whose whole reading counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import every_rule

HERE = Path(__file__).resolve().parent
MODULES = tuple(
    path.stem
    for path in sorted((HERE.parents[1] / "rewards" / "report").glob("*.py"))
    if path.stem not in ("__init__", "entity")
)
COMPILED = ("lexicon",)  # runs while packs are loaded, once for all cases: every case takes its branches
# Branches that only save time or bound it.
GUARDS = frozenset(
    {
        "parsed.too_long",
        "not (marks.heads or marks.states or marks.normals or marks.abnormals or marks.modifiers or marks.organs)",
        "not heads",
        "len(things) > 1",
        "not (things or any((head.side or head.places for head in own)))",
        "lo == 0 and hi == len(self.words)",
        "not cues and (not marks.normals)",
        "'limit' not in marks.words[normal.begin:normal.end]",
        "marks.lexicon.grammar['technique'].isdisjoint(marks.words[cue.end:cue.end + _NEAR])",
        "len(head.spots) < 2",
        "not value",
        "name in packs",
        "not normal",
        "last < 0",
        "s[-1].isalnum()",
        "token[0] not in _SIGNS and len(words) < MAX_SENTENCE",
        "not lexicon.answers or not _hinted(text)",
        "not any((sign in text for sign in ('|', ';', '\\t', '  ')))",
    }
)


def survivors(modules: tuple[str, ...] = MODULES) -> list[str]:
    """Branches that no case notices, as "module:line: source"."""
    every_rule.instrument([f"rewards.report.{name}" for name in MODULES])
    memory = every_rule.row_caches()
    texts = [cache for cache in memory if cache.cache_parameters()["maxsize"] >= 1000]  # not packs and their patterns
    wanted = frozenset(modules)
    found = []
    for compiled, caches in ((False, texts), (True, memory)):
        chosen = frozenset(name for name in wanted if (name in COMPILED) == compiled)
        if chosen:
            cases = list(graders(packs_only=compiled))
            found += every_rule.unnoticed(
                cases, lambda caches=caches: [c.cache_clear() for c in caches], GUARDS, chosen
            )
    return found


def graders(packs_only: bool = False) -> Iterator[Callable[[], object]]:
    for line in (HERE / "cases_report_edges.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if (row["kind"] == "pack") == packs_only:
            yield lambda row=row: edge(row)
    if packs_only:
        return
    for line in (HERE / "cases_report.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in ("hyp_good", "hyp_bad"):
            yield lambda text=row[key], gold=row["reference"]: scored({"completion": text, "gold": gold})
    for line in (HERE / "cases_reading.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        text = line.split("\t")[1].replace("\\n", "\n")
        yield lambda text=text: read({"text": text})


def edge(row: Mapping[str, Any]) -> object:
    """What the library makes of a row at the edges, by its `kind`."""
    return {"pay": scored, "read": read, "labels": labelled, "pack": packed, "scheme": schemed, "coverage": covered}[
        row["kind"]
    ](row)


def scored(row: Mapping[str, Any]) -> object:
    from rewards import RewardInput
    from rewards.report import ReportEntities

    reward = ReportEntities(row.get("packs", ReportEntities().packs))
    sample = RewardInput(row["completion"] * row.get("times", 1), row["gold"], truncated=row.get("truncated", False))
    result = reward.score(sample)
    return result.value, result.status, result.reason, repr(result.parsed), dict(result.components), dict(result.spans)


def read(row: Mapping[str, Any]) -> object:
    from rewards.report import extract, load

    return extract(row["text"], load(tuple(row.get("packs", load().packs))))


def labelled(row: Mapping[str, Any]) -> object:
    from rewards.report import ReportLabels

    try:
        labels = ReportLabels(row["scheme"])
        return labels.names, labels.read(row["text"])
    except FileNotFoundError as error:
        return str(error)


def packed(row: Mapping[str, Any]) -> object:
    """A pack with these parts: what a text says and is paid with it, or what is wrong with it."""
    from rewards.report import extract, load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.json"
        raw = row["raw"] if "raw" in row else json.dumps(row["pack"]).replace("ITSELF", str(path))
        path.write_text(raw, encoding="utf-8")
        packs = (*row.get("packs", ()), str(path))
        try:
            paid = scored({"completion": row["text"], "gold": row["gold"], "packs": packs}) if "gold" in row else None
            return repr(extract(row.get("text", ""), load(packs))), paid
        except (ValueError, FileNotFoundError) as error:
            return str(error).replace(folder, "")


def schemed(row: Mapping[str, Any]) -> object:
    from rewards.report import ReportLabels

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.json"
        path.write_text(json.dumps(row["scheme"]), encoding="utf-8")
        try:
            return ReportLabels(str(path)).read(row["text"])
        except ValueError as error:
            return str(error).replace(folder, "")


def covered(row: Mapping[str, Any]) -> object:
    """What the coverage command prints, or says to a wrong call."""
    import contextlib
    import io

    from rewards.report.coverage import main

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        path = Path(folder) / row["file"]
        path.write_text(row["content"], encoding=row.get("encoding", "utf-8"), newline="")
        with contextlib.redirect_stderr(out):
            kept = [f"--out={folder}/kept.json"] if row.get("out") else []
            code = main([str(path), *row.get("arguments", ()), *kept])
        return code, out.getvalue().replace(folder, ""), (Path(folder) / "kept.json").is_file()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("modules", nargs="*", default=MODULES)
    every_rule.MOST_CASES = 300
    left = survivors(tuple(parser.parse_args().modules))
    for rule in left:
        print(rule)
    print(f"{len(left)} of {len(every_rule.rules)} branches are noticed by no case", file=sys.stderr)
