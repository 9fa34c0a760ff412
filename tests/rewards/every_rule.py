"""Disable each branch of the rule modules in turn, and name those that no case notices.

    python tests/rewards/every_rule.py [MODULE ...] [--cases FOLDER]

Every `if` (and `x if y else z`) of the modules is compiled as `if _rule(n, test)`. One pass over all cases notes which of
them take which branch; then each branch is disabled and the cases that took it are graded again until one comes out
differently. A branch that only saves time, or guards it, is named in GUARDS by its source.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODULES = (
    "claims",
    "choices",
    "labels",
    "numbers",
    "numeric",
    "numeric_label",
    "open_answers",
    "option",
    "phrases",
    "quantity",
    "questions",
    "rivals",
    "statements",
    "symbolic",
    "units",
    "wording",
    "yesno",
)
CLASSES = {
    "option": "OptionLetter",
    "yesno": "YesNo",
    "open": "OpenAnswer",
    "labels": "LabelSet",
    "numeric": "NumericUnits",
    "identity": "rewards.symbolic:SymbolicIdentity",
}
MOST_CASES = 5000  # graded again for one branch
# Branches that only save time, bound it, or guard what no case file can hold.
GUARDS = frozenset(
    {
        "text.isascii()",
        "reading.firm",
        "kind.decides_beside",
        "' ' in key",
        "phrase in self.options.sure_letters",
        "(plain, candidates, lower) == (answer.rest, answer.candidates, answer.lower)",
        "answer.rest.strip()",
        "token.isascii()",
        "plain.isascii()",
        "not text.isascii()",
        "not may_be_conditional(text) or words().conditional.search(text) is None",
        "len(spans) >= options.longest",
        "not own or not said",
        "not ahead or ahead.isspace()",
        "not ahead.strip()",
        "not text.strip()",
        "not key",
        "index + 1 < len(candidates)",
        "not rest.strip()",
        "shorter == phrase",
        "claim in seen",
        "len(seen) > _MOST_CLAIMS",
        "not text or depth > _DEEPEST",
        "len(plain) > _LONGEST_LINE",
        "_PLAIN_END.fullmatch(named.rest)",
        "len(phrase) > _LONGEST_LINE or _LOWER_LETTER.fullmatch(phrase)",
        "sentence in seen or len(sentence) > _LONGEST_SENTENCE",
        "plain in seen or (index not in edges and len(plain) > _LONGEST_LINE)",
        "options.only_letters",
        "any((text not in lowered for text in options.lowered))",
        "'\\n' not in rest",
        "answer.channel == 'bare'",
        "answer.channel == 'bare' or not any((word in text for word in _VERDICT_HINTS))",
        "word not in said[at + 1:]",
        "not isinstance(gold, Iterable)",
        "isinstance(gold, datetime.date)",
        "'Δ' in text or 'delta' in text",
        "unwrapped == text",
        "run is None",
        "len(text) > MAX_UNIT_LENGTH",
        "start >= len(text)",
        "unit_policy not in UNIT_POLICIES",
        "said.status in ('timeout', 'error')",
        "self._nodes > MAX_NODES",
        "depth > MAX_DEPTH",
        "tree == target",
        "not math.isclose(left, right, rel_tol=1e-07, abs_tol=1e-12)",
        "_worker is None",
        "read not in (PROSE, CLOSED)",
        "not 0 <= wrong_cost <= 10",
    }
)

rules: list[tuple[str, int, str]] = []  # (module, line, source of the test)
taken: set[int] = set()
disabled = -1


def _rule(number: int, value: object) -> object:
    if number == disabled:
        return False
    if value:
        taken.add(number)
    return value


class _Numbered(ast.NodeTransformer):
    def __init__(self, module: str) -> None:
        self.module = module

    def _test(self, node: ast.If | ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        number = len(rules)
        rules.append((self.module, node.lineno, ast.unparse(node.test)))
        node.test = ast.Call(ast.Name("_rule", ast.Load()), [ast.Constant(number), node.test], [])
        return node

    visit_If = visit_IfExp = _test


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data, path, *, _optimize=-1):  # type: ignore[no-untyped-def, override]
        tree = _Numbered(self.name.rsplit(".", 1)[-1]).visit(ast.parse(data))
        return compile(ast.fix_missing_locations(tree), path, "exec")

    def get_code(self, fullname):  # type: ignore[no-untyped-def]
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        module.__dict__["_rule"] = _rule
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, modules: frozenset[str]) -> None:
        self.modules = modules

    def find_spec(self, fullname, path, target=None):  # type: ignore[no-untyped-def]
        if fullname not in self.modules:
            return None
        file = HERE.parents[1] / f"{fullname.replace('.', '/')}.py"
        return importlib.util.spec_from_file_location(fullname, file, loader=_Loader(fullname, str(file)))


def survivors(modules: tuple[str, ...], folder: Path) -> list[str]:
    """Branches that no case notices, as "module:line: source"."""
    global disabled
    sys.meta_path.insert(0, _Finder(frozenset(f"rewards.{name}" for name in modules)))
    for name in modules:
        importlib.import_module(f"rewards.{name}")
    from rewards.compose import build
    from rewards.option import gold_letters

    cases = [
        (build({"class": CLASSES[row["kind"]], "args": row.get("args", {})}), sample_of(row)) for row in rows(folder)
    ]

    def caches() -> list[object]:
        """Those of rows; the tables and patterns without an argument stay."""
        found = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("rewards.")]
        return [
            value
            for module in found
            for value in module.values()
            if getattr(value, "cache_parameters", dict)().get("maxsize")
        ]

    def graded(index: int) -> tuple[object, ...]:
        reward, sample = cases[index]
        try:
            result = reward.score(sample)
            return (
                letters_of(reward, sample),
                result.value,
                repr(result.parsed),
                result.status,
                result.reason,
                reward.check_gold(sample),
            )
        except Exception as error:  # a rule that others build on
            return (type(error).__name__,)

    def letters_of(reward: Any, sample: Any) -> object:
        try:
            return gold_letters(sample) if reward.name == "option" else None
        except ValueError as error:
            return str(error)

    def forget() -> None:
        for cache in memory:
            cache.cache_clear()

    def tables_of(module: str) -> list[Any]:
        values = vars(sys.modules[f"rewards.{module}"]).values()
        return [value for value in values if getattr(value, "cache_parameters", dict)().get("maxsize", 0) is None]

    before: list[tuple[object, ...]] = []
    takers: dict[int, list[int]] = defaultdict(list)
    memory = caches()
    for index in range(len(cases)):
        taken.clear()
        forget()
        before.append(graded(index))
        for number in taken:
            takers[number].append(index)
    found = []
    for number, (module, line, source) in enumerate(rules):
        if source in GUARDS:
            continue
        disabled = number
        forget()
        if any(graded(index) != before[index] for index in takers[number][:MOST_CASES]):
            continue
        # Taken while a table is built, which the first case that needs it does for all.
        if len(takers[number]) == 1 and (tables := tables_of(module)):
            for table in tables:
                table.cache_clear()
            forget()
            is_noticed = any(
                graded(index) != before[index] for index in range(len(cases)) if cases[index][0].name == "numeric"
            )
            for table in tables:
                table.cache_clear()
            if is_noticed:
                continue
        found.append(f"{module}:{line}: {source}")
    disabled = -1
    return found


def rows(folder: Path = HERE) -> Iterator[dict[str, Any]]:
    """All cases: those of each kind, and the edges (labels, cuts, floods, arguments of the rewards)."""
    for kind in ("option", "yesno", "open", "labels", "numeric", "edges"):
        for line in (folder / f"cases_{kind}.jsonl").read_text(encoding="utf-8").splitlines():
            yield {"kind": kind, **json.loads(line)}


def sample_of(row: Mapping[str, Any]) -> Any:
    from rewards.base import RewardInput

    meta = dict(row.get("meta") or {}) | ({"multi": True} if row.get("multi") else {})
    given = {"unit": row.get("gold_unit"), "kind": row.get("gold_kind")}
    given |= {key: row.get(key) for key in ("tolerance", "analyte", "unit_policy")}
    return RewardInput(
        row["output"],
        row["gold"],
        tuple(row.get("options") or ()),
        row.get("question", ""),
        truncated=row.get("truncated", False),
        meta=meta | {key: value for key, value in given.items() if value is not None},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--cases", type=Path, default=HERE, help="folder with the cases_*.jsonl")
    given = parser.parse_args()
    left = survivors(tuple(given.modules), given.cases)
    for rule in left:
        print(rule)
    print(f"{len(left)} of {len(rules)} branches are noticed by no case", file=sys.stderr)
