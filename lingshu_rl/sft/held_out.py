"""How good a stage's model is: held-out questions answered greedily, graded by the rewards, one row a stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingshu_rl.data.tables import json_rows
from lingshu_rl.eval.stats import gain_between, mean_ci
from lingshu_rl.progress import Progress
from lingshu_rl.rewarding import reward_of
from lingshu_rl.sft.settings import START, SftConfig
from lingshu_rl.storage.fingerprint import text_hash
from lingshu_rl.storage.runfolder import image_name, write_text
from lingshu_rl.text.markup import table_line

if TYPE_CHECKING:
    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.types import Prompt


def measure(
    config: SftConfig, name: str, model: str, key: str, prompts: Sequence[Prompt], folder: Path, progress: Progress
) -> None:
    """Answer the held-out questions greedily and grade them into eval/<name>.jsonl, once for each state of the
    model."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from lingshu_rl.model.encoder import PromptEncoder
    from lingshu_rl.model.loading import load_model

    state = PartialState()
    mark = folder / "eval" / f"{name}.key"
    told = text_hash([key, asdict(config.test)])
    if mark.exists() and mark.read_text() == told:
        return
    network = load_model(model, torch.bfloat16 if state.device.type == "cuda" else torch.float32).to(state.device)
    own = list(prompts)[state.process_index :: state.num_processes]
    answers = answer(network, PromptEncoder(model), own, config.test.batch, config.test.max_tokens)
    del network
    results = reward_of(config.test.rewards, config.test.data).score_batch(
        [p.reward_input(text, cut) for p, (text, cut) in zip(own, answers, strict=True)]
    )
    rows = [
        {
            "id": p.id,
            "kind": p.kind,
            "task": str(p.meta.get("task", "")),
            "modality": str(p.meta.get("modality", "")),
            "image": image_name(p.images),
            "question": p.text,
            "options": list(p.options),
            "gold": p.gold,
            "completion": text,
            "value": r.value,
            "status": r.status,
            "parsed": r.parsed,
            "reason": r.reason,
        }
        for p, (text, _), r in zip(own, answers, results, strict=True)
    ]
    if state.num_processes > 1:
        place = {p.id: n for n, p in enumerate(prompts)}
        rows = sorted(gather_object(rows), key=lambda row: place[row["id"]])
    if state.is_main_process:
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        write_text(folder / "eval" / f"{name}.jsonl", text)
        write_text(mark, told)
        score = mean_ci([r["value"] for r in rows], [r["image"] for r in rows])
        progress.say(f"{name}: held-out accuracy {_share(score)}")


def answer(
    model: Any, encoder: PromptEncoder, prompts: Sequence[Prompt], batch: int, max_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy completions and whether each was cut at the limit, in the prompts' order."""
    import torch
    from transformers import GenerationConfig

    from lingshu_rl.model.families import model_spec

    ends = encoder.eos_ids
    pad = encoder.tokenizer.pad_token_id
    # A fresh one: a model's own may hold a repetition penalty, which is no part of greedy decoding.
    plan = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends) if pad is None else pad,
        suppress_tokens=list(model_spec(model.config).placeholder_ids) or None,
    )
    out: dict[int, tuple[str, bool]] = {}
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].images))
    while order:
        seeing = bool(prompts[order[0]].images)
        chosen = [n for n in order[:batch] if bool(prompts[n].images) is seeing]
        order = order[len(chosen) :]
        texts = [encoder.render(prompts[n]) for n in chosen]
        plain = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
        if seeing:
            images = [[picture.pixels() for picture in prompts[n].images] for n in chosen]
            inputs = encoder.processor(text=texts, images=images, **plain)
        else:
            inputs = encoder.tokenizer(texts, **plain)
        inputs = {
            k: v.to(model.device, model.dtype) if v.is_floating_point() else v.to(model.device)
            for k, v in inputs.items()
        }
        with torch.no_grad():
            made = model.generate(**inputs, generation_config=plan)[:, inputs["input_ids"].shape[1] :]
        for n, row in zip(chosen, made.tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in ends), None)
            out[n] = (encoder.decode(row[:end]), end is None)
    return [out[n] for n in range(len(prompts))]


def summarise(folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """One row a measured state: accuracy, and the paired gain over the state before it."""
    rows: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    for name in (START, *stages):
        path = folder / "eval" / f"{name}.jsonl"
        if not path.exists():
            continue
        graded = [row for _, row in json_rows(path)]
        rows.append(score_row(name, graded, before))
        before = graded
        blank = folder / "eval" / f"{name}_blank.jsonl"
        if blank.exists():
            seen = [row for _, row in json_rows(blank)]
            rows[-1]["blank_image"] = mean_ci([r["value"] for r in seen], [r["image"] for r in graded])
    return {"rows": rows}


def score_row(name: str, graded: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row = {"stage": name, **mean_ci([r["value"] for r in graded], [r.get("image") for r in graded])}
    return {**row, "gain": gain_between(before, graded)} if before else row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown for people."""
    lines = [
        "| stage | held-out accuracy (95 % interval) | gain over the stage before, points | blank image | questions |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gain = row.get("gain")
        said = f"{gain['points']:+.1f} ({gain['ci95'][0]:+.1f} to {gain['ci95'][1]:+.1f})" if gain else ""
        blank = _share(row["blank_image"]) if row.get("blank_image") else ""
        lines.append(table_line([row["stage"], _share(row), said, blank, str(row["n"])]))
    return "\n".join(lines) + "\n"


def _share(score: Mapping[str, Any]) -> str:
    if score["accuracy"] is None:
        return "not judged"
    low, high = score["ci95"]
    return f"{100 * score['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
