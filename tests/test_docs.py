"""Tables of the documentation are those of the code, and every setting is described."""

import re

import pytest
from doc_tables import ROOT, TABLES, settings, written


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_up_to_date(page):
    text = (ROOT / page).read_text()
    assert written(page, text) == text, "run python tests/doc_tables.py"


def test_every_setting_says_what_it_is():
    told = {key: what for key, _, what in settings()}
    assert [key for key, what in told.items() if len(what) < 4] == []


def test_messages_that_troubleshooting_names_are_in_the_code():
    page = (ROOT / "docs" / "training.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|", page.split("## When it says")[1].split("## Every")[0], re.MULTILINE)
    code = " ".join(p.read_text() for folder in ("lingshu_rl", "rewards") for p in (ROOT / folder).rglob("*.py"))
    assert len(named) > 8
    assert [message for message in named if message not in code] == []
