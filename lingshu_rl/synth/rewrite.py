"""Multiple choice to open questions and back. Which way is right by rule, so no writer is needed and none is trusted.

An option question becomes open only where its text stands without the options and has one right answer: what says so
are words ("most common", "how many", "which plane"), and no other row that asks the same of the same picture may answer
otherwise. An open question becomes multiple choice with wrong options from answers to the same question or task (one
label space), none of which the grader would accept.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lingshu_rl.data.rows import LETTERS, RowError
from lingshu_rl.synth.rows import Dropped, Kept, Outcome, Record, as_prompt, provenance, training_row
from lingshu_rl.synth.verify import Verifier

# The question means its options.
_NEEDS_OPTIONS = re.compile(
    r"\b(?:(?:which|what|one|any|all|none|some|each) of (?:the|these|those)\b|the following|(?:all|none"
    r"|both) of the above"
    r"|except\b|least likely|most likely|best describe|not (?:true|correct|seen|a)\b|options?\b|choices?\b|false\b)",
    re.IGNORECASE,
)
_REFERS = re.compile(
    r"^(?:all|none|both|neither|either|any)\b|\b(?:of the above|of these|[A-E] and [A-E])\b", re.IGNORECASE
)
# Without options, "Which finding is present?" has as many right answers as there are findings. These words make it one:
_SUPERLATIVE = re.compile(
    r"\b(?:most|best|main|chief|sole|maximum|minimum|of choice|gold standard|commonest"
    r"|(?:first|last|only|primary|principal)[ -](?:line|step|sign|symptom|cause|treatment|drug|function|action|test"
    r"|organ|person)"
    r"|(?:larg|small|high|low|earli|lat|long|short|old|young|great|strong|weak|thick|thinn|near|safe|fast|quick)est)\b",
    re.IGNORECASE,
)
_QUANTITY = re.compile(
    r"\bhow (?:many|much|old|long|large|big|wide|high|deep|far|often|was this|is this)\b"
    r"|(?:^|\b(?:what(?:'s| is| was| will be)?|calculate)\s+(?:the\s+)?)(?:\w+\s+){0,2}?(?:dose|dosage|rate|ratio"
    r"|percentage|number"
    r"|incidence|prevalence|half-?life|angle|age|size|volume|duration|width|length|height|weight|distance|thickness"
    r"|diameter"
    r"|frequency|value|amount|concentration|temperature|score)\b",
    re.IGNORECASE,
)
_ATTRIBUTE = re.compile(
    r"\b(?:modality|plane|view|projection|sequence|weighting|side|half|hemisphere|lobe|quadrant|stage|staging|grade"
    r"|stain|phase"
    r"|sex|gender|chromosome|vertebral level|organ|body part|region of the body|part of the body|window|(?:the|your"
    r"|likely|probable) diagnosis"
    r"|(?:type|kind) of (?:image|imaging|scan|study|contrast|stain)|colou?r of|shape of|unit of|formula (?:of|for)"
    r"|name of|called|known as|terms? (?:for|used)|inventor|discoverer|father of|who|when|where (?:is|are|was|does)"
    r"|what year"
    r"|which year|year of)\b",
    re.IGNORECASE,
)
# ... and these make it several all the same, unless a superlative stands with them.
_SEVERAL = re.compile(
    r"\b(?:findings?|abnormalit\w+|features?|signs?|symptoms?|complications?|causes?|drugs?|examples?|characteristics?"
    r"|associated|includes?|can|may|could|seen in|differential|both|true)\b",
    re.IGNORECASE,
)
LONGEST_ANSWER = 6  # words; a longer option is a statement, not an answer
YES_NO = ({"yes", "no"}, {"true", "false"})


def to_open(records: Iterable[Record], verifier: Verifier) -> Iterator[Outcome]:
    rows = list(records)
    answers = right_answers(rows)
    for record in rows:
        name = str(record["id"])
        try:
            prompt = as_prompt(record)
        except RowError as error:
            yield Dropped(name, "not a usable row", str(error), record)
            continue
        if prompt.kind != "option":
            yield Dropped(name, "not multiple choice", prompt.kind, record)
            continue
        if prompt.meta.get("multi"):
            yield Dropped(name, "several right options", str(prompt.gold), record)
            continue
        answer = prompt.options[LETTERS.index(str(prompt.gold))]
        kind = "yesno" if {o.casefold() for o in prompt.options} in YES_NO else "open"
        if _NEEDS_OPTIONS.search(str(record["question"])):
            yield Dropped(name, "question needs its options", str(record["question"]), record)
            continue
        if _REFERS.search(answer):
            yield Dropped(name, "answer refers to options", answer, record)
            continue
        if len(answer.split()) > LONGEST_ANSWER:
            yield Dropped(name, "answer is a statement", answer, record)
            continue
        if kind == "open" and not has_one_answer(str(record["question"])):
            yield Dropped(name, "several answers may be right", str(record["question"]), record)
            continue
        if len(known := answers[_asked_of(record)]) > 1:
            yield Dropped(name, "several answers are right", "; ".join(sorted(known)), record)
            continue
        if kind == "yesno":
            answer = {"true": "yes", "false": "no"}.get(answer.casefold(), answer.casefold())
        yield _judged(record, verifier, "open", prompt.options, question=record["question"], kind=kind, answer=answer)


def has_one_answer(question: str) -> bool:
    """Whether the words of the question itself (its last sentence) leave one right answer without options."""
    asks = re.split(r"(?<=[.?!])\s+", question.strip())[-1]
    if _SUPERLATIVE.search(asks) or _QUANTITY.search(asks):
        return True
    return bool(_ATTRIBUTE.search(asks)) and not _SEVERAL.search(asks)


def right_answers(records: Iterable[Record]) -> dict[str, set[str]]:
    """The right options of all rows that ask one thing of one picture."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        try:
            prompt = as_prompt(record)
        except RowError:
            continue
        if prompt.kind == "option" and not prompt.meta.get("multi"):
            found[_asked_of(record)].add(prompt.options[LETTERS.index(str(prompt.gold))].casefold())
    return found


