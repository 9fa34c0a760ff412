"""Questions that a writer invents about an image, with the right to answer "Error" where the image does not say.

Two requests: one asks for questions with answers (JSON), the other answers each question again without seeing the
proposed answer. The rewards compare the two; only questions on which they agree are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lingshu_rl.data.rows import RowError
from lingshu_rl.imaging.images import Picture
from lingshu_rl.synth.captions import user
from lingshu_rl.synth.rows import Dropped, Kept, Outcome, Record, as_prompt, provenance, training_row
from lingshu_rl.synth.verify import Verifier, reason_of
from lingshu_rl.synth.writer import Asker
from rewards.chat import RequestRefused

ASK = (
    "Write {count} different exam questions about this {modality} image that can be answered by looking at it.{known}\n"
    'Answer with a JSON list. Each item has "question", "kind" ("option", "yesno" or "open") and "answer"; items of '
    "kind "
    '"option" also have "options", a list of 2 to 5 texts, and their answer is one of these texts. Open answers have '
    "at "
    'most five words. Where the image does not allow a question of that kind, give the item the answer "Error".'
)
ANSWER_ERROR = "error"
EXAMPLE = {"question": "Is a finding seen?", "kind": "yesno", "answer": "yes"}
ANSWER_EXAMPLE = "<think>It is seen.</think><answer>yes</answer>"
KINDS = ("option", "yesno", "open")
MAY_REFUSE = 'If the image does not allow an answer, write "Error" as the answer.'
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


class Instruct:
    """count: questions asked for each record."""

    def __init__(self, verifier: Verifier, count: int = 3) -> None:
        if count < 1:
            raise ValueError(f"--count must be at least 1, got {count}")
        self.verifier, self.count = verifier, count

    async def __call__(self, record: Record, writer: Asker) -> list[Outcome]:
        name = str(record["id"])
        try:
            images = [Picture(source).encoded() for source in record.get("images") or []]
        except OSError as error:
            return [Dropped(name, "unreadable record", str(error), record)]
        if not images:
            return [Dropped(name, "no image", "", record)]
        modality = str((record.get("meta") or {}).get("modality", "medical"))
        known = f"\nWhat is known of it: {record['caption']}" if record.get("caption") else ""
        try:
            asked = await writer.ask(
                user(ASK.format(count=self.count, modality=modality, known=known)),
                images=images,
                example=json.dumps([EXAMPLE] * self.count),
            )
            items = read_items(asked.text)
            if items is None:
                return [Dropped(name, "reply is no JSON list", asked.text[:300], record)]
            made = [
                await self.check(record, n, item, asked.request, writer, images)
                for n, item in enumerate(items[: self.count])
            ]
            over = [Dropped(name, "more questions than asked for", str(item), record) for item in items[self.count :]]
            return made + over
        except RequestRefused as error:
            return [Dropped(name, error.reason, str(error), record)]

    async def check(
        self, record: Record, number: int, item: Mapping[str, Any], request: str, writer: Asker, images: list[bytes]
    ) -> Outcome:
        name = f"{record['id']}-q{number}"
        if not isinstance(item, Mapping) or item.get("kind") not in KINDS:
            return Dropped(name, "not a usable row", f"kind must be one of {', '.join(KINDS)}", {"item": item})
        if str(item.get("answer", "")).strip().lower() == ANSWER_ERROR:
            return Dropped(name, "writer answered Error", str(item.get("question")), dict(item))
        fields = {key: item[key] for key in ("question", "kind", "answer", "options") if key in item}
        if fields["kind"] != "option":
            fields.pop("options", None)
        row = training_row(record, f"q{number}", **fields, meta={"task": "self_instruct"})
        try:
            prompt = as_prompt(row)
        except RowError as error:
            return Dropped(name, "not a usable row", str(error), row)
        if problem := self.verifier.label_fault(prompt):
            return Dropped(name, "label cannot be judged", problem, row)
        second = await writer.ask(user(f"{prompt.text}\n{MAY_REFUSE}"), images=images, seed=1, example=ANSWER_EXAMPLE)
        verdict = self.verifier.judge(prompt, second.text, second.truncated)
        row["meta"]["synth"] = provenance("instruct", record, verdict, requests=[request, second.request])
        if verdict["kept"]:
            return Kept(row)
        refused = re.search(r"<answer>\s*error\b", second.text, re.IGNORECASE)
        return Dropped(name, "second reading answered Error" if refused else reason_of(verdict), second.text, row)


def read_items(text: str) -> list[Any] | None:
    """The JSON list of a reply, in a code fence or not; None when there is none."""
    fenced = _FENCE.search(text)
    body = fenced.group(1) if fenced else text
    start, end = body.find("["), body.rfind("]")
    try:
        items = json.loads(body[start : end + 1]) if 0 <= start < end else None
    except (json.JSONDecodeError, RecursionError):
        return None
    return items if isinstance(items, list) else None
