"""Tries a reward on the labels of a data set before training does: can it judge them, and whom else does it pay?

Every label is parsed and must earn 1 when it is given as the answer. Then answers that deserve nothing are tried on a
sample of the rows: another row's label, an empty answer, all options at once, the label hedged with a wrong one, the
question echoed. What constant answers earn is shown, since that is what a policy can earn blindfold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import DEFAULT_SPEC, SpecError, build
from rewards.executor import Executor, RewardFailure
from rewards.judge import judge_of
from rewards.kinds import find_or_plain
from rewards.pace import TEMPLATE, Pace
from rewards.rows import RowError, read_row, unchecked
from rewards.trust import estimate, measure

PROBED_ROWS = 1000  # rows of a kind on which undeserving answers are tried
SHOWN = 20  # lines about bad rows in a text
SLICE = 128  # completions between two looks at the clock
TIMED = 17  # completions by which a reward's pace is known
TRIES = 10  # of a row, about: its label and the undeserving answers


class RowsError(ValueError):
    """A file from which no rows can be read."""


@dataclass(frozen=True)
class BadRow:
    """A row whose label cannot be judged, or does not earn 1."""

    id: str
    kind: str
    gold: str
    reason: str


@dataclass(frozen=True)
class Probe:
    """One sort of answer tried on rows of a kind. limit: the highest mean that is fine; None = shown, not judged.

    mean: over judged rows. unjudged: rows for which the reward gave no value. paid: ids of up to 5 rows that were paid.
    """

    name: str
    kind: str
    rows: int
    mean: float
    limit: float | None = None
    unjudged: int = 0
    paid: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.limit is None or (self.mean <= self.limit and self.unjudged == 0)


@dataclass(frozen=True)
class PreflightReport:
    """rows: by kind, the refused ones left out. refused: lines that are no rows. judged: rows that a model
    judges. doubts: what is odd about the labels
    of a kind together (`Kind.doubts`); they are shown, not judged.
    """

    rows: Mapping[str, int]
    bad: tuple[BadRow, ...]
    probes: tuple[Probe, ...]
    refused: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    judged: int = 0

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.bad and not self.refused and all(probe.ok for probe in self.probes)

    def summary(self) -> str:
        """One line."""
        failed = [probe for probe in self.probes if not probe.ok]
        kinds = ", ".join(f"{count} {kind or 'without kind'}" for kind, count in self.rows.items()) or "no rows"
        left = f", {self.judged} of them left to a judge" if self.judged else ""
        faults = ["all labels earn 1" if self.rows else "no label could be tried"]
        if self.bad:
            faults = [f"{len(self.bad)} bad label{'s' * (len(self.bad) > 1)}"]
        if self.refused:
            faults.append(f"{len(self.refused)} lines refused")
        for probe in failed:
            what = f"{probe.unjudged} times not judged" if probe.unjudged else f"earns {probe.mean:.2f}"
            faults.append(f"{probe.name!r} {what} on {probe.kind} rows")
        return f"{sum(self.rows.values())} rows ({kinds}){left}: {'; '.join([*faults, *self.doubts])}"

    def text(self) -> str:
        """Plain lines: the summary, the bad rows by reason (20 lines at most), the table of probes."""
        table = [_HEAD, *(_cells(probe) for probe in self.probes)]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
        drawn = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*self._heading(), *(f"  {line}" for line in drawn)])

    def _heading(self) -> list[str]:
        lines = [self.summary()]
        for title, items in (("refused", list(self.refused)), ("bad", _grouped(self.bad))):
            lines += [f"  {title}: {item}" for item in items[:SHOWN]]
            if len(items) > SHOWN:
                lines.append(f"  ... and {len(items) - SHOWN} more such lines")
        return lines

    def show(self) -> None:
        """Print `text`, with a drawn table on a terminal."""
        if not sys.stdout.isatty():
            print(self.text())
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(*_HEAD)
        for probe in self.probes:
            table.add_row(*_cells(probe), style=None if probe.ok else "bold red")
        console = Console()
        console.print("\n".join(self._heading()), markup=False, highlight=False)
        console.print(table)


def _grouped(bad: Sequence[BadRow]) -> list[str]:
    """One line for all rows with the same label and reason."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in bad:
        groups[row.kind, row.reason, row.gold].append(row.id)
    lines = []
    for (kind, reason, gold), ids in groups.items():
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        lines.append(f"{', '.join(ids[:5])}{more} ({kind or 'no kind'}): {reason}; label {gold}")
    return lines


