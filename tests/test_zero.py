"""The same gradient under DeepSpeed: ZeRO stages 1 to 3, one and two ranks, as the plain model from unshared rows."""

from __future__ import annotations

import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import gradient_gap, make_groups, score, token_weights
from tiny_models import build, group

from lingshu_rl.model.logprobs import completion_logprobs
from lingshu_rl.model.packing import pack
from lingshu_rl.policy import share_rows, skip_shared_memory_build


def _model(tied: bool) -> Any:
    model = build("qwen2_5_vl")
    if tied:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
        model.tie_weights()
    return model


def _work(rank: int, ranks: int, port: int, stage: int, tied: bool, folder: str) -> None:
    """One rank: its share of the rows; writes the gaps of the full gradient, or the error."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    try:
        torch.set_num_threads(1)
        import deepspeed
        from deepspeed.utils import safe_get_full_grad

        skip_shared_memory_build()
        deepspeed.init_distributed("gloo")
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
        Path(folder, str(rank)).write_text(str(gradient_gap(expected, got)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, str(rank)).write_text(traceback.format_exc())
        raise


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks", "tied"), [(1, 2, False), (2, 2, True), (3, 1, False), (3, 2, True)])
def test_gradients_under_zero(stage: int, ranks: int, tied: bool, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(rank, ranks, port, stage, tied, str(tmp_path))) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
        if worker.is_alive():
            worker.kill()
    gaps = [(tmp_path / str(rank)).read_text() for rank in range(ranks)]
    for gap in gaps:
        assert "Traceback" not in gap, gap
        assert float(gap) < 1e-4