def _asked_of(record: Record) -> str:
    images = [str(image) for image in record.get("images") or ()]
    return "|".join([" ".join(str(record.get("question")).casefold().split()), *images])


def to_options(records: Iterable[Record], verifier: Verifier, count: int, seed: int) -> Iterator[Outcome]:
    """count: options with the right one. A row made by `to_open` gets its own options back."""
    rows = list(records)
    spaces: dict[str, list[str]] = defaultdict(list)
    for record in rows:
        if record.get("kind") == "open" and isinstance(record.get("answer"), str):
            spaces[label_space(record)].append(record["answer"])
    for record in rows:
        name = str(record["id"])
        answer = record.get("answer")
        if record.get("kind") != "open" or not isinstance(answer, str):
            yield Dropped(name, "not an open question", str(record.get("kind")), record)
            continue
        earlier = ((record.get("meta") or {}).get("synth") or {}).get("options")
        rng = random.Random(f"{seed}/{name}")
        options = list(earlier) if earlier else [answer, *distractors(record, spaces, verifier, rng)][:count]
        if len(options) < min(count, 2) or (not earlier and len(options) < count):
            yield Dropped(name, "too few other answers", f"label space {label_space(record)!r}", record)
            continue
        if not earlier:
            rng.shuffle(options)
        letter = LETTERS[options.index(answer)]
        yield _judged(
            record,
            verifier,
            "options",
            options,
            question=record["question"],
            kind="option",
            answer=letter,
            options=options,
        )


def label_space(record: Record) -> str:
    """Rows of one task, or of one question, answer from one set."""
    meta = record.get("meta") or {}
    return str(meta.get("label_space") or meta.get("task") or " ".join(str(record.get("question")).lower().split()))


def distractors(record: Record, spaces: dict[str, list[str]], verifier: Verifier, rng: random.Random) -> list[str]:
    """Other answers of the space in random order, none of which (nor of each other) the grader takes for the right
    one."""
    taken: list[str] = []
    for text in rng.sample(pool := sorted(set(spaces[label_space(record)])), len(pool)):
        if not any(same_answer(record, text, known, verifier) for known in [str(record["answer"]), *taken]):
            taken.append(text)
    return taken


def same_answer(record: Record, said: str, gold: str, verifier: Verifier) -> bool:
    """Whether the grader accepts one for the other, in either direction."""
    for a, b in ((said, gold), (gold, said)):
        row = {"id": record["id"], "images": [], "question": record["question"], "kind": "open", "answer": b}
        if verifier.judge(as_prompt(row), f"<answer>{a}</answer>")["value"] != 0.0:
            return True
    return False


def _judged(record: Record, verifier: Verifier, way: str, had_options: Sequence[str], /, **fields: Any) -> Outcome:
    row = training_row(record, way, **fields)
    try:
        prompt = as_prompt(row)
    except RowError as error:
        return Dropped(str(record["id"]), "not a usable row", str(error), row)
    if problem := verifier.label_fault(prompt):
        return Dropped(str(record["id"]), "label cannot be judged", problem, row)
    verdict = verifier.judge(prompt, f"<answer>{row['answer']}</answer>")
    row["meta"]["synth"] = provenance(f"rewrite {way}", record, verdict, options=list(had_options))
    return (
        Kept(row) if verdict["kept"] else Dropped(str(record["id"]), "label cannot be judged", verdict["reason"], row)
    )
