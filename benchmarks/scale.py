"""What a step costs the trainer's own process beside the update, and how that grows with the number of prompts.

    python benchmarks/scale.py --out benchmarks/baselines/scale.json
    python benchmarks/scale.py --prompts 512 --out scale.json       # one size alone

Prompts of one image each are sampled, scored, encoded and sent to the reference by the trainer's own code
(`lingshu_rl.train.sample`), and the rollouts written. Engine and reference are stand-ins that answer at once, in a process of
their own: what is measured is all that the trainer does around them. Every size runs in a fresh process. `step_s` is wall time,
`cpu_s` processor time of the trainer alone, `peak_mb` how far its memory rose during the step, `out_mb` and `in_mb` what went to
and came from the stand-ins. Images have about a megapixel, completions 1,024 tokens; `--quick` is small.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = (32, 128, 512)
OPTIONS = ["pneumothorax", "effusion", "atelectasis", "no finding"]
SENTENCE = "The left hemithorax shows a small opacity near the base and the heart is of normal size. "


def write_rows(folder: Path, count: int, side: int) -> Path:
    """Films of side x side pixels, no two alike, and a question about each."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).normal(0, 6, (side, side))
    y, x = np.mgrid[:side, :side] / side
    lines = []
    for n in range(count):
        grey = 120 + 80 * np.sin(3 * x + n) * np.cos(2 * y - n) + np.roll(noise, n, axis=1)
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.jpg", quality=90)
        row = {"id": f"q{n:04d}", "images": [f"{n}.jpg"], "question": "What does the film show?", "options": OPTIONS}
        lines.append(json.dumps({**row, "answer": "AB"[n % 2], "kind": "option"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


# ------------------------------------------------------------------------------------------------ the stand-in servers


def serve(answer: Path, port_file: Path) -> None:
    """An engine that gives every prompt the answer in the file, and a reference that finds 0 nats everywhere."""
    import uvicorn
    from safetensors.torch import load
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    from lingshu_rl.reference.wire import encode_logprobs

    counted = {"in": 0, "out": 0}
    completions = answer.read_bytes()

    async def body_of(request: Request) -> bytes:
        body = await request.body()
        counted["in"] += len(body)
        return body

    async def complete(request: Request) -> Response:
        await body_of(request)
        counted["out"] += len(completions)
        return Response(completions, media_type="application/json")

    async def logprobs(request: Request) -> Response:
        import torch

        tensors = load(await body_of(request))
        lengths = tensors["0/lengths"].tolist()
        found = encode_logprobs([[torch.zeros(length) for length in lengths]])
        counted["out"] += len(found)
        return Response(found, media_type="application/octet-stream")

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"max_model_len": 32768}]})

    async def metrics(request: Request) -> Response:
        return PlainTextResponse("vllm:generation_tokens_total 1\nvllm:prompt_tokens_total 1\n")

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/logprobs", logprobs, methods=["POST"]),
            Route("/v1/models", models),
            Route("/metrics", metrics),
            Route("/health", lambda request: JSONResponse({"progress": time.monotonic()})),
            Route("/counted", lambda request: JSONResponse(counted)),
        ]
    )
    from lingshu_rl.processes.workers import free_port

    port = free_port()
    port_file.write_text(str(port))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def engine_answer(prompt_ids: tuple[int, ...], tokenizer: Any, group: int, tokens: int) -> bytes:
    """A group as vLLM's server answers it with return_token_ids, half of it with another option."""
    choices = []
    for member in range(group):
        end = tokenizer.encode(f"<answer>{'AB'[member % 2]}</answer>", add_special_tokens=False)
        words = tokenizer.encode(SENTENCE * (tokens // 8), add_special_tokens=False)[: tokens - len(end)]
        ids = words + end
        content = [
            {"token": "word", "logprob": -0.5 - 0.001 * (i % 700), "bytes": [119, 111, 114, 100], "top_logprobs": []}
            for i in range(len(ids))
        ]
        choices.append({"index": member, "token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"})
    return json.dumps({"id": "x", "prompt_token_ids": prompt_ids, "choices": choices}).encode()


# --------------------------------------------------------------------------------------------------------- the trainer


def measure(count: int, side: int, group: int, tokens: int) -> dict[str, Any]:
    """One step of `count` prompts, in this process."""
    import httpx
    from workload import peak_memory

    from lingshu_rl.config import load_config
    from lingshu_rl.data.load import load
    from lingshu_rl.model.encoder import PromptEncoder

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder, count, side)
        config = load_config(
            overrides=[
                f"run.dir={folder / 'run'}", f"train.group_size={group}", f"rollout.max_tokens={tokens}",
                "loss.kl_coef=0.01", "rewards.spec={class: OptionLetter}", f"data.max_pixels={side * side}",
            ]
        )  # fmt: skip
        encoder = PromptEncoder(config.model)
        encoder.processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": side * side}  # not the demo's
        prompts = load(str(rows), instruction="short", budget=config.data.budget).prompts
        answer, port = folder / "answer.json", folder / "port"
        answer.write_bytes(engine_answer(encoder.encode(prompts[0])[0], encoder.tokenizer, group, tokens))
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(answer), str(port)])
        try:
            url = _url_of(server, port)
            cpu, start = time.process_time(), time.perf_counter()
            with peak_memory() as peak:
                asyncio.run(step(config, encoder, prompts, url))
            found = {
                "prompts": count,
                "group_size": group,
                "completion_tokens": tokens,
                "pixels": side * side,
                "step_s": time.perf_counter() - start,
                "cpu_s": time.process_time() - cpu,
                "peak_mb": peak["mb"],
            }
            counted = httpx.get(f"{url}/counted").json()
        finally:
            server.kill()
            server.wait()
    return {**found, "out_mb": counted["in"] / 2**20, "in_mb": counted["out"] / 2**20}


