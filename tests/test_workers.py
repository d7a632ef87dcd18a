"""Tasks in other processes: every result once, errors as they were, a process that dies is replaced."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data_pipeline.engine.workers import LocalExecutor, open_executor
from nanollama.data.files import DataError


def run_tasks(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    with LocalExecutor(workers) as executor:
        for _, result in executor.run(function, tasks):
            yield result


def square(number: int) -> int:
    return number * number


def threads(number: int) -> str:
    return os.environ["POLARS_MAX_THREADS"]


def fail(number: int) -> int:
    if number == 3:
        raise DataError(f"task {number} is broken")
    return number


def bug(number: int) -> int:
    return 1 // (number - 2)


def die_twice(task: tuple[str, int]) -> int:
    """Kills its process the first two times, as the out-of-memory killer does."""
    folder, number = task
    tries = Path(folder) / str(number)
    with open(tries, "ab") as file:
        file.write(b"x")
    if number in (1, 4) and tries.stat().st_size <= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number: int) -> int:
    if number == 2:
        os._exit(9)
    return number


class Heavy(NamedTuple):
    folder: str
    weight: int


def begin(task: Heavy) -> int:
    with open(Path(task.folder) / "begun", "a") as file:
        file.write(f"{os.getpid()} {task.weight}\n")
    return task.weight


def test_the_heaviest_tasks_are_begun_first(tmp_path: Path) -> None:
    """Each worker's in order, the two heaviest by one each: which of the two starts up sooner is no matter."""
    tasks = [Heavy(str(tmp_path), weight) for weight in (1, 5, 2, 9, 3, 7)]
    with LocalExecutor(2) as executor:
        assert dict(executor.run(begin, tasks)) == {number: task.weight for number, task in enumerate(tasks)}
    begun: dict[str, list[int]] = {}
    for line in (tmp_path / "begun").read_text().splitlines():
        process, weight = line.split()
        begun.setdefault(process, []).append(int(weight))
    one, other = begun.values()
    assert {one[0], other[0]} == {9, 7}
    assert one == sorted(one, reverse=True) and other == sorted(other, reverse=True)
    assert sorted(one + other) == [1, 2, 3, 5, 7, 9]


def test_results_of_one_and_of_two_workers() -> None:
    assert sorted(run_tasks(square, range(7), 1)) == sorted(run_tasks(square, range(7), 2)) == [
        n * n for n in range(7)]
    with LocalExecutor(2) as executor:  # kept from one run to the next
        assert dict(executor.run(square, [5, 6, 7])) == {0: 25, 1: 36, 2: 49}
        pids = {worker.process.pid for worker in executor._pool}
        assert dict(executor.run(square, [1, 2])) == {0: 1, 1: 4}
        assert {worker.process.pid for worker in executor._pool} == pids and len(pids) == 2
        processes = [worker.process for worker in executor._pool]
    assert not any(process.is_alive() for process in processes)


def test_processes_are_started_before_the_tasks_are_known() -> None:
    for soon, started in ((0, 0), (1, 0), (5, 2)):  # one task needs no process
        with LocalExecutor(2, soon=soon) as executor:
            processes = [worker.process for worker in executor._pool]
            assert len(processes) == started and all(process.is_alive() for process in processes)
            assert dict(executor.run(square, [5, 6])) == {0: 25, 1: 36}
            assert {worker.process for worker in executor._pool} >= set(processes)
        assert not any(process.is_alive() for process in processes)


def test_workers_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLARS_MAX_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert set(run_tasks(threads, range(4), 2)) == {str(max(1, cores // 2))}
    assert "POLARS_MAX_THREADS" not in os.environ  # this process is left as it was
    monkeypatch.setenv("POLARS_MAX_THREADS", "7")
    assert set(run_tasks(threads, range(4), 2)) == {"7"}


def test_errors_come_back_as_they_were() -> None:
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"^task 3 is broken$"):
            list(run_tasks(fail, range(6), workers))
    with pytest.raises(ZeroDivisionError) as caught:
        list(run_tasks(bug, range(6), 2))
    assert any("in bug" in note for note in caught.value.__notes__)  # a bug keeps its trace


def test_a_worker_that_dies_is_replaced_and_its_task_tried_again(tmp_path: Path) -> None:
    with LocalExecutor(2, retries=2) as executor:
        done = dict(executor.run(die_twice, [(str(tmp_path), number) for number in range(6)]))
    assert done == {number: number for number in range(6)}
    assert [(tmp_path / str(number)).stat().st_size for number in range(6)] == [1, 3, 1, 1, 3, 1]


def test_a_task_that_always_kills_its_worker_is_named() -> None:
    with LocalExecutor(2, retries=1) as executor, pytest.raises(DataError, match=r"task 2 \(2\) died 2 times.*code 9"):
        list(executor.run(die, range(5)))


def test_ray_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'nanollama\[ray\]'"):
        open_executor("ray", 2)
