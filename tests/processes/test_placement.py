import os
import subprocess
import sys

import pytest
from launching import ROOT
from machines import machine, numbers

from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes import placement
from lingshu_rl.processes.placement import DeviceSet, Machine, find_devices, narrow, parse_devices, place


def placed(*settings, gpus=0, ranks=1, engine_gpus=1):
    return place(load_config(None, settings), machine(gpus), ranks, engine_gpus)


def drawn(p):
    """policy, rollout ("own": in the policy's processes), reference ("*": on the policy's GPUs), idle."""
    rollout = "own" if p.colocated else numbers(p.rollout_servers)
    reference = numbers(p.reference_replicas) + "*" * p.reference_shares
    return " ".join(x or "-" for x in (numbers([p.policy]), rollout, reference, numbers([p.idle])))


def test_without_gpus_every_group_runs_on_the_cpu_in_processes_of_its_own():
    p = placed()
    assert (str(p.policy), [str(d) for d in (*p.rollout_servers, *p.reference_replicas)]) == ("cpu", ["cpu", "cpu"])
    assert not p.colocated and not p.reference_shares and not p.idle.gpus


# GPUs, policy ranks, with a reference, GPUs that an engine's weights need -> who gets what.
AUTOMATIC = {
    (1, 1, True, 1): "0 own 0* -",
    (1, 1, False, 1): "0 own - -",
    (2, 1, True, 1): "0 1 0* -",
    (2, 1, False, 1): "0 1 - -",
    (2, 2, True, 1): "01 own 0|1* -",
    (2, 2, False, 1): "01 own - -",
    (3, 1, True, 1): "0 1 2 -",
    (3, 1, False, 1): "0 1|2 - -",
    (3, 2, True, 1): "01 2 0|1* -",
    (3, 3, True, 1): "012 own 0|1|2* -",
    (4, 1, True, 2): "0 12 3 -",
    (4, 1, False, 2): "0 12 - 3",  # nobody could use the last one: more ranks could
    (4, 2, True, 1): "01 2 3 -",
    (4, 2, False, 1): "01 2|3 - -",
    (4, 2, True, 2): "01 23 0|1* -",
    (4, 3, True, 2): "012 own 3 -",
    (4, 4, True, 1): "0123 own 0|1|2|3* -",
    (6, 2, True, 2): "01 23 4|5 -",
    (6, 3, True, 1): "012 3|4 5 -",
    (6, 4, True, 2): "0123 45 0|1|2|3* -",
    (6, 6, False, 1): "012345 own - -",
    (8, 1, True, 1): "0 1|2|3|4|5|6 7 -",
    (8, 4, True, 1): "0123 4|5|6 7 -",
    (8, 4, True, 2): "0123 45 6|7 -",
    (8, 4, True, 4): "0123 4567 0|1|2|3* -",
    (8, 4, False, 4): "0123 4567 - -",
    (8, 7, True, 1): "0123456 7 0|1|2|3|4|5|6* -",
    (8, 8, True, 1): "01234567 own 0|1|2|3|4|5|6|7* -",
    (8, 8, False, 1): "01234567 own - -",
}


@pytest.mark.parametrize("case", AUTOMATIC, ids=str)
def test_automatic_placement(case):
    gpus, ranks, kl, engine_gpus = case
    p = placed(f"loss.kl_coef={0.001 * kl}", gpus=gpus, ranks=ranks, engine_gpus=engine_gpus)
    assert drawn(p) == AUTOMATIC[case]


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 6, 8])
def test_every_number_of_ranks_is_placed_without_overlap_and_with_one_gpu_servers_nothing_is_idle(gpus):
    for ranks in range(1, gpus + 1):
        for kl in (0.0, 0.001):
            seen = set()
            for engine_gpus in (1, 2, 4):
                p = placed(f"loss.kl_coef={kl}", gpus=gpus, ranks=ranks, engine_gpus=engine_gpus)
                own = [p.policy, *p.rollout_servers, *(() if p.reference_shares else p.reference_replicas), p.idle]
                assert sorted(n for d in own for n in d.numbers) == list(range(gpus)), (ranks, kl, engine_gpus)
                assert engine_gpus > 1 or not p.idle.gpus
                assert len(p.engines) in (0, ranks) and (kl > 0) == bool(p.reference_replicas)
                seen.add(p.policy)
            assert len(seen) == 1  # a rank can choose its device before the model's size is known


