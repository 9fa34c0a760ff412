"""Weights on their way to several servers: who gets what, and what a dead or hanging one does to the others."""

import asyncio
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch
from launching import ROOT
from stateful_engine import FAULTS, PARTS, Engine

from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.rollout import transfer as transfers
from lingshu_rl.rollout.client import RolloutClient, RolloutError
from lingshu_rl.rollout.transfer import (
    AdapterTransfer,
    FanOut,
    FileTransfer,
    NcclTransfer,
    local_address,
    make_transfer,
    master_address,
    watched,
    weight_transfer_kind,
)

WEIGHTS = {"a": torch.ones(3), "b": torch.zeros(2, 2)}


def policy():
    return SimpleNamespace(
        weights=lambda: iter(WEIGHTS.items()), share=lambda value: value, use_device=lambda: None, rank=0
    )


def transfer(tmp_path, handler, urls=("http://a", "http://b"), examine=None):
    client = RolloutClient(list(urls), token="t", decode=str, banned_ids=[], seed=0, temperature=1.0, max_tokens=4, timeout_s=5,
                           retries=0, concurrency=4, **({"examine": examine} if examine else {}))  # fmt: skip
    client.pool.http = httpx.AsyncClient(transport=httpx.MockTransport(handler))
    return client, FileTransfer(client, tmp_path)


def test_every_server_gets_the_same_sequence_and_the_version(tmp_path):
    calls = {"a": [], "b": []}

    def handler(request):
        calls[request.url.host].append(request.url.path)
        if request.url.path == "/update_weights":
            assert (tmp_path / json.loads(request.content)["update_info"]["file"]).exists()
        return httpx.Response(200, json={})

    async def send():
        client, files = transfer(tmp_path, handler)
        await files.send(policy(), version=4)
        assert [s.version for s in client.pool.servers] == [4, 4] and client.weight_version == 4
        await files.send(policy(), version=5, server="http://b")
        assert [s.version for s in client.pool.servers] == [4, 5]

    asyncio.run(send())
    once = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/reset_mm_cache",
            "/reset_encoder_cache"]  # fmt: skip
    assert calls == {"a": once, "b": once + once} and not list(tmp_path.iterdir())


def test_a_server_that_dies_during_a_transfer_is_left_out_and_the_others_get_all(tmp_path):
    seen = []

    def handler(request):
        if request.url.host == "b" and request.url.path == "/update_weights":
            raise httpx.ReadError("reset")
        seen.append((request.url.host, request.url.path))
        return httpx.Response(200, json={})

    async def send():
        async def died(server):
            client.pool.mark(server, alive=False, up=False)
            return True

        client, files = transfer(tmp_path, handler, examine=died)
        await files.send(policy(), version=1)
        return client

    client = asyncio.run(send())
    assert [s.url for s in client.pool.up] == ["http://a"]
    assert ("a", "/finish_weight_update") in seen and ("b", "/finish_weight_update") not in seen


def test_a_server_that_refuses_the_weights_is_an_error_with_its_answer(tmp_path):
    def handler(request):
        bad = request.url.host == "b" and request.url.path == "/update_weights"
        return httpx.Response(500, text="shape mismatch") if bad else httpx.Response(200, json={})

    with pytest.raises(RolloutError, match=r"http://b/update_weights answered 500: shape mismatch"):
        asyncio.run(transfer(tmp_path, handler)[1].send(policy(), version=1))
    assert not list(tmp_path.iterdir())


