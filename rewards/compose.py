"""Composition as data: a plain mapping (from YAML or code) becomes one `Reward`.

    reward = NAME                                  a reward of this package, or "module:Class"
           | {class: NAME, args: {...}}            with keyword arguments
           | {route: {kind: reward, ...}}          the reward for a sample's kind
           | {parts: {name: part, ...}}            several rewards in one
           | {..., behind: reward}                 a judge, asked only where that reward is not certain
    part   = a reward with one of  weight: w  |  gate: t  |  multiply: s     (default weight: 1)

The value of `parts` is  (sum of w_i v_i / sum of w_i) x factors.  A gate's factor is 1 when its value reaches t, else
0; a multiplier's is 1 - s (1 - v). Factors only shrink: format and length can cost a right answer something, but pay
nothing on their own. A weight of 0 makes a part a metric: its value is logged and changes nothing. A part that waits
for a judge is not asked where a gate is shut.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from rewards.base import Reward, RewardInput, RewardResult, Span
from rewards.imports import PathError, hint, imported
from rewards.kinds import ELSEWHERE, ROUTE, KindError, find

# Accuracy by kind is the whole pay. The think-answer format is watched, not paid: as an extra it would pay wrong
# answers (0.5 x format + 1 x accuracy, as Lingshu-RL was trained, gives a third of the pay to any well-formed text), as
# a gate it would starve a policy that has not learnt the format yet.
DEFAULT_SPEC: Mapping[str, Any] = {
    "parts": {
        "answer": {
            "route": ROUTE,
            "weight": 1.0,
        },
        "format": {"class": "ThinkAnswerFormat", "weight": 0.0},
    }
}

# Rewards that read one short answer out of a completion, and so can be told how much of it to read.
_SHORT = ("OptionLetter", "YesNo", "OpenAnswer", "NumericUnits", "LabelSet")


def default_spec(read: str = "prose") -> Mapping[str, Any]:
    """DEFAULT_SPEC whose rewards for short answers read all of a completion, or "closed" answers only (see
    `claims`)."""
    answer = DEFAULT_SPEC["parts"]["answer"]
    route = {
        kind: {"class": reward, "args": {"read": read}} if reward in _SHORT else reward
        for kind, reward in answer["route"].items()
    }
    return {"parts": {**DEFAULT_SPEC["parts"], "answer": {**answer, "route": route}}}


_FORMS = ("class", "route", "parts")
_KEYS = (*_FORMS, "args", "behind")
_ROLES = ("weight", "gate", "multiply")


class SpecError(ValueError):
    """A spec that cannot be built; the message says where in it and what to write instead."""


def build(spec: str | Mapping[str, Any]) -> Reward:
    """The reward that a spec describes; the grammar stands at the top of this module. Raises SpecError."""
    return _build(spec, "spec")


def default_reward() -> Reward:
    """What medical VQA rows are graded with: the reward of the row's kind; the format is a metric."""
    return build(DEFAULT_SPEC)


def is_batched(reward: Reward) -> bool:
    """Whether `score_batch` does more than loop over `score`, so that samples are worth handing over together."""
    return any(type(leaf).score_batch is not Reward.score_batch for leaf in leaves(reward))


def leaves(reward: Reward, sample: RewardInput | None = None) -> Iterator[Reward]:
    """The rewards at the ends of a composition; given a sample, those that may judge it."""
    inner = reward.inner(sample)
    if not inner:
        yield reward
    for one in inner:
        yield from leaves(one, sample)


def part_names(reward: Reward) -> tuple[str, ...]:
    """The names of a composition's parts; empty for any other reward."""
    return tuple(reward.parts) if isinstance(reward, Compose) else ()


