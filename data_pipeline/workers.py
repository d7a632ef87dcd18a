"""Spawned worker processes for whole-shard tasks.

Owns starting, watching and ending them; with one worker, tasks run in this process. Results come as they are
done, so tasks must not depend on order.
"""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nanollama.data.files import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Results of `function` on every task, in the order they are done. Errors: the first task's error."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit threads and locks
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, most likely for lack of memory. Run the same command again with "
                "fewer --workers; it goes on from the last finished part.") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: each watches it and leaves by itself."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
