"""The rollout engine inside every policy process (`rollout.placement=colocate`): one device for sampling and training.

Each rank's engine answers on the routes of vLLM's own server that a run uses, so the main rank asks N ranks as it would
ask N servers, and groups land one by one. Weights go from the policy into the engine of the same process. The device is
the engine's or the policy's, never both's: on CUDA the engine sleeps while the policy computes (weights and cache leave
the device, level 2). Sleeping was not run on this project's CPU machines, where nothing is given up.
With rollout.vllm.tensor_parallel_size=k, k neighbouring ranks hold one engine together: its first rank has the routes
and tells the others which requests to add before each step, as vLLM's external launcher wants it.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lingshu_rl.config import Config
from lingshu_rl.failures import ConfigError
from lingshu_rl.processes.placement import DeviceSet
from lingshu_rl.processes.token import RequireToken
from lingshu_rl.rollout.client import RolloutClient
from lingshu_rl.rollout.sampler import RolloutError
from lingshu_rl.rollout.server import vllm_options
from lingshu_rl.rollout.vllm_plugin import OURS_ENV, finish_reload

if TYPE_CHECKING:
    import torch

    from lingshu_rl.policy import Policy

CLOSE_S = 10.0  # for the engine's thread to end, where no other rank that it waits for was lost
FOREVER = timedelta(days=365)  # followers wait here between requests
Body = Mapping[str, Any]
Reply = Callable[[int, Any], None]  # HTTP status and the answer, from any thread


class InProcessEngine:
    """All ranks make one at the same time. url: of its routes; "" on ranks that follow another."""

    def __init__(
        self, config: Config, model: str, devices: DeviceSet, share: float, policy: Policy, *, token: str, host: str
    ) -> None:
        """devices: of this rank. share: of its memory, what the engine may hold. host: address to listen on."""
        # The engine must live in this process, and must not bind its threads, which are the policy's too.
        os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.update({OURS_ENV: "1", **config.rollout.env})
        from vllm import LLM

        size = int(config.rollout.vllm.get("tensor_parallel_size", 1))
        if policy.ranks % size:
            raise ConfigError(
                f"rollout.vllm.tensor_parallel_size={size} does not divide the {policy.ranks} policy ranks, whose "
                "engines it joins (rollout.placement=colocate)"
            )
        options = {**vllm_options(config, model, devices, share=share), "tensor_parallel_size": size}
        if policy.ranks > 1:
            options["distributed_executor_backend"] = "external_launcher"
        free_cached_memory()
        self.llm = LLM(**options, enable_sleep_mode=devices.on_gpu, disable_log_stats=False)
        del os.environ[OURS_ENV]  # whatever else this process starts is no engine of the run
        self.sleeps, self.asleep = devices.on_gpu, False
        self.use_device = policy.use_device
        self.device = threading.Lock()  # held by the policy from `sleep` to `load`, by the engine during a step
        self.group = LockStep(policy, size)
        self.arrived: queue.SimpleQueue[tuple[Body, Reply] | None] = queue.SimpleQueue()  # None: the end
        self.waiting: dict[str, Reply] = {}
        self.worker = threading.Thread(target=self._work, daemon=True, name="rollout engine")
        self.worker.start()
        self.url = serve(self, host, token) if self.group.leads else ""

    def submit(self, body: Body, reply: Reply) -> None:
        """Take a chat completion request; `reply` is called when it is answered."""
        self.arrived.put((body, reply))

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The policy's weights into the engine, tensor by tensor; nothing is written or sent. Wakes it.

        weights: all of them are taken, whatever the model makes of them: other ranks may be gathering along.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        self.sleep()
        if self.sleeps:
            free_cached_memory()
            self.llm.wake_up(tags=["weights"])
        model_config = self.llm.llm_engine.model_config
        rest = iter(weights)

        def replace(model: Any) -> None:
            initialize_layerwise_reload(model)
            model.load_weights(rest)
            for _ in rest:
                pass
            finalize_layerwise_reload(model, model_config)
            finish_reload(model)

        self.llm.apply_model(replace)
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM kept prompts of the old weights in its cache: requests were still under way")
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.asleep = False
        self.device.release()

    def sleep(self) -> None:
        """Give the device to the policy until the next `load`. Safe to call twice."""
        if not self.asleep:
            self.device.acquire()
            self.asleep = True
            if self.sleeps:
                self.llm.sleep(level=2)

    def close(self) -> None:
        """Shut vLLM down while the process groups that it shares with the policy still stand; it ends them itself."""
        self.arrived.put(None)
        self.worker.join(CLOSE_S)
        self.llm.llm_engine.engine_core.shutdown()

    def _work(self) -> None:
        """Serve until the end; what ends it early is the answer to every request, also to later ones."""
        try:
            self._serve()
        except BaseException as error:
            self._fail(error)
            while (late := self.arrived.get()) is not None:
                self.waiting["late"] = late[1]
                self._fail(error)

    def _serve(self) -> None:
        """Until the end: add what arrived, compute one step, answer what is finished."""
        self.use_device()
        engine = self.llm.llm_engine
        while True:
            arrivals = self.group.share(self._arrivals(wait=not engine.has_unfinished_requests()))
            if arrivals is None:
                return
            with self.device:
                for number, body in enumerate(arrivals):
                    self._add(body, self.replies[number] if self.group.leads else _nobody)
                try:
                    outputs: list[Any] = list(engine.step()) if engine.has_unfinished_requests() else []
                except Exception as error:
                    outputs = []
                    self._fail(error)
            for output in outputs:
                if output.finished:
                    self.waiting.pop(output.request_id)(200, answer_of(output))

    def _arrivals(self, wait: bool) -> list[Body] | None:
        """What came since the last step (None: the end); with `wait`, at least one. Keeps their replies in
        `replies`."""
        if not self.group.leads:
            return []
        came = [self.arrived.get()] if wait else []
        while not self.arrived.empty():
            came.append(self.arrived.get())
        requests = [one for one in came if one is not None]
        self.replies = [reply for _, reply in requests]
        return [body for body, _ in requests] if len(requests) == len(came) else None

    def _add(self, body: Body, reply: Reply) -> None:
        try:
            (name,) = self.llm.enqueue_chat([body["messages"]], sampling_of(body), use_tqdm=False)
        except Exception as error:  # what vLLM's server answers with 400: the request is at fault, not the engine
            reply(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
        else:
            self.waiting[name.partition("-")[0]] = reply  # outputs carry the name without what makes it unique

    def _fail(self, error: BaseException) -> None:
        """An engine that failed in a step does not come back: every request gets the error."""
        for reply in self.waiting.values():
            reply(500, {"error": {"message": f"the engine failed: {type(error).__name__}: {error}"}})
        self.waiting.clear()


def free_cached_memory() -> None:
    """What torch keeps of freed memory is not free to the engine; nothing on CPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _nobody(status: int, answer: Any) -> None:
    """For ranks that compute along with another, which answers."""


