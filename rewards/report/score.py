"""The reward: a generated report against a reference report, finding by finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rewards.answer import CLOSED_CHANNELS
from rewards.answer import extract as find_answer
from rewards.base import Reward, RewardInput, RewardResult, Span
from rewards.report.entity import ReportReading
from rewards.report.extract import extract
from rewards.report.lexicon import DEFAULT_PACKS, load
from rewards.report.locate import Place, locate
from rewards.report.match import compare
from rewards.report.sentences import MAX_WORDS
from rewards.text import Folded

_NOT_ABLE = (
    r"can\s?not|can['’]t|could not|unable to|not able to|do not have|don['’]t have|am not (?:able|qualified) to"
    r"|won['’]t"
)
_DECLINED = (
    r"interpret|analy[sz]e|view|read|provide|diagnose|assist|help|access|process|ability|capability|open|comply"
    r"|the image"
)
_REFUSAL = Folded(
    r"\b(?:i|we)(?:\s+am|['’]m|\s+are|['’]re)?\s+"
    rf"(?:(?:really |very |so )?sorry\b|apologi[sz]e\b|(?:{_NOT_ABLE})\s+(?:\w+\s+){{0,3}}?(?:{_DECLINED})\b)"
    r"|\bas an? (?:ai|artificial|language|large language)\b|\bunable to (?:interpret|analy[sz]e|view|process|assist)\b"
)


@lru_cache(maxsize=4096)
def _read_reference(text: str, packs: tuple[str, ...]) -> ReportReading:
    """A reference is read once for all members of its group."""
    return extract(text, load(packs))


class ReportEntities(Reward):
    """Pays the findings a report gets right: assertion, side, place, grade, change, size.

    `gold` is the text of the reference report; nothing else of the sample is used. Missed, invented, denied and
    wrong-sided findings cost; a copied normal report, repetition and lists of findings do not pay. `parsed` is a list
    of rows, one for each finding of the completion and each unmatched one of the reference; `components` has precision,
    recall, f1, negative_recall, contradiction_rate (shares), repeated (share of words) and findings (a count); `spans`
    has the sentences that state each finding, rightly or wrongly, or deny one that is there.
    packs: names of the packs that ship with the library, or paths of JSON files; see docs/report_packs.md.
    """

    name = "report_entities"

    def __init__(self, packs: Sequence[str] = DEFAULT_PACKS) -> None:
        self.packs = tuple(packs)
        self.lexicon = load(self.packs)

    def check_gold(self, sample: RewardInput) -> str | None:
        if not isinstance(sample.gold, str) or not sample.gold.strip():
            return f"a reference report must be a text, got {type(sample.gold).__name__} {sample.gold!r:.60}"
        reading = _read_reference(sample.gold, self.packs)
        if reading.too_long:
            return f"the reference is longer than {MAX_WORDS} words, which no report is"
        if not reading.entities:
            return f"no finding known to the packs {', '.join(self.packs)} is in the reference: {sample.gold[:80]!r}"
        return None

    def score(self, sample: RewardInput) -> RewardResult:
        problem = self.check_gold(sample)
        if problem:
            return RewardResult(None, "gold_invalid", reason=problem)
        answer = find_answer(sample.completion)
        if answer.status != "ok":
            return RewardResult(0.0, "unparsed", reason=answer.reason)
        text = "\n\n".join(answer.texts) if answer.channel in CLOSED_CHANNELS else answer.body
        if _REFUSAL.search(text):
            return RewardResult(0.0, "unparsed", reason="the completion declines to report")
        said = extract(text, self.lexicon)
        if said.too_long:
            return RewardResult(0.0, "unparsed", reason=f"longer than {MAX_WORDS} words: not read")
        if not said.entities:
            return RewardResult(0.0, "unparsed", parsed=[], reason="no finding was recognised")
        gold = _read_reference(sample.gold, self.packs)
        usual = dict(gold.extra)
        extra = {finding: max(0, count - usual.get(finding, 0)) for finding, count in said.extra}
        outcome = compare(gold.entities, said.entities, extra, self.lexicon)
        repeated = max(0.0, said.repeated - gold.repeated)
        components = {**outcome.components, "repeated": repeated}
        status = "truncated" if sample.truncated and not answer.closed else "ok"
        spans = self._spans(outcome.rows, locate(said.sentences, sample.completion, self.lexicon))
        return RewardResult(outcome.value * (1.0 - repeated), status, outcome.rows, "", components, spans=spans)

    @staticmethod
    def _spans(rows: Sequence[Mapping[str, Any]], places: Sequence[Place | None]) -> dict[str, tuple[Span, ...]]:
        """By finding, the places of the sentences that its row names, which share what it earned or cost."""
        spans: dict[str, tuple[Span, ...]] = {}
        for row in rows:
            found = [place for n in row["sentences"] if (place := places[n]) is not None]
            own = tuple(Span(start, end, row["share"] / len(found)) for start, end in found)
            spans[row["finding"]] = spans.get(row["finding"], ()) + own
        return {finding: own for finding, own in spans.items() if own}
