"""Captions with the features a doctor looks for, in stages: metadata -> regions -> factual -> preference -> merge.

What is known (labels, masks, metadata) is written first and never by the model. The writer then describes the picture
twice, once beside the facts and once by the modality's check list, and joins both; where they differ the facts win.
Every known fact must stand in the merged caption unopposed, or the caption is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lingshu_rl.synth.regions import Region, regions_of, with_boxes
from lingshu_rl.synth.rows import Dropped, Kept, Outcome, Record, SynthError, provenance, training_row
from lingshu_rl.synth.stances import is_place, states
from lingshu_rl.synth.writer import Asker
from rewards.chat import RequestRefused

QUESTIONS = ("Describe this {modality} image.", "What does this {modality} image show?")
SHORTEST, LONGEST = 10, 1024  # words of a caption
_REFUSAL = re.compile(
    r"\b(?:as an ai|i (?:cannot|can't|am unable to|am sorry)|i'm sorry|consult (?:a|your) doctor)\b", re.I
)

FACTUAL = (
    "You see a {modality} image{framed}. These facts are certain:\n{facts}\n"
    "Describe what the image shows in plain sentences. Use every fact. Add only what can be seen; do not guess a "
    "diagnosis that the facts do not name."
)
PREFERENCE = (
    "Describe this {modality} image as a specialist would, going through this list and leaving out what cannot be "
    "judged "
    "from this image:\n{features}\nWrite plain sentences, no list, no advice to the patient."
)
MERGE = (
    "Join two descriptions of one {modality} image into one caption of plain sentences.\n"
    "Certain facts:\n{facts}\n\nDescription A:\n{factual}\n\nDescription B:\n{preference}\n\n"
    "Keep every certain fact in its own words. Where A or B contradict a fact, the fact is right: leave the other out. "
    "Where B contradicts A, keep A. Answer with the caption alone."
)


@cache
def modalities() -> dict[str, dict[str, list[str]]]:
    text = resources.files("lingshu_rl.synth").joinpath("features.json").read_text(encoding="utf-8")
    return json.loads(text)


def modality_of(record: Record) -> str:
    """The key in features.json; an X-ray whose organ is the knee is a knee X-ray. "" for an unknown one."""
    meta = record.get("meta") or {}
    said = _plain(str(meta.get("modality", "")))
    organ = _plain(f"{meta.get('organ', '')} {meta.get('part', '')}")
    for key, entry in modalities().items():
        if said in {key.replace("_", " "), *(_plain(name) for name in entry["names"])}:
            return "knee_xray" if key == "xray" and "knee" in organ.split() else key
    return ""


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())


def metadata_facts(record: Record) -> list[str]:
    """Stage 1: what is known of the study. Each fact is a phrase that the caption has to contain."""
    meta = record.get("meta") or {}
    facts = [str(meta[key]) for key in ("modality", "organ", "view", "sequence", "stain") if meta.get(key)]
    for value in (record.get("labels") or {}).values():
        facts += [str(v) for v in (value if isinstance(value, list) else [value]) if str(v).strip()]
    return list(dict.fromkeys(facts))


class Captions:
    async def __call__(self, record: Record, writer: Asker) -> list[Outcome]:
        name = str(record["id"])
        modality = modality_of(record)
        if not modality:
            return [Dropped(name, "unknown modality", f"meta.modality is none of {', '.join(modalities())}", record)]
        try:
            regions = regions_of(record)
            images = [
                Path(image).read_bytes() for image in record["images"]
            ]  # as they are: boxes are told in their pixels
        except (SynthError, OSError, KeyError) as error:
            return [Dropped(name, "unreadable record", str(error), record)]
        if not images:
            return [Dropped(name, "no image", "", record)]
        facts = metadata_facts(record) + [r.name for r in regions if r.name not in metadata_facts(record)]
        if not facts:
            return [Dropped(name, "no facts", "give meta, labels, masks or boxes", record)]
        try:
            return [await self.write(record, writer, modality, facts, regions, images)]
        except RequestRefused as error:
            return [Dropped(name, error.reason, str(error), record)]

    async def write(
        self,
        record: Record,
        writer: Asker,
        modality: str,
        facts: Sequence[str],
        regions: Sequence[Region],
        images: Sequence[bytes],
    ) -> Outcome:
        said = str((record.get("meta") or {})["modality"])
        told = fact_lines(record, facts, regions)
        example = ", ".join(facts) + "."
        framed = ". The numbered frames mark the regions listed below" if regions else ""
        shown = [with_boxes(images[0], regions), *images[1:]] if regions else images
        factual = await writer.ask(
            user(FACTUAL.format(modality=said, framed=framed, facts=told)), images=shown, example=example
        )
        features = "\n".join(f"- {feature}" for feature in modalities()[modality]["look_at"])
        preference = await writer.ask(
            user(PREFERENCE.format(modality=said, features=features)), images=images, example=example
        )
        merged = await writer.ask(
            user(MERGE.format(modality=said, facts=told, factual=factual.text, preference=preference.text)),
            example=example,
        )
        caption = merged.text.strip()
        verdict = judge_caption(caption, facts, merged.truncated)
        synth = provenance(
            "captions",
            record,
            verdict,
            modality=modality,
            facts=list(facts),
            regions=[region.describe() for region in regions],
            requests={"factual": factual.request, "preference": preference.request, "merge": merged.request},
        )
        question = QUESTIONS[sum(map(ord, str(record["id"]))) % len(QUESTIONS)].format(modality=said)
        row = training_row(
            record,
            "caption",
            question=question,
            answer=caption,
            kind="report",
            meta={"task": "caption", "synth": synth},
        )
        return Kept(row) if verdict["kept"] else Dropped(str(record["id"]), verdict["status"], verdict["reason"], row)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def fact_lines(record: Record, facts: Sequence[str], regions: Sequence[Region]) -> str:
    named = {region.name for region in regions}
    lines = [f"- {fact}" for fact in facts if fact not in named]
    lines += [f"- frame {number}: {region.describe()}" for number, region in enumerate(regions, start=1)]
    if record.get("caption"):
        lines.append(f"- source text: {record['caption']}")
    return "\n".join(lines)


def judge_caption(caption: str, facts: Sequence[str], truncated: bool) -> dict[str, Any]:
    """Facts win: each stands in the caption, is stated there and denied nowhere."""
    verdict: dict[str, Any] = {"verifier": "facts in caption", "kept": False, "facts": len(facts)}

    def dropped(status: str, reason: str) -> dict[str, Any]:
        return {**verdict, "status": status, "reason": reason}

    words = len(caption.split())
    if truncated:
        return dropped("caption cut off", f"after {words} words")
    if _REFUSAL.search(caption):
        return dropped("writer declined", caption[:100])
    if not SHORTEST <= words <= LONGEST:
        return dropped("caption length", f"{words} words; {SHORTEST} to {LONGEST} are kept")
    stances = {fact: states(fact, caption, _about_picture(fact)) for fact in facts}
    if lost := [fact for fact, stance in stances.items() if stance is None]:
        return dropped("fact missing", "; ".join(lost))
    if denied := [fact for fact, stance in stances.items() if stance is False]:
        return dropped("fact denied", "; ".join(denied))
    return {**verdict, "kept": True, "status": "ok", "reason": ""}


def _about_picture(fact: str) -> bool:
    """Whether a fact names a modality or a region, which a picture shows whatever is found in it."""
    names = {_plain(name) for entry in modalities().values() for name in entry["names"]}
    return _plain(fact) in names or is_place(fact)
