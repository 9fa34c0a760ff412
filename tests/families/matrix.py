"""One family through the whole loop of a run, and what came of it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import FAMILIES, make
from launching import ROOT, launch
from PIL import Image
from safetensors import safe_open
from short_runs import metrics_of
from torch import Tensor

from lingshu_rl.data.load import load
from lingshu_rl.model.encoder import PromptEncoder
from lingshu_rl.model.families import cpu_options, model_spec
from lingshu_rl.model.groups import group_logprobs
from lingshu_rl.model.loading import load_model
from lingshu_rl.types import TokenGroup

RESULTS = Path(__file__).with_name("results.json")  # docs/models.md is made of it
SIZES = ((300, 200), (200, 340), (256, 256), (420, 180))


@dataclass(frozen=True)
class Outcome:
    """What a family did. failure: the run's last words where it did not end well. gaps: nats, largest of a token.

    rows: what the run was on, "images" or "text". shares: whether a group is one row; why_not: else.
    engine: trainer against vLLM over both steps. dense: shared rows against one row a completion. oracle: log-probs here
    against the model's own forward on its processor's own inputs. names: whether the saved folder has the published ones.
    moved: what the two steps changed in log-probs; an engine with old weights would be as far away.
    """

    family: str
    title: str
    rows: str
    shares: bool
    why_not: str
    dtype: str
    oracle: float
    failure: str = ""
    engine: float | None = None
    dense: float | None = None
    names: bool = False
    moved: float | None = None

    @property
    def works(self) -> bool:
        """In bfloat16 a run's own checks judge the gap to the engine, by mean and 99th percentile."""
        near = self.dtype != "float32" or (self.engine or 0) < min(1e-3, (self.moved or 0) / 10)
        return not self.failure and self.names and near and self.oracle < 1e-4 and (self.dense or 0) < 1e-4


