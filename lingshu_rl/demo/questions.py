"""Questions from image facts: answers are drawn evenly, so that a constant answer scores near chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingshu_rl.demo.brain import FIELD_MM
from lingshu_rl.demo.images import DemoImage

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One thing that can be asked about an image.

    variant fills `{x}` in the question; answers are balanced within it. think: what an ideal reasoning says, in a word
    or two. options: the label space that an option question draws its wrong options from.
    """

    answer: str
    variant: str = ""
    think: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A question type. count: training questions. cases: what can be asked about an image with such facts, if anything.

    step: numeric answers are multiples of it, and the tolerance is 0.4 of it: the neighbouring multiple is wrong.
    """

    name: str
    kind: str
    count: int
    cases: Callable[[Facts], Iterable[Case]]
    step: int = 0
    unit: str = ""


SHARES = {"train": 1.0, "validation": 0.15, "test": 0.2}  # of a task's count
PLANES = ("axial", "coronal", "sagittal")
MAPS = ("anatomy", "grey matter map", "white matter map")
MODALITIES = ("CT", "MRI", "X-ray", "ultrasound", "fundus photo", "stained tissue", "fluorescence")
PARTS = ("head", "chest", "abdomen", "leg", "eye")
WINDOWS = ("bone window", "soft tissue window")
STAINS = ("H&E", "immunostain", "fluorescence")
WIDTHS_MM = range(60, 200, 20)
# Thirds of the brain along two axes: names, and the world coordinates in mm where they meet.
LEVELS = {"axial": (("low", "middle", "high"), (-14, 32)), "coronal": (("back", "middle", "front"), (-58, 6))}
LEVEL_MARGIN_MM = 4  # no level is asked this close to a border
VENTRICLE_SEEN_CM2 = 1.5


def near(value: float, step: int) -> int:
    """The nearest multiple of `step`."""
    return round(value / step) * step


def level(facts: Facts) -> str | None:
    """Which third of the brain an axial or coronal slice cuts; None near the borders and for other images."""
    names, edges = LEVELS.get(facts.get("plane", ""), ((), ()))
    if not names or min(abs(facts["position_mm"] - edge) for edge in edges) < LEVEL_MARGIN_MM:
        return None
    return names[sum(facts["position_mm"] >= edge for edge in edges)]


def _label(key: str, labels: tuple[str, ...]) -> Callable[[Facts], Iterable[Case]]:
    """Option cases: the fact itself, among the labels."""
    return lambda facts: [Case(facts[key], options=labels)] if key in facts else []


def _is_label(key: str, labels: tuple[str, ...]) -> Callable[[Facts], Iterable[Case]]:
    """Yes/no cases: is the fact this label?"""

    def cases(facts: Facts) -> Iterator[Case]:
        for label in labels if key in facts else ():
            yield Case("yes" if facts[key] == label else "no", variant=label, think=facts[key])

    return cases


def _number(key: str, step: int, unit: str = "") -> Callable[[Facts], Iterable[Case]]:
    """Numeric cases: the fact to the nearest multiple of `step`, never 0."""

    def cases(facts: Facts) -> Iterator[Case]:
        if key in facts and near(facts[key], step) > 0:
            yield Case(f"{near(facts[key], step)} {unit}".strip())

    return cases


def _map(facts: Facts) -> Iterator[Case]:
    if "map" in facts and not facts["inverted"]:
        yield Case(facts["map"], options=MAPS)


def _level(facts: Facts) -> Iterator[Case]:
    if third := level(facts):
        yield Case(third, variant=facts["plane"], options=LEVELS[facts["plane"]][0])


def _width_option(facts: Facts) -> Iterator[Case]:
    if "width_mm" in facts:
        right = near(facts["width_mm"], 20)
        # The neighbours of the right width may be nearly as right.
        others = [mm for mm in WIDTHS_MM if mm == right or abs(mm - right) >= 40]
        yield Case(f"{right} mm", options=tuple(f"{mm} mm" for mm in others))


def _inverted(facts: Facts) -> Iterator[Case]:
    if "inverted" in facts:
        yield Case("yes" if facts["inverted"] else "no", think="white" if facts["inverted"] else "black")


def _ventricle(facts: Facts) -> Iterator[Case]:
    area = facts.get("ventricle_cm2", 0.5)
    if area == 0 or area >= VENTRICLE_SEEN_CM2:
        yield Case("yes" if area else "no")


def _volume(facts: Facts) -> Iterator[Case]:
    for thickness_mm in (5, 10) if "area_cm2" in facts else ():
        volume_ml = near(facts["area_cm2"] * thickness_mm / 10, 20)
        if volume_ml:
            yield Case(f"{volume_ml} mL", variant=str(thickness_mm), think=f"{near(facts['area_cm2'], 20)} cm2")


def _brain_report(facts: Facts) -> Iterator[Case]:
    if (third := level(facts)) and "width_mm" in facts:
        width = f"Width: {near(facts['width_mm'], 20)} mm"
        lines = ("Modality: MRI", f"Plane: {facts['plane']}", f"Level: {third}", width)
        yield Case(". ".join(lines) + ".", think=facts["plane"])


def _report(facts: Facts) -> Iterator[Case]:
    lines = [f"Modality: {facts['modality']}"]
    if "part" in facts:
        lines.append(f"Part: {facts['part']}")
    if "window" in facts:
        lines.append(f"Window: {facts['window']}")
    if "stain" in facts:
        lines.append(f"Stain: {facts['stain']}")
    if near(facts.get("nuclei", 0), 5):
        lines.append(f"Nuclei: {near(facts['nuclei'], 5)}")
    if "brown_percent" in facts:
        lines.append(f"Brown: {near(facts['brown_percent'], 20)} %")
    if len(lines) > 1 and "plane" not in facts:
        yield Case(". ".join(lines) + ".", think=facts["modality"])


TASKS = (
    Task("plane", "option", 230, _label("plane", PLANES)),
    Task("map", "option", 130, _map),
    Task("level", "option", 60, _level),
    Task("width_option", "option", 100, _width_option),
    Task("modality", "option", 200, _label("modality", MODALITIES)),
    Task("part", "option", 80, _label("part", PARTS)),
    Task("window", "option", 40, _label("window", WINDOWS)),
    Task("stain", "option", 60, _label("stain", STAINS)),
    Task("is_plane", "yesno", 120, _is_label("plane", PLANES)),
    Task("inverted", "yesno", 80, _inverted),
    Task("ventricle", "yesno", 90, _ventricle),
    Task("is_modality", "yesno", 110, _is_label("modality", MODALITIES)),
    Task("width", "numeric", 170, _number("width_mm", 20, "mm"), 20, "mm"),
    Task("height", "numeric", 110, _number("height_mm", 20, "mm"), 20, "mm"),
    Task("area", "numeric", 70, _number("area_cm2", 20, "cm2"), 20, "cm2"),
    Task("volume", "numeric", 40, _volume, 20, "mL"),
    Task("grey", "numeric", 20, _number("grey_percent", 10, "%"), 10, "%"),
    Task("brown", "numeric", 30, _number("brown_percent", 10, "%"), 10, "%"),
    Task("nuclei", "numeric", 40, _number("nuclei", 5), 5),
    Task("brain_report", "report", 110, _brain_report),
    Task("report", "report", 110, _report),
)
# x: the case's variant. step: the task's. field: the image's width in mm, without which no length can be known.
QUESTIONS = {
    "plane": ("Which plane is this?", "What is the plane of this slice?"),
    "map": ("What does this image show?", "Which kind of image is this?"),
    "level": ("Which level is this {x} slice?", "Where is this {x} slice?"),
    "width_option": ("The image is {field} mm wide. How wide is the brain?",),
    "modality": ("Which modality is this?", "How was this image made?"),
    "part": ("Which part of the body is this?", "What is the body part?"),
    "window": ("Which window is this CT?", "What is the window of this CT?"),
    "stain": ("Which stain is this?", "What is the stain?"),
    "is_plane": ("Is this slice {x}?", "Is the plane {x}?"),
    "inverted": ("Is this image inverted?", "Are black and white swapped?"),
    "ventricle": ("Does this slice show the ventricles?", "Are the ventricles visible?"),
    "is_modality": ("Is the modality {x}?", "Is this image {x}?"),
    "width": ("The image is {field} mm wide. How wide is the brain to the nearest {step} mm?",),
    "height": ("The image is {field} mm wide. How high is the brain to the nearest {step} mm?",),
    "area": ("The image is {field} mm wide. What is the brain area to the nearest {step} cm2?",),
    "volume": (
        "The image is {field} mm wide, the slice {x} mm thick. What is its brain volume to the nearest {step} mL?",
    ),
    "grey": ("How much of the brain is grey matter to the nearest {step} %?",),
    "brown": ("How much of the image is brown to the nearest {step} %?",),
    "nuclei": ("How many nuclei are there to the nearest {step}?",),
    "brain_report": ("Write a report of this brain.", "Describe this brain."),
    "report": ("Write a report.", "Describe this image."),
}


def make_rows(
    images: Sequence[DemoImage], split: str, rng: np.random.Generator, times: float = 1.0
) -> list[dict[str, Any]]:
    """The rows of one split, shuffled. Image paths are `images/<name>.png`, relative to the rows' file.

    times: rows of each task as a multiple of the demo's own count.
    """
    mine = [image for image in images if image.split == split]
    rows = [row for task in TASKS for row in _task_rows(task, mine, round(task.count * SHARES[split] * times), rng)]
    return [{"id": f"demo-{split}-{n:04d}", **rows[i]} for n, i in enumerate(rng.permutation(len(rows)))]


def _task_rows(
    task: Task, images: Sequence[DemoImage], count: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Takes one case after another from every (variant, answer) in turn until there are enough; none is taken twice."""
    cases: dict[tuple[str, str], list[tuple[DemoImage, Case]]] = defaultdict(list)
    for i in rng.permutation(len(images)):
        for case in task.cases(images[i].facts):
            cases[case.variant, case.answer].append((images[i], case))
    decks: dict[int, list[int]] = defaultdict(list)
    made = 0
    while made < count and any(cases.values()):
        left = sorted(key for key in cases if cases[key])
        for i in rng.permutation(len(left))[: count - made]:
            yield _row(task, *cases[left[i]].pop(), made, decks, rng)
            made += 1


