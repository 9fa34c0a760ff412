"""Questions from image facts: every answer is drawn evenly, so that a constant answer scores near chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingshu_rl.demo.images import DemoImage

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One thing that can be asked about an image. `variant` fills `{x}` in the phrasing; answers are balanced within it."""

    answer: str
    variant: str = ""
    think: str = ""  # what an ideal reasoning says in a word or two
    options: tuple[str, ...] = ()  # option tasks: the label space the distractors come from


@dataclass(frozen=True)
class Task:
    """A question type. `cases` lists what may be asked about an image with these facts (nothing if it does not apply)."""

    name: str
    kind: str
    count: int  # training questions; validation and test get 15 % and 20 % of it
    phrasings: Sequence[str]
    cases: Callable[[Facts], Iterator[Case]]
    unit: str = ""
    tolerance: float = 0.0


LEVELS = {"axial": ("low", "middle", "high"), "coronal": ("back", "middle", "front")}
# World coordinates (mm) where thirds of the brain meet, and the margin around them in which no level is asked.
LEVEL_EDGES_MM = {"axial": (-14, 32), "coronal": (-58, 6)}
LEVEL_MARGIN_MM = 4


def level(facts: Facts) -> str | None:
    """Which third of the brain an axial or coronal slice cuts; None near the borders and for other images."""
    edges = LEVEL_EDGES_MM.get(facts.get("plane", ""))
    if edges is None or min(abs(facts["position_mm"] - edge) for edge in edges) < LEVEL_MARGIN_MM:
        return None
    return LEVELS[facts["plane"]][sum(facts["position_mm"] >= edge for edge in edges)]


def near(value: float, step: int) -> int:
    return int(round(value / step)) * step


def _plane(facts: Facts) -> Iterator[Case]:
    if "plane" in facts:
        yield Case(facts["plane"], options=("axial", "coronal", "sagittal"))


def _is_plane(facts: Facts) -> Iterator[Case]:
    for plane in ("axial", "coronal", "sagittal") if "plane" in facts else ():
        yield Case("yes" if plane == facts["plane"] else "no", variant=plane, think=facts["plane"])


def _map(facts: Facts) -> Iterator[Case]:
    if "map" in facts and not facts["inverted"]:
        yield Case(facts["map"], options=("anatomy", "grey matter map", "white matter map"))


def _level(facts: Facts) -> Iterator[Case]:
    if level(facts) is not None:
        yield Case(str(level(facts)), variant=facts["plane"], options=LEVELS[facts["plane"]])


def _inverted(facts: Facts) -> Iterator[Case]:
    if "inverted" in facts:
        yield Case("yes" if facts["inverted"] else "no", think="white" if facts["inverted"] else "black")


def _width_option(facts: Facts) -> Iterator[Case]:
    if "width_mm" in facts:
        yield Case(f"{near(facts['width_mm'], 20)} mm", options=tuple(f"{mm} mm" for mm in range(60, 181, 20)))


def _length(key: str) -> Callable[[Facts], Iterator[Case]]:
    def cases(facts: Facts) -> Iterator[Case]:
        if key in facts:
            yield Case(f"{near(facts[key], 10)} mm")

    return cases


def _area(facts: Facts) -> Iterator[Case]:
    if "area_cm2" in facts:
        yield Case(f"{near(facts['area_cm2'], 20)} cm2")


def _volume(facts: Facts) -> Iterator[Case]:
    for thickness_mm in (5, 10) if "area_cm2" in facts else ():
        yield Case(f"{near(facts['area_cm2'] * thickness_mm / 10, 20)} mL", variant=str(thickness_mm))


def _grey_percent(facts: Facts) -> Iterator[Case]:
    if "grey_percent" in facts and facts["map"] != "white matter map":
        yield Case(f"{near(facts['grey_percent'], 10)} %")


def _report(facts: Facts) -> Iterator[Case]:
    if level(facts) is not None:
        text = f"Modality: {facts['modality']}. Plane: {facts['plane']}. Level: {level(facts)}. Width: {near(facts['width_mm'], 10)} mm."
        yield Case(text, variant=f"{facts['plane']} {level(facts)}", think=facts["plane"])


