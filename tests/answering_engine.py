"""A stand-in for a vLLM server that costs nothing: it answers text questions by their seeds, and takes weights unread.

Not a test. `python answering_engine.py PORT`. What a run does around its engine is as with a real one: token, lease, routes,
prompts, checkpoints; samples come from elsewhere than the policy (check.on_failure=warn).
"""

import random
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.processes.token import RequireToken
from lingshu_rl.types import Prompt

CONTROL = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
           "reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")  # fmt: skip
encoder, answered = PromptEncoder("demo"), [0]


async def health(request):
    return PlainTextResponse("ok")


async def models(request):
    return JSONResponse({"data": [{"id": "policy", "max_model_len": 400}]})


async def metrics(request):
    return PlainTextResponse(f"vllm:generation_tokens_total {answered[0]}\n")


async def chat(request):
    body = await request.json()
    ids, _ = encoder.encode(Prompt("", tuple(body["messages"]), (), "", (), "open", {}))
    draw = random.Random(body["seed"])
    answered[0] += 1
    logprobs = {"content": [{"logprob": -2.0}] * 4}
    choices = [
        {
            "index": n,
            "token_ids": [draw.randrange(20, 300) for _ in range(4)],
            "finish_reason": "stop",
            "logprobs": logprobs,
        }
        for n in range(body["n"])
    ]
    return JSONResponse({"prompt_token_ids": list(ids), "choices": choices})


async def control(request):
    return JSONResponse({})


if __name__ == "__main__":
    asked = [Route("/v1/chat/completions", chat, methods=["POST"])]
    told = [Route("/" + name, control, methods=["POST"]) for name in CONTROL]
    seen = [Route("/health", health), Route("/v1/models", models), Route("/metrics", metrics)]
    app = Starlette(routes=[*asked, *told, *seen], middleware=[Middleware(RequireToken)])
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