class Route(Reward):
    """Hands each sample to the reward of its kind. A kind without a reward cannot be judged (`gold_invalid`).

    A kind with a module of its own, named by its import path or in `kinds.ELSEWHERE`, brings its reward along; a route
    of that name replaces it.
    """

    name = "route"

    def __init__(self, routes: Mapping[str, Reward]) -> None:
        if not routes:
            raise SpecError("a route needs at least one kind")
        self.routes = dict(routes)
        self.waits = any(reward.waits for reward in routes.values())

    def inner(self, sample: RewardInput | None = None) -> Sequence[Reward]:
        if sample is None:
            return tuple(self.routes.values())
        reward = self._reward(sample.kind)
        return () if isinstance(reward, str) else (reward,)

    def is_certain(self, sample: RewardInput, result: RewardResult) -> bool:
        return all(reward.is_certain(sample, result) for reward in self.inner(sample))

    def score(self, sample: RewardInput) -> RewardResult:
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Iterable[RewardInput]) -> list[RewardResult]:
        samples = list(samples)
        results: list[RewardResult | None] = [None] * len(samples)
        by_kind: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            by_kind.setdefault(sample.kind, []).append(index)
        for kind, indices in by_kind.items():
            reward = self._reward(kind)
            if isinstance(reward, str):
                for index in indices:
                    results[index] = RewardResult(None, "gold_invalid", reason=reward)
                continue
            scored = _scored(reward, [samples[i] for i in indices], kind)
            for index, result in zip(indices, scored, strict=True):
                results[index] = replace(result, components=_named(kind, result), spans=_placed(kind, result))
        return [result for result in results if result is not None]

    def check_gold(self, sample: RewardInput) -> str | None:
        reward = self._reward(sample.kind)
        return reward if isinstance(reward, str) else reward.check_gold(sample)

    def _reward(self, kind: str) -> Reward | str:
        """The reward of a kind, or why there is none."""
        if kind in self.routes:
            return self.routes[kind]
        if ":" in kind or kind in ELSEWHERE:
            try:
                return own_reward(kind)
            except (KindError, SpecError) as error:
                return str(error)
        return f"no reward for kind {kind!r}; routed kinds: {', '.join(self.routes)}{hint(kind, self.routes)}"


class Behind(Reward):
    """A judge behind a rule: asked only for what the rule is not certain of, see `Reward.is_certain`.

    So it neither overrules a certain verdict nor costs anything on easy samples. components: `asked`, 1 where it was.
    """

    name = "behind"

    def __init__(self, rule: Reward, judge: Reward) -> None:
        if rule.waits or not judge.waits:
            raise SpecError(
                f"behind: the rule decides first and a judge stands behind it, as in {{class: JudgeReward, behind: "
                f"OpenAnswer}}; got {judge.name} behind {rule.name}"
            )
        self.rule, self.judge, self.waits = rule, judge, True

    def inner(self, sample: RewardInput | None = None) -> Sequence[Reward]:
        return (self.rule, self.judge)

    def check_gold(self, sample: RewardInput) -> str | None:
        return self.judge.check_gold(sample)

    def score(self, sample: RewardInput) -> RewardResult:
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Iterable[RewardInput]) -> list[RewardResult]:
        samples = list(samples)
        results = _scored(self.rule, samples, "rule")
        asked = [i for i, result in enumerate(results) if not self.rule.is_certain(samples[i], result)]
        for i, result in zip(asked, _scored(self.judge, [samples[i] for i in asked], "judge"), strict=True):
            results[i] = result
        return [replace(r, components={**r.components, "asked": float(bool(r.verdict))}) for r in results]


@dataclass(frozen=True)
class Part:
    """A reward and its role in a composition. value: the weight, the gate's threshold or the multiplier's strength."""

    reward: Reward
    role: str = "weight"  # weight | gate | multiply
    value: float = 1.0

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise SpecError(f"unknown role {self.role!r}; use one of {', '.join(_ROLES)}{hint(self.role, _ROLES)}")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise SpecError(f"{self.role} must be a number, got {self.value!r}")
        if self.role == "weight" and self.value < 0:
            raise SpecError(f"a weight cannot be negative, got {self.value}; use `multiply` for a penalty")
        if self.role != "weight" and not 0 < self.value <= 1:
            raise SpecError(f"{self.role} must be in (0, 1], got {self.value}")

    @property
    def metric_only(self) -> bool:
        return self.role == "weight" and self.value == 0

    def factor(self, value: float) -> float:
        if self.role == "gate":
            return float(value >= self.value)
        return 1.0 - self.value * (1.0 - value)


