"""Grade stored outputs of other tools with this library's graders: MedEvalKit's results.json, lmms-eval samples,
JSONL."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingshu_rl.data.labels import inline_options, labelled
from lingshu_rl.data.rows import FIELDS, LETTERS, RowError, row_to_prompt
from lingshu_rl.data.sources import Source, SourceError, open_records
from lingshu_rl.eval.benchmarks import EvalError
from lingshu_rl.eval.engines import Reply
from lingshu_rl.eval.scoring import Row, make_row, reward_input, score
from lingshu_rl.eval.tables import percent, text
from lingshu_rl.storage.runfolder import write_text
from rewards import build
from rewards.base import RewardResult
from rewards.compose import DEFAULT_SPEC
from rewards.executor import judge
from rewards.kinds import KindError, find

OUTPUTS = ("completion", "response", "output", "prediction", "pred", "model_answer")
ANSWERS = ("answer", "gold", "ground_truth", "gt_answer", "target", "label", "correct_answer", "answer_idx")
OPTIONS = ("options", "choices")
QUESTIONS = ("question", "prompt", "input")
VERDICTS = ("correct", "is_correct", "value", "exact_match", "acc", "score")
FINISH = ("finish_reason", "stop_reason")
CUT = ("length", "max_tokens", "max_length")
SHOWN = 5
_LETTER = re.compile(r"\s*\(?([A-J])[).:]?\s*")


def rescore(file: Path, kind: str | None = None, out: Path | None = None) -> dict[str, Any]:
    """Grade every output of the file again; returns counts and scores, and writes the rows.

    `before` is the other tool's own verdict where it stored one. A label that cannot be judged is counted, not scored.
    Raises EvalError for a file of another form.
    """
    if kind is not None:
        try:
            find(kind)
        except KindError as error:
            raise EvalError(f"--kind: {error}") from None
    form, records = read_outputs(file)
    grader = build({"route": DEFAULT_SPEC["parts"]["answer"]["route"]})
    rows: list[Row] = []
    unusable: list[str] = []
    for number, record in enumerate(records, start=1):
        try:
            if {"question", "answer", "kind"} <= set(record) and form == "plain":
                # A data row beside its output: read as the loader does. What else the other tool stored stays out.
                completion = next(_first_text(record[k]) for k in OUTPUTS if k in record)
                before, made = _verdict(record), {k: v for k, v in record.items() if k in FIELDS}
                prompt = row_to_prompt({"id": number, "images": [], **made}, instruction="")
            else:
                made = plain(form, record, number, kind)
                completion = made.pop("completion")
                before = made.pop("before")
                prompt = row_to_prompt({**made, "images": []}, instruction="")
        except RowError as error:
            unusable.append(f"row {number}: {error}")
            continue
        reply = Reply(completion, finish_reason(record))
        result: RewardResult = judge(grader, [reward_input(prompt, reply)])[0]
        rows.append(
            {
                **make_row(prompt, reply, result),
                "image": str(record.get("image_name") or record.get("image") or ""),
                "before": before,
            }
        )
    if not rows:
        raise EvalError(f"{file}: none of its {len(records)} rows can be graded; the first: {(unusable or ['-'])[0]}")
    target = out or file.with_name(file.stem + ".rescored.jsonl")
    write_text(target, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    kinds = sorted({row["kind"] for row in rows})
    known = [row for row in rows if row["before"] is not None and row["value"] is not None]
    return {
        "file": str(file),
        "form": form,
        "rows": str(target),
        "unusable": unusable,
        "all": score(rows),
        "by_kind": {k: score([r for r in rows if r["kind"] == k]) for k in kinds},
        "before": sum(r["before"] for r in known) / len(known) if known else None,
        "again": sum(r["value"] for r in known) / len(known) if known else None,
        "compared": len(known),
        "finish_unknown": sum(not row["finish_reason"] for row in rows),
        "newly_right": [r["id"] for r in known if r["before"] < 0.5 <= r["value"]],
        "newly_wrong": [r["id"] for r in known if r["value"] < 0.5 <= r["before"]],
    }


def read_outputs(file: Path) -> tuple[str, list[dict[str, Any]]]:
    """(form, rows): "medevalkit" (a list with `response`), "lmms-eval" (`doc`, `resps`), "plain" (an output and a
    label)."""
    try:
        records, _ = open_records(Source(str(file)))
        found = [(number, record) for number, record in records]
    except SourceError as error:
        raise EvalError(str(error)) from None
    if bad := next(((number, record) for number, record in found if isinstance(record, RowError)), None):
        raise EvalError(f"{file}, {records.place(bad[0])}: {bad[1]}")
    if not found:
        raise EvalError(f"{file}: it holds no outputs")
    rows = [record for _, record in found]
    first = rows[0]
    if "resps" in first or "filtered_resps" in first:
        return "lmms-eval", rows
    if "response" in first:
        return "medevalkit", rows
    if any(name in first for name in OUTPUTS):
        return "plain", rows
    raise EvalError(
        f"{file}: its rows hold none of {', '.join(OUTPUTS)} and no `resps`; they have {', '.join(sorted(first)[:12])}"
    )


def plain(form: str, record: Mapping[str, Any], number: int, kind: str | None) -> dict[str, Any]:
    """One stored output as a data row with `completion` and `before` (the other tool's verdict or None)."""
    fields = dict(record)
    if form == "lmms-eval":
        doc = record.get("doc")
        fields = {**(doc if isinstance(doc, dict) else {}), **record}
        fields["completion"] = _first_text(record.get("resps") or record.get("filtered_resps"))
        fields["answer"] = record.get("target", fields.get("answer"))
        fields["id"] = record.get("doc_id", number)
    completion = next((_first_text(fields[k]) for k in OUTPUTS if k in fields), None)
    answer = next((fields[k] for k in ANSWERS if fields.get(k) not in (None, "")), None)
    if answer is None and ("findings" in fields or "impression" in fields):
        answer = "\n".join(
            s
            for s in (str(fields.get("findings") or ""), str(fields.get("impression") or ""))
            if s.strip() and s != "None"
        )
        kind = kind or "report"
    if completion is None or answer is None:
        raise RowError(
            f"has no {'output' if completion is None else 'label'} (fields {', '.join(sorted(fields)[:12])})"
        )
    question = str(next((fields[k] for k in QUESTIONS if fields.get(k)), "?"))
    options = next((fields[k] for k in OPTIONS if fields.get(k)), None) or _lettered(fields)
    if not options and kind in (None, "option") and (letter := _letter(answer)):
        answer, options = letter, _unwritten(question, letter)
    row: dict[str, Any] = {
        "id": str(next((fields[k] for k in ("id", "qid", "question_id") if fields.get(k) is not None), number)),
        "question": question,
        "options": options,
        "answer": answer,
        **({"kind": kind or str(fields["kind"])} if kind or fields.get("kind") else {}),
        **{name: fields[name] for name in ("unit", "tolerance") if name in fields},
    }
    row = labelled(row, 0 if row["options"] and isinstance(answer, int) else None)
    if row["kind"] != "numeric":
        row = {name: value for name, value in row.items() if name not in ("unit", "tolerance")}
    if row["kind"] != "option":
        row.pop("options", None)
    return {**row, "completion": completion, "before": _verdict(fields)}


def finish_reason(record: Mapping[str, Any]) -> str:
    """ "length" for an output that was cut, "stop" for one that was not, "" where the file does not say."""
    if isinstance(record.get("truncated"), bool):
        return "length" if record["truncated"] else "stop"
    value = next((_first_text(record[name]).lower() for name in FINISH if record.get(name)), "")
    return "length" if value in CUT else "stop" if value else ""


def _letter(answer: Any) -> str:
    """The letter that a label is, "" for another."""
    match = _LETTER.fullmatch(answer) if isinstance(answer, str) else None
    return match[1] if match else ""


def _unwritten(question: str, letter: str) -> list[str]:
    """Bare letters for options of a row that stores none, where its question does not have them either."""
    if letter in LETTERS[: len(inline_options(question)[1])]:
        return []
    return list(LETTERS[: max(5, LETTERS.index(letter) + 1)])


def _lettered(fields: Mapping[str, Any]) -> list[str]:
    for names in ([f"option_{c}" for c in LETTERS[:8]], [f"op{c}" for c in "abcdefgh"], list(LETTERS[:8])):
        texts = [str(fields[n]) for n in names if fields.get(n) not in (None, "")]
        if len(texts) > 1:
            return texts
    return []


def _first_text(value: Any) -> str:
    while isinstance(value, list):
        value = value[0] if value else ""
    return "" if value is None else str(value)


def _verdict(fields: Mapping[str, Any]) -> float | None:
    for name in VERDICTS:
        value = fields.get(name)
        if isinstance(value, bool | int | float) and 0 <= value <= 1:
            return float(value)
    return None


def render(result: Mapping[str, Any]) -> str:
    lines = [["kind", "n", "score", "unread", "not judged"]]
    for name, found in (*result["by_kind"].items(), ("all", result["all"])):
        lines.append([name, str(found["n"]), percent(found), str(found["unread"]), str(found["not_judged"])])
    parts = [f"{result['file']}: {result['form']} outputs, graded again", "", text(lines)]
    if result["compared"]:
        parts.append(
            f"stored verdicts say {100 * result['before']:.1f} %, these graders {100 * result['again']:.1f} % of the "
            f"same {result['compared']}: {len(result['newly_right'])} newly right, {len(result['newly_wrong'])} newly "
            "wrong"
        )
    if result["finish_unknown"]:
        parts.append(
            f"{result['finish_unknown']} rows do not say whether their output was cut (no {' or '.join(FINISH)}); a "
            "cut one counts as a whole answer"
        )
    if result["unusable"]:
        parts.append(
            f"{len(result['unusable'])} rows could not be read, for example {'; '.join(result['unusable'][:SHOWN])}"
        )
    return "\n".join([*parts, f"rows: {result['rows']}"])
