"""The report of one run: reads the run folder, writes `report.html`, one file that needs nothing else to be read.

Whatever is missing (a run that was stopped, an evaluation that was not asked for) is left out and said so on the page.
Model text is hostile: the template escapes everything, and the page's content policy lets only its own script run.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingshu_rl.data.sources import paths_in
from lingshu_rl.eval.scoring import UNREAD
from lingshu_rl.eval.stats import gain_between, mean_ci, split_by, summarise
from lingshu_rl.imaging.files import UnreadablePicture
from lingshu_rl.imaging.images import Picture
from lingshu_rl.report import plots
from lingshu_rl.report.alarms import find_alarms
from lingshu_rl.report.monitor import monitors, parsed_of, reward_by_length
from lingshu_rl.report.page import digest, render
from lingshu_rl.report.spans import coloured
from lingshu_rl.report.text import duration, percent, signed
from rewards.kinds import LETTERS, find_or_plain

Row = Mapping[str, Any]

IMAGE_PIXELS = 320  # longest side of an embedded image
SAMPLES = {"fixed": 6, "broken": 4, "still wrong": 6}  # questions in the gallery
GROUPS_SHOWN = 2  # training groups of the first and of the last step
EARLY_FILES, LATE_FILES = 3, 5  # rollout files that stand for "the first steps" and "the last steps"
HISTORY_FILES = 40  # rollout files that the curves of monitors are read from
BATCH = 512  # completions that are held with their texts
# Columns of the rollouts. Those with texts are many times larger, and read for the questions that are shown alone.
TASK = ("task", "kind")
CONTRAST = ("prompt_id", "value", *TASK)
BRIEF = tuple("step prompt_id kind gold value status reason parsed components tokens completion".split())
SAME_SHOWN = 4  # questions shown with their early and late completions
FINDINGS_SHOWN = 10
SCORES = (
    ("Before", "before", "before"),
    ("After", "after", "after"),
    ("After, blank image", "blank", "blank_image"),
    ("After, shuffled image", "shuffled", "shuffled_image"),
)
# Title, metric key by label (a key that ends in "/" stands for all that start so), options of the chart.
CHARTS: tuple[tuple[str, dict[str, str], dict[str, bool]], ...] = (
    ("Mean reward", {"mean": "reward/mean"}, {}),
    ("Reward by kind of question", {"": "reward/kind/"}, {}),
    ("Reward components", {"": "reward/component/"}, {}),
    ("KL to the reference (nats a token)", {"KL": "policy/kl"}, {}),
    ("Entropy (nats a token)", {"entropy": "policy/entropy"}, {}),
    ("Completion length (tokens)", {"mean": "completion/tokens_mean"}, {}),
    ("Gradient norm", {"norm": "policy/grad_norm"}, {"log": True}),
    (
        "Log-prob gap, trainer to engine",
        {"largest": "policy/rollout_gap_max", "mean": "policy/rollout_gap"},
        {"log": True},
    ),
    (
        "Truncated completions, flat groups",
        {"truncated": "completion/truncated_share", "groups of equal rewards": "groups/zero_variance"},
        {"percent": True},
    ),
    ("Clipped tokens", {"from below": "policy/clip_low", "from above": "policy/clip_high"}, {"percent": True}),
)
START_CHECKS = {
    "kl_first_step": "KL to the reference",
    "mean_logprob_gap_first_step": "trainer to engine gap, mean",
    "p99_logprob_gap_first_step": "trainer to engine gap, 99th percentile",
    "max_logprob_gap_first_step": "trainer to engine gap, largest",
    "dense_gap_first_step": "shared to dense gap, largest",
    "seeing_gap_first_step": "trainer to engine gap with images, mean",
    "blank_gap_first_step": "the same with blank images, mean",
}


@dataclass
class RunData:
    """What a run folder holds; `notes` says in words what is missing or damaged."""

    path: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    stored: dict[str, Any] = field(default_factory=dict)  # summary.json
    summary: dict[str, Any] = field(default_factory=dict)  # the same, or what eval/ gives when the run did not end
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evals: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rollouts: list[Path] = field(default_factory=list)  # one file a step
    late: list[dict[str, Any]] = field(default_factory=list)  # completions of the last steps in brief, newest first
    judge: dict[str, Any] = field(default_factory=dict)  # judge.json
    notes: list[str] = field(default_factory=list)


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` and return its path. Raises FileNotFoundError when the folder holds no run."""
    run = load_run(Path(run_dir))
    history = read_history(run)
    phases = phase_rows(run)
    images: dict[str, str] = {}  # data addresses by file, so that no image is read twice
    page = render(
        "template.html",
        run=run,
        name=run.path.resolve().name,
        headline=headline(run),
        facts=facts(run),
        alarms=find_alarms(run.metrics, run.evals, run.late),
        scores=score_rows(run.summary),
        charts=charts(run),
        timeline=timeline(run.metrics, {phase["name"]: n for n, phase in enumerate(phases)}),
        played=played(history),
        played_steps=len(history),
        mean_reward=mean_reward,
        lengths=reward_by_length(run.late),
        phases=phases,
        problems=problems(run.late),
        moves=Counter(move(*pair) for pair in paired(run.evals)),
        samples=samples(run.evals),
        groups=first_and_last_groups(run),
        same=early_and_late(run),
        on_the_way=on_the_way(run.evals),
        findings=findings,
        blank={row["id"]: row for row in run.evals.get("after_blank", ())},
        picture=lambda path: images[path] if path in images else images.setdefault(path, embed(path)),
        choices=choices,
        coloured=coloured,
        stem=stem,
        interval_plot=plots.interval_plot,
    )
    target = run.path / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def load_run(path: Path, *, scores: bool = True) -> RunData:
    """Read a run folder, finished or not. Raises FileNotFoundError when it is none.

    scores: also work out accuracies with their intervals (`summary`), which takes about a second.
    """
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "summary.json", "eval")):
        raise FileNotFoundError(
            f"{path} is no run folder (no config.yaml, no metrics.jsonl); give the run.dir of a run"
        )
    run = RunData(path)
    if (path / "config.yaml").exists():
        from omegaconf import OmegaConf

        run.config_text = (path / "config.yaml").read_text()
        run.config = OmegaConf.to_container(OmegaConf.create(run.config_text))  # type: ignore[assignment]
    run.stored = _read_json(path / "summary.json", run.notes)
    run.versions = run.stored.get("versions") or _read_json(path / "versions.json", run.notes)
    if (path / "judge.json").exists():
        run.judge = _read_json(path / "judge.json", run.notes)
    run.metrics = [m for m in _read_jsonl(path / "metrics.jsonl", run.notes) if isinstance(m.get("step"), int)]
    run.evals = {file.stem: _read_jsonl(file, run.notes) for file in sorted((path / "eval").glob("*.jsonl"))}
    run.rollouts = sorted((path / "rollouts").glob("step-*.parquet"))
    run.late = [row for file in run.rollouts[: -LATE_FILES - 1 : -1] for row in read_brief(file, run.notes)]
    if scores:
        run.summary = dict(run.stored) if run.stored.get("by_kind") else {**summarise(run.evals), **run.stored}
        add_difficulty(run)
    done, planned = run.metrics[-1]["step"] if run.metrics else 0, _dig(run.config, "train.steps")
    if not run.stored:
        of = f" of {planned}" if planned else ""
        run.notes.insert(
            0, f"This run has not ended or was stopped: {done}{of} steps are logged, there is no summary.json."
        )
    if missing := [name for name in ("before", "after") if name not in run.evals]:
        run.notes.append(f"There is no evaluation {' and none '.join(missing)} training.")
    return run


