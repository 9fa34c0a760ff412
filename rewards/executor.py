"""Runs rewards so that a bad sample costs only itself: it comes back unjudged (`value=None`), never as a 0.

inline     the reward runs on a thread of this process. Exceptions become status `error`. For rules of bounded cost.
isolated   the reward runs in worker processes that build it from its spec and can be killed: a hang (also inside C
           code), a memory hog or an `os._exit` loses one sample and at most a worker, which is replaced.

Either way a failure budget ends the run when too large a share of the samples could not be judged.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

from rewards.base import Reward, RewardInput, RewardResult
from rewards.compose import build, is_batched, part_names

MODES = ("inline", "isolated")
WINDOW = 1000  # samples over which the share of unjudged ones is taken
MIN_COUNT = 100  # fewer samples than this say nothing about a share
EXAMPLES = 5  # unjudged samples that a RewardFailure shows
SIDE_BY_SIDE = 32  # batches of a reward that waits for a server; the judge itself bounds its requests
GRACE_S = 1.0  # from the timer inside a worker, which C code does not hear, to the kill from outside
START_TIMEOUT_S = 120.0  # to import and build a reward
_OUT_OF_MEMORY = 86  # exit code of a worker that met its memory limit
_PR_SET_PDEATHSIG = 1

_BOOT = (
    "import json, sys; path, fd = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from rewards.executor import _work; _work(fd)"
)


class RewardFailure(RuntimeError):
    """Too many samples could not be judged, or a worker could not build its reward."""


class FailureBudget:
    """Counts results; `check` fails when over `max_failed_share` of the last 1000 (at least 100) were not judged."""

    def __init__(self, max_failed_share: float = 0.05) -> None:
        if not 0 <= max_failed_share <= 1:
            raise ValueError(f"max_failed_share must be in [0, 1], got {max_failed_share}")
        self.max_failed_share = max_failed_share
        self.counts: Counter[str] = Counter()  # all results so far, by status
        self.masked = 0  # those of them that were not judged
        self._window: deque[bool] = deque(maxlen=WINDOW)
        self._examples: deque[str] = deque(maxlen=EXAMPLES)
        self._lock = threading.Lock()

    def add(self, samples: Sequence[RewardInput], results: Sequence[RewardResult]) -> None:
        with self._lock:
            for sample, result in zip(samples, results, strict=True):
                self.counts[result.status] += 1
                self._window.append(result.value is None)
                if result.value is None:
                    self.masked += 1
                    self._examples.append(
                        f"[{result.status}] {result.reason}\n     completion: {_short(sample.completion)}"
                        f"\n     gold: {_short(sample.gold)}, kind: {sample.kind or '-'}"
                    )

    @property
    def window(self) -> list[bool]:
        """Of the samples that the share is taken over, oldest first: was it not judged? What a checkpoint keeps."""
        with self._lock:
            return list(self._window)

    @window.setter
    def window(self, unjudged: Sequence[bool]) -> None:
        with self._lock:
            self._window = deque(unjudged, maxlen=WINDOW)

    def check(self) -> None:
        """Raises RewardFailure, with the latest unjudged samples, when the budget is exceeded."""
        with self._lock:
            seen, failed = len(self._window), sum(self._window)
            if seen < MIN_COUNT or failed <= self.max_failed_share * seen:
                return
            examples = "\n".join(f"  {i}. {text}" for i, text in enumerate(self._examples, start=1))
        raise RewardFailure(
            f"{failed} of the last {seen} samples could not be judged ({failed / seen:.1%}, the limit is "
            f"{self.max_failed_share:.1%}). The latest:\n{examples}\n"
            "Check the labels with `lingshu-rl rewards check`, mend the reward, or raise max_failed_share."
        )


class Executor:
    """Judges samples off the caller's thread.

    reward: a Reward, or a spec for `rewards.build`; isolated workers need the spec, since each builds its own reward.
    timeout_s: isolated only; the limit of a `score` call, or of a `score_batch` call where a reward overrides it.
    memory_mb: isolated only; the limit of a worker's address space. Workers see no GPU.
    chunk_size: isolated only; how many samples travel to a worker together.
    Raises SpecError for a bad spec, RewardFailure when a worker cannot build the reward.
    """

    def __init__(
        self,
        reward: Reward | str | Mapping[str, Any],
        *,
        mode: str = "inline",
        workers: int = 1,
        timeout_s: float = 10.0,
        memory_mb: int = 4096,
        chunk_size: int = 64,
        max_failed_share: float = 0.05,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        if workers < 1 or chunk_size < 1 or memory_mb < 256 or timeout_s <= 0:
            raise ValueError("workers and chunk_size must be at least 1, memory_mb at least 256, timeout_s above 0")
        self.budget = FailureBudget(max_failed_share)
        self._closed = False
        self._back: _Inline | _Isolated
        if mode == "inline":
            self._back = _Inline(reward if isinstance(reward, Reward) else build(reward))
        elif isinstance(reward, Reward):
            raise ValueError(
                "isolated workers build the reward themselves: pass its spec, such as 'my_module:MyReward' or "
                "{'class': 'my_module:MyReward', 'args': {...}}, instead of an object"
            )
        else:
            self._back = _Isolated(reward, workers, timeout_s, memory_mb, chunk_size)

    def submit(self, samples: Sequence[RewardInput], *, counted: bool = True) -> Future[list[RewardResult]]:
        """One result a sample, in order. With asyncio: `await asyncio.wrap_future(executor.submit(samples))`.

        The future raises RewardFailure when these samples exceed the failure budget; counted=False keeps them out of it
        (evaluation: an unjudged sample is reported there, not trained on).
        """
        if self._closed:
            raise RuntimeError("this executor is closed")
        samples = list(samples)
        outer: Future[list[RewardResult]] = Future()
        outer.set_running_or_notify_cancel()

        def finish(inner: Future[list[RewardResult]]) -> None:
            try:
                results = inner.result()
                if counted:
                    self.budget.add(samples, results)
                    self.budget.check()
            except BaseException as error:
                outer.set_exception(error)
            else:
                outer.set_result(results)

        self._back.submit(samples).add_done_callback(finish)
        return outer

    def score(self, samples: Sequence[RewardInput], *, counted: bool = True) -> list[RewardResult]:
        """`submit`, and wait."""
        return self.submit(samples, counted=counted).result()

    def check_gold(self, samples: Sequence[RewardInput]) -> list[str | None]:
        """For each sample, why its label cannot be judged, or None."""
        results = self._back.submit(list(samples), gold=True).result()
        return [None if result.value is not None else result.reason for result in results]

    @property
    def name(self) -> str:
        """The reward's name."""
        return self._back.name

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts of a composed reward; empty for any other."""
        return self._back.parts

    @property
    def restarts(self) -> int:
        """Workers replaced so far; 0 inline."""
        return self._back.restarts

    def close(self) -> None:
        """Stop at once: workers are killed, unfinished futures raise. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._back.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def judge(reward: Reward, samples: Sequence[RewardInput]) -> list[RewardResult]:
    """One result a sample; an exception costs only its own sample, which comes back as status `error`, value None.

    Raises RewardFailure where the reward itself says that no further sample will fare better.
    """
    return [result for found in _judged(reward, samples, None, fatal=(RewardFailure,)) for result in found]


