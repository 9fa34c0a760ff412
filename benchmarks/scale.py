"""What a step costs the trainer's own process beside the update, and how that grows with prompts, samples and slices.

    python benchmarks/scale.py --out benchmarks/baselines/scale.json
    python benchmarks/scale.py --prompts 512 --out scale.json       # one size alone

Prompts are sampled, scored and sent to the reference by the trainer's own code (`lingshu_rl.train.sample`), and the rollouts
written. Engine and reference are stand-ins that answer at once, in a process of their own: what is measured is all that the
trainer does around them. Every size runs in a fresh process, after a step of two prompts in which what is loaded once is
loaded. `step_s` is wall time, `cpu_s` processor time of the trainer alone, `peak_mb` how far its memory rose during the step,
`out_mb` and `in_mb` what went to and came from the stand-ins; `rows_s` is the processor time in which the ranks together plan
and make the rows of the update, images and all (one after another here; a rank makes its share of them, beside the update).
Images have a megapixel, completions 1,024 tokens; `--quick` is small.
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
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# benchmarks/rewards.py must not stand in the way of the package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = (32, 128, 512)
WARM = 2  # prompts of the step before
OPTIONS = ["pneumothorax", "effusion", "atelectasis", "no finding"]
SENTENCE = "The left hemithorax shows a small opacity near the base and the heart is of normal size. "


def write_rows(folder: Path, count: int, side: int, slices: int) -> Path:
    """Films of side x side pixels, no two alike, and a question about each `slices` of them."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:side, :side] / side
    film = 120 + 80 * np.sin(3 * x) * np.cos(2 * y) + np.random.default_rng(0).normal(0, 6, (side, side))
    film = film.clip(0, 255).astype(np.uint8)
    lines = []
    for n in range(count * slices):
        Image.fromarray(np.roll(film, divmod(n, side), axis=(0, 1))).save(folder / f"{n}.jpg", quality=90)
    for n in range(count):
        images = [f"{n * slices + k}.jpg" for k in range(slices)]
        row = {"id": f"q{n:04d}", "images": images, "question": "What does the film show?", "options": OPTIONS}
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
    """A group as vLLM's server answers it with return_token_ids, no two alike and half of it with another option."""
    choices = []
    text = tokenizer.encode(SENTENCE * (tokens // 8 + 8), add_special_tokens=False)
    for member in range(group):
        end = tokenizer.encode(f"<answer>{'AB'[member % 2]}</answer>", add_special_tokens=False)
        ids = text[member : member + tokens - len(end)] + end
        content = [
            {"token": "word", "logprob": -0.5 - 0.001 * (i % 700), "bytes": [119, 111, 114, 100], "top_logprobs": []}
            for i in range(len(ids))
        ]
        choices.append({"index": member, "token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"})
    return json.dumps({"id": "x", "prompt_token_ids": prompt_ids, "choices": choices}).encode()


# --------------------------------------------------------------------------------------------------------- the trainer


def measure(count: int, side: int, group: int, tokens: int, slices: int) -> dict[str, Any]:
    """One step of `count` prompts, in this process."""
    import httpx

    from lingshu_rl.data.load import load
    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.planning.given import load_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder, WARM + count, side, slices)
        config = load_config(
            overrides=[
                f"run.dir={folder / 'run'}", f"train.group_size={group}", f"rollout.max_tokens={tokens}",
                "loss.kl_coef=0.01", "rewards.spec={class: OptionLetter}", f"data.max_pixels={side * side}",
            ]
        )  # fmt: skip
        encoder = PromptEncoder(config.model)
        encoder.processor.image_processor.size = {
            "shortest_edge": 56 * 56,
            "longest_edge": side * side,
        }  # not the demo's
        prompts = load(str(rows), instruction="short", budget=config.data.budget).prompts
        answer, port = folder / "answer.json", folder / "port"
        answer.write_bytes(engine_answer(encoder.encode(prompts[0])[0], encoder.tokenizer, group, tokens))
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(answer), str(port)])
        try:
            url = _url_of(server, port)
            before, batch, found = asyncio.run(steps(config, encoder, prompts, url))
            counted = {key: n - before[key] for key, n in httpx.get(f"{url}/counted").json().items()}
        finally:
            server.kill()
            server.wait()
    found = {
        "prompts": count,
        "slices": slices,
        "group_size": group,
        "completion_tokens": tokens,
        "prompt_tokens": len(batch.groups[0].members[0].rollout.prompt_ids),
        "pixels": side * side,
        **found,
    }
    cpu = time.process_time()
    rows = make_rows(config, encoder, prompts, batch)
    found |= {"rows": rows, "rows_s": time.process_time() - cpu}
    return {**found, "out_mb": counted["in"] / 2**20, "in_mb": counted["out"] / 2**20}


