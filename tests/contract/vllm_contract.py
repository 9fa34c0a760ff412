"""What this library asks of vLLM, asked of vLLM's own classes: every `check_*` is one question.

test_vllm.py asks the installed CPU package. Started as a script, this file asks whichever vLLM stands first on PYTHONPATH
(the unpacked CUDA wheel, whose compiled parts are not needed for any of it).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import queue
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from tiny_models import build  # noqa: E402

from lingshu_rl.config import LORA_RANKS, more_than_adapters  # noqa: E402
from lingshu_rl.model import weights  # noqa: E402
from lingshu_rl.planning.given import load_config  # noqa: E402
from lingshu_rl.processes.placement import DeviceSet  # noqa: E402
from lingshu_rl.processes.workers import free_port  # noqa: E402
from lingshu_rl.rollout import vllm_plugin  # noqa: E402
from lingshu_rl.rollout.client import RolloutClient  # noqa: E402
from lingshu_rl.rollout.server import vllm_command, vllm_env  # noqa: E402
from lingshu_rl.rollout.transfer import PACKED_BUFFER_BYTES, NcclTransfer, policy_source  # noqa: E402

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def use_some_platform() -> None:
    """vLLM's CUDA package knows no platform on a machine without a GPU, and its argument parser asks for one."""
    from vllm import platforms

    if platforms.current_platform.device_type == "":
        from vllm.platforms.cpu import CpuPlatform

        platforms._current_platform = CpuPlatform()


class Trained:
    """A policy as the transfers see it: rank 0, or another one."""

    def __init__(self, rank: int = 0, mixed: bool = False) -> None:
        self.model, self.rank, self.passes = weights.add_adapters(build("qwen2_5_vl"), LORA).bfloat16(), rank, 0
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.25)
        if (
            mixed
        ):  # an odd number of bfloat16 values first, so that float32 ones do not start at a multiple of four bytes
            self.model.get_base_model().odd = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
            self.model.get_base_model().lm_head.float()

    def weights(self) -> Any:
        self.passes += 1
        return weights.weights(self.model)

    def weight_shapes(self) -> Any:
        return weights.weight_shapes(self.model)

    def share(self, value: Any) -> Any:
        return value

    def use_device(self) -> None:
        pass


class Wire:
    """In place of PyNcclCommunicator: what rank 0 broadcasts comes out at every other rank, in order."""

    def __init__(self, ranks: int) -> None:
        self.pipes = [queue.Queue() for _ in range(ranks)]
        self.sizes: list[int] = []
        self.open = 0

    def end(self, rank: int) -> Any:
        def broadcast(tensor: torch.Tensor, src: int, stream: Any = None) -> None:
            assert src == 0
            if rank:
                tensor.copy_(self.pipes[rank].get(timeout=30))
                return
            self.sizes.append(tensor.numel() * tensor.element_size())
            for pipe in self.pipes[1:]:
                pipe.put(tensor.clone())

        self.open += 1
        return SimpleNamespace(broadcast=broadcast, destroy=lambda: setattr(self, "open", self.open - 1))