@pytest.mark.parametrize(
    ("settings", "gpus", "ranks", "expected"),
    [
        (["devices.policy=[2,3]"], 4, 2, "23 0 1 -"),
        (["devices.policy=[3,2]", "loss.kl_coef=0"], 4, 2, "32 0|1 - -"),
        (["devices.policy=[0]", "devices.rollout=[1]", "devices.reference=cpu"], 4, 1, "0 1 - 23"),
        (["devices.reference=policy"], 4, 2, "01 2|3 0|1* -"),
        (["devices.reference=policy", "reference.replicas=1"], 4, 2, "01 2|3 0* -"),
        (["devices.reference=policy"], 0, 1, "- - - -"),
        (["rollout.placement=colocate"], 1, 1, "0 own 0* -"),
        (["rollout.placement=colocate"], 4, 2, "01 own 2|3 -"),
        (["rollout.placement=colocate", "loss.kl_coef=0"], 4, 2, "01 own - 23"),
        (["rollout.urls=[http://a]"], 2, 1, "0 - 1 -"),
        (["rollout.urls=[http://a]", "reference.urls=[http://b]"], 1, 1, "0 - - -"),
        (["rollout.servers=2", "loss.kl_coef=0"], 8, 4, "0123 4|5 - 67"),
        (["rollout.vllm.tensor_parallel_size=2"], 8, 3, "012 34|56 7 -"),
        (["devices.rollout=[3,4,5,6]", "rollout.servers=2", "devices.reference=[1,2]"], 7, 1, "0 34|56 1|2 -"),
        (["devices.reference=[1,2]", "reference.tensor_parallel=2"], 4, 1, "0 3 12 -"),
        (["train.max_staleness=1"], 2, 1, "0 1 0* -"),
    ],
)
def test_what_is_said_is_obeyed(settings, gpus, ranks, expected):
    p = placed(*settings, gpus=gpus, ranks=ranks)
    assert drawn(p) == expected
    assert ("idle" in p.describe()) == bool(p.idle.gpus)
    assert ("rollout.urls" in p.describe()["rollout"]) == (not p.colocated and not p.rollout_servers)


@pytest.mark.parametrize(
    ("settings", "gpus", "ranks", "message"),
    [
        (["devices.policy=[0]", "devices.rollout=[0]"], 4, 1, "GPU 0 is given to both devices.policy and devices.rollout"),
        (["devices.rollout=[9]"], 4, 1, r"names GPU 9, but this process sees 4 .*CUDA_VISIBLE_DEVICES=0,1,2,3"),
        (["devices.rollout=[0]"], 0, 1, "names GPU 0, but this process sees 0"),
        (["devices.policy=[0,0]"], 4, 2, "names a GPU twice"),
        (["devices.policy=[0,1]"], 4, 1, "accelerate started 1"),
        ([], 2, 3, r"3 policy rank\(s\) need 3 GPU\(s\) of their own, 2 are free"),
        (["rollout.placement=servers"], 2, 2, r"1 rollout server\(s\) need 1 GPU\(s\) of their own, 0 are free"),
        (["train.max_staleness=1"], 1, 1, "rollout.placement=colocate"),
        (["devices.policy=tpu"], 0, 1, "use auto, cpu"),
        (["devices.policy=cpu:4096"], 0, 1, "may not use core"),
        (["devices.rollout=[1,2,3]", "rollout.servers=2"], 4, 1, "has 3 GPUs; 2 .*need 2"),
        (["devices.rollout=[1,2,3]", "rollout.vllm.tensor_parallel_size=2"], 4, 1, "has 3 GPUs; 1 .*need 2"),
        (["devices.reference=[1,2]", "reference.replicas=2", "reference.tensor_parallel=2"], 4, 1, "need 4"),
        (["rollout.urls=[http://a]", "rollout.servers=2"], 4, 1, "has no effect beside the URLs"),
        (["reference.urls=[http://a]", "reference.replicas=2"], 4, 1, "has no effect beside the URLs"),
    ],
)  # fmt: skip
def test_impossible_placements_are_refused(settings, gpus, ranks, message):
    with pytest.raises(ConfigError, match=message):
        placed(*settings, gpus=gpus, ranks=ranks)