# How often the first training steps answered questions of a test question's task right.
DIFFICULTIES = {"hard at the start": 1 / 3, "middling at the start": 2 / 3, "easy at the start": 1.01}


def add_difficulty(run: RunData) -> None:
    """Give the evaluation rows a `difficulty`: what the data says, else how the first training steps fared at its task.

    The training questions are other questions than the held-out ones, so that "hard" is not just a wrong first answer,
    which would look better the second time by chance.
    """
    rewards: dict[str, list[float]] = defaultdict(list)
    early = (read_rollouts(file, run.notes, ("value", *TASK)) for file in run.rollouts[:EARLY_FILES])
    for row in (r for rows in early for r in rows):
        if row["value"] is not None:
            rewards[row["task"] or row["kind"]].append(row["value"])
    rates = {task: statistics.fmean(values) for task, values in rewards.items()}
    for row in (r for rows in run.evals.values() for r in rows):
        stated = row.get("difficulty") or (row.get("groups") or {}).get("difficulty")
        if not stated and (rate := rates.get(str(row.get("task") or row.get("kind")))) is not None:
            stated = next(name for name, limit in DIFFICULTIES.items() if rate < limit)
        row["difficulty"] = stated or ""
    run.summary["by_difficulty"] = split_by(run.evals, "difficulty")


