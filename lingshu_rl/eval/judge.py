"""A language model as judge: of open answers, beside the rules and never instead of them, and of HealthBench's rubrics.

Any OpenAI-compatible endpoint. A verdict that cannot be read, an error or a stall is "not judged", never "wrong".
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lingshu_rl.eval.engines import ChatClient, Reply
from lingshu_rl.eval.journal import Journal
from lingshu_rl.eval.scoring import Row
from lingshu_rl.eval.stats import mean_ci
from rewards.chat import EndpointError, count_tokens
from rewards.judge import (
    LONGEST_ANSWER,
    OPEN_PROMPT,
    OPEN_VERSION,
    OUTPUT_TOKENS,
    RUBRIC_PROMPT,
    RUBRIC_VERSION,
    fill,
    read_verdict,
    reply_text,
    rubric_score,
)


@dataclass(frozen=True)
class JudgeSettings:
    """url of the endpoint; model "" asks it; swapped: open answers whose order is swapped and asked again.

    price: for a million tokens in and out, in any currency; timeout_s and retries hold for one verdict.
    """

    url: str
    model: str = ""
    swapped: int = 50
    price: tuple[float, float] = (0.0, 0.0)
    timeout_s: float = 60.0
    retries: int = 2
    concurrency: int = 16
    max_tokens: int = 512


@dataclass(frozen=True)
class Call:
    """One question to the judge. key: its name in the journal."""

    key: str
    text: str
    seed: int = 0


def open_calls(rows: Sequence[Row], swapped: int) -> list[Call]:
    """One call an open answer; of a sample drawn by hash also the other order, and both again under another seed."""
    asked = [row for row in rows if row["kind"] == "open" and _answer(row)]
    sample = sorted(asked, key=lambda r: hashlib.blake2b(r["id"].encode(), digest_size=8).digest())[:swapped]
    chosen = {row["id"] for row in sample}
    calls = []
    for row in asked:
        forms = [("label_first", 0)]
        if row["id"] in chosen:
            forms += [("label_last", 0), ("label_first", 1), ("label_last", 1)]
        for order, seed in forms:
            pair = (_gold(row), _answer(row)) if order == "label_first" else (_answer(row), _gold(row))
            text = fill(OPEN_PROMPT, question=_bare_question(row), first=pair[0], second=pair[1])
            calls.append(Call(f"{row['id']}/{order}/{seed}", text, seed))
    return calls


def rubric_calls(rows: Sequence[Row]) -> list[Call]:
    """One call for every criterion of every reply that is not empty."""
    calls = []
    for row in rows:
        reply = reply_text(row["completion"]) or row["completion"].strip()
        if row["kind"] != "rubric" or not reply:
            continue
        for number, item in enumerate(row["gold"]):
            text = fill(RUBRIC_PROMPT, conversation=row["question"], reply=reply, criterion=item["criterion"])
            calls.append(Call(f"{row['id']}/{number}", text))
    return calls


def estimate(calls: Sequence[Call], price: tuple[float, float]) -> str:
    """What the calls will cost, in words."""
    tokens = sum(count_tokens(call.text) for call in calls)
    out = OUTPUT_TOKENS * len(calls)
    cost = (tokens * price[0] + out * price[1]) / 1e6
    told = f", about {cost:.2f} at the given price" if any(price) else " (give --judge-price IN,OUT for the cost)"
    return f"{len(calls)} calls, about {round(tokens):,} tokens in and {out:,} out{told}"


async def ask_judge(
    calls: Sequence[Call], client: ChatClient, journal: Journal, advance: Callable[[], None]
) -> dict[str, Reply]:
    """The judge's replies by key, from the journal where they are in it. An endpoint that is gone leaves errors."""
    down: list[str] = []

    async def one(call: Call) -> tuple[str, Reply]:
        reply = journal.get("judge", call.key)
        if reply is None:
            if down:
                reply = Reply(error=down[0])
            else:
                try:
                    reply = await client.complete([{"role": "user", "content": call.text}], seed=call.seed)
                except EndpointError as error:
                    down.append(str(error))
                    reply = Reply(error=str(error))
            journal.add("judge", call.key, reply)
        advance()
        return call.key, reply

    return dict(await asyncio.gather(*(one(call) for call in calls)))