_HEAD = ("kind", "answer", "rows", "mean", "at most", "")


def _cells(probe: Probe) -> tuple[str, ...]:
    limit = "" if probe.limit is None else f"{probe.limit:g}"
    verdict = "" if probe.limit is None else "ok" if probe.ok else "FAIL"
    if not probe.ok and probe.paid:
        verdict += f" (paid: {', '.join(probe.paid)})"
    if probe.unjudged:
        verdict += f" ({probe.unjudged} not judged)"
    return probe.kind or "-", probe.name, str(probe.rows), f"{probe.mean:.3f}", limit, verdict


def check(
    samples: Sequence[RewardInput],
    reward: Reward | Executor,
    *,
    ids: Sequence[str] | None = None,
    refused: Sequence[str] = (),
    template: str = TEMPLATE,
    seed: int = 0,
    judged: Callable[[RewardInput], bool] = lambda sample: False,
    say: Callable[[str], None] = lambda line: None,
) -> PreflightReport:
    """Try `reward` on rows. The rows' completions are ignored; nothing counts against an executor's failure budget.

    say: hears every ten seconds how far a slow reward has come, and how long the rest takes.

    judged: rows that a model judges: of these the label is only read, since every answer would be paid for; how far the
    model is right, `rewards.trust` measures on a few of them.
    ids: names for the rows in the report, by default "row 1", "row 2", ... refused: passed on to the report.
    template: how an answer becomes a completion; it holds "{answer}".
    """
    if "{answer}" not in template:
        raise ValueError(f"the template must hold {{answer}}, got {template!r}")
    names = list(ids) if ids is not None else [f"row {number}" for number in range(1, len(samples) + 1)]
    if len(names) != len(samples):
        raise ValueError(f"{len(names)} ids for {len(samples)} rows")
    executor = reward if isinstance(reward, Executor) else Executor(reward)
    open_rows = len(samples) - sum(map(judged, samples))
    trial = _Trial(executor, template, Pace(open_rows + (TRIES - 1) * min(open_rows, PROBED_ROWS), say))
    try:
        bad, own, texts = _judge_labels(samples, names, trial, judged)
        by_kind: dict[str, list[int]] = defaultdict(list)
        for i, sample in enumerate(samples):
            by_kind[sample.kind].append(i)
        rng = random.Random(seed)
        probes: list[Probe] = []
        doubts: list[str] = []
        for kind, rows in by_kind.items():
            tried = [i for i in rows if i in own]
            if not tried and any(judged(samples[i]) for i in rows):
                continue
            doubts += find_or_plain(kind).doubts([own[i].parsed for i in tried])
            probes.append(_summed("the label", kind, [own[i] for i in tried], [names[i] for i in tried], None))
            good = [i for i in tried if i not in bad]
            chosen = sorted(rng.sample(good, PROBED_ROWS)) if len(good) > PROBED_ROWS else good
            asked, named = [samples[i] for i in chosen], [names[i] for i in chosen]
            probes += _probes(kind, asked, named, [texts[i] for i in chosen], trial, rng)
    finally:
        if executor is not reward:
            executor.close()
    counts = {kind: len(rows) for kind, rows in by_kind.items()}
    left = sum(map(judged, samples))
    return PreflightReport(counts, tuple(bad.values()), tuple(probes), tuple(refused), tuple(doubts), left)