class _GoldCheck(Reward):
    """A reward's `check_gold` in the form of a score, so that it runs under the same limits."""

    def __init__(self, reward: Reward) -> None:
        self._reward, self.name = reward, reward.name

    def score(self, sample: RewardInput) -> RewardResult:
        problem = self._reward.check_gold(sample)
        return RewardResult(1.0) if problem is None else RewardResult(None, "gold_invalid", reason=problem)


class _SoftTimeout(BaseException):
    """Raised by the timer inside a worker; no Exception, so that a reward's own `except Exception` lets it through."""


def _judged(
    reward: Reward, samples: Sequence[RewardInput], timeout_s: float | None, fatal: tuple[type[Exception], ...] = ()
) -> Iterator[list[RewardResult]]:
    """Results in order, in as many pieces as there are calls: one for a reward that handles batches, else one a sample.

    A batch that fails is judged again sample by sample, which finds the guilty ones. `fatal` exceptions are passed on.
    """
    units: deque[Sequence[RewardInput]] = deque([samples] if samples and is_batched(reward) else [[s] for s in samples])
    while units:
        unit = units.popleft()
        try:
            with _timer(timeout_s):
                results = list(reward.score_batch(unit))
            yield _checked(results, len(unit))
        except fatal:
            raise
        except (_SoftTimeout, Exception) as error:
            if len(unit) == 1:
                yield [_failed(error, timeout_s, reward.name)]
            else:
                units.extend([sample] for sample in unit)


def _checked(results: list[Any], expected: int) -> list[RewardResult]:
    if len(results) != expected:
        raise ValueError(f"score_batch returned {len(results)} results for {expected} samples")
    for result in results:
        if not isinstance(result, RewardResult):
            raise TypeError(f"a reward returns RewardResult, not {type(result).__name__}")
    return results


def _failed(error: BaseException, timeout_s: float | None, name: str) -> RewardResult:
    if isinstance(error, _SoftTimeout):
        return _late(timeout_s)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    return RewardResult(
        None, "error", reason=f"{name}: {type(error).__name__}: {_short(str(error), 300)}{notes}{place}"
    )


