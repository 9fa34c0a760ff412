"""The quick-start notebook runs as it stands, and the example of the Python page does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_quick_start_notebook_runs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # outputs are for a reader's own machine
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("image/png" in output["data"] for output in results)
    assert "completion" in results[-1]["data"]["text/html"]
    assert (tmp_path / "runs" / "notebook" / "report.html").stat().st_size > 10_000


def test_the_public_names_are_there_and_load_no_torch_before_they_are_asked_for():
    code = (
        "import lingshu_rl, sys; from lingshu_rl import *; assert callable(train) and Config().train.steps > 0; "
        "missing = [n for n in lingshu_rl.__all__ if n not in globals()]; sys.exit(bool(missing) or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_train_stays_a_function_after_its_module_was_loaded():
    code = (
        "from lingshu_rl import train; import lingshu_rl.train, lingshu_rl; assert lingshu_rl.train.train is not train"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_error_of_the_library_has_one_root():
    found = {}
    for path in (ROOT / "lingshu_rl").rglob("*.py"):
        found |= {m[1]: m[2] for m in re.finditer(r"^class (\w+Error)\(([^)]*)\)", path.read_text(), re.MULTILINE)}
    own = {"LingshuError", "RunStopped", "BadAnswer", *found}  # a bad answer is asked for again
    strays = {
        name: bases
        for name, bases in found.items()
        if name != "LingshuError" and not own & set(re.split(r"[,\s]+", bases))
    }
    assert strays == {}