def _url_of(server: subprocess.Popen[bytes], port: Path) -> str:
    import httpx

    while server.poll() is None:
        if port.exists() and port.read_text():
            url = f"http://127.0.0.1:{port.read_text()}"
            try:
                httpx.get(f"{url}/health")
                return url
            except httpx.HTTPError:
                pass
        time.sleep(0.1)
    raise SystemExit("the stand-in servers did not start")


async def step(config: Any, encoder: Any, prompts: Any, url: str) -> None:
    """What `train` does with a batch but the update: its own functions, with what they ask of a run."""
    from lingshu_rl.progress import Progress
    from lingshu_rl.reference.client import ReferenceClient
    from lingshu_rl.rewarding import build_rewards
    from lingshu_rl.rollout.client import RolloutClient
    from lingshu_rl.runfolder import RunFolder
    from lingshu_rl.timeline import Timeline
    from lingshu_rl.train import sample

    rollout = RolloutClient(
        [url], token="", decode=encoder.decode, banned_ids=(), end_ids=encoder.eos_ids, seed=0, temperature=1.0,
        max_tokens=config.rollout.max_tokens, timeout_s=600, retries=0, concurrency=config.rollout.concurrency,
    )  # fmt: skip
    reference = ReferenceClient([url], token="", timeout_s=600)
    rewards = build_rewards(config, prompts, Progress(quiet=True))
    folder = RunFolder(config.run.dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    run: Any = SimpleNamespace(
        config=config, rollout=rollout, reference=reference, rewards=rewards, encoder=encoder, timeline=Timeline()
    )
    try:
        run.timeline.begin(1)
        batch = await sample(run, 1, list(prompts))
        if len(batch.train) != len(prompts):
            raise SystemExit(f"{len(batch.train)} of {len(prompts)} groups would be trained on: {batch.refused}")
        folder.write_rollouts(1, batch.groups, batch.advantages)
    finally:
        await rollout.close()
        await reference.close()
        rewards.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--prompts", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--side", type=int, default=1024, help="pixels of an image's sides")
    parser.add_argument("--quick", action="store_true", help="4 and 8 small prompts")
    parser.add_argument("--serve", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    if options.quick:
        options.prompts, options.group, options.tokens, options.side = [4, 8], 2, 64, 112
    if options.one:
        print(json.dumps(measure(options.one, options.side, options.group, options.tokens)))
        return
    from workload import write

    points: list[dict[str, Any]] = []
    for count in options.prompts:
        words = [f"--{key}={getattr(options, key)}" for key in ("group", "tokens", "side")]
        done = subprocess.run(
            [sys.executable, __file__, f"--one={count}", *words], stdout=subprocess.PIPE, text=True, check=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        points.append(json.loads(done.stdout.splitlines()[-1]))
        one = points[-1]
        print(
            f"{one['prompts']:4} prompts x {one['group_size']}: {one['step_s']:7.1f} s, processor {one['cpu_s']:7.1f} s, memory "
            f"+{one['peak_mb']:6.0f} MiB, sent {one['out_mb']:7.0f} MiB, received {one['in_mb']:6.0f} MiB",
            flush=True,
        )
    for a, b in pairwise(points):
        times = b["prompts"] / a["prompts"]
        print(
            f"x{times:g} prompts: processor x{b['cpu_s'] / a['cpu_s']:.2f}, memory x{b['peak_mb'] / a['peak_mb']:.2f}"
        )
    if options.out:
        write(options.out, points)


if __name__ == "__main__":
    main()
