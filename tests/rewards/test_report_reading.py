"""What single texts are read as: one line a text in cases_reading.tsv, by kind of wording or layout."""

import re
from pathlib import Path

import pytest

from rewards.report import extract, load
from rewards.report.lexicon import DEFAULT_PACKS

SIGNS = {"present": "+", "uncertain": "?", "absent": "-"}
LINES = (Path(__file__).parent / "cases_reading.tsv").read_text(encoding="utf-8").splitlines()[1:]
CASES = [line.split("\t") for line in LINES]
LEXICON = load(DEFAULT_PACKS)


def reads(text: str) -> set[str]:
    """Statements as sign, finding and side: "+pleural_effusion@left"; whole organ systems have no side."""
    return {
        SIGNS[e.assertion] + e.finding + (f"@{e.side}" if e.side and not e.group else "")
        for e in extract(text, LEXICON).entities
    }


@pytest.mark.parametrize(("kind", "text", "expected"), CASES, ids=lambda value: value[:40])
def test_a_text_is_read_as_it_is_meant(kind, text, expected):
    """Exactly the listed findings are present or uncertain; the listed denials are among those read, of any side."""
    wanted = {part for part in re.split(r" (?=[-+?])", expected) if part}
    found = reads(text.replace("\\n", "\n"))
    assert {s for s in found if s[0] != "-"} == {s for s in wanted if s[0] != "-"}
    for denial in (s for s in wanted if s[0] == "-"):
        assert any(denial in (s, s.split("@")[0]) for s in found), denial


def test_every_kind_has_cases():
    kinds = [kind for kind, _, _ in CASES]
    assert len(CASES) >= 650 and all(kinds.count(kind) >= 8 for kind in set(kinds))
    assert sum(kind.startswith(("ct_", "head_ct")) for kind in kinds) >= 250
