"""Chains of thought for rows with a known answer, kept only when the rewards find the chain's own answer right.

The writer is asked the plain question and never sees the label. Whatever it says about its answer counts for nothing:
the grader of training decides.
"""

from __future__ import annotations

import re

from lingshu_rl.data.rows import FIELDS, RowError
from lingshu_rl.synth.rows import Dropped, Kept, Outcome, Record, as_prompt, provenance
from lingshu_rl.synth.verify import Verifier, reason_of
from lingshu_rl.synth.writer import Asker, Reply
from lingshu_rl.types import Prompt
from rewards.answer import extract
from rewards.chat import RequestRefused

SHORTEST_CHAIN = 3  # words
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL | re.IGNORECASE)
EXAMPLE = ""  # a reply that is not kept, so that the next sample is asked for


class Thoughts:
    """samples: replies asked for one row, one after another until one is right."""

    def __init__(self, verifier: Verifier, samples: int = 1) -> None:
        if samples < 1:
            raise ValueError(f"--samples must be at least 1, got {samples}")
        self.verifier, self.samples = verifier, samples

    async def __call__(self, record: Record, writer: Asker) -> list[Outcome]:
        name = str(record["id"])
        try:
            prompt = as_prompt(record)
        except RowError as error:
            return [Dropped(name, "not a usable row", str(error), record)]
        if problem := self.verifier.label_fault(prompt):
            return [Dropped(name, "label cannot be judged", problem, record)]
        failures: list[Outcome] = []
        for seed in range(self.samples):
            try:
                reply = await writer.ask(
                    [{"role": "user", "content": prompt.text}],
                    images=[picture.encoded() for picture in prompt.images],
                    seed=seed,
                    example=EXAMPLE,
                )
            except RequestRefused as error:
                return [Dropped(name, error.reason, str(error), record)]
            outcome = self.decide(record, prompt, reply, seed)
            if isinstance(outcome, Kept):
                return [outcome]
            failures.append(outcome)
        return failures

    def decide(self, record: Record, prompt: Prompt, reply: Reply, seed: int) -> Outcome:
        verdict = self.verifier.judge(prompt, reply.text, reply.truncated)
        think = chain_of(reply.text)
        meta = dict(record.get("meta") or {})
        synth = provenance("thoughts", record, verdict, request=reply.request, sample=seed)
        row = {key: record[key] for key in FIELDS if key in record} | {"meta": {**meta, "think": think, "synth": synth}}
        if not verdict["kept"]:
            return Dropped(str(record["id"]), reason_of(verdict), reply.text, row)
        if len(think.split()) < SHORTEST_CHAIN:
            return Dropped(str(record["id"]), "no chain of thought", reply.text, row)
        if concludes_otherwise(self.verifier, prompt, think):
            return Dropped(str(record["id"]), "chain concludes otherwise", reply.text, row)
        return Kept(row)


def chain_of(text: str) -> str:
    """The think block, or, without one, what is said before the answer is announced."""
    blocks = [found.strip() for found in _THINK.findall(text) if found.strip()]
    if blocks:
        return "\n".join(blocks)
    answer = extract(text)
    return answer.body[: answer.candidates[0].lead].strip() if answer.candidates else ""


def concludes_otherwise(verifier: Verifier, prompt: Prompt, think: str) -> bool:
    """Whether the chain itself announces ("so the answer is B") another answer than the label."""
    if prompt.kind not in ("option", "yesno") or extract(think).channel not in ("cue", "boxed", "tag"):
        return False
    verdict = verifier.judge(prompt, think)
    return verdict["status"] == "ok" and verdict["value"] == 0.0