def _late(timeout_s: float | None) -> RewardResult:
    return RewardResult(None, "timeout", reason=f"no result within {timeout_s:g} s")


@contextlib.contextmanager
def _timer(seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return
    signal.signal(signal.SIGALRM, _on_alarm)  # each time, since a reward may have set its own
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _short(value: Any, limit: int = 160) -> str:
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@dataclass
class _Job:
    """One submit. Results are filled in by index; the future is set when none is missing."""

    samples: Sequence[RewardInput]
    gold: bool = False  # ask check_gold instead of score
    future: Future[list[RewardResult]] = field(default_factory=Future)
    results: dict[int, RewardResult] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fill(self, found: Mapping[int, RewardResult]) -> None:
        with self.lock:
            self.results.update(found)
            complete = len(self.results) == len(self.samples)
        if complete:
            self.finish([self.results[i] for i in range(len(self.samples))])

    def finish(self, outcome: list[RewardResult] | BaseException) -> None:
        # close() and the last result may race for the future; whoever comes second has nothing to add.
        with contextlib.suppress(InvalidStateError):
            if isinstance(outcome, BaseException):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)


class _Inline:
    """Daemon threads: a hang does not hold up the process's end. One, so that results are counted in the order of
    submission; several for a reward that waits for a server, which has room for other batches meanwhile."""

    restarts = 0

    def __init__(self, reward: Reward) -> None:
        self._reward, self._gold_check = reward, _GoldCheck(reward)
        self.name, self.parts = reward.name, part_names(reward)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._threads = SIDE_BY_SIDE if reward.waits else 1
        for _ in range(self._threads):
            threading.Thread(target=self._serve, name="rewards", daemon=True).start()

    def submit(self, samples: Sequence[RewardInput], gold: bool = False) -> Future[list[RewardResult]]:
        job = _Job(samples, gold)
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        self._closing.set()
        for _ in range(self._threads):
            self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._closing.is_set():
                    raise RuntimeError("the executor was closed before these samples were judged")
                job.finish(judge(self._gold_check if job.gold else self._reward, job.samples))
            except BaseException as error:
                job.finish(error)


@dataclass(frozen=True)
class _Task:
    """Samples of a job that go to a worker together. second_try: one on which a worker died, for a fresh worker."""

    job: _Job
    indices: tuple[int, ...]
    second_try: bool = False