def test_a_prefix_cache_that_is_still_held_is_reset_again_until_it_is(tmp_path, monkeypatch):
    """vLLM answers 200 and `success: false` while a request holds blocks; old prefixes would go on being served."""
    refusals, calls = {"a": 2, "b": 0}, {"a": [], "b": []}

    def handler(request):
        host, route = request.url.host, request.url.path
        calls[host].append(route)
        if route != "/reset_prefix_cache":
            return httpx.Response(200, json={})
        refusals[host] -= 1
        return httpx.Response(200, json={"success": refusals[host] < 0})

    client, files = transfer(tmp_path, handler)
    asyncio.run(files.send(policy(), version=4))
    assert [calls[host].count("/reset_prefix_cache") for host in "ab"] == [3, 1]
    assert calls["a"][-2:] == ["/reset_mm_cache", "/reset_encoder_cache"]
    assert [s.version for s in client.pool.servers] == [4, 4]

    refusals["b"] = 10**9
    monkeypatch.setattr(transfers, "RESET_S", 0.1)
    client, files = transfer(tmp_path, handler)
    with pytest.raises(RolloutError, match=r"http://b still keeps its prefix cache .* who else uses this server"):
        asyncio.run(files.send(policy(), version=5))
    assert client.pool.by_url("http://b").version == 0


SENT = [f"{layer}.{part}" for layer in "xyz" for part in range(PARTS)]
FILE_ROUTES = ("/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")  # fmt: skip


def versioned(version):
    """A policy of nine tensors with the version in each."""
    values = {name: torch.tensor([100.0 * version + number]) for number, name in enumerate(SENT)}
    return SimpleNamespace(weights=lambda: iter(values.items()), share=lambda value: value)


def layers_of(version):
    return {layer: [100.0 * version + PARTS * n + part for part in range(PARTS)] for n, layer in enumerate("xyz")}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("route", FILE_ROUTES)
def test_no_failure_of_a_route_at_any_moment_leaves_the_engine_with_other_weights(route, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "FILE_BYTES", 16)  # four tensors a file, so that files end within layers
    engine = Engine(tmp_path)
    client, files = transfer(tmp_path, engine.handler, urls=["http://a"])
    client.pool.retries = 1
    asyncio.run(files.send(versioned(1), 1))
    assert engine.holds == layers_of(1)
    engine.fails = {route: fault}
    asyncio.run(files.send(versioned(2), 2))
    assert engine.holds == layers_of(2) and engine.version == "2" and not engine.fails
    assert client.weight_version == 2 and not engine.open and not list(tmp_path.iterdir())


@pytest.mark.parametrize("waiting", [{}, {"x": [7.0]}, {"x": [7.0], "y": [8.0, 9.0, 10.0]}])
def test_an_update_that_a_killed_run_left_open_hinders_the_next_one_in_nothing(waiting, tmp_path):
    engine = Engine(tmp_path)
    client, files = transfer(tmp_path, engine.handler, urls=["http://a"])
    client.pool.retries = 1
    engine.open, engine.waiting = True, waiting
    asyncio.run(files.send(versioned(3), 3))
    assert engine.holds == layers_of(3)


