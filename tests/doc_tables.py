"""The tables of docs/: of the settings' own comments, of presets and `lingshu_rl.names`, of what families of models did in tests.

`python tests/doc_tables.py` writes them between their markers.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from lingshu_rl import config, names, objective
from lingshu_rl.config import Config
from lingshu_rl.data import sources
from lingshu_rl.planning.given import REAL_RUN

ROOT = Path(__file__).resolve().parent.parent


def comments() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment beside or above the field."""
    found = {}
    for module in (config, objective, sources):
        source = Path(str(module.__file__)).read_text()
        said: dict[int, str] = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for owner in (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)):
            end = owner.lineno
            for node in owner.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    lines = range(end + 1, (node.end_lineno or 0) + 1)
                    found[owner.name, node.target.id] = " ".join(said[line] for line in lines if line in said)
                end = node.end_lineno or end
    return found


def settings(node: Any = None, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, default, what it is) of every setting."""
    node = node or Config()
    told = comments()
    for field in fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from settings(value, f"{key}.")
        else:
            yield key, value, told[type(node).__name__, field.name]


def settings_table() -> str:
    rows = ["| setting | default | another model's | what it is |", "|---|---|---|---|"]
    for key, value, told in settings():
        own = f"`{REAL_RUN[key]}`" if key in REAL_RUN else ""
        rows.append(f"| `{key}` | {_shown(value)} | {own} | {_cell(told)} |")
    return "\n".join(rows)


def source_table() -> str:
    rows = ["| key | what it is |", "|---|---|"]
    told = {name: said for (owner, name), said in comments().items() if owner in ("SourceSpec", "Source")}
    rows += [f"| `{f.name}` | {_cell(told[f.name])} |" for f in fields(sources.Source)]
    return "\n".join(rows)


def presets_table() -> str:
    rows = ["| `format` | whose layout |", "|---|---|"]
    rows += [f"| `{name}` | {_cell(preset.about)} |" for name, preset in sources.presets().items()]
    return "\n".join(rows)


def names_table(known: dict[str, names.Ours]) -> str:
    rows = ["| there | here | |", "|---|---|---|"]
    rows += [f"| `{key}` | {f'`{ours.key}`' if ours.key else ''} | {ours.note} |" for key, ours in known.items()]
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def families_table() -> str:
    """What tests/families/matrix.py wrote down."""
    rows = [
        "| family | two steps with vLLM | a group is | trainer to engine | shared to single rows | to the model's own forward |",
        "|---|---|---|--:|--:|--:|",
    ]
    for found in json.loads((ROOT / "tests/families/results.json").read_text()).values():
        loop = f"works, on {found['rows']}" if found["works"] else f"**no**: {found['failure']}"
        layout = "one row" if found["shares"] else f"rows of its own ({found['why_not'].partition(': ')[2]})"
        gaps = [f"{found[key]:.0e}" if found[key] is not None else "" for key in ("engine", "dense", "oracle")]
        engine = gaps[0] + (f" ({found['dtype']})" if found["dtype"] != "float32" else "")
        rows.append(f"| {found['title']} | {loop} | {layout} | {engine} | {gaps[1]} | {gaps[2]} |")
    return "\n".join(rows)


def _shown(value: Any) -> str:
    return "empty" if value in ("", [], {}) else f"`{value}`"


TABLES = {
    "docs/data.md": {"source": source_table, "presets": presets_table},
    "docs/training.md": {"settings": settings_table},
    "docs/models.md": {"families": families_table},
    "docs/coming_from.md": {"trl": lambda: names_table(names.TRL), "verl": lambda: names_table(names.VERL)},
}


def written(page: str, text: str) -> str:
    """The page with its tables as they are now."""
    for name, table in TABLES[page].items():
        text, count = re.subn(
            f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, t=table: f"{m[1]}{t()}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
        assert count == 1, f"{page} has no place for {name}"
    return text


if __name__ == "__main__":
    for page in TABLES:
        (ROOT / page).write_text(written(page, (ROOT / page).read_text()))
