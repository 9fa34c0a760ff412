"""What must stay true of the packages' borders."""

import ast
import graphlib
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from lingshu_rl.config import Config
from lingshu_rl.data.sources import Source

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "module",
    [
        "lingshu_rl",
        "rewards",
        "lingshu_rl.config",
        "lingshu_rl.planning.given",
        "lingshu_rl.data",
        "lingshu_rl.cli",
        "lingshu_rl.sweep.command",
        "lingshu_rl.report.watch",
    ],
)
def test_importing_loads_no_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_rewards_do_not_import_the_trainer():
    code = "import rewards, rewards.compose, rewards.executor, sys; sys.exit(any(m.startswith('lingshu_rl') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_key_of_a_source_is_dead_or_untried():
    library = "\n".join(p.read_text() for p in (ROOT / "lingshu_rl").rglob("*.py"))
    tests = "\n".join(
        (ROOT / "tests" / f"{name}.py").read_text()
        for name in ("data/test_layouts", "data/test_mixing", "imaging/test_volumes")
    )
    keys = [field.name for field in fields(Source)]
    assert [key for key in keys if not re.search(rf"(source|self|\bs)\.{key}\b", library)] == []
    assert [key for key in keys if f'"{key}"' not in tests and f"{key}=" not in tests] == []


def test_image_files_are_opened_in_one_place():
    """`files.opened_file` knows which formats may be read; whatever else opens a file may start what reads the others."""
    readers = re.compile(r"Image\.open\(|\bimread\(|\bimdecode\(|ImageFile\.Parser|\bopen_image\(|read_image\(")
    own = [ROOT / folder for folder in ("lingshu_rl", "rewards", "recipes")]
    found = [p.relative_to(ROOT).as_posix() for f in own for p in f.rglob("*.py") if readers.search(p.read_text())]
    assert found == ["lingshu_rl/imaging/files.py"]


def leaves(node, prefix=""):
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_no_option_is_dead():
    """Every option's name is read somewhere outside the files that declare it."""
    declared = {"config.py", "objective.py"}
    text = "\n".join(p.read_text() for p in (ROOT / "lingshu_rl").rglob("*.py") if p.name not in declared)
    dead = [key for key in leaves(Config()) if f".{key.rsplit('.', 1)[-1]}" not in text]
    assert dead == []


def test_every_option_is_exercised_by_a_test_or_a_recipe():
    text = "\n".join(p.read_text() for p in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "recipes").rglob("*.*")])
    missing = [key for key in leaves(Config()) if key.rsplit(".", 1)[-1] not in text]
    assert missing == []


def test_imports_run_downwards_only():
    """Between rooms (a folder, or a file beside the folders); what a function imports when it runs is not an arrow."""
    package = ROOT / "lingshu_rl"
    arrows: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lingshu_rl."):
                arrows.setdefault(room, set()).add(node.module.split(".")[1])
    for room, below in arrows.items():
        below.discard(room)
    order = list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle
    assert (
        order.index("types") < order.index("model") < order.index("policy") < order.index("run") < order.index("train")
    )


CIRCLES_LEFT = {  # each through an import inside a function; this list may only get shorter
    # a rehearsal reads a command's words with the command's own parser
    ("lingshu_rl.pipeline.rehearsal", "lingshu_rl.cli"),
}


def imported(path, files):
    """The files of this project that a file imports, also when a function of it runs; not those for types alone."""
    tree = ast.parse(path.read_text())
    typing = {
        id(n)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for n in ast.walk(test)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (names & files.keys()) | ({node.module} & files.keys())
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & files.keys()


def test_files_do_not_import_in_circles_but_for_those_listed():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in ("lingshu_rl", "rewards")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    arrows = {name: set(imported(path, files)) - {name} for name, path in files.items()}
    for importer, other in CIRCLES_LEFT:
        assert other in arrows[importer], f"{importer} no longer imports {other}: take it from the list"
        arrows[importer].discard(other)
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle
