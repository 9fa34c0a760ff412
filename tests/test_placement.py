import os

import pytest

from lingshu_rl.config import ConfigError, load_config
from lingshu_rl.placement import DeviceSet, parse_devices, place


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
