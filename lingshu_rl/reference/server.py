"""A reference worker: a frozen model behind HTTP that returns completion log-probs, by the same code as the policy.

    python -m lingshu_rl.reference.server --model M --port P

Routes: GET /health {"progress": a count that moves while it works}; POST /logprobs (safetensors in and out, see
wire.py); POST /refresh {"folder": name} loads another model from below --refresh-dir. Every route but /health needs the
run's token, before its body is read. One request is computed at a time. ADMITTED bodies are held in memory (body, its
copy as tensors, the answer); others wait with their bodies unread, and above MAX_CONNECTIONS they get 503 at once. Idle
connections hold nobody up (see `doors`). The largest body is what the model's longest sequence could need, so no study
that the model can read is refused for its size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.config import Config
from lingshu_rl.model.loading import model_path
from lingshu_rl.planning.memory import row_tokens
from lingshu_rl.processes.doors import serve
from lingshu_rl.processes.placement import DeviceSet
from lingshu_rl.processes.threads import in_thread
from lingshu_rl.processes.token import RequireToken
from lingshu_rl.processes.workers import python
from lingshu_rl.storage.runfolder import RunFolder
from lingshu_rl.types import ProcessorInputs

if TYPE_CHECKING:
    from lingshu_rl.model.families import ModelSpec
    from lingshu_rl.reference.wire import ImageInputs, Reader

ADMITTED = 2  # one is computed while the next is read
MAX_CONNECTIONS = 512
BODY_TIMEOUT_S = 60.0  # for the next piece of a body, once it is its turn
TOKEN_BYTES = 64 << 10  # of one token of an image: float32 pixels of SmolVLM 48 KiB, Gemma 3 37, Qwen-VL 18 to 24


class ReferenceModel:
    """The frozen model. `score` is the pure computation; the server only carries it."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        device: str,
        max_tokens: int = 1 << 20,
        tensor_parallel: int = 1,
        processor: str = "",
        **scoring: Any,
    ) -> None:
        """processor: the model whose processor reads the images; "" = images come as tensors.

        scoring: token_budget, layout, temperature and attention of `group_logprobs`, as the policy uses them.
        """
        from lingshu_rl.model.families import model_spec
        from lingshu_rl.model.loading import load_model, resolve_dtype

        self.dtype, self.device, self.shards = resolve_dtype(dtype, device != "cpu"), device, tensor_parallel
        self.progress = 0  # layers computed since the start
        self.model = self._counted(load_model(model, self.dtype, tensor_parallel).to(device))
        text, spec = self.model.config.get_text_config(), model_spec(self.model.config)
        longest = getattr(text, "max_position_embeddings", 1 << 20)
        self.limits = {
            "vocabulary": text.vocab_size,
            "max_sequence": longest,
            "max_tokens": max_tokens,
            "images": image_inputs(self.model, spec),
            "reader": image_reader(processor, body_limit(longest)) if processor else None,
        }
        self.scoring = {**scoring, "banned_ids": spec.placeholder_ids}

    @property
    def max_body_bytes(self) -> int:
        return body_limit(self.limits["max_sequence"])

    def _counted(self, model: Any) -> Any:
        """The frozen model, each layer of which adds to `progress` when it is done."""
        import torch

        def done(*_: Any) -> None:
            self.progress += 1

        for layers in model.requires_grad_(False).modules():
            if isinstance(layers, torch.nn.ModuleList):
                for layer in layers:
                    layer.register_forward_hook(done)
        return model

    def score(self, body: bytes) -> bytes:
        """encode_groups in, encode_logprobs out. Raises WireError for a body that is not one."""
        from lingshu_rl.model.groups import group_logprobs
        from lingshu_rl.reference.wire import decode_groups, encode_logprobs

        scored = group_logprobs(self.model, decode_groups(body, **self.limits), **self.scoring)
        return encode_logprobs(scored)

    def refresh(self, folder: Path) -> None:
        """Replace the model by the one in `folder`, of the same kind. The old one leaves the device first."""
        from lingshu_rl.model.loading import load_model

        if self.shards > 1:  # its shards are loaded to the devices at once
            self.model.to("meta")
        new = self._counted(load_model(str(folder), self.dtype, self.shards))
        self.model.to("meta")
        self.model = new.to(self.device)


