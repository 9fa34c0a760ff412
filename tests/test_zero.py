"""The same gradient under DeepSpeed: ZeRO stages 1 to 3, one and two ranks, as the plain model from unshared rows, and the
sum of many rows' as it is in float32."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import gradient_gap, make_groups, score, token_weights
from tiny_models import build, group

from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import pack
from lingshu_rl.planning.given import load_config
from lingshu_rl.policy import deepspeed_settings, share_rows, skip_shared_memory_build


def _model(tied: bool) -> Any:
    model = build("qwen2_5_vl")
    if tied:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
        model.tie_weights()
    return model


def _rank(rank: int, ranks: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    """One rank; writes what `work` found, or the error."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    try:
        torch.set_num_threads(1)
        import deepspeed

        skip_shared_memory_build()
        deepspeed.init_distributed("gloo")
        Path(folder, str(rank)).write_text(json.dumps(work(rank, ranks, *arguments)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, str(rank)).write_text(traceback.format_exc())
        raise


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What `work(rank, ranks, *arguments)` gives in a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_rank, args=(rank, ranks, port, work, arguments, str(folder))) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
        if worker.is_alive():
            worker.kill()
    found = [(folder / str(rank)).read_text() for rank in range(ranks)]
    for text in found:
        assert "Traceback" not in text, text
    return [json.loads(text) for text in found]


def full_gradient(rank: int, ranks: int, stage: int, tied: bool) -> float:
    """The gap of the whole gradient, each rank having computed its share of the rows."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    torch.manual_seed(0)
    plain = _model(tied)
    # The text-only row is the largest, so that only dealing by kind keeps the ranks in the same parts of the model.
    groups = [*make_groups("qwen2_5_vl")[:2], group("qwen2_5_vl", "text", [9, 3], text=70)]
    weights = token_weights(groups)
    _, expected = score(plain, pack(groups, plain, 1, "dense"), weights)
    model = _model(tied)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            # Persistence 0: every parameter is a shard outside its module's forward, the head's too.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    rows = pack(groups, engine, 90)
    assert sorted(bool(row.vision) for row in rows) == [False, True, True]
    engine.set_gradient_accumulation_boundary(False)
    mine = share_rows(rows, rank, ranks)
    for i, (row, counts) in enumerate(mine):
        engine.set_gradient_accumulation_boundary(i == len(mine) - 1)
        logprobs_T = completion_logprobs(engine, row, entropy=True, chunk=4).logprobs_T
        parts = logprobs_T.split([n for *_, n in row.members])
        total = sum((part * weights[g][m]).sum() for (g, m, _), part in zip(row.members, parts, strict=True))
        engine.backward(total * (ranks if counts else 0), scale_wrt_gas=False)  # DeepSpeed averages over ranks
    got = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    got = {name: gradient for name, gradient in got.items() if name in expected}
    return gradient_gap(expected, got)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks", "tied"), [(1, 2, False), (2, 2, True), (3, 1, False), (3, 2, True)])
def test_gradients_under_zero(stage: int, ranks: int, tied: bool, tmp_path: Path) -> None:
    assert max(on_ranks(ranks, full_gradient, stage, tied, folder=tmp_path)) < 1e-4


ROWS = 256  # of each rank


def bfloat16_sums(rank: int, ranks: int, cases: list[list[str]]) -> list[float]:
    """For each run's settings, how far the gradient of a step in bfloat16 is from its rows' sum, as a share of it.

    A row's gradient is an outer product, exact but for the rounding to bfloat16 that the expected sum has too.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    torch.manual_seed(0)
    x, c = (torch.rand(2, ROWS * ranks, 48) + 0.5).bfloat16()
    expected = (x[:, None] * c[:, :, None]).double().sum(0) / ranks
    gaps = []
    for settings in cases:
        model = torch.nn.Linear(48, 48, bias=False, dtype=torch.bfloat16)
        config = load_config(None, ["train.dtype=bfloat16", "train.max_grad_norm=0", *settings])
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            config=deepspeed_settings(config, on_gpu=False, ranks=ranks),
        )
        before = safe_get_full_fp32_param(model.weight).double()
        for i in range(rank, ROWS * ranks, ranks):
            engine.set_gradient_accumulation_boundary(i + ranks >= ROWS * ranks)
            engine.backward((engine(x[i : i + 1]) * c[i]).float().sum(), scale_wrt_gas=False)
        engine.step()
        moved = before - safe_get_full_fp32_param(model.weight).double()
        gaps.append(float((moved - expected).norm() / expected.norm()))
    return gaps


@pytest.mark.slow
def test_many_rows_are_added_up_in_float32(tmp_path: Path) -> None:
    """What is left is the rounding when ranks are reduced; a sum in bfloat16 falls behind row by row."""
    stages = [[f"deepspeed.zero_optimization.stage={stage}"] for stage in (1, 2, 3)]
    plain = [[*stage, "deepspeed.data_types.grad_accum_dtype=bf16"] for stage in stages]
    gaps, *_ = on_ranks(2, bfloat16_sums, stages + plain, folder=tmp_path)
    assert max(gaps[:3]) < 4e-3 < 1.5e-2 < min(gaps[3:])
