"""A reference worker: a frozen model behind HTTP that returns completion log-probs, by the same code as the policy.

    python -m lingshu_rl.reference.server --model M --port P

Routes: GET /health; POST /logprobs (safetensors in and out, see wire.py). Every route but /health needs the run's token.
One request is computed at a time; others wait in the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from lingshu_rl.config import Config
from lingshu_rl.placement import DeviceSet
from lingshu_rl.rollout.vllm_plugin import RequireToken
from lingshu_rl.workers import python


class ReferenceModel:
    """The frozen model. `score` is the pure computation; the server only carries it."""

    def __init__(self, model: str, *, dtype: str, device: str, **scoring: Any) -> None:
        """scoring: token_budget, layout, temperature and attention of `group_logprobs`, as the policy uses them."""
        from lingshu_rl.families import model_spec
        from lingshu_rl.model import load_model, resolve_dtype

        self.model = load_model(model, resolve_dtype(dtype, device != "cpu")).to(device).requires_grad_(False)
        self.vocabulary = self.model.config.get_text_config().vocab_size
        self.scoring = {**scoring, "banned_ids": model_spec(self.model.config).placeholder_ids}

    def score(self, body: bytes) -> bytes:
        """encode_groups in, encode_logprobs out. Raises WireError for a body that is not one."""
        from lingshu_rl.reference.wire import decode_groups, encode_logprobs
        from lingshu_rl.scoring import group_logprobs

        scored = group_logprobs(self.model, decode_groups(body, vocabulary=self.vocabulary), **self.scoring)
        return encode_logprobs(scored)


def build_app(reference: ReferenceModel, max_body_bytes: int) -> Any:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    from lingshu_rl.reference.wire import WireError

    turn = asyncio.Lock()

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def logprobs(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_body_bytes:
                return PlainTextResponse(f"body over {max_body_bytes} bytes", status_code=413)
        async with turn:
            try:
                answer = await asyncio.to_thread(reference.score, bytes(body))
            except WireError as error:
                return PlainTextResponse(str(error), status_code=400)
            except (ValueError, RuntimeError, IndexError) as error:
                # What the model refuses (image tensors that do not fit the tokens) is the request's fault, not ours.
                return PlainTextResponse(f"{type(error).__name__}: {error}", status_code=422)
        return Response(answer, media_type="application/octet-stream")

    return Starlette(
        routes=[Route("/health", health), Route("/logprobs", logprobs, methods=["POST"])],
        middleware=[Middleware(RequireToken)],
    )


def reference_command(
    config: Config, model: str, devices: DeviceSet, *, port: int, host: str = "127.0.0.1"
) -> list[str]:
    """The argv of one reference worker that computes as this run's policy does."""
    follows_policy = config.reference.dtype == "auto"
    options = {
        "model": model,
        "host": host,
        "port": port,
        "dtype": config.train.dtype if follows_policy else config.reference.dtype,
        "device": "cuda" if devices.on_gpu else "cpu",
        "layout": config.packing.layout,
        "token-budget": config.packing.token_budget,
        "temperature": config.rollout.temperature,
        "attention": config.packing.attention,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [*devices.command_prefix(), python(), "-m", "lingshu_rl.reference.server", *words]


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (the first visible GPU)")
    parser.add_argument("--layout", default="shared", choices=["shared", "dense"])
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "flex"])
    parser.add_argument("--max-body-mb", type=int, default=512)
    args = parser.parse_args()
    reference = ReferenceModel(
        args.model,
        dtype=args.dtype,
        device=args.device,
        layout=args.layout,
        token_budget=args.token_budget,
        temperature=args.temperature,
        attention=args.attention,
    )
    uvicorn.run(
        build_app(reference, args.max_body_mb << 20),
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_keep_alive=600,
    )


if __name__ == "__main__":
    main()