def test_a_server_that_stays_out_of_order_is_started_again_or_named(tmp_path):
    def broken(request):
        return httpx.Response(500 if request.url.path.endswith("weight_update") else 200, text="stuck")

    client, files = transfer(tmp_path, broken, urls=["http://a"])
    client.pool.retries = 1
    with pytest.raises(RolloutError, match=r"finish_weight_update answered 500|start it again") as told:
        asyncio.run(files.send(versioned(1), 1))
    assert "http://a cannot take new weights any more: start it again" in str(told.value)
    killed = []

    async def restart(server):
        killed.append(server.url)
        client.pool.mark(server, alive=False, up=False)
        return True

    files.restart = restart
    asyncio.run(files.send(versioned(1), 1))
    assert killed == ["http://a"] and not client.pool.up


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("route", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache"])
def test_no_failure_of_a_route_leaves_the_engine_with_other_adapters(route, fault, tmp_path):
    def policy_of(version):
        def save(folder):
            folder.mkdir()
            (folder / "adapter").write_text(f"version {version}")

        return SimpleNamespace(save_adapter=save, share=lambda value: value)

    engine = Engine(tmp_path)
    client, _ = transfer(tmp_path, engine.handler, urls=["http://a"])
    client.pool.retries = 1
    adapters = AdapterTransfer(client, tmp_path)
    for version in (1, 2, 3):
        engine.fails = {route: fault} if version == 2 else {}
        asyncio.run(adapters.send(policy_of(version), version))
        assert engine.adapters[client.sampling["model"]] == f"version {version}"
    assert len(engine.adapters) <= 2 and not list(tmp_path.iterdir())


PLACES = {"gpu": (True, True), "cpu": (False, False), "gpu policy": (True, False), "gpu servers": (False, True)}
LORA = "train.lora={r: 4, target_modules: [q_proj, v_proj]}"


@pytest.mark.parametrize(
    ("settings", "place", "ours", "kind"),
    [
        ([], "gpu", True, "nccl"), ([], "gpu", False, "nccl"), ([], "cpu", True, "file"),
        ([], "gpu policy", True, "file"), ([], "gpu servers", True, "file"),
        (["rollout.weight_transfer=file"], "gpu", True, "file"),
        ([LORA], "gpu", True, "adapter"), ([LORA], "cpu", True, "adapter"),
        ([LORA], "gpu", False, "nccl"), ([LORA], "cpu", False, "file"),
        ([LORA, "rollout.weight_transfer=nccl"], "gpu", True, "nccl"),
        ([LORA, "rollout.weight_transfer=adapter"], "cpu", False, "adapter"),
        (["train.lora={r: 4, target_modules: [q_proj], use_dora: true}"], "gpu", True, "nccl"),
        (["train.lora={r: 4, target_modules: all-linear}"], "cpu", True, "file"),
        ([LORA, "rollout.placement=colocate"], "gpu", True, "in_process"),
    ],
)  # fmt: skip
def test_how_weights_travel(settings, place, ours, kind):
    config, (policy_on_gpu, servers_on_gpu) = load_config(None, settings), PLACES[place]
    where = {"policy_on_gpu": policy_on_gpu, "servers_on_gpu": servers_on_gpu, "ours": ours}
    where["colocated"] = config.rollout.placement == "colocate"
    assert weight_transfer_kind(config, **where) == kind
    if kind != "in_process":
        made = make_transfer(kind, None, folder=None, timeout_s=1, dead=lambda: "")
        assert type(made) is {"file": FileTransfer, "nccl": NcclTransfer, "adapter": AdapterTransfer}[kind]


@pytest.mark.parametrize(
    ("settings", "place", "told"),
    [
        (["rollout.weight_transfer=nccl"], "gpu policy", "needs policy and rollout on GPUs"),
        (["rollout.weight_transfer=adapter", "train.lora={r: 4, target_modules: [gate_proj]}"], "gpu",
         r"module\(s\) such as model\.visual\..*use auto"),
    ],
)  # fmt: skip
def test_weights_that_cannot_travel_as_asked_are_refused(settings, place, told):
    policy_on_gpu, servers_on_gpu = PLACES[place]
    with pytest.raises(ConfigError, match=told):
        weight_transfer_kind(
            load_config(None, settings), policy_on_gpu=policy_on_gpu, servers_on_gpu=servers_on_gpu, ours=True
        )


NETWORKS = "ip link set lo up; ip addr add 10.1.0.1/24 dev lo; ip addr add 10.2.0.1/24 dev lo"


def test_the_master_address_is_one_that_the_servers_reach(tmp_path):
    """In a network namespace: a host with two networks. The host's own name points to neither of them, or nowhere."""
    assert local_address("http://127.0.0.1:8000") == "127.0.0.1" == master_address(["http://localhost:1"])
    code = (
        "from lingshu_rl.rollout.transfer import master_address as m;"
        "print(m(['http://10.2.0.7:8000']), m(['http://127.0.0.1:1', 'http://10.1.0.9:8000/']))"
    )
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-ec", f'{NETWORKS}; exec "$0" -c "$1"']
    done = subprocess.run([*command, sys.executable, code], cwd=ROOT, capture_output=True, text=True)
    if subprocess.run([*command[:4], "true"]).returncode or not shutil.which("ip"):
        pytest.skip("no network namespaces here")
    assert done.stdout.split() == ["10.2.0.1", "10.1.0.1"], done.stderr


def test_a_call_that_hangs_ends_with_what_died_or_how_long_it_took():
    never = threading.Event()
    began = time.monotonic()
    with pytest.raises(
        RolloutError, match=r"(?s)sending the weights cannot finish: rollout server 1 was killed.*r1\.log"
    ):
        asyncio.run(
            watched(
                never.wait, what="sending the weights", timeout_s=60, dead=lambda: "rollout server 1 was killed; r1.log"
            )
        )
    with pytest.raises(RolloutError, match=r"sending the weights took over 0 s .*hanging"):
        asyncio.run(watched(never.wait, what="sending the weights", timeout_s=0.1, dead=lambda: ""))
    assert time.monotonic() - began < 20
    with pytest.raises(KeyError, match="from the call"):
        asyncio.run(watched(lambda: {}["from the call"], what="x", timeout_s=5, dead=lambda: ""))
    asyncio.run(watched(lambda: None, what="x", timeout_s=5, dead=lambda: ""))
    never.set()


@pytest.fixture
def gpu_servers():
    """Stand-ins for vLLM servers of 2 and 4 GPUs that keep what they are told."""
    made = []
    for size in (2, 4):

        class Handler(http.server.BaseHTTPRequestHandler):
            gpus, got, refuse = size, [], ""

            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                route = self.path.strip("/")
                self.got.append((route, json.loads(body) if body else None, self.headers["authorization"]))
                self.send_response(500 if route == type(self).refuse else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"world_size": self.gpus}).encode())

            do_GET = do_POST = answer

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.append((f"http://127.0.0.1:{server.server_address[1]}", Handler, server))
    yield [(url, handler) for url, handler, _ in made]
    for *_, server in made:
        server.shutdown()