class ShardedModel(ReferenceModel):
    """One model over the processes of a torchrun: the first has the HTTP server and says what all compute together.

    A process that is lost makes torchrun end the others, and the run starts the replica again. On CUDA not run here.
    """

    def __init__(self, model: str, *, device: str, **options: Any) -> None:
        import torch
        import torch.distributed as dist

        if device != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
        self.control = dist.new_group(
            backend="gloo", timeout=timedelta(days=365)
        )  # followers wait here between requests
        super().__init__(model, device=device, **options)

    @property
    def leads(self) -> bool:
        import torch.distributed as dist

        return bool(dist.get_rank() == 0)

    def score(self, body: bytes) -> bytes:
        self._say(b"s" + body)
        return super().score(body)

    def refresh(self, folder: Path) -> None:
        self._say(b"r" + str(folder).encode())
        super().refresh(folder)

    def follow(self) -> None:
        """Compute what the first process says, for ever. What it refuses they refuse too, and it answers."""
        while True:
            message = self._hear()
            with contextlib.suppress(Exception):
                if message[:1] == b"s":
                    super().score(message[1:])
                else:
                    super().refresh(Path(message[1:].decode()))

    def _say(self, message: bytes) -> None:
        import torch
        import torch.distributed as dist

        dist.broadcast(torch.tensor([len(message)]), 0, group=self.control)
        dist.broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), 0, group=self.control)

    def _hear(self) -> bytes:
        import torch
        import torch.distributed as dist

        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, 0, group=self.control)
        message = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(message, 0, group=self.control)
        return message.numpy().tobytes()


def image_inputs(model: Any, spec: ModelSpec) -> ImageInputs:
    """What this model reads of images, by the method that encodes them; nothing for one that reads text alone."""
    from lingshu_rl.reference.wire import ImageInputs

    method = getattr(model, "get_image_features", None)
    names = inspect.signature(method).parameters if method is not None else ()
    return ImageInputs(frozenset(names) - {"kwargs"}, spec.image_id, spec.mrope_merge)


def image_reader(model: str, most_bytes: int) -> Reader | None:
    """The model's own processor, as the policy's ranks use it; None for a model that reads text alone."""
    from PIL import Image

    from lingshu_rl.imaging import png
    from lingshu_rl.imaging.images import DEFAULT_BUDGET
    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.model.lengths import probe
    from lingshu_rl.reference.wire import Reader

    encoder = PromptEncoder(model)
    if encoder.processor is None:
        return None
    smallest = png.write(Image.new("L", DEFAULT_BUDGET.fit(1, 1)))
    _, vision = encoder.read(ProcessorInputs(encoder.render(probe()), (smallest,)))
    return Reader(encoder.read, most_bytes, least=sum(t.nbytes for t in vision.values() if t.is_floating_point()))


def body_limit(max_sequence: int) -> int:
    """Bytes of one request: as many images as fill the model's context."""
    return TOKEN_BYTES * max_sequence


