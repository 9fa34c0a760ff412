"""Tables of the documentation are those of the code, and every setting is described."""

import ast
import re
from functools import cache

import pytest
from doc_tables import ROOT, TABLES, settings, written

from lingshu_rl.cli import main


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_up_to_date(page):
    text = (ROOT / page).read_text()
    assert written(page, text) == text, "run python tests/doc_tables.py"


def test_every_setting_says_what_it_is():
    told = {key: what for key, _, what in settings()}
    assert [key for key, what in told.items() if len(what) < 4] == []


@cache
def texts_of_code():
    """(file, text) of the strings in the code but for docstrings; what is filled in stands as …"""
    found = []
    for path in (p for folder in ("lingshu_rl", "rewards", "recipes") for p in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(path.read_text())
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in (n for n in ast.walk(tree) if id(n) not in told):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append((str(path.relative_to(ROOT)), "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((str(path.relative_to(ROOT)), node.value))
    return found


def is_there(text):
    """Whether a file that a text points at is in the repository, and has that heading."""
    file, _, anchor = text.partition("#")
    if not (ROOT / file).exists():
        return False
    headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE) if anchor else []
    return not anchor or anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_files_that_messages_point_at_are_there():
    place = re.compile(
        r"(?<![\w/])(?:docs|recipes|benchmarks|tests|rewards/data)/[\w/-]+\.(?:md|py|yaml|json|sh)(?:#[\w-]+)?"
    )
    named = {(file, found) for file, text in texts_of_code() for found in place.findall(text)}
    assert len(named) > 8 and [pair for pair in sorted(named) if not is_there(pair[1])] == []


def test_names_that_the_guide_to_changes_gives_are_there():
    told = (ROOT / "CONTRIBUTING.md").read_text()
    for file, name in (("lingshu_rl/losses.py", "VARIANTS"), ("lingshu_rl/objective.py", "LOSSES"), ("rewards/kinds.py", "ELSEWHERE")):  # fmt: skip
        assert (
            f"`{file}`" in told
            and f"`{name}`" in told
            and re.search(rf"^{name}\b", (ROOT / file).read_text(), re.MULTILINE)
        )


def test_settings_that_messages_name_exist():
    defaults = {key: default for key, default, _ in settings()}
    known = set(defaults) | {key.rpartition(".")[0] for key in defaults}
    groups = "|".join(sorted({key.split(".")[0] for key in defaults if "." in key}))
    free = tuple(f"{key}." for key, default in defaults.items() if default in ({}, None))  # they take any keys
    written = re.compile(rf"(?<![\w./:-])((?:{groups})\.[a-z_]+(?:\.[a-z_]+)*)(?![\w.(])")
    others = "lingshu_rl/names.py"  # lists the names of other trainers
    named = {
        (file, found)
        for file, text in texts_of_code()
        if " " in text and file != others
        for found in written.findall(text)
    }
    files = (".json", ".jsonl", ".sqlite", ".parquet", ".yaml")
    assert len(named) > 100
    assert [(f, key) for f, key in sorted(named) if key not in known and not key.startswith(free) and not key.endswith(files)] == []  # fmt: skip


def test_commands_that_messages_name_exist():
    seconds = "check|coverage|look|leaks|compare|rescore"
    named = {
        found for _, text in texts_of_code() for found in re.findall(rf"`lingshu-rl ([a-z]+)(?: ({seconds}))?", text)
    }
    assert len(named) > 4
    for words in named:
        with pytest.raises(SystemExit) as end:
            main([*filter(None, words), "--help"])
        assert end.value.code == 0, words


def test_messages_that_troubleshooting_names_are_in_the_code():
    page = (ROOT / "docs" / "training.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|", page.split("## When it says")[1].split("## Every")[0], re.MULTILINE)
    code = " ".join(p.read_text() for folder in ("lingshu_rl", "rewards") for p in (ROOT / folder).rglob("*.py"))
    code = re.sub(r'"\s+[rf]{0,2}"', "", code)  # texts that go on in the next line
    assert len(named) > 8
    assert [message for message in named if message not in code] == []
