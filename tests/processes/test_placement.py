import os

import pytest

from lingshu_rl.config import ConfigError, load_config
from lingshu_rl.processes.placement import DeviceSet, parse_devices, place


def placed(*settings, gpus=0, ranks=1):
    return place(load_config(None, settings), gpus, ranks)


def test_without_gpus_every_group_runs_on_the_cpu():
    p = placed()
    assert (str(p.policy), str(p.rollout), str(p.reference), p.idle_gpus) == ("cpu", "cpu", "cpu", ())


def test_gpus_are_dealt_without_overlap():
    p = placed(gpus=8, ranks=4)
    assert (p.policy.gpus, p.reference.gpus, p.rollout.gpus) == ((0, 1, 2, 3), (7,), (4, 5, 6))


def test_named_devices_leave_the_rest_idle_and_say_so():
    p = placed("devices.policy=[0]", "devices.rollout=[1]", "devices.reference=cpu", gpus=4)
    assert p.idle_gpus == (2, 3)
    assert "cuda:2,3" in p.describe()["idle"]


@pytest.mark.parametrize(
    ("settings", "gpus", "ranks", "message"),
    [
        (
            ["devices.policy=[0]", "devices.rollout=[0]"],
            4,
            1,
            "GPU 0 is given to both devices.policy and devices.rollout",
        ),
        (["devices.rollout=[9]"], 4, 1, "names GPU 9, but this machine has 4"),
        (["devices.policy=[0,0]"], 4, 2, "names a GPU twice"),
        (["devices.policy=[0,1]"], 4, 1, "accelerate started 1"),
        ([], 2, 1, "need at least 3 GPUs"),
        (["devices.policy=tpu"], 0, 1, "use auto, cpu"),
        (["devices.policy=cpu:4096"], 0, 1, "may not use core"),
    ],
)
def test_impossible_placements_are_refused(settings, gpus, ranks, message):
    with pytest.raises(ConfigError, match=message):
        placed(*settings, gpus=gpus, ranks=ranks)


def test_groups_that_are_not_started_get_nothing():
    assert placed("loss.kl_coef=0", gpus=2).reference is None
    p = placed("rollout.urls=[http://a]", "reference.urls=[http://b]")
    assert p.rollout is None and p.reference is None
    assert "rollout.urls" in p.describe()["rollout"]


def test_cores_bind_the_child_process():
    core = min(os.sched_getaffinity(0))
    devices = parse_devices("rollout", f"cpu:{core}")
    assert devices == DeviceSet(cores=(core,))
    assert devices.command_prefix() == ["taskset", "-c", str(core)]
    assert devices.env() == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    assert parse_devices("policy", "cuda:0-2").gpus == (0, 1, 2)
    assert DeviceSet(gpus=(1, 3)).env() == {"CUDA_VISIBLE_DEVICES": "1,3"}


def shares(*settings, gpus=8, ranks=4):
    p = placed(*settings, gpus=gpus, ranks=ranks)
    return [str(d) for d in p.rollout_servers], [str(d) for d in p.reference_replicas]


def test_a_groups_devices_are_shared_by_its_servers():
    assert shares() == (["cuda:4,5,6"], ["cuda:7"])
    assert shares("devices.rollout=[3,4,5,6]", "devices.policy=[0]", "rollout.servers=2", "devices.reference=[1,2]", ranks=1) == (
        ["cuda:3,4", "cuda:5,6"], ["cuda:1", "cuda:2"])  # fmt: skip
    tensor_parallel = ["rollout.vllm.tensor_parallel_size=2", "devices.rollout=[0,1,2,3]", "devices.policy=[4]"]
    assert shares(*tensor_parallel, "devices.reference=[6,7]", "reference.tensor_parallel=2", ranks=1) == (
        ["cuda:0,1", "cuda:2,3"], ["cuda:6,7"])  # fmt: skip
    assert shares("rollout.servers=2", "reference.replicas=3", gpus=0) == (["cpu"] * 2, ["cpu"] * 3)
    core = min(os.sched_getaffinity(0))
    assert shares(f"devices.rollout=cpu:{core}", "rollout.servers=1", gpus=0)[0] == [f"cpu:{core}"]
    assert [str(d) for d in DeviceSet(cores=(0, 1, 2, 3)).split(2)] == ["cpu:0,1", "cpu:2,3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["devices.rollout=[1,2,3]", "rollout.servers=2"],
            r"rollout.servers=2, but devices.rollout=cuda:1,2,3 cannot be divided",
        ),
        (["devices.rollout=[1,2,3]", "rollout.vllm.tensor_parallel_size=2"], "has 3 GPUs; 1 server"),
        (["devices.reference=[1,2]", "reference.replicas=2", "reference.tensor_parallel=2"], "need 4"),
        (["rollout.urls=[http://a]", "rollout.servers=2"], "has no effect beside the URLs"),
        (["reference.urls=[http://a]", "reference.replicas=2"], "has no effect beside the URLs"),
    ],
)
def test_devices_that_do_not_divide_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        placed("devices.policy=[0]", *settings, gpus=8)


def test_each_server_gets_its_share_of_tensor_parallelism():
    from lingshu_rl.rollout.server import vllm_command

    def size(*settings):
        command = vllm_command(load_config(None, settings), "m", DeviceSet(gpus=(0, 1, 2, 3)), port=1)
        return command[command.index("--tensor-parallel-size") + 1]

    assert (size(), size("rollout.vllm.pipeline_parallel_size=2")) == ("4", "2")


def test_a_colocated_engine_takes_no_device_of_its_own():
    p = placed("rollout.placement=colocate", "loss.kl_coef=0", gpus=1)
    assert p.policy.gpus == (0,) and p.rollout is None and p.rollout_servers == () and p.idle_gpus == ()
    p = placed("rollout.placement=colocate", "loss.kl_coef=0", gpus=2, ranks=2)
    assert p.policy.gpus == (0, 1) and p.rollout_servers == () and p.idle_gpus == ()
    for beside in ("rollout.urls=[http://a]", "rollout.servers=2", "devices.rollout=cpu", "train.max_staleness=1"):
        with pytest.raises(ConfigError, match="in the policy's process"):
            load_config(None, ["rollout.placement=colocate", beside])
