"""The executor: what fails costs only its own sample, workers are killed and replaced, the budget ends a run."""

import asyncio
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque

import pytest

from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import SpecError
from rewards.executor import Executor, FailureBudget, RewardFailure, judge

HERE = "test_executor"


class Naughty(Reward):
    """Does what the completion says; everything else is right."""

    name = "naughty"

    def score(self, sample):
        match sample.completion:
            case "raise":
                raise ValueError("no such luck")
            case "return":
                return 1.0
            case "sleep":
                time.sleep(60)
            case "swallow":
                try:
                    time.sleep(60)
                except Exception:
                    return RewardResult(1.0)
            case "regex":  # catastrophic, but the standard library's matcher hears the timer
                re.match(r"(a+)+$", "a" * 40 + "b")
            case "c":  # runs in C, holds the interpreter lock and hears no signal
                deque(itertools.repeat(0), maxlen=0)
            case "memory":
                bytearray(8 << 30)
            case "exit":
                os._exit(3)
            case "child":
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
                time.sleep(60)
            case "object":
                return RewardResult(1.0, parsed={"thing": threading.current_thread})
            case "pid":
                return RewardResult(1.0, parsed=os.getpid())
            case "gpu":
                return RewardResult(1.0, parsed=os.environ.get("CUDA_VISIBLE_DEVICES"))
        return RewardResult(1.0, parsed=sample.completion, components={"n": 1.0})

    def check_gold(self, sample):
        return self.score(sample).parsed if sample.completion != "fine" else None


class NaughtyBatch(Naughty):
    """The same, a batch at a time."""

    def score_batch(self, samples):
        return [self.score(sample) for sample in samples]


class Leaky(Reward):
    """Keeps 100 MB a sample: a worker meets its limit on a sample that is not to blame."""

    kept: list[bytearray] = []  # noqa: RUF012

    def score(self, sample):
        self.kept.append(bytearray(100 << 20))
        return RewardResult(1.0)


class Unbuildable(Reward):
    def __init__(self):
        raise ValueError("no model file")


def samples(*texts: str) -> list[RewardInput]:
    return [RewardInput(text, gold="g", kind="open", meta={"id": i}) for i, text in enumerate(texts)]


def isolated(spec=f"{HERE}:Naughty", **options) -> Executor:
    return Executor(spec, mode="isolated", **{"timeout_s": 0.5, "max_failed_share": 1.0} | options)


def test_inline_an_exception_costs_its_own_sample_and_names_its_line():
    with Executor(Naughty(), max_failed_share=1.0) as executor:
        results = executor.score(samples("fine", "raise", "return", "fine"))
    assert [r.value for r in results] == [1.0, None, None, 1.0]
    assert results[1].status == "error" and "ValueError: no such luck (test_executor.py:" in results[1].reason
    assert "not float" in results[2].reason
    assert executor.budget.counts == {"ok": 2, "error": 2} and executor.budget.masked == 2


def test_a_failing_batch_is_judged_again_sample_by_sample():
    results = judge(NaughtyBatch(), samples("fine", "raise", "fine"))
    assert [r.value for r in results] == [1.0, None, 1.0]
    assert judge(NaughtyBatch(), []) == []


def test_inline_submit_returns_before_the_work_is_done_and_fits_asyncio():
    class Slow(Reward):
        def score(self, sample):
            time.sleep(0.2)
            return RewardResult(1.0)

    async def both(executor):
        return await asyncio.gather(*(asyncio.wrap_future(executor.submit(samples("x"))) for _ in range(2)))

    with Executor(Slow()) as executor:
        began = time.monotonic()
        future = executor.submit(samples("x"))
        assert time.monotonic() - began < 0.1
        assert future.result()[0].value == 1.0
        assert [r[0].value for r in asyncio.run(both(executor))] == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit(samples("x"))


def test_isolated_every_kind_of_failure_costs_only_its_own_sample():
    texts = ["a", "raise", "b", "sleep", "swallow", "d", "regex", "e", "memory", "f", "exit", "g", "return", "h", "c"]
    with isolated(memory_mb=2048) as executor:
        results = executor.score(samples(*texts))
        again = executor.score(samples("still", "here"))
    assert [r.parsed for r in again] == ["still", "here"]
    found = {text: result for text, result in zip(texts, results, strict=True)}
    for text in "abdefgh":
        assert found[text].value == 1.0 and found[text].parsed == text and found[text].components == {"n": 1.0}
    for text in ("sleep", "swallow", "regex", "c"):
        assert (found[text].value, found[text].status) == (None, "timeout"), text
    for text, words in {
        "raise": "ValueError: no such luck",
        "memory": "ran out of its 2048 MB",
        "exit": "exited with 3",
        "return": "not float",
    }.items():
        assert (found[text].value, found[text].status) == (None, "error"), text
        assert words in found[text].reason
    assert executor.budget.masked == 8
    # One each for c and for the first and the second death of memory and of exit; the timer inside ends the others.
    assert executor.restarts == 5


def test_isolated_a_failing_batch_loses_only_the_guilty():
    with isolated(f"{HERE}:NaughtyBatch") as executor:
        results = executor.score(samples("a", "c", "b", "raise", "e", "exit", "d"))
    assert [r.value for r in results] == [1.0, None, 1.0, None, 1.0, None, 1.0]
    assert [r.status for r in results] == ["ok", "timeout", "ok", "error", "ok", "error", "ok"]