class _Isolated:
    """A queue of tasks and one thread a worker. The thread also starts the worker: the kernel ends a worker together
    with the thread that started it, so that none outlives this process."""

    def __init__(
        self, spec: str | Mapping[str, Any], workers: int, timeout_s: float, memory_mb: int, chunk_size: int
    ) -> None:
        self._spec = spec
        self._timeout_s, self._memory_mb, self._chunk_size = timeout_s, memory_mb, chunk_size
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self._workers: dict[int, _Worker] = {}
        self._closing = False
        self._lock = threading.Lock()
        self.restarts = 0
        self.name, self.parts = "", ()
        ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, args=(number, ready), name=f"rewards-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        problems = [problem for problem in [ready.get() for _ in self._threads] if problem is not None]
        if problems:
            self.close()
            raise problems[0]
        built = self._workers[0]
        self.name, self.parts = built.name, built.parts

    def submit(self, samples: Sequence[RewardInput], gold: bool = False) -> Future[list[RewardResult]]:
        job = _Job(samples, gold)
        if not samples:
            job.finish([])
            return job.future
        with self._lock:
            self._jobs[id(job)] = job
        job.future.add_done_callback(lambda _: self._jobs.pop(id(job), None))
        # A small job is spread over the workers, a large one travels in full chunks.
        size = min(self._chunk_size, -(-len(samples) // len(self._threads)))
        for start in range(0, len(samples), size):
            self._tasks.put(_Task(job, tuple(range(start, min(start + size, len(samples))))))
        return job.future

    def close(self) -> None:
        with self._lock:
            self._closing = True
            workers, jobs = list(self._workers.values()), list(self._jobs.values())
        for _ in self._threads:
            self._tasks.put(None)
        for worker in workers:
            worker.kill()
        for thread in self._threads:
            thread.join(timeout=10)
        for job in jobs:
            job.finish(RuntimeError("the executor was closed before these samples were judged"))

    def _serve(self, number: int, ready: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            worker = self._start(number)
        except BaseException as error:
            ready.put(error)
            return
        ready.put(None)
        while (task := self._tasks.get()) is not None and not self._closing:
            try:
                # A second try must not meet what earlier samples left behind.
                if not worker.alive or (task.second_try and worker.used):
                    worker.kill()
                    self.restarts += 1
                    worker = self._start(number)
                self._do(task, worker)
            except BaseException as error:
                task.job.finish(error)
        worker.kill()
        worker.forget()

    def _start(self, number: int) -> _Worker:
        worker = _Worker(self._spec, self._timeout_s, self._memory_mb)
        with self._lock:
            old = self._workers.get(number)
            self._workers[number] = worker
            if self._closing:
                worker.kill()
        if old is not None:
            old.forget()
        worker.wait_ready()
        return worker

    def _do(self, task: _Task, worker: _Worker) -> None:
        job, indices, used = task.job, task.indices, worker.used
        results, problem = worker.judge([job.samples[i] for i in indices], job.gold)
        job.fill(dict(zip(indices, results, strict=False)))
        if problem is None or self._closing:
            return
        missing = indices[len(results) :]
        if worker.batched and not job.gold and not results and len(missing) > 1:
            # The whole batch went down in one call: alone, each sample shows whether it was the one.
            for index in missing:
                self._tasks.put(_Task(job, (index,)))
            return
        if problem.status == "timeout" or task.second_try or not (used or results):
            job.fill({missing[0]: problem})
        else:  # earlier samples may be to blame, as when memory leaks
            self._tasks.put(_Task(job, missing[:1], second_try=True))
        if missing[1:]:
            self._tasks.put(_Task(job, missing[1:]))


class _Worker:
    """A worker process and the pipe to it. Samples go in by the chunk, results come out call by call."""

    def __init__(self, spec: str | Mapping[str, Any], timeout_s: float, memory_mb: int) -> None:
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self.used = False
        self.batched, self.name, self.parts = False, "", ()
        self._killed = False
        order = pickle.dumps((spec, timeout_s, memory_mb))
        self._conn, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps([sys.path, theirs.fileno()])],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # so that a kill also reaches what the reward started
            )
        with contextlib.suppress(OSError):  # a worker that is dead already is noticed in wait_ready
            self._conn.send_bytes(order)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Wait until the reward is built. Raises RewardFailure with the worker's own words."""
        try:
            if self._conn.poll(START_TIMEOUT_S):
                problem, self.batched, self.name, self.parts = self._conn.recv()
            else:
                problem = f"not ready within {START_TIMEOUT_S:g} s"
        except (EOFError, OSError):
            problem = self._end()
        if problem:
            self.kill()
            raise RewardFailure(f"a reward worker could not start: {problem}")

    def judge(self, samples: Sequence[RewardInput], gold: bool) -> tuple[list[RewardResult], RewardResult | None]:
        """The results, and None; or the results of the first samples and what is to be said of the next one."""
        results: list[RewardResult] = []
        self.used = True
        data = pickle.dumps((samples, gold))
        try:
            self._conn.send_bytes(data)
            while len(results) < len(samples):
                if not self._conn.poll(self._timeout_s + GRACE_S):
                    self.kill()
                    return results, _late(self._timeout_s)
                results += self._conn.recv()
        except (EOFError, OSError):
            reason = self._end()
            self.kill()
            return results, RewardResult(None, "error", reason=reason)
        return results, None

    def kill(self) -> None:
        if not self._killed:
            self._killed = True  # once only: a later process may get the same number
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def forget(self) -> None:
        self._conn.close()

    def _end(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe"
        if code == _OUT_OF_MEMORY:
            return f"the worker ran out of its {self._memory_mb} MB of memory"
        return (
            f"the worker was killed by {signal.Signals(-code).name}" if code < 0 else f"the worker exited with {code}"
        )


def _work(fd: int) -> None:
    """A worker's life: build the reward, then judge chunk after chunk until the pipe closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    conn: Connection = Connection(fd)
    spec, timeout_s, memory_mb = conn.recv()
    with contextlib.suppress(ValueError, OSError):  # not every system knows this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    try:
        reward = build(spec)
        conn.send(("", is_batched(reward), reward.name, part_names(reward)))
        while True:
            samples, gold = pickle.loads(conn.recv_bytes())
            judged = _GoldCheck(reward) if gold else reward
            for results in _judged(judged, samples, timeout_s, fatal=(MemoryError,)):
                conn.send([replace(result, parsed=_plain(result.parsed)) for result in results])
    except EOFError:
        return
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except Exception as error:
        conn.send((f"{type(error).__name__}: {error}", False, "", ()))


def _on_alarm(number: int, frame: Any) -> None:
    raise _SoftTimeout


def _plain(value: Any) -> Any:
    """Builtin data as it is, anything else as text: the parent must not need the reward's own classes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return repr(value)