def headline(run: RunData) -> dict[str, Any]:
    """The result in words (title, sentences), and the scores for the tiles."""
    s, text = run.summary, []
    before, after, gain = s.get("before"), s.get("after"), s.get("gain")
    if before and after and gain and gain["points"] is not None:
        low, high = gain["ci95"]
        verb = "improved" if low > 0 else "got worse"
        changed = f"The policy {verb} by {abs(gain['points']):.1f} points"
        title = changed if low > 0 or high < 0 else "No change that can be told from noise"
        text.append(
            f"On {after['n']} held-out questions accuracy went from {percent(before['accuracy'])} to "
            f"{percent(after['accuracy'])}: {signed(gain['points'])} points, "
            f"95\N{NO-BREAK SPACE}% interval {signed(low)} to {signed(high)}."
        )
    elif before and after and gain:
        title = "No held-out question could be judged both before and after training"
        text.append(f"{gain['not_judged']} questions were asked both times; the reasons stand beside their answers.")
    elif score := after or before:
        title = f"Accuracy {percent(score['accuracy'])} {'after' if after else 'before'} training"
        text.append(f"On {score['n']} held-out questions. There is no second evaluation to compare with.")
    else:
        title = "Not evaluated on held-out questions"
    rewards = [m["reward/mean"] for m in run.metrics if plots.finite(m.get("reward/mean")) is not None]
    if rewards and not (before and after):
        text.append(f"The mean training reward is {rewards[-1]:.3f}, after {rewards[0]:.3f} in the first step.")
    blank, shuffled = s.get("blank_image") or {}, s.get("shuffled_image") or {}
    if after and None not in (after["accuracy"], blank.get("accuracy")):
        text.append(f"With a blank image the trained policy scores {percent(blank['accuracy'])}")
        if shuffled.get("accuracy") is not None:
            text[-1] += f", with the image of another question {percent(shuffled['accuracy'])}"
        text[-1] += f": {signed(100 * (after['accuracy'] - blank['accuracy'])).lstrip('+')} points"
        if run.evals.get("after") and run.evals.get("after_blank"):
            low, high = gain_between(run.evals["after_blank"], run.evals["after"])["ci95"]
            text[-1] += f" (95\N{NO-BREAK SPACE}% interval {signed(low)} to {signed(high)})"
        text[-1] += " come from looking at the image"
        old = blank.get("before") or {}
        if before and None not in (before["accuracy"], old.get("accuracy")):
            text[-1] += f", {signed(100 * (before['accuracy'] - old['accuracy'])).lstrip('+')} before training"
        text[-1] += "."
    for key, told in (
        ("text_only", "Without any image"),
        ("majority_answer", "The most frequent label, given to all questions,"),
    ):
        if (s.get(key) or {}).get("accuracy") is not None:
            verb = "the trained policy scores" if key == "text_only" else "scores"
            text.append(f"{told} {verb} {percent(s[key]['accuracy'])}.")
    if unread := sum(row.get("status") in UNREAD for row in run.evals.get("after", ())):
        share = unread / len(run.evals["after"])
        text.append(
            f"{percent(share)} of the trained policy's answers could not be read as an answer; they count as wrong."
        )
    tiles = [(label, css, s[key]) for label, css, key in SCORES if (s.get(key) or {}).get("accuracy") is not None]
    return {"title": title, "text": text, "tiles": tiles}


def facts(run: RunData) -> list[tuple[str, str]]:
    """The run in short: model, data, settings, cost, checks of the first batch."""
    s, config = run.stored, run.config
    out = [("Model", _dig(config, "model"))]
    for name, key in (("Training data", "data.train"), ("Test data", "data.test")):
        out.append((name, ", ".join(paths_in(_dig(config, key) or ""))))
    if prompts := _dig(config, "train.prompts_per_step"):
        out.append(("Batch", f"{prompts} prompts × {_dig(config, 'train.group_size')} completions"))
    out += [("Learning rate", _dig(config, "train.lr")), ("KL weight", _dig(config, "loss.kl_coef"))]
    out += [("Seed", _dig(config, "seed")), ("Steps", s.get("steps")), ("DeepSpeed ZeRO stage", s.get("zero_stage"))]
    out.append(("Time", duration(s["seconds_total"]) if s.get("seconds_total") else None))
    tokens = s.get("engine_generated_tokens")
    out.append(("Generated, by the engine's count", f"{tokens:,.0f} tokens" if tokens else None))
    for key, label in START_CHECKS.items():
        if (value := plots.finite(s.get(key))) is not None:
            out.append((f"First batch: {label}", f"{plots.short(value)} nats"))
    return [(label, str(value)) for label, value in out if value not in (None, "")]


