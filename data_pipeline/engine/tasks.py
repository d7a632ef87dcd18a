"""A task of the pipeline: what any executor promises, and how its result or error travels between processes.

Executors: `workers` (this machine), `ray_workers` (a cluster). Knows nothing of what a task does.
"""

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

from nanollama.data.files import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
RETRIES = 3  # times a task is tried again after the process that ran it died


class Executor(Protocol):
    """Runs a pure function on many tasks, somewhere. A context manager that ends its processes."""

    workers: int

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """(number of the task, its result) as they are done. Errors: the first task's error; DataError when the
        process of a task died more than RETRIES times.

        Tasks that have a `weight` (bytes to read, about) may be begun in the order of it, the heaviest first."""
        ...

    def __enter__(self) -> "Executor":
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        ...


def attempt(function: Callable[[Any], Any], task: Any) -> tuple[bool, Any]:
    """(True, the result), or (False, the error) in a form that can travel between processes."""
    try:
        return True, function(task)
    except Exception as error:
        return False, _portable(error, traceback.format_exc())


def _portable(error: Exception, trace: str) -> Exception:
    """`error`, or its text when it cannot travel between processes; a bug keeps its trace as a note."""
    error.__traceback__, error.__cause__, error.__context__ = None, None, None
    if not isinstance(error, DataError):
        error.add_note(f"In a worker process:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def short_name(task: Any) -> str:
    """What to call a task in a message."""
    text = str(getattr(task, "label", task))
    return text if len(text) <= 100 else text[:100] + "..."