def seconds_each(samples: Sequence[RewardInput], executor: Executor) -> float:
    """What a completion takes a reward, by a few of these samples. The first one starts what the reward works with."""
    asked = [replace(s, completion=TEMPLATE.replace("{answer}", "none of these")) for s in samples[:TIMED]]
    executor.score(asked[:1], counted=False)
    began = time.monotonic()
    executor.score(asked[1:], counted=False)
    return (time.monotonic() - began) / max(1, len(asked) - 1)


@dataclass(frozen=True)
class _Trial:
    executor: Executor
    template: str
    pace: Pace

    def answers(self, samples: Sequence[RewardInput], answers: Sequence[str]) -> list[RewardResult]:
        texts = [self.template.replace("{answer}", answer) for answer in answers]
        return self.completions(samples, texts)

    def completions(self, samples: Sequence[RewardInput], texts: Sequence[str]) -> list[RewardResult]:
        asked = [replace(s, completion=text, truncated=False) for s, text in zip(samples, texts, strict=True)]
        results: list[RewardResult] = []
        for start in range(0, len(asked), SLICE):
            results += self.executor.score(asked[start : start + SLICE], counted=False)
            self.pace.advance(len(asked[start : start + SLICE]))
        return results


def _judge_labels(
    samples: Sequence[RewardInput],
    names: Sequence[str],
    trial: _Trial,
    judged: Callable[[RewardInput], bool],
) -> tuple[dict[int, BadRow], dict[int, RewardResult], dict[int, str]]:
    """The bad rows; what each label that parses earns as an answer; and its text. All by the row's place."""
    problems = trial.executor.check_gold(samples)
    own: dict[int, RewardResult] = {}
    texts: dict[int, str] = {}
    open_ones = {
        i: find_or_plain(samples[i].kind).write(samples[i])
        for i, problem in enumerate(problems)
        if problem is None and not judged(samples[i])
    }
    while open_ones:
        results = trial.answers([samples[i] for i in open_ones], [left[0] for left in open_ones.values()])
        for (i, left), result in zip(open_ones.items(), results, strict=True):
            if i not in own or _full(result):
                own[i], texts[i] = result, left[0]
        open_ones = {i: left[1:] for i, left in open_ones.items() if left[1:] and not _full(own[i])}
    for i, result in own.items():
        if result.value is None:
            problems[i] = f"the label itself could not be judged ({result.status}: {result.reason})"
        elif not _full(result):
            problems[i] = f"the label itself earns {result.value:.2f} ({result.reason or result.status})"
    bad = {
        i: BadRow(names[i], samples[i].kind, _short(samples[i].gold), problem)
        for i, problem in enumerate(problems)
        if problem is not None
    }
    return bad, own, texts


def _full(result: RewardResult) -> bool:
    return result.value is not None and result.value >= 1.0 - 1e-9