def score_rows(summary: Row) -> list[dict[str, Any]]:
    """The accuracy table: all questions, then by kind, task and modality where there is more than one."""
    rows = [("all", "All questions", summary)]
    for level in ("kind", "difficulty", "modality", "task"):
        parts = summary.get(f"by_{level}") or {}
        order = [*DIFFICULTIES, *sorted(parts)] if level == "difficulty" else sorted(parts)
        rows += [(level, name, parts[name]) for name in dict.fromkeys(order) if len(parts) > 1 and name in parts]
    out = []
    for level, name, s in rows:
        scores = [(label, css, s.get(key) or {}) for label, css, key in SCORES]
        n = max(score.get("n", 0) for _, _, score in scores)
        out.append({"level": level, "name": name, "n": n, "scores": scores, "gain": s.get("gain")})
    return [row for row in out if row["n"]]


def charts(run: RunData) -> dict[str, Any]:
    """Figures (title, legend, SVG): curves, seconds a step, reward statuses; without those that are all zero."""
    steps = [m["step"] for m in run.metrics]

    def figure(title: str, series: Mapping[str, Any], svg: str) -> dict[str, Any]:
        return {
            "title": title,
            "legend": [name.replace("_", " ") for name in series] if len(series) > 1 else [],
            "svg": svg,
        }

    curves = []
    if len(seen := _accuracy_over_steps(run)) > 2:
        at = [step for step, _ in seen]
        curves.append(
            figure(
                "Held-out accuracy in training",
                {},
                plots.line_chart(at, {"accuracy": [a for _, a in seen]}, percent=True),
            )
        )
    for title, wanted, options in CHARTS:
        series = _series(run.metrics, wanted)
        if any(any(values) for values in series.values()):
            curves.append(figure(title, series, plots.line_chart(steps, series, **options)))
    times = _phase_times(run.metrics)
    statuses = dict(sorted(_series(run.metrics, {"": "reward/status/"}).items(), key=lambda item: item[0] != "ok"))
    return {
        "curves": curves,
        "times": figure("Seconds a step", times, plots.column_chart(steps, times)) if times else None,
        "statuses": figure("Reward statuses", statuses, plots.column_chart(steps, statuses, percent=True))
        if statuses
        else None,
    }


def phase_rows(run: RunData) -> list[dict[str, Any]]:
    """Seconds by phase over the run: first those of every step, in the order of their chart. Places are colours."""
    times = _phase_times(run.metrics)
    logged = {name: sum(plots.finite(v) or 0.0 for v in values) for name, values in times.items()}
    seconds = {**logged, **(run.stored.get("seconds_by_phase") or {})}
    total, steps = sum(seconds.values()) or 1.0, len(run.metrics)
    return [
        {"name": name, "seconds": value, "share": value / total, "per_step": value / steps if name in logged else None}
        for name, value in seconds.items()
    ]