class Compose(Reward):
    """A weighted mean of parts, shrunk by gates and multipliers.

    components: every part's value under its name, a part's own components and spans as "name/...", the spans' points as
    a share of the whole. A part that could not judge masks the sample, unless it is only a metric. status and parsed
    are those of the first weighted part (or of the part that masks); reason lists what each part that did not give full
    value said.
    """

    name = "compose"

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = dict(parts)
        self.weights = {name: p.value for name, p in self.parts.items() if p.role == "weight" and p.value > 0}
        if not self.weights:
            raise SpecError("a composition needs a part with a weight above 0: gates and multipliers pay nothing")
        self.waits = any(part.reward.waits for part in parts.values())

    def inner(self, sample: RewardInput | None = None) -> Sequence[Reward]:
        return tuple(part.reward for part in self.parts.values())

    def score(self, sample: RewardInput) -> RewardResult:
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Iterable[RewardInput]) -> list[RewardResult]:
        samples = list(samples)
        rows: list[dict[str, RewardResult]] = [{} for _ in samples]
        for name, part in sorted(self.parts.items(), key=lambda item: item[1].reward.waits):
            asked = [i for i, row in enumerate(rows) if not (part.reward.waits and self._is_shut(row))]
            for i, result in zip(asked, _scored(part.reward, [samples[i] for i in asked], name), strict=True):
                rows[i][name] = result
        return [self._combine(row) for row in rows]

    def _is_shut(self, results: Mapping[str, RewardResult]) -> bool:
        """Whether a gate among the results leaves nothing to earn, or cannot say."""
        gates = [
            (self.parts[name], result.value) for name, result in results.items() if self.parts[name].role == "gate"
        ]
        return any(value is None or not gate.factor(value) for gate, value in gates)

    def check_gold(self, sample: RewardInput) -> str | None:
        for name, part in self.parts.items():
            if not part.metric_only and (problem := part.reward.check_gold(sample)):
                return f"{name}: {problem}"
        return None

    def _combine(self, found: Mapping[str, RewardResult]) -> RewardResult:
        """found: of the parts that were asked; the others waited behind a shut gate."""
        results = {name: found[name] for name in self.parts if name in found}
        verdict = "\n".join(result.verdict for result in results.values() if result.verdict)
        components: dict[str, float] = {}
        for name, result in results.items():
            components.update(_named(name, result))
        reason = "; ".join(
            f"{name}: {result.reason}" for name, result in results.items() if result.reason and result.value != 1.0
        )
        for name, result in results.items():
            if result.value is None and not self.parts[name].metric_only:
                return RewardResult(None, result.status, result.parsed, f"{name}: {result.reason}", components, verdict)
        if self._is_shut(results):
            first = next((results[name] for name in self.weights if name in results), RewardResult(0.0))
            return RewardResult(0.0, first.status, first.parsed, reason, components, verdict)
        total = sum(self.weights.values())
        factors = [p.factor(_value(results[name])) for name, p in self.parts.items() if p.role != "weight"]
        shares = {name: weight / total * math.prod(factors) for name, weight in self.weights.items()}
        value = sum(share * _value(results[name]) for name, share in shares.items())
        spans: dict[str, tuple[Span, ...]] = {}
        for name, share in shares.items():
            spans |= _placed(name, results[name], share)
        first = results[next(iter(self.weights))]
        # The sum of weights times ones can exceed their sum by a rounding step.
        return RewardResult(min(1.0, value), first.status, first.parsed, reason, components, verdict, spans)


def _value(result: RewardResult) -> float:
    assert result.value is not None
    return result.value


def _named(name: str, result: RewardResult) -> dict[str, float]:
    """A part's value and its own components, prefixed with the part's name."""
    named = {} if result.value is None else {name: result.value}
    return named | {f"{name}/{key}": value for key, value in result.components.items()}


def _placed(name: str, result: RewardResult, share: float = 1.0) -> dict[str, tuple[Span, ...]]:
    """A part's spans, prefixed with its name, worth its share of the whole."""
    return {
        f"{name}/{key}": tuple(span._replace(points=share * span.points) for span in spans)
        for key, spans in result.spans.items()
    }


def _scored(reward: Reward, samples: Sequence[RewardInput], name: str) -> list[RewardResult]:
    try:
        results = list(reward.score_batch(samples))
    except Exception as error:
        error.add_note(f"in reward part {name!r}")
        raise
    for result in results:
        if not isinstance(result, RewardResult):
            raise TypeError(f"reward part {name!r} returned {type(result).__name__} instead of RewardResult")
    if len(results) != len(samples):
        raise ValueError(f"reward part {name!r} returned {len(results)} results for {len(samples)} samples")
    return results