TASKS = (
    Task("plane", "option", 300, ("Which plane is this?", "What is the plane of this slice?"), _plane),
    Task("map", "option", 200, ("What does this image show?", "Which kind of image is this?"), _map),
    Task("level", "option", 200, ("Which level is this {x} slice?", "Where is this {x} slice?"), _level),
    Task("width_option", "option", 200, ("How wide is the brain?", "What is the width of the brain?"), _width_option),
    Task("is_plane", "yesno", 200, ("Is this a {x} slice?", "Is the plane {x}?"), _is_plane),
    Task("inverted", "yesno", 160, ("Is this image inverted?", "Are black and white swapped?"), _inverted),
    Task("width", "numeric", 200, ("How wide is the brain in mm?", "What is the width of the brain in mm?"), _length("width_mm"), "mm", 5),
    Task("height", "numeric", 160, ("How high is the brain in mm?", "What is the height of the brain in mm?"), _length("height_mm"), "mm", 5),
    Task("area", "numeric", 120, ("What is the area of the brain in cm2?",), _area, "cm2", 10),
    Task("volume", "numeric", 80, ("The slice is {x} mm thick. What is its volume in mL?",), _volume, "mL", 10),
    Task("grey", "numeric", 60, ("How much of the brain is grey matter in %?",), _grey_percent, "%", 5),
    Task("report", "report", 200, ("Write a report.", "Describe this image."), _report),
)
SHARES = {"train": 1.0, "validation": 0.15, "test": 0.2}


def make_rows(images: Sequence[DemoImage], split: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The rows of one split, shuffled. Image paths are `images/<name>.png`, relative to the rows' file."""
    mine = [image for image in images if image.split == split]
    rows = [row for task in TASKS for row in _task_rows(task, mine, round(task.count * SHARES[split]), rng)]
    rng.shuffle(rows)  # type: ignore[arg-type]
    return [{"id": f"demo-{split}-{n:04d}", **row} for n, row in enumerate(rows)]


def _task_rows(task: Task, images: Sequence[DemoImage], count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    buckets: dict[tuple[str, str], list[tuple[DemoImage, Case]]] = defaultdict(list)
    for image in images:
        for case in task.cases(image.facts):
            buckets[case.variant, case.answer].append((image, case))
    for key in buckets:
        buckets[key] = [buckets[key][i] for i in rng.permutation(len(buckets[key]))]
    made = 0
    while made < count and any(buckets.values()):
        for key in sorted(buckets):
            if buckets[key] and made < count:
                yield _row(task, *buckets[key].pop(), made, rng)
                made += 1


def _row(task: Task, image: DemoImage, case: Case, n: int, rng: np.random.Generator) -> dict[str, Any]:
    phrasing = str(rng.choice(task.phrasings))
    row: dict[str, Any] = {
        "images": [f"images/{image.name}.png"],
        "question": phrasing.format(x=case.variant).replace("a axial", "an axial"),
        "answer": case.answer,
        "kind": task.kind,
        "meta": {**image.meta, "task": task.name, "think": case.think or case.answer},
    }
    if case.options:
        row["options"], row["answer"] = _options(case, n, rng)
    if task.unit:
        row["unit"], row["tolerance"] = task.unit, {"abs": task.tolerance}
    return row


def _options(case: Case, n: int, rng: np.random.Generator) -> tuple[list[str], str]:
    """Two to four options from the case's label space, and the right letter; letters come round evenly."""
    size = min(len(case.options), 2 + n % 3)
    others = [label for label in case.options if label != case.answer]
    options = [str(label) for label in rng.choice(others, size - 1, replace=False)]
    place = int(rng.integers(size))
    options.insert(place, case.answer)
    return options, "ABCD"[place]


def sft_text(row: Mapping[str, Any]) -> str:
    """The ideal completion of a row. An option's words are thought in the text of the option list, then its letter is answered."""
    return f"<think> {row['meta']['think']} </think><answer> {row['answer']} </answer>"