@contextlib.contextmanager
def without_cuda(wire: Wire | None = None):
    """vLLM's NCCL engines with streams that do nothing and, for the communicator, the wire."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    changes = {
        (packed_tensor, "_get_streams"): lambda device, number: (stream,) * number,
        (torch.cuda, "stream"): lambda s: contextlib.nullcontext(),
        (torch.cuda, "current_stream"): lambda *a: stream,
        (torch.accelerator, "current_device_index"): lambda: 0,
        (torch.accelerator, "synchronize"): lambda *a: None,
    }
    if wire is not None:
        changes |= {
            (nccl_engine, "open_trainer_endpoint"): lambda info: wire.end(0),
            (nccl_engine, "worker_init_process_group"): lambda info, parallel: wire.end(
                info.rank_offset + parallel.rank
            ),
        }
    with contextlib.ExitStack() as stack:
        for (where, name), value in changes.items():
            stack.enter_context(mock.patch.object(where, name, value))
        yield


class Engine:
    """vLLM's worker-side NCCL engine behind vLLM's own routes; between them, what AsyncLLM and the worker pass on."""

    def __init__(self, busy: int) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        class Worker(NCCLWeightTransferEngine):
            def start_weight_update(self) -> None:
                got.clear()

            def finish_weight_update(self) -> None:
                pass

        self.got = got = {}
        self.calls: list[Any] = []
        self.busy = busy  # times that the prefix cache is still held
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0, world_size_across_dp=1)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, model_config=None)
        model = SimpleNamespace(load_weights=lambda pairs: got.update({n: t.clone() for n, t in pairs}))
        self.worker = Worker(None, self.vllm_config, torch.device("cpu"), model)

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self.calls.append(request.init_info)
        self.worker.init_transfer_engine(self.worker.parse_init_info(request.init_info))

    async def shutdown_weight_transfer_engine(self) -> None:
        self.worker.shutdown()

    async def start_weight_update(self) -> None:
        self.worker.start_weight_update()

    async def update_weights(self, request: Any) -> None:
        await asyncio.to_thread(self.worker.update_weights, request.update_info)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.worker.finish_weight_update()

    async def reset_prefix_cache(self, running: bool, external: bool) -> bool:
        self.busy -= 1
        self.calls.append("prefix")
        return self.busy < 0

    async def reset_mm_cache(self) -> None:
        self.calls.append("mm")

    async def reset_encoder_cache(self) -> None:
        self.calls.append("encoder")


@contextlib.contextmanager
def serving(engine: Any):
    """A server with vLLM's own development and weight-transfer routes."""
    from vllm.entrypoints.rl.factories import register_rl_api_routers
    from vllm.entrypoints.serve import register_vllm_dev_api_routers

    app = FastAPI()
    register_vllm_dev_api_routers(app)
    register_rl_api_routers(app)
    app.state.engine_client = engine
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def _client(urls: list[str]) -> RolloutClient:
    return RolloutClient(urls, token="t", decode=str, banned_ids=[5], seed=0, temperature=1.0, max_tokens=4, timeout_s=30,
                         retries=0, concurrency=4)  # fmt: skip


def check_nccl_brings_every_weight_to_every_server() -> None:
    """Our source, settings, control calls and cache resets through vLLM's trainer side, routes and worker side."""
    for mixed in (False, True):
        wire, policy, engines = Wire(3), Trained(mixed=mixed), [Engine(busy=2), Engine(busy=0)]
        with without_cuda(wire), serving(engines[0]) as one, serving(engines[1]) as two:

            async def send(policy=policy, urls=(one, two)) -> RolloutClient:
                client = _client(list(urls))
                transfer = NcclTransfer(client, 60.0)
                for version in (1, 2):
                    with torch.no_grad():
                        policy.model.get_base_model().lm_head.weight.add_(1.0)
                    await transfer.send(policy, version)
                await transfer.send(policy, 2, server=urls[1])
                await client.close()
                return client

            client = asyncio.run(send())
        expected = dict(policy.weights())
        for engine in engines:
            assert engine.got.keys() == expected.keys()
            assert all(torch.equal(engine.got[name], tensor) for name, tensor in expected.items())
        assert [server.version for server in client.pool.servers] == [2, 2]
        first = [call for call in engines[0].calls if isinstance(call, dict)]
        assert [call["rank_offset"] for call in first] == [1] and first[0]["master_address"] == "127.0.0.1"
        assert [call["rank_offset"] for call in engines[1].calls if isinstance(call, dict)] == [2, 1]
        assert engines[0].calls[1:] == ["prefix", "prefix", "prefix", "mm", "encoder", "prefix", "mm", "encoder"]
        assert first[0]["packed"] is not mixed and first[0]["packed_buffer_size_bytes"] == PACKED_BUFFER_BYTES


def check_other_ranks_only_read_the_weights() -> None:
    policy = Trained(rank=1)
    policy.share = lambda value: ["http://127.0.0.1:1"]
    with without_cuda(Wire(2)):
        asyncio.run(NcclTransfer(None, 30.0).send(policy, 1))
    assert policy.passes == 1


def check_the_source_says_beforehand_what_it_yields() -> None:
    from vllm.distributed.weight_transfer import WeightSource
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    source = policy_source(Trained())
    assert isinstance(source, WeightSource)
    meta = source.metadata()
    sent = list(NCCLTrainerWeightTransferEngine._checked_iter(source, meta))
    assert len(sent) == len(meta) > 40


