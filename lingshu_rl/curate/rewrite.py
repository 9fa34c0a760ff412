"""Dialogue answers without the doctor's voice: a writer model rewrites, rules check that it did."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from lingshu_rl.curate.items import Context, Dropped, Item, rank
from rewards.chat import KEY_ENV, ChatAnswer, RequestRefused

INSTRUCTION = (
    "Rewrite the reply to a medical question as neutral, general information in the third person. Keep every medical "
    "fact and add none. Claim no identity (no doctor, no clinic, no name, no 'I'), greet nobody, and do not "
    "advertise. Where the reply states a diagnosis for the asker, say what the signs may suggest instead. Where it "
    "prescribes a drug or a dose, say what is commonly considered and that a clinician decides. Return the rewritten "
    "reply and nothing else."
)
# What must not be left, by name of the fault. Checked on every reply, whoever wrote it.
FAULTS = {
    "identity": re.compile(
        r"\bI(?:'m| am)\s+(?:Dr\b|an?\s+(?:\w+\s+){0,2}(?:doctor|physician|surgeon|nurse|specialist|\w+ologist)\b)"
        r"|\bas\s+(?:your|an?)\s+(?:\w+\s+)?(?:doctor|physician)\b"
        r"|\bmy\s+(?:clinic|patients|practice|hospital)\b|\bthis is\s+Dr\b|\bDr\.?\s+(?-i:[A-Z])[a-z]+"
        r"|\bI\s+(?:have\s+)?(?:understand|read|seen|reviewed|gone through)\b.{0,40}\b(?:query|question|concern|case)",
        re.IGNORECASE,
    ),
    "diagnosis": re.compile(
        r"\byou\s+(?:definitely|certainly|clearly|surely)?\s*(?:have|are\s+suffering\s+from|have\s+got"
        r"|suffer\s+from)\s+(?!to\b|any\b|been\b|had\b|a\s+question|questions|concerns?)\w+"
        r"|\b(?:I|we)\s+(?:can\s+)?diagnose|\byour\s+diagnosis\s+is\b|\bthis\s+is\s+(?:definitely|certainly)\b",
        re.IGNORECASE,
    ),
    "prescription": re.compile(
        r"\b(?:I|we)\s+(?:would\s+|will\s+)?(?:prescribe|recommend|advise|suggest)\b|\b(?:take|start|use"
        r"|stop)\s+(?:taking\s+|using\s+)?(?:the\s+)?(?:tablets?|capsules?|syrup|tab\.?|cap\.?|inj\.?)\b"
        r"|\b(?:take|start)\s+[\w-]+(?:\s+[\w-]+){0,3}\s+\d+\s*(?:mg|mcg|g|ml|iu)\b|\b\d+\s*(?:mg|mcg|ml|iu)\s+(?:once"
        r"|twice|thrice|daily|every|bd|tds|od|bid|tid)\b",
        re.IGNORECASE,
    ),
}


def unsafe_parts(text: str) -> dict[str, str]:
    """Fault -> the words that show it."""
    return {name: match.group(0) for name, rule in FAULTS.items() if (match := rule.search(text))}


@dataclass(frozen=True)
class Rewrite:
    """Rewrite the answers of `kinds` through a writer model. only_unsafe: leave answers alone in which the rules find
    nothing.

    url: of an OpenAI-compatible server, up to /v1. The old answer is kept under meta.original_answer.
    """

    name: ClassVar[str] = "rewrite"
    url: str = ""
    model: str = ""
    kinds: tuple[str, ...] = ("open",)
    only_unsafe: bool = False
    temperature: float = 0.2
    max_tokens: int = 1024
    concurrency: int = 16
    timeout_s: float = 300.0
    key_env: str = KEY_ENV
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if not self.url or not self.model:
            raise ValueError("rewrite needs url and model of an OpenAI-compatible server")

    def run(self, rows: Iterable[Item], context: Context) -> Iterator[Item | Dropped]:
        endpoint = context.endpoint(self)

        def ask(item: Item) -> ChatAnswer | None:
            answer = str(item.row["answer"])
            if item.row["kind"] not in self.kinds or (self.only_unsafe and not unsafe_parts(answer)):
                return None
            user = f"Question:\n{item.row['question']}\n\nReply:\n{answer}"
            body = {
                "model": self.model,
                "temperature": self.temperature,
                "max_tokens": self.max_tokens,
                "messages": [{"role": "system", "content": self.instruction}, {"role": "user", "content": user}],
            }
            return endpoint.sample(body, 1, rank(context.seed, "rewrite", str(item.row["id"])) & 0x7FFFFFFF)[0]

        try:
            for item, reply in endpoint.each(rows, ask):
                yield self.judge(item, reply, context)
        finally:
            context.notes.update(requests_sent=endpoint.sent, answers_from_cache=endpoint.from_cache)
            endpoint.close()

    def judge(self, item: Item, reply: ChatAnswer | RequestRefused | None, context: Context) -> Item | Dropped:
        if reply is None:
            return item
        if isinstance(reply, RequestRefused):
            return Dropped.item(item, "writer_failed", str(reply))
        text = re.sub(r"<think>.*?</think>", "", reply.text, flags=re.DOTALL).strip()
        if reply.truncated or not text:
            return Dropped.item(item, "writer_failed", "cut off at max_tokens" if reply.truncated else "empty reply")
        if faults := unsafe_parts(text):
            return Dropped.item(item, "rewrite_unsafe", "; ".join(f"{k}: {v!r}" for k, v in faults.items()))
        context.count("rows_rewritten")
        return item.with_row(answer=text).with_meta(original_answer=item.row["answer"], rewritten_by=self.model)