def test_what_a_colocated_engine_does_not_go_with_is_refused():
    for beside in ("rollout.urls=[http://a]", "rollout.servers=2", "devices.rollout=cpu", "train.max_staleness=1"):
        with pytest.raises(ConfigError, match="in the policy's process"):
            load_config(None, ["rollout.placement=colocate", beside])


def test_cores_bind_the_child_process():
    core = min(os.sched_getaffinity(0))
    devices = find_devices("rollout", f"cpu:{core}", Machine())
    assert devices == DeviceSet(cores=(core,))
    assert devices.command_prefix() == ["taskset", "-c", str(core)]
    assert devices.env() == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    assert parse_devices("policy", "cuda:0-2") == ("cuda", (0, 1, 2))
    p = placed("rollout.servers=2", "reference.replicas=3")
    assert [len(p.rollout_servers), len(p.reference_replicas)] == [2, 3]
    assert [str(d) for d in DeviceSet(cores=(0, 1, 2, 3)).split(2)] == ["cpu:0,1", "cpu:2,3"]


# CUDA_VISIBLE_DEVICES of the parent, devices that CUDA shows for it -> names of the devices, in order.
VISIBLE = {
    "unset": (None, 4, ["0", "1", "2", "3"]),
    "a subset": ("4,5,6,7", 4, ["4", "5", "6", "7"]),
    "another order, as by --gpu_ids": ("3,1", 2, ["3", "1"]),
    "uuids, as by Slurm": ("GPU-aa, GPU-bb", 2, ["GPU-aa", "GPU-bb"]),
    "parts of cards": ("MIG-1a,MIG-2b", 2, ["MIG-1a", "MIG-2b"]),
    "a list that CUDA ends early": ("0,-1,2", 1, ["0"]),
    "none": ("", 0, []),
}


@pytest.mark.parametrize("case", VISIBLE)
def test_children_get_entries_of_the_parents_own_list(case):
    visible, shown, names = VISIBLE[case]
    here = machine(shown, visible)
    assert [gpu.name for gpu in here.gpus] == names
    if shown > 1:
        p = place(load_config(None, ["loss.kl_coef=0"]), here)
        assert [d.env() for d in p.rollout_servers] == [{"CUDA_VISIBLE_DEVICES": name} for name in names[1:]]
        last = find_devices("rollout", [shown - 1, 0], here)
        assert last.env() == {"CUDA_VISIBLE_DEVICES": f"{names[-1]},{names[0]}"}


def test_ranks_see_the_policys_gpus_alone_in_rank_order():
    here = machine(4, "GPU-a,GPU-b,GPU-c,GPU-d")
    p = place(load_config(None, ["devices.policy=[3,2]"]), here, ranks=2)
    assert narrow(p.policy, here) == {"CUDA_VISIBLE_DEVICES": "GPU-d,GPU-c"}
    assert [d.env() for d in p.rollout_servers] == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}]
    assert narrow(DeviceSet(), here) == {"CUDA_VISIBLE_DEVICES": ""}  # devices.policy=cpu
    assert narrow(DeviceSet(), Machine()) == {}


def test_accelerate_takes_the_visible_device_of_the_local_rank():
    """Contract: `narrow` rests on accelerate's choice of cuda:LOCAL_RANK, which no CPU can run."""
    import inspect

    from accelerate.state import PartialState

    source = inspect.getsource(PartialState.set_device)
    assert "self.local_process_index % device_module.device_count()" in source
    assert 'os.environ.get("LOCAL_RANK"' in inspect.getsource(PartialState.__init__)


