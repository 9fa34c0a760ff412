"""Questions from labels and masks: right by construction, with wrong options that are false of the image at hand.

A spec (YAML) says where records come from and what is asked:

    source: {table: labels.csv, id: "{image}", images: ["img/{image}"], meta: {modality: X-ray}, split: "|",
             labels: {view: "{view}", findings: "{findings}"}, boxes: "{bboxes}"}       # or  {records: file.jsonl}
    questions:
      view: {about: labels.view, form: option, ask: ["Which projection is this?"], values: {PA: posterior-anterior,
      ...}}
      side: {about: regions.side, form: option, ask: ["In which half of the image does the {name} lie?"]}
    limit: 500     # questions of each name; 0 = all

Answers are taken in turn, so that none is right more often than the others where the data allow it.
"""

from __future__ import annotations

import csv
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.data.rows import LETTERS
from lingshu_rl.synth.regions import Region, regions_of
from lingshu_rl.synth.rows import (
    Dropped,
    Kept,
    Outcome,
    Record,
    SynthError,
    located,
    provenance,
    read_records,
    training_row,
)

LABEL_FORMS = ("option", "yesno", "open")
REGION_FACTS = {
    "present": "yesno",
    "side": "option",
    "level": "option",
    "count": "numeric",
    "share": "numeric",
    "largest": "option",
}
CLEARLY = 1.5  # the largest region is this many times the next one, or it is not asked for
SHARE_TOLERANCE = 0.1  # relative


@dataclass(frozen=True)
class TemplateQuestion:
    """values: label -> words, in the order of the label space. related: groups of labels of which one makes the others
    doubtful, so they are neither its wrong options nor denied beside it. none: the label that says "nothing found".
    """

    name: str
    about: str
    form: str
    ask: tuple[str, ...]
    values: Mapping[str, str] = field(default_factory=dict)
    options: int = 4
    related: tuple[tuple[str, ...], ...] = ()
    none: str = ""

    def __post_init__(self) -> None:
        where = f"questions.{self.name}"
        kind, _, what = self.about.partition(".")
        if kind == "labels" and what:
            if self.form not in LABEL_FORMS:
                raise SynthError(f"{where}.form: labels are asked as {', '.join(LABEL_FORMS)}, got {self.form!r}")
            if len(self.values) < 2:
                raise SynthError(f"{where}.values: a label space has at least two labels, each with its words")
        elif kind == "regions" and what in REGION_FACTS:
            if self.form != REGION_FACTS[what]:
                raise SynthError(f"{where}.form: regions.{what} is asked as {REGION_FACTS[what]!r}, got {self.form!r}")
        else:
            raise SynthError(
                f"{where}.about: labels.NAME or one of {', '.join(f'regions.{f}' for f in REGION_FACTS)}, got "
                f"{self.about!r}"
            )
        if not self.ask:
            raise SynthError(f"{where}.ask: give at least one wording")
        if not 2 <= self.options <= len(LETTERS):
            raise SynthError(f"{where}.options must be from 2 to {len(LETTERS)}, got {self.options}")
        unknown = {label for group in self.related for label in group} - set(self.values)
        if unknown:
            raise SynthError(f"{where}.related names {', '.join(sorted(unknown))}, which are not among its values")

    def doubtful(self, present: Iterable[str]) -> set[str]:
        """Labels that are in one group with a present one."""
        here = set(present)
        return {label for group in self.related if here & set(group) for label in group} - here


@dataclass(frozen=True)
class Case:
    """One question about one record. truth: what the record says of every option (or of the one thing asked)."""

    record: Record
    answer: str
    name: str = ""  # fills {name} in the wording
    wrong: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    truth: Mapping[str, Any] = field(default_factory=dict)


def read_spec(path: Path) -> dict[str, Any]:
    """The spec as data with `questions` built. Raises SynthError naming the key."""
    import yaml

    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SynthError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise SynthError(f"{path}: not readable YAML: {error}") from None
    if not isinstance(spec, dict) or not spec.get("source") or not spec.get("questions"):
        raise SynthError(f"{path}: a spec has source and questions")
    refuse_unknown(spec, ("source", "questions", "limit", "seed"), str(path))
    known = tuple(TemplateQuestion.__dataclass_fields__)[1:]
    questions = []
    for name, fields in spec["questions"].items():
        refuse_unknown(fields, known, f"{path}: questions.{name}")
        fields = {
            **fields,
            "ask": tuple(fields.get("ask") or ()),
            "related": tuple(map(tuple, fields.get("related") or ())),
        }
        if fields.get("values"):
            fields["values"] = {str(k): str(v) for k, v in fields["values"].items()}
        try:
            questions.append(TemplateQuestion(name, **fields))
        except TypeError as error:
            raise SynthError(f"{path}: questions.{name}: {error}") from None
    return {**spec, "questions": questions}


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise SynthError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")


