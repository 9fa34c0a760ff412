"""The gallery page shows what its script prints today."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_gallery_page_is_the_output_of_its_script(capsys):
    for library in ("rouge_score", "sacrebleu"):
        pytest.importorskip(library)
    runpy.run_path(str(ROOT / "benchmarks" / "report_gallery.py"), run_name="__main__")
    page = (ROOT / "docs" / "report_gallery.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
