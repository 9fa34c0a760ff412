"""What is shipped: wheel and sdist install by themselves, hold all data, and start the demo away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(*words: str | Path, cwd: Path, timeout_s: float = 600) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env=env,
        text=True,
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=ROOT)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel; what it depends on is lent by this one."""
    home = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", home / "env", cwd=home)
    python = home / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", next(built.glob("*.whl")), cwd=home)
    # With its .pth files, of which one mends torchvision (`make demo` writes it).
    (site / "lent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    where = run(python, "-c", "import lingshu_rl, rewards; print(lingshu_rl.__file__, rewards.__file__)", cwd=home)
    assert all(str(site) in path for path in where.split()), where
    return home


def tracked(folder: str) -> set[str]:
    out = subprocess.run(["git", "ls-files", folder], cwd=ROOT, text=True, capture_output=True)
    if out.returncode:
        pytest.skip("not a git checkout")
    return set(out.stdout.split("\n")) - {""}


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file_of_the_packages(built):
    wanted = tracked("lingshu_rl") | tracked("rewards")
    wheel = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted - wheel == set() and wanted - sdist == set()
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in wheel)


@pytest.mark.slow
def test_the_demo_starts_from_the_wheel(installed, tmp_path):
    command = installed / "env" / "bin" / "lingshu-rl"
    assert re.fullmatch(r"lingshu-rl \d+\.\d+\.\d+\n", run(command, "--version", cwd=tmp_path))
    settings = ["train.steps=1", "train.prompts_per_step=2", "train.group_size=2", "eval.limit=8", "eval.controls=[]"]
    said = run(command, "train", *settings, cwd=tmp_path, timeout_s=900)
    assert "held-out accuracy" in said and (tmp_path / "runs" / "demo" / "report.html").is_file()


@pytest.mark.slow
def test_the_site_builds_and_every_link_in_it_leads_somewhere(tmp_path):
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site", cwd=ROOT)
    assert (tmp_path / "site" / "rewards" / "index.html").is_file()


@pytest.mark.parametrize("page", [p for p in PAGES if p.is_file()], ids=lambda p: p.name)
def test_files_that_pages_name_are_there(page):
    """Links, and paths of the checkout in code marks."""
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:recipes|lingshu_rl|rewards|tests|benchmarks|docs)/[\w./-]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