def check_buffers_leave_room_on_a_24_gb_card() -> None:
    """Two neighbouring buffers at their largest, for Qwen2.5-VL 3B: less than what vLLM leaves free of 24 GB (8 %)."""
    import transformers
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(
                text_config={
                    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                },
                vision_config={"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
                tie_word_embeddings=True,
            )
        ).bfloat16()  # fmt: skip
    sizes: list[int] = []
    group = SimpleNamespace(broadcast=lambda tensor, src: sizes.append(tensor.numel()))
    with without_cuda():
        packed_nccl_broadcast_producer(
            iterator=weights.weights(model), group=group, src=0, post_iter_func=lambda item: item[1],
            buffer_size_bytes=PACKED_BUFFER_BYTES, num_buffers=2,
        )  # fmt: skip
    assert sum(sizes) > 7e9
    assert max(a + b for a, b in itertools.pairwise(sizes)) < 0.08 * 24e9


def check_the_command_line_is_one_that_vllm_takes() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vllm = "rollout.vllm={max_model_len: 99, enable_prefix_caching: false, limit_mm_per_prompt: {image: 2}}"
    lora = "train.lora={r: 9, target_modules: [q_proj]}"
    parser = make_arg_parser(FlexibleArgumentParser())
    for settings, gpus, transfer in (
        ([vllm], (), "file"),
        ([lora], (), "adapter"),
        (["train.dtype=bfloat16"], (2, 3), "nccl"),
        ([lora, "rollout.vllm={gpu_memory_utilization: 0.5}"], (0,), "adapter"),
    ):
        command = vllm_command(load_config(None, settings), "m", DeviceSet(gpus=gpus), port=1, transfer=transfer)
        module = command[command.index("-m") + 1]
        assert __import__(module, fromlist=["run_server"]).run_server
        given = parser.parse_args(command[command.index("-m") + 2 :])
        validate_parsed_serve_args(given)
        assert given.weight_transfer_config.backend == ("nccl" if transfer == "nccl" else vllm_plugin.BACKEND)
        assert given.tensor_parallel_size == max(1, len(gpus)) and given.served_model_name == ["policy"]
        assert not given.enable_lora or given.max_lora_rank == 16
        assert bool(given.enable_lora) == (transfer == "adapter")
        assert given.enable_prefix_caching is (False if settings == [vllm] else None)


def check_the_environment_is_one_that_vllm_reads() -> None:
    from vllm import envs

    ours = vllm_env(DeviceSet(cores=(0,)), token="t", transfer_dir=Path("."), extra={})
    names = {name for name in ours if name.startswith("VLLM_")} | {"VLLM_ENABLE_V1_MULTIPROCESSING"}
    assert len(names) > 4 and names <= set(envs.environment_variables)


def check_the_plugin_brings_its_engine() -> None:
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory as factory
    from vllm.model_executor.model_loader import reload

    vllm_plugin.register()  # in a server that shares the environment and is none of ours
    assert vllm_plugin.BACKEND not in factory._registry
    with mock.patch.dict("os.environ", {vllm_plugin.OURS_ENV: "1"}):
        vllm_plugin.register()
        vllm_plugin.register()  # vLLM loads plugins in each of its processes, and sometimes twice
    got: dict[str, torch.Tensor] = {}
    model = torch.nn.Linear(2, 2)
    model.load_weights = lambda pairs: got.update(pairs)
    config = SimpleNamespace(parallel_config=None, model_config="the model's")
    steps = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict("os.environ", {vllm_plugin.TRANSFER_DIR_ENV: folder}),
        mock.patch.object(reload, "initialize_layerwise_reload", lambda m: steps.append(m)),
        mock.patch.object(reload, "finalize_layerwise_reload", lambda m, c: steps.append((m, c))),
    ):
        from safetensors.torch import save_file

        save_file({"weight": torch.ones(2, 2)}, Path(folder, "weights.safetensors"))
        engine = factory.create_engine(
            WeightTransferConfig(backend=vllm_plugin.BACKEND), config, torch.device("cpu"), model
        )
        engine.init_transfer_engine(engine.parse_init_info({}))
        engine.start_weight_update()
        engine.update_weights({"file": "weights.safetensors"})
        engine.finish_weight_update()
    assert steps == [model, (model, "the model's")] and torch.equal(got["weight"], torch.ones(2, 2))
    real = inspect.signature(reload.finalize_layerwise_reload).parameters
    assert len(real) == 2 and len(inspect.signature(reload.initialize_layerwise_reload).parameters) == 1