def _row(
    task: Task, image: DemoImage, case: Case, n: int, decks: dict[int, list[int]], rng: np.random.Generator
) -> dict[str, Any]:
    question = str(rng.choice(QUESTIONS[task.name])).format(x=case.variant, step=task.step, field=FIELD_MM)
    row: dict[str, Any] = {"images": [f"images/{image.name}.png"], "question": question, "kind": task.kind}
    if case.options:
        # Four options more often than two: fewer answers are right by luck. Each place holds the answer equally often.
        size = min(len(case.options), (4, 3, 4, 2)[n % 4])
        decks[size] = decks[size] or rng.permutation(size).tolist()
        place = decks[size].pop()
        others = [label for label in case.options if label != case.answer]
        options = [str(label) for label in rng.choice(others, size - 1, replace=False)]
        row |= {"options": [*options[:place], case.answer, *options[place:]], "answer": "ABCD"[place]}
    else:
        row["answer"] = case.answer
    if task.step:
        row |= {"tolerance": {"abs": 0.4 * task.step}, **({"unit": task.unit} if task.unit else {})}
    row["meta"] = {**image.meta, "task": task.name, "think": case.think or case.answer}
    return row


def sft_text(row: Mapping[str, Any]) -> str:
    """The ideal completion of a demo row: a word or two of thought (an option in its own words), then the answer."""
    return completion(row["meta"]["think"], row["answer"])


def plain_text(row: Mapping[str, Any]) -> str:
    """What the image shows, in plain words: the thought, and the answer where it is more than the thought."""
    think, answer = row["meta"]["think"], row["answer"]
    if row["kind"] == "report":
        return str(answer)
    more = row["kind"] == "yesno" or (row["kind"] == "numeric" and think != answer)
    return f"{think}. {answer}." if more else f"{think}."


def completion(think: str, answer: str) -> str:
    return f"<think> {think} </think><answer> {answer} </answer>"
