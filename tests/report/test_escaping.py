"""Names from outside in every page and table: they are shown word for word, and nothing of them comes to life."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser

import pytest

from lingshu_rl.curate.funnel import report_text
from lingshu_rl.eval.tables import html_page, latex, markdown
from lingshu_rl.report import plots
from lingshu_rl.report.html import write_report
from lingshu_rl.report.page import render
from lingshu_rl.sft.held_out import table
from lingshu_rl.text.markup import as_latex, as_markdown, table_line

NAMES = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b",
    "a\nb\r\n| c |",
    "[x](javascript:alert(1))",
    "`code`",
    "![x](http://host/p.png)",
    "</td><td>",
    "&lt;b&gt;",
    "[a][b]",
    "[a]: http://host",
    "*bold*",
    "back\\slash |",
    "<!-- hidden",
    "<http://host>",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }}{% raw %}",
    os.fsdecode(b"bytes \xff"),
]
ALIVE = re.compile(r"(?<!\\)(?:\\\\)*[`*]|<[A-Za-z/!?]|&[A-Za-z#](?!(t|mp);|mp;)|(?<!\\)\]\(|(?<!\\)\]\[|^\[[^]]*\]:")


class Tags(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))

    def handle_data(self, data):
        self.text += data


def tags(page: str) -> list:
    return Tags(page).tags


@pytest.mark.parametrize("name", NAMES)
def test_a_markdown_cell_stays_one_cell_of_plain_text(name):
    line = table_line([name, "2"])
    assert "\n" not in line and "\r" not in line and not ALIVE.search(as_markdown(name))
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3
    line.encode()


@pytest.mark.parametrize("name", NAMES)
def test_every_markdown_table_takes_any_name(name):
    counts = {"in": 3, "kept": 2, "dropped": 1, "reasons": {"bad_row": 1}, "notes": {name: {name: 3}}}
    pages = [
        report_text(
            {"steps": [{"step": name, **counts}], "sources": {name: {"read": 3, "left": 2}}, "files": {name: 2}}
        ),
        table([{"stage": name, "accuracy": 0.5, "ci95": (0.4, 0.6), "n": 9}]),
        markdown([["benchmark", "n"], [name, "3"]]),
    ]
    plain = [page.replace(as_markdown(name), "name") for page in pages]
    for page in plain:
        assert "alert" not in page and "host" not in page and "bytes" not in page
        rows = [line for line in page.splitlines() if line.startswith("|")]
        assert rows and all(line.endswith("|") for line in rows)
        page.encode()


@pytest.mark.parametrize("name", NAMES)
def test_html_pages_and_charts_have_the_same_tags_whatever_the_names(name, tmp_path):
    def evaluation(word: str) -> str:
        return html_page(word, [[["benchmark", word], [word, "1"]]], word)

    def charts(word: str) -> str:
        line = plots.line_chart([1, 2], {word: [0.1, 0.2]})
        return f"{line}{plots.span_chart({word: [(0.0, 1.0)]}, {word: 0})}{plots.axis_plot([word, 'b'], {word: [[0.1], [0.2]]})}"

    for page in (evaluation, charts):
        assert tags(page(name)) == tags(page("plain"))
    evaluation(name).encode()


def run_named(folder, word):
    """A run folder whose own name, model, data, metrics and notes are the word."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: {word!a}\ndata: {{train: {word!a}}}\n")
    row = {
        "id": word,
        "question": word,
        "options": None,
        "gold": word,
        "completion": word,
        "value": 1.0,
        "status": "conflict",
        "reason": word,
        "kind": "open",
        "task": word,
        "image": None,
        "parsed": None,
        "modality": word,
    }
    for when in ("before", "after"):
        (folder / "eval" / f"{when}.jsonl").write_text(
            json.dumps(row) + "\n" + json.dumps({**row, "id": "2", "value": 0.0, "task": "t"})
        )
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, f"reward/component/{word}": 0.5, "reward/mean": 0.5, f"time/{word}": 1.0}) + "\n"
    )
    return write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if not {"/", "\n"} & set(name)])
def test_the_report_of_a_run_takes_any_name(name, tmp_path):
    page, plain = run_named(tmp_path / name, name), run_named(tmp_path / "plain", "plain")
    assert tags(page) == tags(plain)


def test_a_run_whose_texts_are_scripts_has_one_script(tmp_path):
    page = run_named(tmp_path / "a", "</script><script>alert(1)</script>")
    assert [tag for tag, _ in tags(page)].count("script") == 1


@pytest.mark.parametrize("name", [r"\input{/etc/passwd}", "a & b", "50 % _of_ {x} #1 $y$", "~^", r"\write18{ls}"])
def test_latex_starts_no_command(name):
    made = latex([["benchmark"], [name]], caption=name)
    assert as_latex(name) in made
    assert not re.search(r"\\(input|write)", made) and not re.search(
        r"(?<!\\)[%#_$]", as_latex(name).replace(r"$\to$", "")
    )


def test_a_template_renders_no_name_as_a_template(tmp_path):
    assert "{{ 7 * 7 }}" in run_named(tmp_path / "a", "{{ 7 * 7 }}")
    with pytest.raises(Exception, match="nothing"):
        render("nothing.html")