def _probes(
    kind: str,
    samples: Sequence[RewardInput],
    names: Sequence[str],
    labels: Sequence[str],
    trial: _Trial,
    rng: random.Random,
) -> list[Probe]:
    """The undeserving answers on the rows of one kind."""
    found: list[Probe] = []

    def probe(name: str, rows: Iterable[int], answers: Mapping[int, str], limit: float | None) -> list[RewardResult]:
        rows = list(rows)
        results = trial.answers([samples[i] for i in rows], [answers[i] for i in rows])
        if rows:
            found.append(_summed(name, kind, results, [names[i] for i in rows], limit))
        return results

    borrowed = _borrowed(samples, labels, rng)
    record = find_or_plain(kind)
    results = probe("another row's label", borrowed, borrowed, record.part_marks)
    wrong = {i: borrowed[i] for i, result in zip(borrowed, results, strict=True) if result.value == 0}

    everyone = range(len(samples))
    if samples:
        found.append(_summed("nothing", kind, trial.completions(samples, [""] * len(samples)), names, 0.0))
    probe("an empty answer", everyone, dict.fromkeys(everyone, ""), 0.0)
    own: dict[str, dict[int, str]] = defaultdict(dict)
    for i, sample in enumerate(samples):
        for name, answer in record.undeserving(sample, labels[i]).items():
            own[name][i] = answer
    for name, answers in own.items():
        probe(name, answers, answers, 0.0)
    if record.single:
        single = [i for i in wrong if not samples[i].meta.get("multi")]
        probe("label or a wrong one", single, {i: f"{labels[i]} or {wrong[i]}" for i in single}, 0.0)
        probe("wrong one or the label", single, {i: f"{wrong[i]} or {labels[i]}" for i in single}, 0.0)
        asked = {i: sample.prompt for i, sample in enumerate(samples) if sample.prompt}
        probe("the question", asked, asked, 0.05)
    for answer in record.constants(samples, labels):
        probe(f"always {_short(answer, 30)!r}", everyone, dict.fromkeys(everyone, answer), None)
    return found


def _borrowed(samples: Sequence[RewardInput], labels: Sequence[str], rng: random.Random) -> dict[int, str]:
    """For each row that has one, a label of another row of as many options that differs from its own."""
    found: dict[int, str] = {}
    groups: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[len(sample.options)].append(i)
    for rows in groups.values():
        for i in rows:
            for j in rng.sample(rows, min(len(rows), 8)):
                if labels[j].casefold() != labels[i].casefold():
                    found[i] = labels[j]
                    break
    return found


def _summed(name: str, kind: str, results: Sequence[RewardResult], names: Sequence[str], limit: float | None) -> Probe:
    values = [result.value for result in results if result.value is not None]
    mean = sum(values) / len(values) if values else 0.0
    paid = [row for row, result in zip(names, results, strict=True) if result.value]
    return Probe(name, kind, len(results), mean, limit, len(results) - len(values), tuple(paid[:5]))


def _short(value: Any, limit: int = 80) -> str:
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@dataclass(frozen=True)
class Rows:
    """samples and their ids, in file order; refused: "line 7: reason" for every line that is no row."""

    samples: tuple[RewardInput, ...]
    ids: tuple[str, ...]
    refused: tuple[str, ...]

    def some(self, count: int) -> Rows:
        """At most `count` rows, evenly apart; all for 0."""
        kept = range(len(self.samples))
        if 0 < count < len(kept):
            kept = [n * len(kept) // count for n in range(count)]  # type: ignore[assignment]
        return Rows(tuple(self.samples[n] for n in kept), tuple(self.ids[n] for n in kept), self.refused)


Records = Iterable[
    tuple[str, Any]
]  # where a row stands ("line 7"), and the row or the RowError that says why there is none


def json_lines(path: str, settings: Sequence[str]) -> Records:
    """Rows of a JSONL file in the data-row form. Raises RowsError when it cannot be read."""
    if settings or Path(path).suffix != ".jsonl":
        raise RowsError(
            f"{path}: labels are read from .jsonl files, one row a line; `lingshu-rl rewards check` reads the others"
        )
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise RowsError(f"{path}: {error.strerror}") from None
    return [(f"line {number}", _row(line)) for number, line in enumerate(lines, start=1) if line.strip()]


def _row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return RowError(str(error))


def load_rows(path: str | Path) -> Rows:
    """Rows of a JSONL file in the data-row form. Raises RowsError when nothing can be read."""
    return labels_of(json_lines(str(path), ()), str(path))


def labels_of(records: Records, name: str) -> Rows:
    """The labels of rows; images are not opened. Raises RowsError where there are none."""
    samples: list[RewardInput] = []
    first_use: dict[str, str] = {}
    refused: list[str] = []
    for place, row in records:
        try:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, Mapping):
                raise RowError(f"a line holds one JSON object, this one a {type(row).__name__}")
            read = read_row(row, unchecked)
            if read.id in first_use:
                raise RowError(f"duplicate id, first used at {first_use[read.id]}")
        except (ValueError, TypeError, RecursionError) as error:
            refused.append(f"{place}: {error}")
            continue
        first_use[read.id] = place
        samples.append(read.sample)
    if not samples and not refused:
        raise RowsError(f"{name}: the file is empty")
    return Rows(tuple(samples), tuple(first_use), tuple(refused))