def check_processes_on_a_cpu_sleep_between_looks_at_their_queues() -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    slept: list[float] = []
    with (
        mock.patch.object(shm_broadcast, "sched_yield", shm_broadcast.sched_yield),
        mock.patch.object(vllm_plugin.time, "sleep", slept.append),
    ):
        vllm_plugin.wait_idly_on_cpu()
        condition = shm_broadcast.SpinCondition.__new__(shm_broadcast.SpinCondition)
        condition.is_reader, condition.busy_loop_s = True, 1.0
        condition.record_read()
        condition.wait()
    assert slept == [vllm_plugin.LOOK_S]


def check_adapters_are_refused_where_vllm_refuses_them() -> None:
    from peft import LoraConfig
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    room = LoRAConfig(max_lora_rank=512, max_loras=1)
    for extra in (
        {}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 32}}, {"alpha_pattern": {"q_proj": 32}},
        {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.1}, {"layers_to_transform": [0]}, {"use_dora": True},
        {"bias": "all"}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"}, {"layer_replication": [[0, 1]]}, {"use_qalora": True}, {"r": 1024},
        {"trainable_token_indices": [1]}, {"alora_invocation_tokens": [1]},
    ):  # fmt: skip
        lora = LORA | extra
        try:
            PEFTHelper.from_dict(LoraConfig(**lora).to_dict()).validate_legal(room)
            refused = False
        except ValueError:
            refused = True
        assert not refused or more_than_adapters(lora), extra
        assert bool(more_than_adapters(lora)) == (
            refused or bool(extra.keys() & {"trainable_token_indices", "bias"})
        ), extra


def check_adapters_as_we_write_them_load() -> None:
    import typing

    from vllm.config import lora as settings
    from vllm.config.lora import LoRAConfig
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    assert set(LORA_RANKS) <= set(typing.get_args(settings.MaxLoRARanks))
    policy = Trained()
    with tempfile.TemporaryDirectory() as folder:
        weights.save_adapter(policy.model, Path(folder))
        helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
        helper.validate_legal(LoRAConfig(max_lora_rank=8, max_loras=1))
        loaded = LoRAModel.from_local_checkpoint(
            folder, {"q_proj", "v_proj"}, helper, lora_model_id=1, device="cpu", dtype=torch.bfloat16
        )
    trained = {name: tensor for name, tensor in policy.model.named_parameters() if "lora_B" in name}
    assert len(loaded.loras) == len(trained) == 6
    for name, layer in loaded.loras.items():
        assert torch.equal(layer.lora_b, trained[f"base_model.model.{name}.lora_B.default.weight"]), name
    LoadLoRAAdapterRequest(lora_name="policy-1", lora_path="x")
    UnloadLoRAAdapterRequest(lora_name="policy-1")


def check_requests_and_answers_have_the_fields_we_use() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionRequest,
        ChatCompletionResponse,
        ChatCompletionResponseChoice,
    )

    client = _client(["http://127.0.0.1:1"])
    asyncio.run(client.close())
    body = {**client.sampling, "messages": [{"role": "user", "content": "?"}], "n": 2, "seed": 3}
    request = ChatCompletionRequest(**body)
    assert not request.model_extra and body.keys() <= ChatCompletionRequest.model_fields.keys()
    assert "prompt_token_ids" in ChatCompletionResponse.model_fields
    assert {"token_ids", "logprobs", "finish_reason", "index"} <= ChatCompletionResponseChoice.model_fields.keys()


def check_the_engine_in_this_process_has_the_calls_we_make() -> None:
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    for owner, name, arguments in (
        (LLM, "apply_model", ["func"]),
        (LLM, "sleep", ["level"]),
        (LLM, "wake_up", ["tags"]),
        (LLM, "chat", ["messages", "sampling_params", "use_tqdm"]),
        (LLM, "reset_prefix_cache", []),
        (LLM, "reset_mm_cache", []),
        (LLMEngine, "reset_encoder_cache", []),
    ):
        assert set(arguments) <= set(inspect.signature(getattr(owner, name)).parameters), name
    SamplingParams(n=2, seed=1, temperature=1.0, max_tokens=3, logprobs=0, logit_bias={1: -100.0})


def check_tied_heads_are_found_by_names_that_exist() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    assert issubclass(ParallelLMHead, VocabParallelEmbedding)
    vllm_plugin.finish_reload(torch.nn.Sequential(torch.nn.Linear(2, 2)))


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


if __name__ == "__main__":
    import vllm

    print(f"vLLM {vllm.__version__} in {Path(vllm.__file__).parent}")
    use_some_platform()
    for name, check in CHECKS.items():
        check()
        print(f"ok: {name}", flush=True)