class LockStep:
    """`size` neighbouring ranks that add the same requests before the same step. All policy ranks make one together."""

    def __init__(self, policy: Policy, size: int) -> None:
        import torch.distributed as dist

        self.first = policy.rank // size * size
        self.leads = policy.rank == self.first
        self.group: Any = None
        if size > 1:
            groups = [
                dist.new_group(list(range(first, first + size)), backend="gloo", timeout=FOREVER)
                for first in range(0, policy.ranks, size)
            ]
            self.group = groups[policy.rank // size]

    def share(self, arrivals: list[Body] | None) -> list[Body] | None:
        if self.group is None:
            return arrivals
        import torch.distributed as dist

        box = [arrivals]
        dist.broadcast_object_list(box, src=self.first, group=self.group)
        return box[0]


def sampling_of(body: Body) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        n=body["n"],
        seed=body["seed"],
        temperature=body["temperature"],
        max_tokens=body["max_tokens"],
        logprobs=0,
        stop_token_ids=body["stop_token_ids"],
        logit_bias={int(token): bias for token, bias in body["logit_bias"].items()},
    )


def answer_of(output: Any) -> dict[str, Any]:
    """vLLM's RequestOutput as its server would put it."""
    return {
        "prompt_token_ids": output.prompt_token_ids,
        "choices": [
            {
                "index": choice.index,
                "token_ids": list(choice.token_ids),
                "finish_reason": choice.finish_reason,
                "logprobs": {
                    "content": [
                        {"logprob": places[token].logprob}
                        for token, places in zip(choice.token_ids, choice.logprobs, strict=True)
                    ]
                },
            }
            for choice in output.outputs
        ],
    }


def serve(engine: InProcessEngine, host: str, token: str) -> str:
    """Answer requests for the engine in a thread of this process; returns the URL."""
    import uvicorn
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)  # vLLM's own counters of this process

    async def models(request: Request) -> Response:
        longest = engine.llm.llm_engine.model_config.max_model_len
        return JSONResponse({"data": [{"id": "policy", "max_model_len": longest}]})

    async def chat(request: Request) -> Response:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[tuple[int, Any]] = loop.create_future()

        def settle(status: int, answer: Any) -> None:
            if not answered.done():  # the client may have gone
                answered.set_result((status, answer))

        def reply(status: int, answer: Any) -> None:
            loop.call_soon_threadsafe(settle, status, answer)

        engine.submit(await request.json(), reply)
        status, answer = await answered
        return JSONResponse(answer, status)

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=[Middleware(RequireToken, token=token)],
    )
    # Bound here: a server that binds for itself ends its thread when it fails.
    listener = socket.create_server((host, 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    threading.Thread(target=server.run, args=([listener],), daemon=True, name="rollout routes").start()
    return f"http://{host}:{listener.getsockname()[1]}"


class InProcessTransfer:
    """Each rank loads its own engine; the main one notes the version."""

    def __init__(self, engine: InProcessEngine, client: RolloutClient | None) -> None:
        self.engine, self.client = engine, client

    async def start(self, servers: Any = None) -> None:
        """Nothing to open."""

    async def send(self, policy: Policy, version: int, server: str | None = None) -> None:
        self.engine.load(policy.weights())
        for one in self.client.pool.servers if self.client is not None else ():
            one.version = version