def outcome(name: str, work: Path) -> Outcome:
    """The family's, in a folder of its own: two steps of a run with vLLM in its process."""
    family, folder = FAMILIES[name], make(name, work / "model")
    spec = model_spec(load_model(str(folder), torch.float32))
    rows = write_rows(work / "oracle", family.sees)
    sees = (
        family.sees and not spec.image_blocks
    )  # which vLLM's attention on a CPU does not know: `launches.check_sight`
    trained = write_rows(work / "rows", sees)
    before, own = logprobs(folder, rows)
    found = partial(
        Outcome, name, family.title, "images" if sees else "text", spec.shareable, spec.reason,
        cpu_options(str(folder)).get("dtype", "float32"), largest(before, own),
    )  # fmt: skip
    done = launch(
        [
            f"model={folder}", f"data.train={trained}", f"data.test={trained.parent / 'test.jsonl'}", "data.instruction=short",
            "rollout.placement=colocate", "train.steps=2", "train.prompts_per_step=4", "train.group_size=4",
            "train.warmup_steps=1", "train.lr=1e-3", "rollout.max_tokens=16", "rollout.vllm={max_model_len: 4096}",
            "packing.token_budget=4096", "eval.limit=2", "eval.controls=[]", "loss.kl_coef=0", "run.trackers=[]",
            "rewards.spec={class: 'length_reward:Length'}", "rewards.preflight=false", f"run.dir={work / 'run'}",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    (work / "output.txt").write_text(done.stdout)
    if done.returncode:
        return found(failure=last_words(done.stdout))
    summary = json.loads((work / "run" / "summary.json").read_text())
    saved = next((work / "run").glob("checkpoints/*/hf"))
    return found(
        engine=max(row["policy/rollout_gap_max"] for row in metrics_of(work / "run")),
        dense=summary.get("dense_gap_first_step"),
        names=kinds_of(saved) == kinds_of(folder),
        moved=largest(before, logprobs(saved, rows)[0]),
    )


def logprobs(folder: Path, rows: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Of a few completions to a few prompts: by a packed row, and by the model's forward on what its processor returned.

    In float64, where two ways to the same number do not differ by what a random tower makes of their rounding.
    """
    model, encoder = load_model(str(folder), torch.float64), PromptEncoder(str(folder))
    model.set_experts_implementation("eager")  # grouped products take no float64
    here, own = [], []
    for prompt in load(str(rows), instruction="short").prompts[:2]:
        ids, vision = encoder.encode(prompt)
        vision = {key: in_double(value) for key, value in vision.items()}
        completions = tuple(tuple(range(60 + 7 * n, 60 + 7 * n + n)) for n in (1, 5, 9))
        group = TokenGroup(prompt.id, ids, completions, vision)
        here += group_logprobs(model, [group], token_budget=8192, layout="shared", banned_ids=(), temperature=1.0)[0]
        own += [own_forward(model, encoder, prompt, ids, completion) for completion in completions]
    return here, own


def in_double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def largest(one: list[Tensor], other: list[Tensor]) -> float:
    """Difference of a token, nats."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def own_forward(
    model: Any, encoder: PromptEncoder, prompt: Any, ids: tuple[int, ...], completion: tuple[int, ...]
) -> Any:
    """(T,) log-probs of the completion, from one call with all that the processor returned, each token's kind included."""
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    if prompt.images:
        images = [picture.pixels() for picture in prompt.images]
        text = [encoder.render(prompt)]
        found = encoder.processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
        inputs = {key: in_double(value) for key, value in found.items()}
        inputs.pop("labels", None)  # PaliGemma's asks for a loss
    answer = torch.tensor([completion])
    continued = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    # A token of the answer is of the kind that the processor gives its suffix (PaliGemma), else plain text.
    kind = 1 if model.config.model_type == "paligemma" else 0
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            continued[key] = torch.full_like(answer, kind)
    inputs |= {key: torch.cat([inputs[key], more], 1) for key, more in continued.items()}
    logits = model(**inputs, use_cache=False).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer.T)[:, 0]


def write_rows(work: Path, sees: bool, blank: bool = False) -> Path:
    """train.jsonl and test.jsonl: questions about noise of several sizes, or about grey."""
    work.mkdir(parents=True)
    for name, count in (("train", 8), ("test", 4)):
        rows = []
        for n in range(count):
            size, file = SIZES[n % len(SIZES)], work / f"{name}{n}.png"
            if sees:
                noise = np.random.default_rng([len(name), n]).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(noise // (255 if blank else 1) + 127 * blank).save(file)
            images, question = [str(file)] * sees, f"Which organ is it? ({n})"
            rows.append({"id": f"{name}{n}", "images": images, "question": question, "answer": "liver", "kind": "open"})
        (work / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return work / "train.jsonl"


def kinds_of(folder: Path) -> dict[str, Any]:
    """Name -> (type, shape) of every tensor of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found |= {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    return found


def last_words(output: str) -> str:
    """What ended the run, in a sentence: its own last words, or the last exception."""
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line).strip() for line in output.splitlines()]
    told = [n for n, line in enumerate(lines) if re.match(r"the run stopped|model=|[\w.]*(Error|Exception)\b.*:", line)]
    first = told[-1] if told else len(lines) - 1
    words = " ".join(lines[first : first + 1 + lines[first].endswith(":")])
    return re.split(r"[.;] ", re.sub(r"^the run stopped: |model=\S+: ", "", words))[0]


if __name__ == "__main__":  # python tests/families/matrix.py FAMILY ...: run them and write down what they did
    import sys
    import tempfile

    for family in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            done = outcome(family, Path(scratch))
            if not done.works:
                print((Path(scratch) / "output.txt").read_text())
        written = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        now = {**written, family: {"works": done.works, **asdict(done)}}
        RESULTS.write_text(json.dumps({name: now[name] for name in FAMILIES if name in now}, indent=1) + "\n")
        print(family, "works" if done.works else f"fails: {done}", flush=True)
