"""The corpus on a Ray cluster of several nodes on this machine: the bytes of local processes, also when a node dies."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corpora import files_of
from test_corpus_stages import staged_mixture

from data_pipeline.corpus import build_corpus
from data_pipeline.engine.workers import open_executor
from nanollama.data.files import DataError

ray = pytest.importorskip("ray", reason="needs Ray (extra ray, 236 MB installed)")
# Ray's own sockets and logs are left to the garbage collector
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"),
              pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def work(task: tuple[str, int, str]) -> str:
    """Notes where it runs, returns the node; never ends on the node that is to die, nor before one began there."""
    folder, number, victim = task
    node: str = ray.get_runtime_context().get_node_id()
    (Path(folder) / f"{number}-{node}").touch()
    while node == victim or not list(Path(folder).glob(f"*-{victim}")):
        time.sleep(0.05)
    return node


def fail(number: int) -> int:
    if number == 3:
        raise DataError(f"task {number} is broken")
    return number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two nodes, a processor each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    cluster.wait_for_nodes()
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def test_errors_and_deaths(cluster: Any) -> None:
    with open_executor("ray", 3) as executor:
        with pytest.raises(DataError, match=r"^task 3 is broken$"):
            list(executor.run(fail, range(6)))
        executor.retries = 1  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=r"the Ray worker at 7 died 2 times \(WorkerCrashedError\)"):
            list(executor.run(die, [7]))
    assert ray.is_initialized()  # a cluster that was joined is left running


def test_the_same_bytes_and_a_node_that_dies(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, nodes = cluster
    config = staged_mixture(tmp_path)
    build_corpus(config, tmp_path / "local", workers=1)
    build_corpus(config, tmp_path / "ray", engine="ray")
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")

    folder = tmp_path / "where"
    folder.mkdir()
    victim = nodes[0]
    tasks = [(str(folder), number, victim.node_id) for number in range(18)]

    def kill() -> None:
        while not list(folder.glob(f"*-{victim.node_id}")):
            time.sleep(0.05)
        made.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill)
    with open_executor("ray", 3) as executor:
        killer.start()
        done = dict(executor.run(work, tasks))
    killer.join()
    assert sorted(done) == list(range(18)) and victim.node_id not in done.values()
    assert [number for number in range(18) if len(list(folder.glob(f"{number}-*"))) > 1]  # begun there, done elsewhere

    build_corpus(config, tmp_path / "after", engine="ray")  # two nodes of three are left
    assert files_of(tmp_path / "after") == files_of(tmp_path / "local")
