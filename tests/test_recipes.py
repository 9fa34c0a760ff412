"""Recipes beside the settings: Slurm scripts run with stand-ins for its commands, images name what is there."""

import json
import os
import re
import subprocess
import sys

import pytest
from launching import ROOT

from lingshu_rl.planning.given import load_config
from lingshu_rl.planning.plan import table
from lingshu_rl.processes.placement import Machine, find_devices, place

# srun runs its command once a node; the others say how they were called.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((NODES - 1))); do SLURM_NODEID=$node "$@" || exit $?; done
"""
TELL = """#!{python}
import json, os, sys, time
line = {{"command": os.path.basename(sys.argv[0]), "words": sys.argv[1:], "node": os.environ.get("SLURM_NODEID"), "token": os.environ.get("LINGSHU_RL_TOKEN")}}
open({out!r}, "a").write(json.dumps(line) + "\\n")
# A training outlives the start of the server beside it, which the script ends with it.
deadline = time.monotonic() + 30
while line["command"] == "accelerate" and line["node"] == "1" and time.monotonic() < deadline and "lingshu-rl" not in open({out!r}).read():
    time.sleep(0.05)
"""


def submitted(tmp_path, script, *words, nodes, **env):
    """What the script's commands were called with, in order."""
    out = tmp_path / "told.jsonl"
    commands = tmp_path / "bin"
    commands.mkdir()
    bodies = {"srun": SRUN, "scontrol": '#!/bin/bash\nprintf "first\\nsecond\\n"\n'}
    for name in ("srun", "scontrol", "accelerate", "lingshu-rl"):
        body = bodies.get(name, TELL.format(python=sys.executable, out=str(out)))
        (commands / name).write_text(body)
        (commands / name).chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    given = {
        **os.environ,
        "PATH": path,
        "NODES": str(nodes),
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_JOB_ID": "1",
        **env,
    }
    script = ROOT / "recipes" / "slurm" / script
    done = subprocess.run(
        ["bash", str(script), *words], cwd=ROOT, env=given, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def configured(words):
    """The run's config, as the recipe would read it."""
    return load_config(
        ROOT / words[words.index("--config") + 1], [w for w in words if "=" in w and not w.startswith("-")]
    )


@pytest.mark.parametrize(
    ("env", "ranks"), [({}, 8), ({"CONFIG": "recipes/configs/lingshu_rl_7b_split.yaml", "RANKS": "4"}, 4)]
)
def test_one_node_under_slurm(tmp_path, env, ranks):
    (told,) = submitted(tmp_path, "one_node.sh", "data.train=my rows.jsonl", "data.test=u", nodes=1, **env)
    config = configured(told["words"])
    assert config.data.train == "my rows.jsonl" and told["words"][told["words"].index("--num_processes") + 1] == str(
        ranks
    )
    placement = place(config, Machine.assume(8), ranks)
    assert len(placement.policy.gpus) == ranks and not placement.idle.gpus


def test_two_nodes_under_slurm_use_every_gpu_once(tmp_path):
    told = submitted(tmp_path, "two_nodes.sh", "run.dir=/shared/r", "data.train=t", "data.test=u", nodes=2)
    launches = [line for line in told if line["command"] == "accelerate"]
    (reference,) = [line for line in told if line["command"] == "lingshu-rl"]
    assert [line["node"] for line in launches] == ["0", "1"] and reference["node"] == "1"
    assert len({line["token"] for line in told}) == 1 and told[0]["token"]
    for line in launches:
        words = line["words"]
        assert (
            words[words.index("--machine_rank") + 1] == line["node"]
            and words[words.index("--num_processes") + 1] == "12"
        )
        assert words[words.index("--main_process_ip") + 1] == "first"
        config = configured(words)
        assert config.reference.urls == ["http://second:8200"] and config.run.dir == "/shared/r"
        placement = place(config, Machine.assume(8), 6)
        assert [len(d.gpus) for d in placement.rollout_servers] == [2] and not placement.idle.gpus
    serving = configured(reference["words"])
    devices = find_devices("reference", serving.devices.reference, Machine.assume(8))
    assert devices.numbers == placement.rollout_servers[0].numbers == (6, 7)  # node 1 starts no rollout server there
    assert serving.reference.tensor_parallel == 2 and reference["words"][:4] == ["serve", "reference", "--port", "8200"]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "docker").iterdir()), ids=lambda p: p.name)
def test_images_name_what_is_there(file):
    import tomllib

    text = file.read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [extra for found in re.findall(r"\.\[([\w,]+)\]", text) for extra in found.split(",")]
    assert set(asked) <= set(extras) and ("make" in text or asked)
    for path in re.findall(r"recipes/[\w./]+\.(?:py|yaml|Dockerfile)", text):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r'(?:RUN make |"make", ")(\.?[\w./]+)', text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


def test_the_table_of_plans_is_up_to_date():
    page = (ROOT / "docs" / "clusters.md").read_text()
    shown = re.search(r"<!-- plans: .* -->\n(.*?)<!-- /plans -->", page, re.DOTALL)[1]
    files = sorted(p for p in (ROOT / "recipes" / "configs").glob("*.yaml") if "sft" not in p.stem)
    assert shown.strip() == table(files)