def timeline(metrics: Sequence[Row], colours: Mapping[str, int]) -> dict[str, Any] | None:
    """When each phase of a step began and ended, for the step of median length; None when no step says so.

    A step says so by `timeline` {phase: [start_s, end_s] or a list of such}, or by `time/start/PHASE`,
    `time/end/PHASE`.
    """
    told = [(m, spans) for m in metrics[1:] or metrics if (spans := _spans(m))]
    if not told:
        return None
    told.sort(key=lambda pair: (plots.finite(pair[0].get("time/step")) or 0.0, pair[0]["step"]))
    row, spans = told[len(told) // 2]
    title = f"Step {row['step']}, the one of median length: what ran when (seconds)"
    places = {name: colours.get(name, len(colours)) for name in spans}
    return {"title": title, "legend": [], "svg": plots.span_chart(spans, places)}


def played(history: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Curves of what a policy that plays the reward gives away. history: `monitor.monitors` by step."""
    steps, rates = list(history), list(history.values())

    def series(**wanted: str) -> dict[str, list[float | None]]:
        found = {label.replace("_", " "): [r.get(key) for r in rates] for label, key in wanted.items()}
        return {label: values for label, values in found.items() if any(v is not None for v in values)}

    wanted = [
        ("Unread and contradictory answers", series(cannot_be_read="unparsed", contradict_themselves="conflict"), True),
        ("Right format, wrong answer", series(share="format_right_answer_wrong"), True),
        ("Completions that repeat another of their group", series(share="duplicates"), True),
        ("Letters chosen (entropy, bits)", series(chosen="letter_entropy", right_answers="gold_entropy"), False),
        ("Length and reward in a group (correlation)", series(correlation="length_correlation"), False),
    ]
    out = [
        {"title": title, "legend": list(s) if len(s) > 1 else [], "svg": plots.line_chart(steps, s, percent=share)}
        for title, s, share in wanted
        if any(any(values) for values in s.values())
    ]
    groups = series(all_right="all_right", all_wrong="all_wrong")
    if groups:
        pairs = zip(groups["all right"], groups["all wrong"], strict=True)
        mixed = [None if a is None or b is None else 1 - a - b for a, b in pairs]
        parts = {"all right": groups["all right"], "some right": mixed, "all wrong": groups["all wrong"]}
        svg = plots.column_chart(steps, parts, percent=True)
        out.append({"title": "Questions by how many of their completions are right", "legend": list(parts), "svg": svg})
    return out


def early_and_late(run: RunData) -> list[dict[str, Any]]:
    """Questions that came up in the first and in the last third of the steps, at most one a task, in the order of
    hashes.

    Of each the completions of the first time and of the last.
    """
    files = evenly(run.rollouts)
    third = len(files) // 3
    ends: list[dict[str, tuple[str, Path]]] = []  # question -> its task, and where its completions are
    for part in (files[:third], files[len(files) - third :][::-1]):
        ends.append({})
        for file in part:
            for row in read_rollouts(file, run.notes, ("prompt_id", *TASK)):
                ends[-1].setdefault(row["prompt_id"], (row["task"] or row["kind"], file))
    shown: dict[str, str] = {}
    for name in sorted(ends[0].keys() & ends[1].keys(), key=digest):
        shown.setdefault(ends[0][name][0], name)
    return [
        {
            when: read_groups(end[name][1], run.notes, [name])[0]
            for when, end in zip(("early", "late"), ends, strict=True)
        }
        for name in list(shown.values())[:SAME_SHOWN]
    ]


def mean_reward(group: Sequence[Row]) -> float | None:
    judged = [m["value"] for m in group if m["value"] is not None]
    return statistics.fmean(judged) if judged else None


def on_the_way(evals: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Row]]:
    """Answers of at most three evaluations during training: label -> question -> row."""
    names = sorted(n for n in evals if n.startswith("step-") and n[5:].isdigit())
    chosen = names if len(names) <= 3 else [names[i * (len(names) - 1) // 2] for i in range(3)]
    return {f"step {int(name[5:])}": {row["id"]: row for row in evals[name]} for name in chosen}


def findings(row: Row) -> list[dict[str, Any]]:
    """What the grader made of an answer, item by item, where its kind can be drawn so: text, verdict and points."""
    draw = report_findings if row.get("kind") == "report" else find_or_plain(str(row.get("kind"))).draw
    parsed = parsed_of(row) if draw else None
    return draw({**row, "parsed": parsed}) if draw and parsed else []


def report_findings(row: Row) -> list[dict[str, Any]]:
    """The findings of a report; points are None where the grader gives none."""
    parsed = row["parsed"]
    if isinstance(parsed, Mapping):
        wrong = str(row.get("reason") or "").lower()
        return [
            {"text": f"{key}: {value}", "verdict": "wrong" if str(key).lower() in wrong else "right", "points": None}
            for key, value in list(parsed.items())[:FINDINGS_SHOWN]
        ]
    found = [f for f in parsed if isinstance(f, Mapping) and f.get("finding")] if isinstance(parsed, list) else []
    out = []
    for f in sorted(found, key=lambda f: -abs(f.get("points") or 0.0))[:FINDINGS_SHOWN]:
        words = (f.get("assertion"), f.get("side"), str(f["finding"]).replace("_", " "), f.get("location"))
        points = plots.finite(f.get("points"))
        text = " ".join(str(w) for w in words if w) + ("" if f.get("source") != "reference" else " (in the reference)")
        out.append(
            {"text": text, "verdict": f.get("verdict") or "", "points": None if points is None else points + 0.0}
        )
    return out


def problems(late: Sequence[Row]) -> list[tuple[int, str, str]]:
    """The commonest reasons for a status other than ok in the last steps: count, status, reason."""
    reasons = Counter((row["status"], row["reason"] or "") for row in late if row["status"] != "ok")
    return [(count, status, reason) for (status, reason), count in reasons.most_common(6)]


def paired(evals: Mapping[str, Sequence[Row]]) -> list[tuple[Row, Row]]:
    """Judged answers before and after training to the same question."""
    old = {row["id"]: row for row in evals.get("before", ()) if row["value"] is not None}
    return [(old[row["id"]], row) for row in evals.get("after", ()) if row["value"] is not None and row["id"] in old]


def move(before: Row, after: Row) -> str:
    """What training did to a question; right means a value of at least one half."""
    names = {
        (False, True): "fixed",
        (True, False): "broken",
        (False, False): "still wrong",
        (True, True): "still right",
    }
    return names[before["value"] >= 0.5, after["value"] >= 0.5]


def samples(evals: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Questions for the gallery. Within each move the tasks take turns, all in the order of hashes: no one chose."""
    out = []
    for name, count in SAMPLES.items():
        queues: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
        for pair in sorted(paired(evals), key=lambda pair: digest(str(pair[1]["id"]))):
            if move(*pair) == name:
                queues[pair[1]["task"] or pair[1]["kind"]].append(pair)
        turns = sorted((n, digest(task + name), task) for task, queue in queues.items() for n in range(len(queue)))
        out += [
            {"move": name, "before": queues[task][n][0], "after": queues[task][n][1]} for n, _, task in turns[:count]
        ]
    return out


def first_and_last_groups(run: RunData) -> list[list[Row]]:
    """Groups of the first and of the last step that can be read, with all that is stored of them."""
    readable = ((f, names) for f in run.rollouts if (names := widest(read_rollouts(f, run.notes, CONTRAST))))
    backwards = ((f, names) for f in run.rollouts[:0:-1] if (names := widest(read_rollouts(f, run.notes, CONTRAST))))
    ends = [found for files in (readable, backwards) if (found := next(files, None))]
    return [group for file, names in ends for group in read_groups(file, run.notes, names)]


def widest(rows: Iterable[Row]) -> list[str]:
    """The questions of one step whose completions' rewards are spread the widest, at most one a task."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["prompt_id"]].append(row)

    def spread(name: str) -> float:
        return statistics.pstdev([m["value"] for m in groups[name] if m["value"] is not None] or [0.0])

    best: dict[str, str] = {}
    for name in sorted(groups, key=lambda name: (-spread(name), digest(name))):
        best.setdefault(groups[name][0]["task"] or groups[name][0]["kind"], name)
    return list(best.values())[:GROUPS_SHOWN]


def choices(row: Row) -> list[tuple[str, str, bool]]:
    """Letter, text and "is this the right answer" of every option."""
    gold = {part.strip() for part in str(row["gold"]).split(",")}
    return [(letter, text, letter in gold) for letter, text in zip(LETTERS, row["options"] or (), strict=False)]


def stem(row: Row) -> list[str]:
    """The question's first line and the rest, without the option lines, which are shown on their own."""
    listed = {f"{letter}. {text}" for letter, text, _ in choices(row)}
    first, *rest = [line for line in row["question"].splitlines() if line.strip() not in listed] or [""]
    return [first, "\n".join(rest)]


def embed(path: str) -> str:
    """An image file as a data address, at most IMAGE_PIXELS on its longer side; "" when it cannot be read."""
    try:
        small = Picture(path).pixels()
    except UnreadablePicture:
        return ""
    small.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _series(metrics: Sequence[Row], wanted: Mapping[str, str]) -> dict[str, list[float | None]]:
    """Logged values by label, without what was never logged. A key that ends in "/" stands for all that start so."""
    keys: dict[str, str] = {}
    for label, key in wanted.items():
        keys |= {k[len(key) :]: k for m in metrics for k in m if k.startswith(key)} if key[-1] == "/" else {label: key}
    found = {label: [m.get(key) for m in metrics] for label, key in keys.items()}
    return {label: values for label, values in found.items() if any(plots.finite(v) is not None for v in values)}


def _phase_times(metrics: Sequence[Row]) -> dict[str, list[float | None]]:
    """Seconds of each phase by step; `time/step` is their frame, `time/start/...` and `time/end/...` are moments."""
    times = _series(metrics, {"": "time/"})
    return {
        name: values for name, values in times.items() if name != "step" and not name.startswith(("start/", "end/"))
    }


def _spans(row: Row) -> dict[str, list[tuple[float, float]]]:
    """Phase -> (start, end) pairs in seconds from the step's first start."""
    given: dict[str, Any] = dict(row["timeline"]) if isinstance(row.get("timeline"), Mapping) else {}
    for key in row:
        if key.startswith("time/start/") and f"time/end/{key[11:]}" in row:
            given[key[11:]] = [row[key], row[f"time/end/{key[11:]}"]]
    out: dict[str, list[tuple[float, float]]] = {}
    for phase, value in given.items():
        pairs = value if value and isinstance(value[0], list | tuple) else [value]
        clean = [(a, b) for a, b in pairs if plots.finite(a) is not None and plots.finite(b) is not None and b >= a]
        if clean:
            out[phase] = clean
    first = min((a for pairs in out.values() for a, _ in pairs), default=0.0)
    return {phase: [(a - first, b - first) for a, b in pairs] for phase, pairs in out.items()}


def _accuracy_over_steps(run: RunData) -> list[tuple[int, float]]:
    """Held-out accuracy at step 0, at the evaluations on the way, and at the end."""
    last = run.metrics[-1]["step"] if run.metrics else 0
    named = {"before": 0, "after": last} | {
        n: int(n[5:]) for n in run.evals if n.startswith("step-") and n[5:].isdigit()
    }
    scores = [
        (step, mean_ci([r["value"] for r in run.evals[n]])["accuracy"]) for n, step in named.items() if n in run.evals
    ]
    return sorted((step, accuracy) for step, accuracy in scores if accuracy is not None)


def _dig(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        notes.append(f"{path.name} cannot be read and was left out.")
        return {}


def _read_jsonl(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines that are JSON objects; a run that was killed may leave the last one cut off."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    rows, bad = [], []
    for n, line in enumerate(lines, 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            bad.append(n)
    if bad == [len(lines)]:
        notes.append(f"The last line of {path.name} was cut off and left out.")
    elif bad:
        notes.append(f"{len(bad)} lines of {path.name} cannot be read and were left out; the first is line {bad[0]}.")
    return rows


def read_history(run: RunData) -> dict[int, dict[str, float]]:
    """The rates of `monitors` by step, of at most HISTORY_FILES steps. One step's completions are held at a time."""
    steps = (rows for file in evenly(run.rollouts) if (rows := read_brief(file, run.notes)))
    return {rows[0]["step"]: monitors(rows) for rows in steps}


def evenly(files: Sequence[Path]) -> list[Path]:
    """At most HISTORY_FILES of them, evenly over the run."""
    count = min(HISTORY_FILES, len(files))
    return [files[round(i * (len(files) - 1) / max(1, count - 1))] for i in range(count)]


def read_brief(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """What rates and alarms need of a step's completions; a text stands as a number, which equal texts share."""
    rows = read_rollouts(path, notes, BRIEF)
    return [{**row, "completion": hash(" ".join(row["completion"].split()))} for row in rows]


def read_groups(path: Path, notes: list[str], names: Sequence[str]) -> list[list[Row]]:
    """All that is stored of these questions' completions in one step, in the order of names."""
    found: dict[str, list[Row]] = {name: [] for name in names}
    for row in read_rollouts(path, notes, of=names):
        found[row["prompt_id"]].append(row)
    return [sorted(group, key=lambda m: m["member"]) for group in found.values()]


def read_rollouts(
    path: Path, notes: list[str], columns: Sequence[str] = (), of: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """A step's completions; none of a file that cannot be read. columns, of: those and the questions wanted; () =
    all."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(BATCH, columns=there or None, use_threads=False):
                wanted = batch.filter(pc.is_in(batch.column("prompt_id"), pa.array(of))) if of else batch
                yield from wanted.to_pylist()
    except (pa.ArrowException, OSError):
        if (note := f"{path.name} cannot be read and was left out.") not in notes:
            notes.append(note)