def build_app(reference: ReferenceModel, refresh_dir: Path | None = None) -> Any:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    from lingshu_rl.reference.wire import WireError

    admitted, turn = asyncio.Semaphore(ADMITTED), asyncio.Lock()
    most, received = reference.max_body_bytes, 0

    async def health(request: Request) -> Response:
        return JSONResponse({"progress": reference.progress + received})

    async def read(request: Request) -> bytes:
        nonlocal received
        pieces, size, now = [], 0, asyncio.get_running_loop().time
        async with asyncio.timeout(BODY_TIMEOUT_S) as limit:
            async for piece in request.stream():
                limit.reschedule(now() + BODY_TIMEOUT_S)
                size, received = size + len(piece), received + len(piece)
                if size > most:
                    raise _TooLarge
                pieces.append(piece)
        return b"".join(pieces)

    async def guarded(request: Request, work: Callable[[bytes], bytes]) -> Response:
        """Read the body when it is its turn, compute in a thread, and make every refusal an answer that says why."""
        too_large = PlainTextResponse(f"body over {most} bytes, more than the model can read", status_code=413)
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > most:
            return too_large
        async with admitted:
            try:
                body = await read(request)
            except _TooLarge:
                return too_large
            except TimeoutError:
                return PlainTextResponse(f"nothing of the body came for {BODY_TIMEOUT_S:.0f} s", status_code=408)
            except ClientDisconnect:
                return Response(status_code=400)
            async with turn:
                try:
                    answer = await in_thread(work, body)
                except WireError as error:
                    return PlainTextResponse(str(error), status_code=400)
                except Exception as error:
                    # What the model refuses (image tensors that do not fit the tokens) is the request's fault, not
                    # ours.
                    return PlainTextResponse(f"{type(error).__name__}: {error}", status_code=422)
        return Response(answer, media_type="application/octet-stream")

    async def logprobs(request: Request) -> Response:
        return await guarded(request, reference.score)

    def load(body: bytes) -> bytes:
        name = json.loads(body)["folder"]
        folder = (refresh_dir / name).resolve() if refresh_dir is not None else Path()
        if refresh_dir is None or folder.parent != refresh_dir.resolve() or folder.name != name or not folder.is_dir():
            raise WireError(f"{name!r} is not a folder in {refresh_dir or 'this server, which has no --refresh-dir'}")
        reference.refresh(folder)
        return b""

    async def refresh(request: Request) -> Response:
        return await guarded(request, load)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/logprobs", logprobs, methods=["POST"]),
            Route("/refresh", refresh, methods=["POST"]),
        ],
        middleware=[Middleware(RequireToken)],
    )


class _TooLarge(Exception):
    pass


def reference_command(
    config: Config, model: str, devices: DeviceSet, *, port: int, host: str = "127.0.0.1"
) -> list[str]:
    """The argv of one reference worker that computes as this run's policy does."""
    follows_policy = config.reference.dtype == "auto"
    options = {
        "model": model,
        "processor": model_path(config.model),
        "host": host,
        "port": port,
        "dtype": config.train.dtype if follows_policy else config.reference.dtype,
        "device": "cuda" if devices.on_gpu else "cpu",
        "layout": config.packing.layout,
        "token-budget": row_tokens(config, devices.on_gpu),
        "temperature": config.rollout.temperature,
        "attention": config.packing.attention,
        "tensor-parallel": config.reference.tensor_parallel,
        "refresh-dir": RunFolder(config.run.dir).references,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    shards = config.reference.tensor_parallel
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(shards)] if shards > 1 else []
    return [*devices.command_prefix(), python(), *launcher, "-m", "lingshu_rl.reference.server", *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--processor", default="", help="the model whose processor reads the images")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (the first visible GPU)")
    parser.add_argument("--layout", default="shared", choices=["shared", "dense"])
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "flex"])
    parser.add_argument("--max-tokens", type=int, default=1 << 20, help="of one request")
    parser.add_argument("--refresh-dir", type=Path, help="where POST /refresh may load models from")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes, started by torchrun")
    args = parser.parse_args()
    reference = (ShardedModel if args.tensor_parallel > 1 else ReferenceModel)(
        args.model,
        dtype=args.dtype,
        device=args.device,
        layout=args.layout,
        token_budget=args.token_budget,
        temperature=args.temperature,
        attention=args.attention,
        max_tokens=args.max_tokens,
        processor=args.processor,
        tensor_parallel=args.tensor_parallel,
    )
    if isinstance(reference, ShardedModel) and not reference.leads:
        reference.follow()
    serve(build_app(reference, args.refresh_dir), host=args.host, port=args.port, most=MAX_CONNECTIONS)


if __name__ == "__main__":
    main()
