"""Whole-shard tasks as tasks of a Ray cluster (extra `ray`), behind the protocol of `tasks`.

Owns joining the cluster (RAY_ADDRESS, or one of this machine's processors started for the run) and what the death of
a worker or a node means. Tasks read and write files, so all nodes must see the same folders. The bytes are those of
local processes: a task does not know where it runs.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from data_pipeline.engine.tasks import RETRIES, Result, Task, attempt, short_name
from nanollama.data.files import DataError

AHEAD = 2  # tasks submitted per processor of the cluster: enough that none waits, few enough to hold


class RayExecutor:
    """Tasks of one processor each. Joins a running cluster, or starts one of `workers` processors here."""

    def __init__(self, workers: int, retries: int = RETRIES):
        try:
            import ray
        except ImportError as error:
            raise DataError("--engine=ray needs Ray, which is not installed. Install it with: "
                            "pip install 'nanollama[ray]'") from error
        self._ray: Any = ray
        self.workers, self.retries = max(1, workers), retries
        self._mine = not ray.is_initialized()
        if self._mine:
            address = os.environ.get("RAY_ADDRESS")
            size = {} if address else {"num_cpus": self.workers, "include_dashboard": False}
            # workers import what the driver imports, also from a checkout that is not installed
            paths = os.pathsep.join(path for path in sys.path if path)
            self._ray.init(address=address, log_to_driver=False, logging_level="error",
                           runtime_env={"env_vars": {"PYTHONPATH": paths}}, **size)

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._mine:
            self._ray.shutdown()

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """See Executor."""
        remote = self._ray.remote(attempt).options(max_retries=self.retries, num_cpus=1)
        waiting = list(range(len(tasks)))[::-1]
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                ahead = AHEAD * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < ahead:
                    number = waiting.pop()
                    running[remote.remote(function, tasks[number])] = number
                [done], _ = self._ray.wait(list(running), num_returns=1)
                number = running.pop(done)
                yield number, self._result(done, tasks[number])
        finally:
            for one in running:
                self._ray.cancel(one, force=True)

    def _result(self, done: Any, task: Any) -> Any:
        errors = self._ray.exceptions
        try:
            fine, value = self._ray.get(done)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError,
                errors.ObjectLostError) as error:
            raise DataError(
                f"the Ray worker at {short_name(task)} died {self.retries + 1} times ({type(error).__name__}). Run the "
                "same command again, on nodes with more memory if it happens again; it goes on from the last finished "
                "part.") from error
        if not fine:
            raise value
        return value
