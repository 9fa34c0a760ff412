"""The code's shape: what a reader meets. Each list of exceptions may only get shorter."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("lingshu_rl", "rewards") for path in (ROOT / package).rglob("*.py"))
LONGEST_LINE, LONGEST_FUNCTION, MOST_BRANCHES = 120, 60, 15  # branches: McCabe's complexity as ruff counts it
LONG_FUNCTIONS = {
    "lingshu_rl/cli.py parsed",
    "lingshu_rl/eval/runner.py run_evaluation",
    "lingshu_rl/losses.py policy_loss",
    "lingshu_rl/model/packing.py _row",
    "lingshu_rl/reference/server.py build_app",
    "lingshu_rl/run.py _connect",
    "lingshu_rl/run.py _open",
}
BRANCHED = {"lingshu_rl/reference/server.py build_app", "lingshu_rl/run.py _open", "lingshu_rl/sweep/words.py words"}
SHARE_OVER_10 = 0.01  # of all functions


def name(path):
    return path.relative_to(ROOT).as_posix()


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name(path)} {node.name}", node.end_lineno - node.lineno + 1


def branched(most):
    """The functions over a complexity, by file and name."""
    command = "-m ruff check --isolated --select C901 --output-format json lingshu_rl rewards --config".split()
    limit = f"lint.mccabe.max-complexity={most}"
    done = subprocess.run([sys.executable, *command, limit], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return {f"{name(Path(one['filename']))} {one['message'].split('`')[1]}" for one in found}


@pytest.mark.parametrize("package", ["lingshu_rl", "rewards"])
def test_no_line_is_over_the_width_and_the_formatter_has_seen_all(package):
    lines = [(f"{name(p)}:{n}", line) for p in FILES for n, line in enumerate(p.read_text().split("\n"), 1)]
    own = [(place, line) for place, line in lines if place.startswith(package)]
    assert [place for place, line in own if len(line) > LONGEST_LINE] == []
    assert [place for place, line in own if "fmt: skip" in line or "fmt: off" in line] == []


def test_functions_are_short():
    assert {one for one, length in functions() if length > LONGEST_FUNCTION} == LONG_FUNCTIONS


def test_functions_have_few_branches():
    assert branched(MOST_BRANCHES) == BRANCHED
    assert len(branched(10)) / len(list(functions())) < SHARE_OVER_10