def make_rows(config: Any, encoder: Any, prompts: Any, batch: Any) -> int:
    """As the ranks of the policy make them, without a model; returns how many."""
    from transformers import AutoConfig

    from lingshu_rl.model.loading import model_path
    from lingshu_rl.planning.plan import with_budget
    from lingshu_rl.policy import Policy
    from lingshu_rl.processes.placement import Machine, Ranks

    longest = max(len(group.tokens.prompt_ids) for group in batch.train)
    policy: Any = Policy.__new__(Policy)
    policy.engine, policy.encoder = AutoConfig.from_pretrained(model_path(config.model)), encoder
    policy.control = SimpleNamespace(own={p.id: p for p in prompts}.__getitem__)
    policy.token_budget = with_budget(config, longest, Machine(), Ranks()).packing.token_budget
    policy.layout = config.packing.layout
    policy.accelerator = SimpleNamespace(process_index=0, num_processes=1)
    return sum(1 for _ in policy._rows(policy._deal(batch.train)))


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


async def steps(config: Any, encoder: Any, prompts: Any, url: str) -> Any:
    """Two steps, of WARM prompts and of the others: what the servers counted before the second, its batch and its costs."""
    import httpx
    from workload import peak_memory

    from lingshu_rl.model.lengths import Lengths, PictureTokens
    from lingshu_rl.progress import Progress
    from lingshu_rl.reference.client import ReferenceClient
    from lingshu_rl.rewarding import build_rewards
    from lingshu_rl.rollout.client import RolloutClient
    from lingshu_rl.run import Run
    from lingshu_rl.storage.runfolder import RunFolder
    from lingshu_rl.timeline import Timeline

    rollout = RolloutClient(
        [url], token="", decode=encoder.decode, banned_ids=(), end_ids=encoder.eos_ids, seed=0, temperature=1.0,
        max_tokens=config.rollout.max_tokens, timeout_s=600, retries=0, concurrency=config.rollout.concurrency,
    )  # fmt: skip
    reference = ReferenceClient([url], token="", timeout_s=600)
    rewards = build_rewards(config, prompts, Progress(quiet=True))
    folder, lengths = RunFolder(config.run.dir), Lengths(PictureTokens(encoder))
    folder.path.mkdir(parents=True, exist_ok=True)
    lengths.look(prompts)  # as a run does when it loads them
    run: Any = SimpleNamespace(
        config=config, rollout=rollout, reference=reference, rewards=rewards, encoder=encoder, timeline=Timeline(),
        lengths=lengths, folder=folder,
    )  # fmt: skip
    run.inputs = partial(Run.inputs, run)
    try:
        await step(run, 0, prompts[:WARM])
        before = httpx.get(f"{url}/counted").json()
        cpu, start = time.process_time(), time.perf_counter()
        with peak_memory() as peak:
            batch = await step(run, 1, prompts[WARM:])
        found = {"step_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "peak_mb": peak["mb"]}
        return before, batch, found
    finally:
        await rollout.close()
        await reference.close()
        rewards.close()


async def step(run: Any, number: int, prompts: Any) -> Any:
    """What `train` does with a batch but the update, by its own functions."""
    from lingshu_rl.train import sample

    run.timeline.begin(number)
    batch = await sample(run, number, list(prompts))
    if len(batch.train) != len(prompts):
        raise SystemExit(f"{len(batch.train)} of {len(prompts)} groups would be trained on: {batch.refused}")
    run.folder.write_rollouts(number, batch.groups, batch.advantages)
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--prompts", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--side", type=int, default=1024, help="pixels of an image's sides")
    parser.add_argument(
        "--growth", type=int, default=32, help="prompts at which samples and slices are doubled; 0 = none"
    )
    parser.add_argument("--quick", action="store_true", help="4 and 8 small prompts")
    parser.add_argument("--serve", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    if options.quick:
        options.prompts, options.group, options.tokens, options.side, options.growth = [4, 8], 4, 64, 112, 8
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    from workload import write

    plain = {"side": options.side, "group": options.group, "tokens": options.tokens, "slices": 1}
    points = [one({**plain, "count": count}) for count in options.prompts]
    for a, b in pairwise(points):
        told(f"x{b['prompts'] / a['prompts']:g} prompts", a, b)
    if options.growth:
        small = {**plain, "count": options.growth, "side": max(112, options.side // 4)}
        half, whole = (one({**small, "group": n}) for n in (options.group // 2, options.group))
        told("x2 samples", half, whole)
        few, many = (one({**small, "count": options.growth // 4, "slices": n}) for n in (8, 64))
        told(f"x8 slices, x{many['prompt_tokens'] / few['prompt_tokens']:.2f} tokens of a prompt", few, many)
        points += [half, whole, few, many]
    if options.out:
        write(options.out, points)


def one(words: dict[str, int]) -> dict[str, Any]:
    """`measure` in a process of its own, and a line of it."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(words)], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{found['prompts']:4} prompts of {found['slices']} x {found['group_size']}: {found['step_s']:6.1f} s, processor "
        f"{found['cpu_s']:6.2f} s, memory +{found['peak_mb']:5.0f} MiB, sent {found['out_mb']:5.0f} MiB, received "
        f"{found['in_mb']:4.0f} MiB; {found['rows']} rows in {found['rows_s']:.2f} s",
        flush=True,
    )
    return found


def told(what: str, a: dict[str, Any], b: dict[str, Any]) -> None:
    print(
        f"{what}: "
        + ", ".join(f"{name} x{b[key] / a[key]:.2f}" for name, key in
                    (("processor", "cpu_s"), ("memory", "peak_mb"), ("sent", "out_mb"), ("rows", "rows_s")))
    )  # fmt: skip


if __name__ == "__main__":
    main()