def test_one_communicator_gives_every_server_its_own_ranks(gpu_servers):
    fan_out = FanOut([url for url, _ in gpu_servers], {"Authorization": "Bearer secret"}, 5)
    assert sum(fan_out.sizes()) == 6
    fan_out.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    fan_out.start_weight_update()
    fan_out.update_weights({"names": ["a"]})
    fan_out.finish_weight_update()
    for (_, handler), offset in zip(gpu_servers, (1, 3), strict=True):
        told = [
            (route, body)
            for route, body, token in handler.got
            if token == "Bearer secret" and route != "get_world_size"
        ]
        assert told == [
            ("init_weight_transfer_engine", {"init_info": {"rank_offset": offset, "world_size": 7}}),
            ("start_weight_update", None),
            ("update_weights", {"update_info": {"names": ["a"]}}),
            ("finish_weight_update", {"weight_version": None}),
        ]
    gpu_servers[1][1].refuse = "update_weights"
    with pytest.raises(RolloutError, match=f"{gpu_servers[1][0]}/update_weights answered 500"):
        fan_out.update_weights({"names": ["a"]})


def test_a_server_that_joins_again_gets_a_communicator_of_its_own_and_the_next_send_joins_all(monkeypatch):
    """The order of calls around vLLM's NCCL engine, which itself needs CUDA."""
    joined, sent = [], []

    def connect(self, policy, urls):
        joined.append(urls)
        self.engine = SimpleNamespace(send_weights=lambda: sent.append(urls))

    monkeypatch.setattr(NcclTransfer, "_connect", connect)

    async def story():
        client, _ = transfer(None, lambda request: httpx.Response(200, json={}))
        nccl, (a, b) = NcclTransfer(client, 5), client.pool.servers
        await nccl.send(policy(), 1)
        await nccl.send(policy(), 2)
        client.pool.mark(b, alive=False, up=False)
        await nccl.send(policy(), 3)
        client.pool.mark(b, alive=True, up=False)
        await nccl.send(policy(), 3, server=b.url)
        client.pool.mark(b, alive=True, up=True)
        assert (a.version, b.version) == (3, 3)
        await nccl.send(policy(), 4)
        for server in (a, b):
            client.pool.mark(server, alive=False, up=False)
        await nccl.send(policy(), 5)

    asyncio.run(story())
    both, one, other = ["http://a", "http://b"], ["http://a"], ["http://b"]
    assert joined == [both, one, other, both] and sent == [both, both, one, other, both]
