"""Where in a completion the answer stands: one channel decides, everything below it may only veto.

Order: `<answer>` tag, `\\boxed{}`, JSON answer key, cue phrase ("the answer is"), bare last or only line. Nothing is
guessed: a completion whose think block, tag, box or JSON answer is left open or empty has no answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from rewards.text import blanked, first_sentence_end, normalise, strip_markup, table, unwrap_latex

CLOSED_CHANNELS = ("tag", "boxed", "json")

_END_OF_TURN = re.compile(
    r"<\|(?:im_end|im_start|endoftext|end_of_text|eot_id|eom_id|end|endofturn|end_of_turn_token|start_header_id|user"
    r"|return|call|diff_marker)\|>|\[END FINAL RESPONSE\]|<\|end▁of▁sentence\|>|</s>|<eos>|<end_of_turn>"
    r"|<start_of_turn>|<turn\|>|<end_of_utterance>",
    re.IGNORECASE,
)
_THINK = re.compile(
    r"<\s*/?\s*(?:\w{1,9}:)?(?:think|thinking|thought|reasoning|analysis|scratchpad|reflection)\s*>|\[/?THINK\]"
    r"|◁/?think▷"
    r"|<unused9[45]>|<\|(?:begin|end)_of_thought\|>|<\|(?:START|END)_THINKING\|>|<\|channel>\s?(?:thought)?"
    r"|<channel\|>",
    re.IGNORECASE,
)
_CLOSES_THOUGHT = re.compile(r".*(?:/|unused95|end_|<channel\|>)")
# Where a reply opens with a channel of thought (a word of it, and how), and where its final part begins.
_CHANNELS = tuple(
    (word, re.compile(opens), re.compile(final, re.MULTILINE))
    for word, opens, final in (
        # gpt-oss, with its special tokens and without them
        (
            "<|channel|>",
            r"<\|channel\|>",
            r"<\|channel\|>\s*final[^<\n]{0,20}(?:<\|constrain\|>[^<\n]{0,20})?<\|message\|>",
        ),
        ("analysis", r"\A\s*analysis(?=[A-Z\"'(])", r"assistantfinal\s*"),
        # HuatuoGPT; a reply with a closed tag has headings of its own
        (
            "Thinking",
            r"\A\s*#{1,4} Thinking\s*\n(?!(?s:.*)</answer>)",
            r"^#{1,4} (?:Final )?(?:Response|Answer|Conclusion):?[ \t]*$",
        ),
        # Apriel
        ("reasoning", r"\A\s*Here are my reasoning steps", r"\[BEGIN FINAL RESPONSE\]"),
    )
)
_TAG = re.compile(r"<\s{0,3}(/?)\s{0,3}(?:answer|final[_ ]?answer|ans)\s{0,3}>", re.IGNORECASE)
_OPEN_TAG_END = re.compile(r"<\s{0,3}/?\s{0,3}(?:final[_ ]?)?ans(?:w(?:er?)?)?\s{0,3}$", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
_BRACE = re.compile(r"\\[{}]|[{}]")
_JSON_KEY = re.compile(
    r"[\"'](?:(?:final|correct|selected|chosen|predicted|my|best)[_ -]?)?(?:answers?|option|choices?|letters?"
    r"|prediction)"
    r"(?:[_ -](?:letter|choice|option|key|text))?[\"']\s{0,9}:\s{0,9}",
    re.IGNORECASE,
)
_JSON_THOUGHT = re.compile(
    r"\"(?:(?:step[_ -]by[_ -]step[_ -])?(?:reasoning|thinking|thoughts?|explanation|rationale|analysis|working|steps"
    r"|calculation))\"\s{0,9}:\s{0,9}(?=\")",
    re.IGNORECASE,
)
_JSON_UNIT = re.compile(
    r"\s{0,9},\s{0,9}[\"'](?:answer[_ -]?)?units?[\"']\s{0,9}:\s{0,9}[\"']([^\"'\n]{0,40})[\"']", re.IGNORECASE
)
_JSON_LOOSE = re.compile(r"'([^'\n]*)'(?=\s{0,9}[,}\]])|([A-Za-z0-9+.\-]+)(?=\s{0,9}[,}\]])")
_JSON = json.JSONDecoder(
    parse_float=lambda text: text,
    parse_int=lambda text: text,
    parse_constant=lambda text: text,
    object_pairs_hook=lambda pairs: _JsonObject(pairs),
)
_EMPTY_OBJECT = re.compile(r"\{[\s,]*\}")
_TABLE_HEADER = re.compile(
    r"^((?:[^|\n]*\|){1,6}?)[ *_]*(?:(?:final|correct|selected|my) )?answer[ *_]*\|[^\n]*\n[ ]*\|?[ ]*:?-+[-:| ]*\n",
    re.I | re.M,
)
_CUE_BEFORE, _CUE_BEHIND = 120, 200  # characters; no cue is that long
_CUE_TAIL = r"[*_`\"'\s]{0,12}(?:[:=|→👉➡]|->|=>)?[*_`\"\s]{0,12}"
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": " ", "&amp;": "&"}
_ENTITY = re.compile("|".join(_ENTITIES))


class _JsonObject(list):
    """Key-value pairs of a JSON object, duplicates kept."""


class Candidate(NamedTuple):
    """One place where an answer is given: `text` is raw, `start:end` its place in `Answer.body`.

    lead: where its announcement (tag, box, cue phrase) begins.
    """

    text: str
    channel: str
    start: int
    end: int
    lead: int


@dataclass(frozen=True)
class Answer:
    """What a completion offers as its answer.

    status: "ok", or "unparsed" when nothing may be read (see `reason`).
    channel: tag | boxed | json | cue | bare, or "" when there is none. "bare" means: no mark at all; then `texts` holds
    the last line, and a caller with a stricter or wider idea of a bare answer looks at `body`.
    texts: all candidate texts of the deciding channel in order; the caller parses each and demands that they agree.
    A cue text is the first sentence after the cue, which may say nothing ("the answer is clear").
    lower: candidates of the channels below (never of "bare"); they may veto, not decide.
    body: the completion without think blocks, cut at the first end-of-turn token.
    rest: the body with tags, boxes and JSON answers blanked out (same length, same offsets).
    """

    status: str
    channel: str = ""
    texts: tuple[str, ...] = ()
    lower: tuple[Candidate, ...] = ()
    body: str = ""
    rest: str = ""
    candidates: tuple[Candidate, ...] = ()
    reason: str = ""

    @property
    def closed(self) -> bool:
        """True when the answer ends by its own mark, so that a cut at the length limit cannot have changed it."""
        return self.status == "ok" and self.channel in CLOSED_CHANNELS


def extract(completion: str) -> Answer:
    """Find the answer candidates of a completion. Pure, never raises on text, linear in its length."""
    text = normalise(completion)
    if "&" in text:
        text = _ENTITY.sub(lambda match: _ENTITIES[match.group()], text)
    final = _final_channel(text)
    text = cut_at_end_of_turn(final or "")
    stripped = _without_thoughts(text)
    if final is None or stripped is None:
        return Answer("unparsed", reason="the think block is never closed")
    body = stripped.strip()
    if not body:
        return Answer(
            "unparsed", reason="nothing stands outside the think block" if text.strip() else "empty completion"
        )

    rest = body
    found: list[Candidate] = []
    for find in (_tags, _boxes, _json_answers):
        candidates, spans, problem = find(rest)
        if problem:
            return Answer("unparsed", channel=_CHANNEL_OF[find], body=body, rest=rest, reason=problem)
        if find is _tags:
            candidates, problem = _unpack_json(candidates)
            if problem:
                return Answer("unparsed", channel="tag", body=body, rest=rest, reason=problem)
        found += candidates
        rest = blanked(rest, spans)
        if spans and find is _json_answers:
            rest = _EMPTY_OBJECT.sub(lambda match: " " * len(match.group()), rest)
        if not rest.strip():
            break
    else:
        cells, header = _table_cells(rest)
        found = _formulas_last([*found, *_cues(blanked(rest, header)), *cells])

    if not found:
        last = body.rsplit("\n", 1)[-1].strip()
        return Answer("ok", "bare", (last,), body=body, rest=rest)
    channel = found[0].channel
    deciding = tuple(candidate for candidate in found if candidate.channel == channel)
    return Answer(
        "ok",
        channel,
        tuple(candidate.text for candidate in deciding),
        lower=tuple(found[len(deciding) :]),
        body=body,
        rest=rest,
        candidates=deciding,
    )


def _formulas_last(found: list[Candidate]) -> list[Candidate]:
    """A boxed formula of the working ("\\boxed{V = D/C}") decides nothing where a cue follows it; it may veto."""
    last_cue = max((candidate.lead for candidate in found if candidate.channel == "cue"), default=-1)
    formulas = [c for c in found if c.channel == "boxed" and "=" in c.text and c.end < last_cue]
    return [candidate for candidate in found if candidate not in formulas] + formulas if formulas else found


def cut_at_end_of_turn(text: str) -> str:
    """What stands before the first end-of-turn token of any common chat template."""
    if "<" not in text and "[" not in text:
        return text
    end = _END_OF_TURN.search(text)
    return text if end is None else text[: end.start()]


def _final_channel(text: str) -> str | None:
    """What stands in the final channel of a model family that marks channels, or None when it was never reached."""
    for word, opens, final in _CHANNELS:
        if word not in text or opens.search(text) is None:
            continue
        *_, last = [None, *final.finditer(text)]
        if last is None:
            return None
        text = text[last.end() :]
    return text.replace("<|begin_of_box|>", "\\boxed{").replace("<|end_of_box|>", "}")  # GLM


def _without_thoughts(text: str) -> str | None:
    """The text outside think blocks, or None when one is left open.

    A closing mark without an opening one closes a block that the prompt opened: what stands before it is thought.
    """
    if "<" not in text and "[" not in text and "◁" not in text:
        return text
    kept: list[str] = []
    depth = 0
    start = 0
    opened = False
    for match in _THINK.finditer(text):
        if not _CLOSES_THOUGHT.match(match.group().lower()):
            if depth == 0:
                kept.append(text[start : match.start()])
            depth += 1
            opened = True
        elif depth > 0:
            depth -= 1
            start = match.end()
        else:
            if opened:
                kept.append(text[start : match.start()])
            start = match.end()
            opened = True
    if depth > 0:
        return None
    kept.append(text[start:])
    return "\n".join(kept)


_Found = tuple[list[Candidate], list[tuple[int, int]], str]


def _tags(text: str) -> _Found:
    candidates: list[Candidate] = []
    spans: list[tuple[int, int]] = []
    if "<" not in text:
        return candidates, spans, ""
    pieces: list[tuple[int, int]] = []
    depth = 0
    start = outer = 0
    for match in _TAG.finditer(text):
        if not match.group(1):
            if depth == 0:
                outer = match.start()
                pieces = []
            else:
                pieces.append((start, match.start()))
            depth += 1
        elif depth == 0:
            return [], [], "a closing answer tag without an opening one"
        else:
            depth -= 1
            pieces.append((start, match.start()))
            if depth == 0:
                filled = [(a, b) for a, b in pieces if text[a:b].strip()]
                if not filled:
                    return [], [], "an empty answer tag"
                candidates += [Candidate(text[a:b].strip(), "tag", a, b, outer) for a, b in filled]
                spans.append((outer, match.end()))
        start = match.end()
    if depth > 0 or _OPEN_TAG_END.search(text, max(0, len(text) - 24)):
        return [], [], "an answer tag is never closed"
    return candidates, spans, ""


def _boxes(text: str) -> _Found:
    candidates: list[Candidate] = []
    spans: list[tuple[int, int]] = []
    match = _BOX.search(text)
    while match is not None:
        end = _closing_brace(text, match.end())
        if end is None:
            return [], [], "a box is never closed"
        inner = text[match.end() : end].strip()
        if not unwrap_latex(inner):
            return [], [], "an empty box"
        candidates.append(Candidate(inner, "boxed", match.end(), end, match.start()))
        spans.append((match.start(), end + 1))
        match = _BOX.search(text, end + 1)
    return candidates, spans, ""


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def _json_answers(text: str) -> _Found:
    candidates: list[Candidate] = []
    spans: list[tuple[int, int]] = []
    first_brace = text.find("{")
    last_brace = text.rfind("}")
    if first_brace < 0:
        return [], [], ""
    position = first_brace
    while (match := _JSON_KEY.search(text, position)) is not None:
        value: Any
        try:
            value, end = _JSON.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            loose = _JSON_LOOSE.match(text, match.end())
            if loose is None:
                return [], [], "a JSON answer that cannot be read"
            value, end = loose.group(1) if loose.group(1) is not None else loose.group(2), loose.end()
        if end > last_brace:
            return [], [], "a JSON answer is never closed"
        answer = "[]" if value == [] else _json_text(value, 0)  # an empty list may be the right one
        unit = _JSON_UNIT.match(text, end)
        if not answer:
            return [], [], "an empty JSON answer"
        if unit is not None:
            answer = f"{answer} {unit.group(1)}"
        candidates.append(Candidate(answer, "json", match.end(), end, match.start()))
        spans.append((match.start(), end))
        position = end
    if candidates:
        spans = sorted([*spans, *_json_thoughts(text, spans)])
    return candidates, spans, ""


def _json_thoughts(text: str, answers: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The fields before a JSON answer in which it is thought out."""
    found: list[tuple[int, int]] = []
    for key in _JSON_THOUGHT.finditer(text):
        try:
            value, end = _JSON.raw_decode(text, key.end())
        except (ValueError, RecursionError):
            continue
        # What follows an answer may take it back.
        if isinstance(value, str) and end <= answers[0][0] and (not found or key.start() >= found[-1][1]):
            found.append((key.start(), end))
    return found