def source_records(source: Mapping[str, Any], base: Path) -> Iterator[Record]:
    """Records of a .jsonl file, or of a CSV table whose columns fill the `{column}` fields of the source."""
    if "records" in source:
        refuse_unknown(source, ("records",), "source")
        yield from read_records(base / source["records"])
        return
    refuse_unknown(source, ("table", "id", "images", "meta", "labels", "split", "boxes", "mm_per_px"), "source")
    for name in ("table", "id", "images"):
        if not source.get(name):
            raise SynthError(f"source.{name} is missing")
    split = source.get("split", "|")
    path = base / source["table"]
    if not path.is_file():
        raise SynthError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):

            def fill(text: str, row: dict[str, str] = row, number: int = number) -> str:
                out = str(text)
                for column, cell in row.items():
                    out = out.replace("{" + str(column) + "}", cell or "")
                if "{" in out:
                    raise SynthError(
                        f"{path}, line {number}: no column for {text!r}; columns: {', '.join(map(str, row))}"
                    )
                return out.strip()

            record: dict[str, Any] = {"id": fill(source["id"]), "images": [fill(i) for i in source["images"]]}
            record["meta"] = {key: fill(value) for key, value in (source.get("meta") or {}).items()}
            record["labels"] = {
                key: [part.strip() for part in fill(value).split(split) if part.strip()]
                for key, value in (source.get("labels") or {}).items()
            }
            if boxes := fill(source.get("boxes", "")):
                record["boxes"] = [_box(text, f"{path}, line {number}") for text in re.split(r"[;|]", boxes)]
            if source.get("mm_per_px"):
                record["mm_per_px"] = float(fill(source["mm_per_px"]))
            yield located(record, path.parent)


def _box(text: str, where: str) -> dict[str, Any]:
    name, colon, numbers = text.partition(":")
    try:
        xywh = [float(n) for n in numbers.split(",")]
    except ValueError:
        xywh = []
    if not colon or len(xywh) != 4:
        raise SynthError(f"{where}: a box reads 'name:x,y,width,height', got {text!r}")
    return {"name": name.strip(), "xywh": xywh}


def template_rows(
    records: Iterable[Record], questions: Sequence[TemplateQuestion], limit: int = 0, seed: int = 0
) -> Iterator[Outcome]:
    """All questions about all records. Records with labels outside of a label space are dropped for that question."""
    cases: dict[str, dict[str, list[Case]]] = {q.name: defaultdict(list) for q in questions}
    for record in records:
        try:
            regions = regions_of(record)
        except SynthError as error:
            yield Dropped(str(record["id"]), "unreadable record", str(error), record)
            continue
        for question in questions:
            if question.about.startswith("labels."):
                found, fault = label_cases(record, question)
            else:
                found, fault = region_cases(record, question, regions), ""
            if fault:
                yield Dropped(
                    str(record["id"]), "label outside of the label space", f"{question.name}: {fault}", record
                )
            for case in found:
                key = f"{case.name}\0{case.answer}" if question.form == "yesno" else case.answer
                cases[question.name][key].append(case)
    for question in questions:
        yield from drawn(question, cases[question.name], limit, random.Random(f"{seed}/{question.name}"))


def label_cases(record: Record, question: TemplateQuestion) -> tuple[list[Case], str]:
    """What can be asked of the record's labels; and the labels that the question does not know."""
    name = question.about.partition(".")[2]
    if name not in (record.get("labels") or {}):
        return [], ""
    given = record["labels"][name]
    present = [str(v) for v in (given if isinstance(given, list) else [given])]
    unknown = [label for label in present if label not in question.values and label != question.none]
    if unknown or not present or (question.none in present and len(present) > 1):
        return [], ", ".join(unknown) or "no label" if present != [question.none] else ""
    words, doubtful = question.values, question.doubtful(present)
    absent = [label for label in words if label not in present and label not in doubtful]
    found = [label for label in present if label != question.none]
    if question.form == "yesno":
        asked = [(label, "yes") for label in found] + [(label, "no") for label in absent]
        return [Case(record, a, words[label], truth={words[label]: label in present}) for label, a in asked], ""
    if question.form == "open":
        return [Case(record, words[found[0]], truth={words[found[0]]: True})] if len(present) == 1 and found else [], ""
    truth = {words[label]: label in present for label in (*found, *absent)}
    wrong = tuple(words[label] for label in absent)
    return [Case(record, words[label], wrong=wrong, truth=truth) for label in found] if wrong else [], ""


