"""What is installed: locks that fit what is asked for, floors above known advisories, the newest versions allowed."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED_EXTRAS = ("eval", "dicom", "quant", "ray")  # beside cpu or cuda, as `make lock` has them
# The lowest version without an advisory that is known to us (2026-11), of what reads hostile bytes or listens.
ADVISED = {
    "jinja2": "3.1.6",  # leaves the sandbox: CVE-2024-56201, CVE-2024-56326, CVE-2025-27516
    "pillow": "11.3",  # writes beyond a buffer: CVE-2024-28219, CVE-2025-48379
    "pyarrow": "14.0.1",  # runs code from a file: CVE-2023-47248
    "starlette": "0.49.1",  # blocked by form data and Range headers: CVE-2024-47874, CVE-2025-54121, CVE-2025-62727
    "transformers": "4.53",  # regular expressions without end, pickled files: CVE-2024-11392 to CVE-2025-5197
    "python-gdcm": "3.2.2",  # writes beyond a buffer: CVE-2024-22391, CVE-2024-25569, CVE-2025-11266
    "ray": "2.52",  # a page in a browser runs jobs: CVE-2025-62593
    "torch": "2.6",  # torch.load with weights_only ran code: CVE-2025-32434
}


def asked(*extras: str) -> Iterator[Requirement]:
    """What the project asks for with these extras, those that they name included."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    for one in (Requirement(text) for texts in lists for text in texts):
        if one.name == "lingshu-rl":
            yield from asked(*one.extras)
        else:
            yield one


def locked(name: str) -> dict[str, tuple[Version, int]]:
    """Package -> version and how many hashes it has."""
    text = (ROOT / "locks" / f"{name}.txt").read_text().replace("\\\n", " ")
    lines = [
        re.fullmatch(r"([\w.-]+)==(\S+)(?: ; [^-]*)?((?:\s+--hash=sha256:[0-9a-f]{64})*)", line.strip())
        for line in text.splitlines()
    ]
    assert None not in lines, "a line of the lock is no package with its hashes"
    return {line[1]: (Version(line[2]), line[3].count("--hash")) for line in lines}


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_lock_fits_what_the_project_asks_for_and_names_no_host(name):
    found = locked(name)
    assert len(found) > 100 and all(hashes > 0 for _, hashes in found.values())
    for requirement in asked(name, *LOCKED_EXTRAS):
        version, _ = found[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version, prereleases=True), requirement
    text = (ROOT / "locks" / f"{name}.txt").read_text()
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host|@ ", text)


def test_floors_and_locks_are_above_known_advisories():
    floors = {
        r.name: [Version(s.version) for s in r.specifier if s.operator in (">=", "==")]
        for r in asked("cpu", "cuda", *LOCKED_EXTRAS)
    }
    for package, least in ADVISED.items():
        assert floors[package] and max(floors[package]) >= Version(least), package
        assert all(locked(name)[package][0] >= Version(least) for name in ("cpu", "cuda")), package


@pytest.mark.endurance
def test_the_newest_allowed_versions_pass_the_fast_tests(tmp_path):
    """In an environment of its own. PIP_ARGS names PyTorch's CPU wheels, as for `make`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    more = os.environ.get("PIP_ARGS", "").split()
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--upgrade",
        "--upgrade-strategy",
        "eager",
        *more,
        f"{ROOT}[cpu,dev]",
    ]
    subprocess.run(install, check=True, env=env, cwd=tmp_path)
    subprocess.run(
        [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True, env=env
    )
    subprocess.run([python, "-m", "lingshu_rl.processes.compat", "install"], check=True, env=env, cwd=ROOT)
    tests = [
        python,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow and not endurance",
        "-n",
        "2",
        "--ignore",
        str(Path(__file__)),
    ]
    assert subprocess.run(tests, env=env, cwd=ROOT).returncode == 0, subprocess.run(
        [python, "-m", "pip", "freeze"], capture_output=True, text=True
    ).stdout
