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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODULES = (
    "analytes",
    "claims",
    "choices",
    "dates",
    "labels",
    "numbers",
    "numeric",
    "numeric_label",
    "open_answers",
    "option",
    "phrases",
    "quantity",
    "questions",
    "reading",
    "statements",
    "symbolic",
    "tokens",
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
        "character == ' '",
        "verdict",
        "not denied and (not any((self._plain(word) in self.asked for word in self._words(sentence))))",
        "len(self._known) >= _MOST_KNOWN",
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
        "not answer.candidates or not answer.rest.strip()",
        "not withdrawn",
        "not ended or stances().takes_back.search(ended) is None",
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
        "_VERDICT_HINT.search(text) is None",
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


def instrument(names: Iterable[str]) -> None:
    """Import these modules with numbered branches; none of them may be imported yet."""
    sys.meta_path.insert(0, _Finder(frozenset(names)))
    for name in names:
        importlib.import_module(name)


def row_caches() -> list[Any]:
    """The caches of the rewards that hold what was read of a row; the tables and patterns without an argument stay."""
    found = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("rewards.")]
    return [
        value
        for module in found
        for value in module.values()
        if getattr(value, "cache_parameters", dict)().get("maxsize")
    ]


def tables_of(module: str) -> list[Any]:
    """The caches without a bound of a module of the rewards: its tables and patterns."""
    found = [
        vars(loaded)
        for name, loaded in sys.modules.items()
        if name in (f"rewards.{module}", f"rewards.report.{module}")
    ]
    values = [value for values in found for value in values.values()]
    return [value for value in values if getattr(value, "cache_parameters", dict)().get("maxsize", 0) is None]


def unnoticed(
    cases: Sequence[Callable[[], object]], forget: Callable[[], object], guards: frozenset[str], modules: frozenset[str]
) -> list[str]:
    """Branches of these modules whose loss changes the result of no case, as "module:line: source".

    `forget` empties the caches. A case that raises has its error's type as its result.
    """
    global disabled

    def result(case: Callable[[], object]) -> object:
        try:
            return case()
        except Exception as error:  # a rule that others build on
            return type(error).__name__

    def is_noticed(indexes: Iterable[int]) -> bool:
        return any(result(cases[index]) != before[index] for index in indexes)

    before: list[object] = []
    takers: dict[int, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        taken.clear()
        forget()
        before.append(result(case))
        for number in taken:
            takers[number].append(index)
    found = []
    for number, (module, line, source) in enumerate(rules):
        if source in guards or module not in modules:
            continue
        disabled = number
        forget()
        if is_noticed(takers[number][:MOST_CASES]):
            continue
        # Taken while a table is built, which the first case that needs it does for all.
        tables = tables_of(module) if len(takers[number]) == 1 else []
        for table in tables:
            table.cache_clear()
        forget()
        if not tables or not is_noticed(range(len(cases))):
            found.append(f"{module}:{line}: {source}")
        for table in tables:
            table.cache_clear()
    disabled = -1
    forget()
    return found


def survivors(modules: tuple[str, ...], folder: Path) -> list[str]:
    """Branches of the short answers' modules that no case notices, as "module:line: source"."""
    instrument([f"rewards.{name}" for name in modules])
    from rewards.compose import build
    from rewards.option import gold_letters

    def case(row: Mapping[str, Any]) -> Callable[[], object]:
        reward = build({"class": CLASSES[row["kind"]], "args": row.get("args", {})})
        sample = sample_of(row)

        def letters() -> object:
            try:
                return gold_letters(sample) if reward.name == "option" else None
            except ValueError as error:
                return str(error)

        def graded() -> object:
            result = reward.score(sample)
            gold = reward.check_gold(sample)
            return letters(), result.value, repr(result.parsed), result.status, result.reason, gold

        return graded

    cases = [case(row) for row in rows(folder)]
    memory = row_caches()
    return unnoticed(cases, lambda: [cache.cache_clear() for cache in memory], GUARDS, frozenset(modules))


def rows(folder: Path = HERE) -> Iterator[dict[str, Any]]:
    """All cases: those of each kind, the edges (labels, cuts, floods, arguments), and sentences as answers."""
    for kind in ("option", "yesno", "open", "labels", "numeric", "edges"):
        for line in (folder / f"cases_{kind}.jsonl").read_text(encoding="utf-8").splitlines():
            yield {"kind": kind, **json.loads(line)}
    for line in (folder / "cases_sentences.jsonl").read_text(encoding="utf-8").splitlines():
        yield {"kind": "yesno", "gold": "yes", **json.loads(line)}


def sample_of(row: Mapping[str, Any]) -> Any:
    from rewards.base import RewardInput

    meta = dict(row.get("meta") or {}) | ({"multi": True} if row.get("multi") else {})
    given = {"unit": row.get("gold_unit"), "kind": row.get("gold_kind")}
    given |= {key: row.get(key) for key in ("tolerance", "analyte", "unit_policy")}
    return RewardInput(
        row["output"],
        row["gold"],
        row.get("options") or (),
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
