"""These rewards in other trainers, and TRL's reward functions here.

Each `to_*` takes a Reward, or an Executor when the reward must run in killable workers, and returns what that trainer
calls. All of them read the fields of a data row (`answer`, `options`, `kind`, `unit`, `tolerance`, `meta`) wherever the
trainer keeps them. A sample that could not be judged is masked where the trainer can mask; where it cannot, `unjudged`
says what to do, because a silent 0 would be a wrong label.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rewards.base import Reward, RewardInput, RewardResult
from rewards.executor import Executor, RewardFailure
from rewards.imports import imported

_TAIL_CHARS = (400, 100, 40)  # how much of a prompt's end must be found again where images changed its start


def reward_input(
    row: Mapping[str, Any], completion: str, *, gold: str = "answer", prompt: str = "", truncated: bool = False
) -> RewardInput:
    """What a reward sees of a data row. gold: the name of the label's field.

    Fields that are absent or None are left out. Tables may hand over arrays for lists and fill the keys that a row
    lacks with None; both are undone here.
    Raises ValueError when the row has no label.
    """
    if gold not in row:
        fields = ", ".join(sorted(str(key) for key in row)) or "none"
        raise ValueError(f"the row has no field {gold!r}, which holds the label; its fields: {fields}")
    meta = dict(_plain(row.get("meta")) or {})
    for key in ("unit", "tolerance"):
        if (value := _plain(row.get(key))) is not None:
            meta[key] = value
    images = _plain(row.get("images"))
    if images is None:
        images = [] if row.get("image") is None else [row["image"]]
    return RewardInput(
        completion=completion,
        gold=_plain(row[gold]),
        options=tuple(_plain(row.get("options")) or ()),
        prompt=prompt or str(row.get("question") or ""),
        images=tuple(images),
        kind=row.get("kind") or "",
        truncated=truncated,
        meta=meta,
    )


def to_trl(reward: Reward | Executor, *, gold: str = "answer", eos_token_ids: Collection[int] = ()) -> TrlFunction:
    """A reward function for TRL's GRPOTrainer and RLOOTrainer. An unjudged sample is None, which TRL masks.

    TRL sums several reward functions and counts a None among numbers as 0: compose rewards with `rewards.build` and
    give TRL the one result. gold: the dataset column with the label. eos_token_ids: with them, a completion that does
    not end in one of them counts as truncated.
    """
    return TrlFunction(reward, gold, eos_token_ids)


class TrlFunction:
    """f(prompts, completions, completion_ids, **columns) -> list[float | None], as TRL 1.16 calls it.

    Component means go to `log_metric` as "<name>/<component>", status and reason to `log_extra`. An instance can be
    pickled, as TRL's asynchronous trainer asks, unless it was given an Executor.
    """

    def __init__(self, reward: Reward | Executor, gold: str, eos_token_ids: Collection[int]) -> None:
        self._reward, self._gold, self._eos_token_ids = reward, gold, frozenset(eos_token_ids)
        self._executor: Executor | None = None
        self.__name__ = reward.name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        size = len(completions)
        table = {key: values for key, values in columns.items() if isinstance(values, list) and len(values) == size}
        samples = []
        for i, completion in enumerate(completions):
            cut = completion_ids is not None and self._cut(completion_ids[i])
            row = {key: values[i] for key, values in table.items()}
            samples.append(
                reward_input(row, _text(completion), gold=self._gold, prompt=_text(prompts[i], "user"), truncated=cut)
            )
        self._executor = self._executor or _executor(self._reward)
        results = self._executor.score(samples)
        if log_metric is not None:
            for name, mean in _component_means(results).items():
                log_metric(f"{self.__name__}/{name}", mean)
            log_metric(f"{self.__name__}/unjudged", sum(r.value is None for r in results) / size)
        if log_extra is not None:
            log_extra(f"{self.__name__}/status", [result.status for result in results])
            log_extra(f"{self.__name__}/reason", [result.reason for result in results])
        return [result.value for result in results]

    def _cut(self, ids: Sequence[int]) -> bool:
        return bool(self._eos_token_ids) and (len(ids) == 0 or ids[-1] not in self._eos_token_ids)

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._reward, Executor):
            raise TypeError("an Executor cannot be sent to another process; give to_trl the Reward itself")
        return {**self.__dict__, "_executor": None}


def to_verl(reward: Reward | Executor, *, unjudged: float | None = None) -> Callable[..., dict[str, Any]]:
    """`compute_score` for verl (`reward.custom_reward_function.path` / `.name`), for its naive and dapo managers.

    `ground_truth` is the label; options, kind, unit, tolerance and meta are read from `extra_info`. The result's keys
    are the same for every sample, as verl demands: score, acc, pred, status, unjudged, and one a part of a composition
    (nan where a part does not apply). verl cannot mask a sample: one that could not be judged gets `unjudged`, or ends
    the run with RewardFailure when that is None.
    """
    executor = _executor(reward)
    names = executor.parts

    def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        row = {**(extra_info or {}), "answer": ground_truth}
        result = executor.score([reward_input(row, solution_str)])[0]
        value = _valued(result, unjudged, "verl")
        return {
            "score": value,
            "acc": value,
            "pred": "" if result.parsed is None else str(result.parsed),
            "status": result.status,
            "unjudged": float(result.value is None),
            **{name: result.components.get(name, math.nan) for name in names},
        }

    return compute_score


def to_openrlhf(reward: Reward | Executor, *, unjudged: float | None = None) -> Callable[..., dict[str, Any]]:
    """`reward_func(queries, prompts, labels)` for OpenRLHF (`--reward.remote_url my_file.py`).

    OpenRLHF hands over one label a prompt and no other column: a label is either the answer alone or a data row as a
    JSON object (`{"answer": "B", "options": [...], "kind": "option"}`). The completion is the query without its prompt.
    OpenRLHF cannot mask a sample: one that could not be judged gets `unjudged`, or raises RewardFailure when that is
    None.
    """
    executor = _executor(reward)
    names = executor.parts

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> dict[str, Any]:
        import torch

        samples = [
            reward_input(_label_row(label), _after_prompt(query, prompt), prompt=prompt)
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        results = executor.score(samples)
        values = torch.tensor([_valued(result, unjudged, "OpenRLHF") for result in results], dtype=torch.float32)
        logs = {name: torch.tensor([r.components.get(name, math.nan) for r in results]) for name in names}
        logs["unjudged"] = torch.tensor([float(result.value is None) for result in results])
        return {"rewards": values, "scores": values, "extra_logs": logs}

    return reward_func


def to_verifiers(reward: Reward | Executor) -> Callable[..., Any]:
    """A reward for verifiers 0.4 (`verifiers.v1`): `medical = vf.reward(to_verifiers(my_reward))` in a vf.Task.

    The task's data carries the fields of a data row. Components are recorded as metrics of the trace. A sample that
    could not be judged raises RewardFailure: verifiers then marks the rollout as failed, and training leaves it out.
    """
    executor = _executor(reward)

    async def score(self: Any, trace: Any) -> float:
        row = self.data.model_dump()
        sample = reward_input(row, trace.last_reply, prompt=self.data.prompt_text, truncated=trace.is_truncated)
        result = (await asyncio.wrap_future(executor.submit([sample])))[0]
        trace.record_metrics(dict(result.components))
        return _valued(result, None, "verifiers")

    score.__name__ = reward.name
    return score


def from_trl(
    function: Callable[..., Any] | str, *, gold: str = "answer", low: float = 0.0, high: float = 1.0
) -> TrlReward:
    """A TRL reward function, or its path "module:function", as a Reward; see TrlReward."""
    return TrlReward(function, gold=gold, low=low, high=high)


class TrlReward(Reward):
    """Calls f(prompts=, completions=, **columns) with chat messages, as TRL does for a chat dataset.

    function: the function (plain or async), or its path, which makes the reward usable in a spec:
    `{class: "rewards.adapters:TrlReward", args: {function: "trl.rewards:think_format_reward"}}`.
    gold: the column under which the function expects the label (TRL's own call it "solution"). The columns are that
    one, `options`, `kind` and the keys of `meta`. low, high: the function's range, mapped onto [0, 1]; a number outside
    of it is an error. None from the function means that it cannot judge the sample.
    """

    def __init__(
        self, function: Callable[..., Any] | str, *, gold: str = "answer", low: float = 0.0, high: float = 1.0
    ) -> None:
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        self._function = imported(function) if isinstance(function, str) else function
        ids = inspect.signature(self._function).parameters.get("completion_ids")
        if ids is not None and ids.default is inspect.Parameter.empty:
            raise ValueError("this function needs completion_ids; a Reward sees text, not tokens")
        self._gold, self._low, self._high = gold, low, high
        self.name = getattr(self._function, "__name__", "trl")

    def score(self, sample: RewardInput) -> RewardResult:
        return self.score_batch([sample])[0]

    def score_batch(self, samples: Iterable[RewardInput]) -> list[RewardResult]:
        samples = list(samples)
        columns: dict[str, list[Any]] = {
            key: [s.meta.get(key) for s in samples] for key in dict.fromkeys(k for s in samples for k in s.meta)
        }
        columns |= {
            "options": [list(s.options) for s in samples],
            "kind": [s.kind for s in samples],
            self._gold: [s.gold for s in samples],
        }
        values = self._function(
            prompts=[[{"role": "user", "content": s.prompt}] for s in samples],
            completions=[[{"role": "assistant", "content": s.completion}] for s in samples],
            **columns,
        )
        if inspect.isawaitable(values):
            values = asyncio.run(_finished(values))
        return [self._result(value) for value in values]

    def _result(self, value: Any) -> RewardResult:
        if value is None or math.isnan(value):
            return RewardResult(None, "gold_invalid", reason=f"{self.name} returned {value}")
        if not self._low <= value <= self._high:
            raise ValueError(f"{self.name} returned {value}, outside of its range {self._low} to {self._high}")
        scaled = (float(value) - self._low) / (self._high - self._low)
        return RewardResult(scaled, reason="" if scaled == 1 else f"{self.name} returned {value:g}")


async def _finished(awaitable: Any) -> Any:
    return await awaitable


def _executor(reward: Reward | Executor) -> Executor:
    return reward if isinstance(reward, Executor) else Executor(reward)


def _valued(result: RewardResult, unjudged: float | None, trainer: str) -> float:
    if result.value is not None:
        return result.value
    if unjudged is None:
        raise RewardFailure(
            f"a sample could not be judged ({result.status}: {result.reason}) and {trainer} cannot mask it"
        )
    return unjudged


def _component_means(results: Sequence[RewardResult]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.components.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def _text(turn: Any, role: str = "assistant") -> str:
    """The text of a completion or prompt: a string, or the last message of that role with its text parts."""
    if isinstance(turn, str):
        return turn
    messages = [message for message in turn if message.get("role") == role]
    content = messages[-1].get("content") if messages else ""
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")


def _after_prompt(query: str, prompt: str) -> str:
    """The completion in `query`. Images expand inside a prompt, so that only its end may be found again as it was."""
    if query.startswith(prompt):
        return query[len(prompt) :]
    for size in _TAIL_CHARS:
        tail = prompt[-size:]
        if len(tail) == min(size, len(prompt)) and tail and (place := query.find(tail)) >= 0:
            return query[place + len(tail) :]
    raise ValueError(f"the prompt's end {prompt[-40:]!r} does not occur in the query {query[:80]!r}...")


def _label_row(label: Any) -> Mapping[str, Any]:
    if isinstance(label, str) and label.lstrip().startswith("{"):
        try:
            row = json.loads(label)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "answer" in row:
            return row
    return {"answer": label}


def _plain(value: Any) -> Any:
    """Arrays and scalars of numpy as builtin data; None-valued keys of mappings dropped."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value