def apply_open(rows: Sequence[Row], replies: Mapping[str, Reply], model: str) -> dict[str, Any]:
    """Write the verdicts into the rows (`judge`) and sum them up beside the rules' score of the same answers."""
    open_rows = [row for row in rows if row["kind"] == "open"]
    for row in open_rows:
        if row["value"] is None:
            row["judge"] = {"value": None, "reason": "there is no answer to judge"}
        elif not _answer(row):
            row["judge"] = {"value": 0.0, "reason": "empty answer, not asked"}
        else:
            reply = replies[f"{row['id']}/label_first/0"]
            said = read_verdict(reply.text, "same")
            reason = reply.error or ("" if said is not None else "no verdict in the reply")
            row["judge"] = {"value": None if said is None else float(said), "reason": reason, "text": reply.text}
    both = [
        (row["judge"]["value"], row["value"])
        for row in open_rows
        if row["judge"]["value"] is not None and row["value"] is not None
    ]
    verdicts = {key: read_verdict(reply.text, "same") for key, reply in replies.items()}
    orders = _pairs(verdicts, "label_first/0", "label_last/0")
    again = _pairs(verdicts, "label_first/0", "label_first/1") + _pairs(verdicts, "label_last/0", "label_last/1")
    return {
        "model": model,
        "prompt": OPEN_VERSION,
        "prompt_hash": hashlib.sha256(OPEN_PROMPT.encode()).hexdigest()[:16],
        **mean_ci([row["judge"]["value"] for row in open_rows], [row["image"] for row in open_rows]),
        "by_rule": mean_ci([row["value"] for row in open_rows], [row["image"] for row in open_rows]),
        "agrees_with_rules": _share(both),
        "judge_right_rule_wrong": sum(j == 1 and r == 0 for j, r in both),
        "judge_wrong_rule_right": sum(j == 0 and r == 1 for j, r in both),
        "agrees_when_swapped": _share(orders),
        "agrees_with_itself": _share(again),
    }


def apply_rubric(rows: Sequence[Row], replies: Mapping[str, Reply], model: str) -> dict[str, Any]:
    """Score every reply by its rubric: points of the met criteria over the points that can be won.

    A reply with a criterion that was not judged has no score. `raw` may be negative, `value` is cut at 0 and 1.
    """
    failed = 0
    for row in rows:
        if row["kind"] != "rubric" or row["status"] == "engine_error":
            continue
        verdicts = []
        for number in range(len(row["gold"])):
            reply = replies.get(f"{row['id']}/{number}")
            verdicts.append(None if reply is None else read_verdict(reply.text, "met"))
        if not row["completion"].strip():
            row |= {"value": 0.0, "raw": 0.0, "status": "unparsed", "reason": "empty answer, not asked"}
            continue
        failed += verdicts.count(None)
        if None in verdicts:
            row |= {"value": None, "status": "error", "reason": f"{verdicts.count(None)} criteria were not judged"}
            continue
        points = [item["points"] for item in row["gold"]]
        raw = rubric_score(points, [bool(met) for met in verdicts])
        row |= {"value": min(1.0, max(0.0, raw)), "raw": raw, "status": "ok", "reason": "", "parsed": verdicts}
    return {
        "model": model,
        "prompt": RUBRIC_VERSION,
        "criteria": len(replies),
        "criteria_not_judged": failed,
        "prompt_hash": hashlib.sha256(RUBRIC_PROMPT.encode()).hexdigest()[:16],
    }


def _pairs(verdicts: Mapping[str, bool | None], one: str, other: str) -> list[tuple[bool, bool]]:
    found = []
    for key, first in verdicts.items():
        if key.endswith(one) and f"{key.removesuffix(one)}{other}" in verdicts:
            second = verdicts[f"{key.removesuffix(one)}{other}"]
            if first is not None and second is not None:
                found.append((first, second))
    return found


def _share(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    return {"share": sum(a == b for a, b in pairs) / len(pairs) if pairs else None, "n": len(pairs)}


def _gold(row: Row) -> str:
    return row["gold"] if isinstance(row["gold"], str) else "; ".join(map(str, row["gold"]))


def _answer(row: Row) -> str:
    if row["value"] is None and row["status"] == "engine_error":
        return ""
    said = row["parsed"] if isinstance(row["parsed"], str) and row["parsed"] else reply_text(row["completion"])
    return (said or row["completion"]).strip()[-LONGEST_ANSWER:]


def _bare_question(row: Row) -> str:
    """Without the prompt's last line, which speaks of the answer's form."""
    return row["question"].rsplit("\n", 1)[0] if "\n" in row["question"] else row["question"]


def client_of(settings: JudgeSettings, model: str, token: str, transport: Any = None) -> ChatClient:
    return ChatClient(
        settings.url,
        model=model,
        token=token,
        sampling={"temperature": 0.0, "max_tokens": settings.max_tokens},
        timeout_s=settings.timeout_s,
        retries=settings.retries,
        concurrency=settings.concurrency,
        transport=transport,
    )