def _unpack_json(candidates: list[Candidate]) -> tuple[list[Candidate], str]:
    """Tag contents that are JSON themselves, replaced by the answers inside."""
    unpacked: list[Candidate] = []
    for candidate in candidates:
        inner, _, problem = _json_answers(candidate.text) if "{" in candidate.text else ([], [], "")
        if problem:
            return [], problem
        unpacked += [candidate._replace(text=item.text) for item in inner] or [candidate]
    return unpacked, ""


def _json_text(value: Any, depth: int) -> str:
    """A JSON value as an answer text; lists are joined by commas, objects by ". " in their own order."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or depth > 3:
        return ""
    if isinstance(value, _JsonObject):
        return ". ".join(part for part in (_json_text(item, depth + 1) for _, item in value) if part)
    return ", ".join(part for part in (_json_text(item, depth + 1) for item in value) if part)


_CHANNEL_OF = {_tags: "tag", _boxes: "boxed", _json_answers: "json"}


@cache
def _cue_patterns(ascii_only: bool) -> list[tuple[tuple[str, ...], re.Pattern[str]]]:
    return [
        (hints, re.compile(f"(?:{'|'.join(entry['answer'])}){_CUE_TAIL}", 0 if ascii_only else re.IGNORECASE))
        for language, entry in table("cues").items()
        if not language.startswith("_")
        and (hints := tuple(hint for hint in entry["hints"] if hint.isascii() or not ascii_only))
    ]


@cache
def _cue_lead() -> re.Pattern[str]:
    leads = "|".join(sorted(table("cues")["_leads"], key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:(?:{leads})\s{{0,2}})+$", re.IGNORECASE)


def _around(lowered: str, hints: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where a cue can stand: the parts of a text near one of the hints that every cue of a language contains."""
    places: list[int] = []
    for hint in hints:
        at = lowered.find(hint)
        while at >= 0:
            places.append(at)
            at = lowered.find(hint, at + len(hint))
    parts: list[tuple[int, int]] = []
    for at in sorted(places):
        start, end = max(0, at - _CUE_BEFORE), min(len(lowered), at + _CUE_BEHIND)
        if parts and start < parts[-1][1]:
            parts[-1] = (parts[-1][0], end)
        else:
            parts.append((start, end))
    return parts


