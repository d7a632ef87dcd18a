"""Whole-shard tasks in spawned processes on this machine.

Owns starting, watching and ending the processes, and trying a task again whose process died. Results come as they
are done, so tasks must not depend on order. With one worker, tasks run in this process. Past one machine:
`ray_workers`, behind the same protocol. Knows nothing of what a task does.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from data_pipeline.engine.tasks import RETRIES, Executor, Result, Task, attempt, short_name
from nanollama.data.files import DataError

ENGINES = ("local", "ray")
_THREADS = ("POLARS_MAX_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS")


def open_executor(engine: str, workers: int, soon: int = 0) -> Executor:
    """The executor called `engine`; `soon`: see LocalExecutor. Errors: DataError when it is not installed."""
    if engine == "ray":
        from data_pipeline.engine.ray_workers import RayExecutor

        return RayExecutor(workers)
    return LocalExecutor(workers, soon=soon)


@dataclasses.dataclass
class _Worker:
    process: Any
    pipe: Any
    task: int | None = None  # what it is at


class LocalExecutor:
    """Up to `workers` spawned processes, kept from one `run` to the next. As many as `soon` tasks will need are
    started on entering, so that they start up while the caller finds out what the tasks are."""

    def __init__(self, workers: int, retries: int = RETRIES, soon: int = 0):
        self.workers, self.retries = max(1, workers), retries
        self._soon = soon
        self._pool: list[_Worker] = []
        self._context = multiprocessing.get_context("spawn")  # a forked process would inherit threads and locks

    def __enter__(self) -> "LocalExecutor":
        if (count := min(self.workers, self._soon)) > 1:
            self._pool = [self._start() for _ in range(count)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for worker in self._pool:  # idle, or its task is no longer wanted: taking an interpreter down takes longer
            worker.process.kill()
            worker.pipe.close()
        for worker in self._pool:
            worker.process.join()
        self._pool = []

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """See Executor."""
        if min(self.workers, len(tasks)) <= 1:
            for number, task in enumerate(tasks):
                yield number, function(task)
            return
        # the heaviest first, so that none is begun last and waited for alone
        waiting = deque(sorted(range(len(tasks)), key=lambda number: -getattr(tasks[number], "weight", 0)))
        tries = [0] * len(tasks)
        try:
            while waiting or any(worker.task is not None for worker in self._pool):
                self._deal(function, tasks, waiting)
                for worker in self._ready():
                    yield from self._collect(worker, tasks, waiting, tries)
        finally:
            for worker in [one for one in self._pool if one.task is not None]:  # stopped half-way by an error
                worker.process.kill()
                self._forget(worker)

    def _deal(self, function: Callable[[Any], Any], tasks: Sequence[Any], waiting: deque[int]) -> None:
        while waiting:
            idle = next((worker for worker in self._pool if worker.task is None), None)
            if idle is None:
                if len(self._pool) >= min(self.workers, len(tasks)):
                    return
                self._pool.append(idle := self._start())
            idle.task = waiting.popleft()
            try:
                idle.pipe.send((function, tasks[idle.task]))
            except (BrokenPipeError, ConnectionResetError):  # died while idle: `_collect` sees it and tries again
                return

    def _start(self) -> _Worker:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), daemon=True)
        with _threads(max(1, len(os.sched_getaffinity(0)) // self.workers)):
            process.start()
        theirs.close()
        return _Worker(process, mine)

    def _ready(self) -> list[_Worker]:
        busy = {worker.pipe: worker for worker in self._pool if worker.task is not None}
        return [busy[pipe] for pipe in multiprocessing.connection.wait(list(busy))]

    def _collect(self, worker: _Worker, tasks: Sequence[Any], waiting: deque[int],
                 tries: list[int]) -> Iterator[tuple[int, Any]]:
        number = worker.task
        assert number is not None
        try:
            done, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):  # nobody is at the other end: it died
            self._forget(worker)
            tries[number] += 1
            if tries[number] > self.retries:
                raise DataError(
                    f"the process at task {number} ({short_name(tasks[number])}) died {tries[number]} times, most "
                    f"likely for lack of memory (exit code {worker.process.exitcode}). Run the same command again with "
                    "fewer --workers; it goes on from the last finished part.") from None
            waiting.appendleft(number)
            return
        worker.task = None
        if not done:
            raise value
        yield number, value

    def _forget(self, worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.join()
        self._pool.remove(worker)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes started inside share the processors: each library of theirs takes `count` threads unless told."""
    mine = {name: str(count) for name in _THREADS if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


def _work(pipe: Any) -> None:
    """A worker's life: tasks until the pipe ends."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    while True:
        try:
            function, task = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(function, task))


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: each watches it and leaves by itself."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