def test_a_rank_chooses_its_devices_before_anything_that_may_ask_cuda_is_loaded(tmp_path):
    """CUDA reads its list once, when it is first asked; libraries ask when they are imported."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from machines import machine
from lingshu_rl import cli
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes import locks, placement
seen = []
real = placement.narrow
def narrow(policy, here):
    seen.append([name for name in ("transformers", "accelerate", "deepspeed", "vllm", "peft") if name in sys.modules])
    return real(policy, here)
placement.narrow, placement.this_machine = narrow, lambda: machine(4, "4,5,6,7")
import lingshu_rl.planning.plan
lingshu_rl.planning.plan.this_machine = placement.this_machine
os.environ |= {{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TMPDIR": {str(tmp_path)!r}}}
cli.settle(load_config(None, ["devices.policy=[2,3]"]))
assert seen == [[]], seen
assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_this_machine_is_what_the_process_was_started_with(monkeypatch):
    """The probe runs in a child; here it is a script that knows two cards, and torch one that knows CUDA."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(placement, "_PROBE", "print('card', 2**34, 'GPU-x'); print('card', 2**33, '')")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-x")
    placement.this_machine.cache_clear()
    try:
        here = placement.this_machine()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-x")
        assert placement.this_machine() is here
        assert [(g.index, g.name, g.gb, g.uuid) for g in here.gpus] == [(0, "7", 16.0, "GPU-x"), (1, "GPU-x", 8.0, "")]
        placement.this_machine.cache_clear()
        monkeypatch.setattr(placement, "_PROBE", "raise SystemExit('no driver')")
        with pytest.raises(ConfigError, match="could not be counted: no driver"):
            placement.this_machine()
    finally:
        placement.this_machine.cache_clear()


def test_an_engine_gets_its_devices_share_of_tensor_parallelism_and_memory():
    from lingshu_rl.rollout.server import vllm_command, vllm_options

    four = DeviceSet(machine(4).gpus)

    def value(option, *settings):
        command = vllm_command(load_config(None, settings), "m", four, port=1)
        return command[command.index(option) + 1]

    assert value("--tensor-parallel-size") == "4"
    assert value("--tensor-parallel-size", "rollout.vllm.pipeline_parallel_size=2") == "2"
    assert value("--tensor-parallel-size", "rollout.vllm.data_parallel_size=4") == "1"
    assert value("--gpu-memory-utilization") == "0.9"
    assert vllm_options(load_config(), "m", four, share=0.35)["gpu_memory_utilization"] == 0.35
    assert value("--gpu-memory-utilization", "rollout.vllm.gpu_memory_utilization=0.5") == "0.5"
    assert "gpu_memory_utilization" not in vllm_options(load_config(), "m", DeviceSet())


@pytest.mark.parametrize(
    ("settings", "gpus", "judge_gpus", "expected"),
    [
        (["judge.model=demo"], 4, 1, "0 1 2|3 -"),  # policy, judge, rollout and reference get the rest
        (["judge.model=demo"], 8, 2, "0 12 3|4|5|6|7 -"),
        (["judge.model=demo", "devices.judge=[3]"], 4, 1, "0 3 1|2 -"),
        (["judge.model=demo", "loss.kl_coef=0"], 2, 1, "0 1 own -"),
        ([], 2, 1, "0 - 1 -"),
    ],
)
def test_the_judge_gets_devices_of_its_own(settings, gpus, judge_gpus, expected):
    p = place(load_config(None, settings), machine(gpus), 1, 1, judge_gpus)
    others = [*p.rollout_servers, *(() if p.reference_shares else p.reference_replicas)]
    told = (numbers([p.policy]), numbers(p.judges), "own" if p.colocated else numbers(others), numbers([p.idle]))
    assert " ".join(x or "-" for x in told) == expected
    assert (
        ("judge" in p.describe()) == bool(p.judges) and set(p.judges) <= {*p.judges} and not set(p.judges) & {p.policy}
    )


def test_a_judge_does_not_overlap_and_does_not_come_for_nothing():
    with pytest.raises(ConfigError, match=r"devices\.judge and devices\.rollout|devices\.rollout and devices\.judge"):
        placed("judge.model=demo", "devices.judge=[1]", "devices.rollout=[1]", gpus=2)
    with pytest.raises(ConfigError, match="the judge need"):
        placed("judge.model=demo", gpus=1)
    with pytest.raises(ConfigError, match=r"no judge\.model"):
        load_config(None, ["devices.judge=[1]"])
    with pytest.raises(ConfigError, match=r"cluster=ray.*url"):
        load_config(None, ["judge.model=demo", "cluster=ray"])