def _table_cells(text: str) -> tuple[list[Candidate], list[tuple[int, int]]]:
    """The cells below a heading such as "Answer" in a markdown table, and the place of the heading."""
    if "|" not in text or (header := _TABLE_HEADER.search(text)) is None:
        return [], []
    column = header.group(1).count("|")
    cells: list[Candidate] = []
    start = header.end()
    for line in text[header.end() :].split("\n"):
        parts = line.split("|")
        if len(parts) <= column:
            break
        begin = start + sum(len(part) + 1 for part in parts[:column])
        end = begin + len(parts[column])
        if value := strip_markup(text[begin:end]):
            cells.append(Candidate(value, "cue", begin, end, header.start()))
        start += len(line) + 1
    return cells, [header.span()]


def _cues(text: str) -> list[Candidate]:
    """What stands after each cue phrase: the rest of its sentence, or the next line when the cue is a heading."""
    matches: list[re.Match[str]] = []
    lowered = text.lower()
    read = lowered if text.isascii() else text  # small letters need no IGNORECASE, which is slow
    for hints, pattern in _cue_patterns(text.isascii()):
        for hint in hints:
            if hint in lowered:
                parts = _around(lowered, hints) if len(lowered) == len(text) else [(0, len(text))]
                for start, end in parts:
                    matches += pattern.finditer(read, start, end)
                break
    if not matches:
        return []
    matches.sort(key=lambda match: (match.start(), -match.end()))
    kept: list[re.Match[str]] = []
    for match in matches:
        if not kept or match.start() >= kept[-1].end():
            kept.append(match)
    leads = [match.start() for match in kept]
    for index, match in enumerate(kept):
        earliest = kept[index - 1].end() if index else 0
        lead = _cue_lead().search(text, max(earliest, match.start() - 40), match.start())
        if lead is not None:
            leads[index] = lead.start()
    candidates: list[Candidate] = []
    for match, lead_start, next_start in zip(kept, leads, [*leads[1:], len(text)], strict=True):
        start = match.end()
        newline = text.find("\n", start, next_start)
        end = start + first_sentence_end(text[start : next_start if newline < 0 else newline])
        value = strip_markup(text[start:end])
        # A question asks; it does not answer.
        if re.search(r"\w", value) and not value.endswith("?"):
            candidates.append(Candidate(value, "cue", start, end, lead_start))
    return candidates