def region_cases(record: Record, question: TemplateQuestion, regions: Sequence[Region]) -> list[Case]:
    what = question.about.partition(".")[2]
    by_name: dict[str, list[Region]] = defaultdict(list)
    for region in regions:
        by_name[region.name].append(region)
    single = [found[0] for found in by_name.values() if len(found) == 1]
    if what == "present":
        named = dict.fromkeys(str(n) for mask in record.get("masks") or [] for n in mask["names"].values())
        return [Case(record, "yes" if n in by_name else "no", n, truth={n: n in by_name}) for n in named]
    if what in ("side", "level"):
        words = ("left", "right") if what == "side" else ("upper", "lower")
        at = [(r, getattr(r, what)) for r in single if getattr(r, what)]
        return [
            Case(record, here, r.name, tuple(w for w in words if w != here), truth={w: w == here for w in words})
            for r, here in at
        ]
    if what == "count":
        return [
            Case(record, str(r.parts), r.name, fields={"tolerance": {"exact": True}}, truth={"count": r.parts})
            for r in single
            if r.parts
        ]
    if what == "share":
        return [
            Case(
                record,
                f"{100 * r.share:.1f} %",
                r.name,
                fields={"unit": "%", "tolerance": {"rel": SHARE_TOLERANCE}},
                truth={"share": round(r.share, 6)},
            )
            for r in single
            if r.share and r.share >= 0.01
        ]
    ranked = sorted((r for r in single if r.share), key=lambda r: -float(r.share or 0))
    if len(ranked) < 2 or float(ranked[0].share or 0) < CLEARLY * float(ranked[1].share or 0):
        return []
    truth = {r.name: r is ranked[0] for r in ranked}
    return [Case(record, ranked[0].name, wrong=tuple(r.name for r in ranked[1:]), truth=truth)]


def drawn(
    question: TemplateQuestion, cases: Mapping[str, list[Case]], limit: int, rng: random.Random
) -> Iterator[Outcome]:
    """Cases of every answer in turn. Yes/no takes as many of yes as of no for each thing asked about."""
    decks = {key: rng.sample(cases[key], len(cases[key])) for key in sorted(cases)}
    if question.form == "yesno":
        names = sorted({key.split("\0")[0] for key in decks})
        for name in names:
            pair = [f"{name}\0yes", f"{name}\0no"]
            size = min(len(decks.get(key, [])) for key in pair)
            for key in pair:
                decks[key] = decks.get(key, [])[:size]
    made = 0
    places: dict[int, list[int]] = defaultdict(list)
    while any(decks.values()) and (not limit or made < limit):
        left = [key for key in sorted(decks) if decks[key]]
        if question.form == "yesno":  # whole pairs, so that a limit cannot unbalance them
            names = sorted({key.split("\0")[0] for key in left})
            left = [f"{name}\0{answer}" for name in rng.sample(names, len(names)) for answer in ("yes", "no")]
        else:
            left = rng.sample(left, len(left))
        for key in left[: limit - made if limit else None]:
            yield Kept(question_row(question, decks[key].pop(), made, places, rng))
            made += 1


def question_row(
    question: TemplateQuestion, case: Case, number: int, places: dict[int, list[int]], rng: random.Random
) -> dict[str, Any]:
    text = rng.choice(question.ask).replace("{name}", case.name)
    fields: dict[str, Any] = {"question": text, "kind": question.form, "answer": case.answer, **case.fields}
    truth = dict(case.truth)
    if question.form == "option":
        size = min(question.options, 1 + len(case.wrong))
        places[size] = places[size] or rng.sample(range(size), size)
        place = places[size].pop()
        options = rng.sample(case.wrong, size - 1)
        options.insert(place, case.answer)
        truth = {option: case.truth[option] for option in options}
        fields |= {"options": options, "answer": LETTERS[place]}
    right = [option for option, holds in truth.items() if holds is True]
    verdict = {"verifier": "labels", "kept": question.form != "option" or right == [case.answer], "truth": truth}
    assert verdict["kept"], (question.name, case.record["id"], truth)
    about = {"question": question.name, "about": question.about, **({"name": case.name} if case.name else {})}
    synth = provenance("template", case.record, verdict, **about)
    return training_row(
        case.record, f"{question.name}-{number}", **fields, meta={"task": question.name, "synth": synth}
    )
