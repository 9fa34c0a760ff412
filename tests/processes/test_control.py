"""What ranks tell each other: prompts by name, images not at all, and a rank that dies ends the others' wait."""

import os
import socket
import time
from dataclasses import replace

import pytest
import torch

from lingshu_rl.processes.control import Control, use_route_to_main
from lingshu_rl.types import Prompt, TokenGroup


def alone(known):
    control = Control(0, 1)
    control.know(known)
    return control


def prompt(name, image):
    return Prompt(name, ({"role": "user", "content": "?"},), (image,), "A", (), "open", {})


def test_prompts_travel_by_name_and_come_out_as_the_receivers_own():
    here = {"q": prompt("q", b"pixels" * 10_000)}
    there = {"q": prompt("q", "/mnt/elsewhere/q.png")}
    message = alone(here).pack({"group": (here["q"], [1, 2]), "again": here["q"], "changed": prompt("q", b"blank")})
    assert len(message) < 1_000
    heard = alone(there).unpack(message)
    assert heard["group"] == (there["q"], [1, 2]) and heard["again"] is there["q"]
    assert heard["changed"].images == (b"blank",)  # not the one that both have, so it goes as it is
    with pytest.raises(LookupError, match=r"has not loaded 'q'.*data files differ"):
        alone({}).unpack(message)


def test_a_message_of_four_images_of_a_megapixel_is_small():
    """92 MB of float32 patches in Qwen2.5-VL's form, which are left out: who computes a group makes them."""
    vision = {"pixel_values": torch.empty(4900, 1176), "image_grid_thw": torch.tensor([[1, 70, 70]])}
    ids = tuple(range(1300))
    groups = [TokenGroup(str(n), ids, ((1, 2, 3),) * 8, vision) for n in range(4)]
    light = [replace(group, vision=None) for group in groups]
    assert len(alone({}).pack(groups[:1])) > 20_000_000
    heard = alone({}).unpack(message := alone({}).pack(light))
    assert len(message) < 30_000 and heard == light


def _rank(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    control = Control(rank, 2)
    control.barrier()
    if rank == 0:
        time.sleep(0.5)
        os._exit(9)
    control.share(None)


def test_a_main_rank_that_dies_ends_the_others_wait():
    """A wait that may take days must not be one for a rank that is no longer there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [9, 1]


def test_gloo_takes_the_interface_that_leads_to_the_main_rank(monkeypatch):
    import psutil

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    use_route_to_main()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_route_to_main()
    loopback = os.environ["GLOO_SOCKET_IFNAME"]
    assert "127.0.0.1" in [address.address for address in psutil.net_if_addrs()[loopback]]