def _build(spec: Any, where: str) -> Reward:
    if isinstance(spec, str):
        return _instance(spec, {}, where)
    if not isinstance(spec, Mapping):
        raise SpecError(f"{where}: expected a name or a mapping, got {type(spec).__name__}")
    if "behind" in spec:
        judge = _build({key: value for key, value in spec.items() if key != "behind"}, where)
        return _at(where, Behind, _build(spec["behind"], f"{where}.behind"), judge)
    forms = [form for form in _FORMS if form in spec]
    if len(forms) != 1:
        _refuse_unknown(spec, _KEYS, where)
        raise SpecError(f"{where}: give exactly one of {', '.join(_FORMS)}, got {', '.join(forms) or 'none'}")
    form = forms[0]
    _refuse_unknown(spec, ("class", "args") if form == "class" else (form,), where)
    if form == "class":
        return _instance(spec["class"], spec.get("args") or {}, where)
    inner = spec[form]
    if not isinstance(inner, Mapping) or not inner:
        raise SpecError(f"{where}.{form}: expected a mapping of names to rewards, got {inner!r}")
    if form == "route":
        return Route({str(kind): _build(value, f"{where}.route.{kind}") for kind, value in inner.items()})
    for name in inner:
        if not isinstance(name, str) or not name or "/" in name:
            raise SpecError(f"{where}.parts: a part's name is a text without '/', got {name!r}")
    return _at(where, Compose, {name: _part(value, f"{where}.parts.{name}") for name, value in inner.items()})


def _part(spec: Any, where: str) -> Part:
    if not isinstance(spec, Mapping):
        return Part(_build(spec, where))
    roles = [role for role in _ROLES if role in spec]
    if len(roles) > 1:
        raise SpecError(f"{where}: a part has one role, got {' and '.join(roles)}")
    rest = {key: value for key, value in spec.items() if key not in _ROLES}
    _refuse_unknown(rest, (*_KEYS, *_ROLES), where)
    reward = _build(rest, where)
    return _at(where, Part, reward, roles[0], spec[roles[0]]) if roles else Part(reward)


def _at(where: str, make: Any, *args: Any) -> Any:
    try:
        return make(*args)
    except (SpecError, PathError) as error:
        raise SpecError(f"{where}: {error}") from error


def _instance(name: Any, args: Any, where: str) -> Reward:
    if not isinstance(name, str):
        raise SpecError(f"{where}: a class is a text such as 'OptionLetter' or 'my_module:MyReward', got {name!r}")
    if not isinstance(args, Mapping):
        raise SpecError(f"{where}.args: expected a mapping of keyword arguments, got {type(args).__name__}")
    cls = _at(where, imported, name, Reward) if ":" in name else _own(name, where)
    if not (isinstance(cls, type) and issubclass(cls, Reward)):
        raise SpecError(f"{where}: {name} is not a subclass of rewards.Reward")
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        _refuse_unknown(args, tuple(parameters), f"{where}.args", what=f"argument of {cls.__name__}")
    try:
        return cls(**args)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{where}: {name} refused its arguments: {error}") from error


def _own(name: str, where: str) -> Any:
    package = importlib.import_module("rewards")
    known = [
        n for n in package.__all__ if n[:1].isupper() and n not in ("Kind", "Reward", "RewardInput", "RewardResult")
    ]
    if name not in known:
        raise SpecError(f"{where}: no reward named {name!r}{hint(name, known)}; own classes are named 'module:Class'")
    return getattr(package, name)


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str, what: str = "key") -> None:
    for key in given:
        if key not in known:
            raise SpecError(f"{where}: unknown {what} {key!r}{hint(key, known)}; known: {', '.join(known) or 'none'}")


@cache
def own_reward(name: str) -> Reward:
    """The reward of the kind's record. Raises KindError, and SpecError for a record whose reward cannot be built."""
    return build(find(name).reward)


def label_check(name: str) -> Callable[[RewardInput], str | None]:
    """Why a label of this kind cannot be used, where no other reward is to judge it."""
    return _is_text if find(name).imitated else own_reward(name).check_gold


def _is_text(sample: RewardInput) -> str | None:
    return (
        None
        if isinstance(sample.gold, str)
        else f"an answer of kind {sample.kind!r} must be a text, got {sample.gold!r}"
    )