def test_isolated_a_leak_is_not_blamed_on_the_sample_that_met_the_limit():
    with isolated(f"{HERE}:Leaky", memory_mb=1024, timeout_s=10) as executor:
        assert [r.value for r in executor.score(samples(*"abcdefghijklmnop"))] == [1.0] * 16
        assert executor.restarts >= 1


def test_isolated_workers_share_a_job_and_see_no_gpu_and_send_plain_data():
    with isolated(workers=2, timeout_s=5) as executor:
        results = executor.score(samples(*["pid"] * 400, "gpu", "object"))
        pids = {r.parsed for r in results[:400]}
    assert len(pids) == 2 and os.getpid() not in pids
    assert results[400].parsed == ""
    assert list(results[401].parsed) == ["thing"] and "function" in results[401].parsed["thing"]


def test_close_kills_workers_their_children_and_ends_waiting_futures():
    executor = isolated(timeout_s=30)
    pid = executor.score(samples("pid"))[0].parsed
    future = executor.submit(samples("child"))
    for _ in range(100):
        children = subprocess.run(["pgrep", "-s", str(pid)], capture_output=True, text=True).stdout.split()
        if len(children) >= 2:
            break
        time.sleep(0.05)
    executor.close()
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        future.result(timeout=5)
    assert len(children) >= 2
    for child in children:
        for _ in range(100):  # a killed process ends when the scheduler gets to it
            if not _running(int(child)):
                break
            time.sleep(0.05)
        assert not _running(int(child)), child


def _running(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_ends_with_its_parent_even_inside_c_code():
    code = (
        "import os, sys, time; from rewards.base import RewardInput; from rewards.executor import Executor\n"
        f"e = Executor('{HERE}:Naughty', mode='isolated', timeout_s=60)\n"
        "print(e.score([RewardInput('pid', gold=1)])[0].parsed, flush=True)\n"
        "e.submit([RewardInput('c', gold=1)]); time.sleep(0.5); os._exit(1)\n"
    )
    path = os.pathsep.join([os.getcwd(), os.path.dirname(__file__)])
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    pid = int(run.stdout)
    for _ in range(40):
        if not _running(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} outlived its parent")


def test_isolated_needs_a_spec_and_tells_why_a_worker_cannot_start():
    with pytest.raises(ValueError, match="pass its spec"):
        Executor(Naughty(), mode="isolated")
    with pytest.raises(RewardFailure, match="no model file"):
        isolated(f"{HERE}:Unbuildable")
    with pytest.raises(RewardFailure, match="did you mean 'Naughty'"):
        isolated(f"{HERE}:Naugty")
    with pytest.raises(SpecError):
        Executor("nothing")
    with pytest.raises(ValueError, match="not one of inline, isolated"):
        Executor(Naughty(), mode="thread")


@pytest.mark.parametrize("spec", [f"{HERE}:Naughty", f"{HERE}:NaughtyBatch"])
def test_labels_are_checked_under_the_same_limits(spec):
    expected = ["odd", None, "naughty: ValueError: no such luck", "no result within"]
    with isolated(spec) as executor, Executor(spec) as inline:
        found = executor.check_gold(samples("odd", "fine", "raise", "sleep"))
        assert inline.check_gold(samples("odd", "fine")) == ["odd", None]
    assert [f and f[: len(e or "")] for f, e in zip(found, expected, strict=True)] == expected
    assert executor.budget.masked == 0


def test_the_budget_ends_the_run_with_examples_and_ignores_uncounted_samples():
    with Executor(Naughty(), max_failed_share=0.05) as executor:
        executor.score(samples(*["fine"] * 95, *["raise"] * 5))
        executor.score(samples(*["raise"] * 50), counted=False)
        with pytest.raises(RewardFailure) as caught:
            executor.score(samples("raise"))
    message = str(caught.value)
    assert "6 of the last 101 samples" in message and message.count("no such luck") == 5
    assert "completion: raise" in message and "lingshu-rl rewards check" in message


def test_the_budget_goes_on_where_a_checkpoint_left_it():
    before, after = FailureBudget(0.1), FailureBudget(0.1)
    before.add(samples(*["x"] * 99), [RewardResult(None, "error")] * 99)
    after.window = before.window
    with pytest.raises(RewardFailure, match="99 of the last 100"):
        after.add(samples("x"), [RewardResult(1.0)])
        after.check()


def test_the_budget_waits_for_enough_samples_and_forgets_old_ones():
    budget = FailureBudget(0.1)
    bad, good = RewardResult(None, "error"), RewardResult(1.0)
    budget.add(samples(*["x"] * 99), [bad] * 99)
    budget.check()
    budget.add(samples(*["x"] * 1000), [good] * 1000)
    budget.check()
    budget.add(samples(*["x"] * 101), [bad] * 101)
    with pytest.raises(RewardFailure, match="101 of the last 1000"):
        budget.check()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        FailureBudget(1.5)


def test_isolated_throughput_is_not_lost_to_the_border():
    with isolated(timeout_s=10) as executor:
        executor.score(samples("warm"))
        began = time.monotonic()
        executor.score(samples(*["x"] * 4000))
        assert 4000 / (time.monotonic() - began) > 2000
