"""Every command in README and docs: run here, or read word by word as its program reads it where it cannot run.

`HOW` says which is done with which, and why.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from eval.eval_samples import SAMPLES, write_json
from launching import ROOT
from report.test_run_report import make_run, questions

from lingshu_rl.cli import main
from lingshu_rl.pipeline.rehearsal import faults
from lingshu_rl.sweep.plan import parse_sweep
from lingshu_rl.sweep.run import write_plan

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = "lingshu-rl|accelerate|python|make|pip|sbatch|ray"
# What stands for something of the reader's. The workspace has files of these names.
MEANT = {"FILE": "my.jsonl", "FILE.yaml": "recipes/pipelines/miniature.yaml", "REPORTS.csv": "reports.csv", "A": "my.jsonl", "B": "held_out.jsonl", "M": "demo",
         "URL": "http://127.0.0.1:8000/v1", "CONFIG": "recipes/configs/sft_demo.yaml", "STEP": "thoughts", "RUN": "runs/mine",
         "SWEEP_FOLDER": "runs/sweeps/s", "FOLDER_OR_HUB_ID": "demo", "Qwen/Qwen2.5-VL-3B-Instruct": "demo", "$RANK": "0", "...": "", "&": "", "key=value": "", "name=value": ""}  # fmt: skip


def commands() -> list[str]:
    """The commands of all pages, each once, in one line."""
    seen: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(rf"(\w+=\S+ )*({PROGRAMS}) ", line):
                    seen[" ".join(line.split())] = None
        for line in re.findall(rf"^ {{4,}}((?:{PROGRAMS}) .*)$", text, re.MULTILINE):
            seen[line] = None
        for words in re.findall(rf"`((?:{PROGRAMS}) [^`\n]+)`", text):
            seen[words] = None
    return list(seen)


def words_of(command: str) -> list[str]:
    """Its words, with the workspace's names for the reader's."""
    bare = re.sub(r"[\[\]](?=\s|$)|(?<=\s)\[", "", command) if "'" not in command and '"' not in command else command
    bare = bare.replace("RUN RUN", "runs/mine runs/other")
    words = [re.sub(r"=\.\.\.$", "=demo", w) for w in shlex.split(bare, comments=True)]
    words = [w for w in words if not re.fullmatch(r"[A-Z_]+=\S+", w) or w.startswith("PIP_ARGS")]
    return [MEANT.get(w, w) for w in words if MEANT.get(w, w)]


def run_here(words: list[str], capsys) -> None:
    assert main(words[1:]) == 0, capsys.readouterr().err


def run_python(words: list[str], capsys) -> None:
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def watch_once(words: list[str], capsys) -> None:
    run_here([*words, "--once"], capsys)


def reads_its_words(words: list[str], capsys) -> None:
    """Words, settings and names are known; the repository's files are there."""

    def promised(path: Path) -> bool:
        return not str(path).startswith(("recipes/", "benchmarks/", "tests/"))

    assert faults(words, promised) == []


def shows_its_help(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words[1:], "--help"])
    assert end.value.code == 0


def has_the_option(words: list[str], capsys) -> None:
    """The own words of a benchmark or a module, by its source: it would take minutes."""
    script = f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else next(w for w in words if w.endswith(".py"))
    source = (ROOT / script).read_text()
    assert [w for w in words if w.startswith("--") and f'"{w}"' not in source] == []


def is_a_target(words: list[str], capsys) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def names_what_there_is(words: list[str], capsys) -> None:
    """Extras of this package, requirement files of this repository."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")]
    assert set(asked) <= set(extras)
    assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))


def is_a_script_of_ours(words: list[str], capsys) -> None:
    assert (ROOT / words[1]).is_file()  # run with stand-ins for Slurm's commands in test_recipes


def is_of_others(words: list[str], capsys) -> None:
    assert words[0] in ("ray", "accelerate", "pip")


# The first that matches is done with a command.
HOW: list[tuple[str, Callable[..., None], str]] = [
    (r"lingshu-rl [\w ]+", shows_its_help, "named without its words"),
    (r"lingshu-rl (rewards|report|data look|eval leaks|eval compare|eval rescore|eval --list)\b.*", run_here, ""),
    (r"lingshu-rl watch .*", watch_once, "it would follow the run"),
    (r"lingshu-rl .*(--dry-run|--estimate).*", run_here, ""),
    (r"lingshu-rl .*", reads_its_words, "trains, asks servers or takes minutes; test_train, test_sweep_run, test_pipeline and others run them"),
    (r"accelerate launch .*recipes/.*", reads_its_words, "trains, on GPUs or nodes that are not here"),
    (r"accelerate .*", is_of_others, "named without a script"),
    (r"python -c .*", run_python, ""),
    (r"python .*", has_the_option, "takes minutes; test_benchmarks and test_demo_policy run them in small"),
    (r"make .*", is_a_target, "installs, and takes minutes"),
    (r"pip install (num2words|cyclonedx-bom)", is_of_others, "installs a package of others"),
    (r"pip .*", names_what_there_is, "installs"),
    (r"sbatch .*", is_a_script_of_ours, "needs Slurm"),
    (r"ray start .*", is_of_others, "Ray's own command; test_cluster starts one"),
]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A reader's folder: rows, runs, a sweep's folder, outputs of another tool."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "benchmarks", "lingshu_rl"):
        (place / name).symlink_to(ROOT / name)
    row = {"images": [], "question": "Which side is the effusion on?", "answer": "A", "options": ["left", "right"], "kind": "option"}  # fmt: skip
    for name in ("my", "held_out", "train", "rows"):
        lines = [{**row, "id": f"{name}-{n}", "answer": "AB"[n % 2]} for n in range(8)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "reports.csv").write_text("report\nNo pleural effusion. The heart is enlarged.\n")
    SAMPLES["slake"](place / "samples", "slake")
    (place / "slake").symlink_to(next((place / "samples").rglob("*.json")).parent)
    (place / "slake" / "train.json").write_text(next((place / "samples").rglob("*.json")).read_text())
    for name in ("mine", "other", "eval/A", "eval/B"):
        run = make_run(place / "runs" / name, questions(place, 8), steps=3)
        (run / "config.yaml").write_text(f"train: {{steps: 3, lr: {1 + len(name)}e-6}}\nseed: 0\n")
    for name in ("prompt_sharing", "s"):
        write_plan(parse_sweep({"dir": str(place / "runs" / "sweeps" / name), "variants": {"a": None, "b": {"train.lr": 1e-5}}}))  # fmt: skip
    for name in ("vqa_rad", "slake", "pubmedqa"):
        SAMPLES[name](place / "benchmarks_dir", name)
    pack = re.search(r"```json\n(.*?)```", (ROOT / "docs" / "report_packs.md").read_text(), re.DOTALL)[1]
    (place / "fundus.json").write_text(pack)
    write_json(place / "MedEvalKit" / "results.json", [{"question": "Is there an effusion?", "answer": "yes", "response": "Yes."}])  # fmt: skip
    return place


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documentation(command, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    words = words_of(command)
    how = next(how for pattern, how, _ in HOW if re.fullmatch(pattern, " ".join(words)))
    how(words, capsys)


def test_every_way_is_used_and_every_command_has_one():
    told = [" ".join(words_of(command)) for command in commands()]
    used = [next((n for n, (p, _, _) in enumerate(HOW) if re.fullmatch(p, line)), line) for line in told]
    assert [line for line in used if isinstance(line, str)] == []
    assert set(used) == set(range(len(HOW))) and len(told) > 50