def main(argv: Sequence[str] | None = None, read: Callable[[str, Sequence[str]], Records] = json_lines) -> int:
    """`lingshu-rl rewards check DATA`: 0 when all is well, 1 when labels or the reward are not, 2 for a wrong call.

    read: the rows of DATA, with the key=value words that say how they are read; it may raise ValueError.
    """
    parser = argparse.ArgumentParser(prog="lingshu-rl rewards", description="Check labels and rewards before a run.")
    checking = parser.add_subparsers(dest="command", required=True).add_parser(
        "check", help="try a reward on the labels of a data set"
    )
    checking.add_argument("data", metavar="DATA", help="a .jsonl file of data rows; or, with lingshu-rl, any source")
    checking.epilog = (
        "other people's data are read by keys of a source: format=slake where='q_lang == en' (docs/data.md)"
    )
    choice = checking.add_mutually_exclusive_group()
    choice.add_argument("--reward", metavar="NAME", help="a reward of this package, or module:Class; default: by kind")
    choice.add_argument("--spec", metavar="FILE", help="a YAML file with a composition, as under rewards.spec")
    checking.add_argument("--template", default=TEMPLATE, help="a completion with {answer} in it; default: %(default)r")
    checking.add_argument(
        "--judge-limits",
        metavar=("FALSE_PAY", "FALSE_REFUSAL"),
        nargs=2,
        type=float,
        default=(0.1, 0.2),
        help="shares of wrong answers paid and of right ones refused that a judge is allowed; default: 0.1 0.2",
    )
    checking.add_argument("--rows", metavar="N", type=int, default=0, help="try N rows, evenly taken; default: all")
    checking.add_argument("--out", metavar="FILE", type=Path, help="write the whole report as JSON")
    arguments, settings = parser.parse_known_args(argv)
    if wrong := [word for word in settings if "=" not in word or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    try:
        rows = labels_of(read(arguments.data, settings), arguments.data).some(arguments.rows)
        reward = build(arguments.reward or (_spec_file(arguments.spec) if arguments.spec else DEFAULT_SPEC))
        report = check(
            rows.samples,
            reward,
            ids=rows.ids,
            refused=rows.refused,
            template=arguments.template,
            judged=lambda sample: judge_of(reward, sample) is not None,
            say=_to_stderr,
        )
        for judge, calls, tokens in estimate(rows.samples, reward):
            _to_stderr(f"{judge}, its trial: {judge.told_cost(calls, tokens)}")
        trusts = measure(rows.samples, reward, template=arguments.template, say=_to_stderr)
    except (RowsError, SpecError, ValueError, RewardFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.show()
    problems = [problem for trust in trusts for problem in trust.problems(*arguments.judge_limits)]
    for line in [line for trust in trusts for line in trust.lines()] + [f"FAIL: {problem}" for problem in problems]:
        print(line)
    ok = report.ok and not problems
    if arguments.out:
        told = {"ok": ok, **asdict(report), "judges": [trust.to_json() for trust in trusts]}
        arguments.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return 0 if ok else 1


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _spec_file(path: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        spec = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise SpecError(f"{path}: {error}") from None
    # A run's whole config is welcome too.
    if isinstance(spec, dict) and isinstance(spec.get("rewards"), dict):
        spec = spec["rewards"].get("spec") or DEFAULT_SPEC
    return spec


if __name__ == "__main__":
    sys.exit(main())
