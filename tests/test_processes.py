"""Several processes on one machine: together they are one run; they start alike or not at all, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_train import ROOT, data, losses, run_hash, settings, wait_for_step

from nanollama import train as front_door
from nanollama.config import ConfigError, resolve
from nanollama.parallel import distributed
from nanollama.parallel.team import EXIT_STATUS, Connected, TeamError
from nanollama.training.metrics import read_metrics

__all__ = ["data"]  # a fixture


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder: Path, fields: dict, processes: int, devices: int, *arguments: str) -> list[subprocess.Popen]:
    """One run as `processes` processes of `devices` virtual devices each."""
    folder.mkdir(exist_ok=True)
    file = folder / "config.py"
    file.write_text(f"def get_config(arg):\n    return {fields!r}\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    port, started = free_port(), []
    for process in range(processes):
        command = [sys.executable, "-m", "nanollama.train", f"--config={file}", f"--workdir={folder / 'run'}",
                   f"--devices={devices}", *arguments]  # fmt: skip
        if processes > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={process}"]
        with open(folder / f"log{process}", "w") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return started


def wait(folder: Path, started: list[subprocess.Popen], timeout: float = 420) -> list[int]:
    codes = [process.wait(timeout=timeout) for process in started]
    assert not any(codes), "\n".join((folder / f"log{i}").read_text()[-3000:] for i in range(len(started)))
    return codes


def four_devices(folder: Path) -> dict:
    return settings(folder, mesh=dict(data=2, fsdp=2), batch=dict(global_rows=8, micro_batches=2),
                    checkpoint=dict(every=3), evaluation=dict(every=6), model=dict(num_layers=1),
                    logging=dict(sample_prompts=[]))  # fmt: skip


@pytest.mark.slow
def test_processes_are_one_run_and_survive_a_kill(data: Path, tmp_path: Path) -> None:
    fields = four_devices(data)
    one, two, broken = tmp_path / "one", tmp_path / "two", tmp_path / "broken"
    front_door.train(resolve(fields), one / "run")
    wait(two, launch(two, fields, 2, 2))
    alone, together = losses(one / "run"), losses(two / "run")
    assert list(together) == list(range(1, 13)), "one process writes, every step once"
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=1e-5)
    figures = [json.loads((folder / "run" / "results.json").read_text())["training"]["validation"]
               for folder in (one, two)]  # fmt: skip
    assert figures[0]["tokens"] == figures[1]["tokens"]
    assert figures[1]["nll"] == pytest.approx(figures[0]["nll"], rel=1e-5)
    last = [[line for line in read_metrics(folder / "run" / "metrics.jsonl") if line["kind"] == "train"][-1]
            for folder in (one, two)]  # fmt: skip
    assert last[0]["source_tokens"] == last[1]["source_tokens"], "the labels of all processes"

    fields["evaluation"]["every"] = 0
    started = launch(broken, {**fields, "steps": 100_000}, 2, 2)
    wait_for_step(broken / "run", 5, started[0])
    started[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert started[0].wait(timeout=60) == EXIT_STATUS
    assert time.monotonic() - killed < 30
    started[1].wait()
    log = (broken / "log0").read_text()
    assert "error: process 1 (" in log and f"pid {started[1].pid}) is gone" in log and "--resume" in log
    wait(broken, launch(broken, {**fields, "steps": 9}, 2, 2, "--resume"))
    wait(broken, launch(broken, fields, 4, 1, "--resume"))
    assert losses(broken / "run") == together, "killed, resumed, and resumed as four processes: the same bits"
    assert run_hash(broken / "run") == run_hash(two / "run")


def come_together(count: int, facts: list[dict], timeout: float = 20) -> list:
    """Each process as a thread; its Connected, or its TeamError."""
    port, results = free_port(), [None] * count

    def start(process: int) -> None:
        try:
            results[process] = Connected(process, count, f"127.0.0.1:{port}", facts[process], timeout)
        except TeamError as error:
            results[process] = error

    threads = [threading.Thread(target=start, args=(process,)) for process in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("slow", [False, True])
def test_a_team_exchanges_and_leaves(slow: bool) -> None:
    """slow: results are long on their way; the first process must not say goodbye before they are sent."""
    team = come_together(3, [{}] * 3)
    seen: list = [None] * 3
    send = team[0]._send
    if slow:
        team[0]._send = lambda peer, message: (time.sleep(0.05 if "results" in message else 0), send(peer, message))

    def work(member: Connected) -> None:
        seen[member.process] = [member.exchange([member.process, number]) for number in range(20)]
        member.leave()

    threads = [threading.Thread(target=work, args=(member,), daemon=True) for member in team]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert seen == [[[[process, number] for process in range(3)] for number in range(20)]] * 3


def test_different_processes_are_refused_and_the_difference_named() -> None:
    facts = [{"config.steps": "10", "jax": "1"}, {"config.steps": "10", "jax": "2"}, {"config.steps": "9", "jax": "1"}]
    for error in come_together(3, facts):
        assert isinstance(error, TeamError)
        assert "jax: 1 on process 0" in str(error) and "2 on process 1" in str(error)
        assert "config.steps: 10 on process 0" in str(error) and "9 on process 2" in str(error)


def test_a_process_that_never_comes_is_named() -> None:
    waiting, came, _ = come_together(3, [{}, {}], timeout=1)
    for error in (waiting, came):
        assert "process 2 of 3 did not come" in str(error) and "within 1 s" in str(error)
    with pytest.raises(TeamError, match=r"process 0 did not answer at 127\.0\.0\.1:\d+ within 1 s"):
        Connected(1, 2, f"127.0.0.1:{free_port()}", {}, 1)


def test_a_process_that_comes_twice_or_counts_otherwise_is_refused() -> None:
    port, results = free_port(), {}
    address = f"127.0.0.1:{port}"

    def start(name: str, process: int, processes: int) -> None:
        try:
            results[name] = Connected(process, processes, address, {}, 20)
        except TeamError as error:
            results[name] = str(error)

    def begin(name: str, process: int, processes: int = 3) -> threading.Thread:
        thread = threading.Thread(target=start, args=(name, process, processes))
        thread.start()
        return thread

    began = [begin("first", 0), begin("second", 1), begin("again", 1)]
    while not results:  # of the two, whoever comes later
        time.sleep(0.01)
    assert "is already. Give every process its own --process." in next(iter(results.values()))
    began.append(begin("other", 2, processes=4))
    for thread in began:
        thread.join()
    for name in ("first", "other"):
        assert "--processes: 3 on process 0" in results[name] and "4 on process 2" in results[name]
    with socket.create_server(("", port)), pytest.raises(TeamError, match=f"port {port} cannot be opened .*in use"):
        Connected(0, 2, address, {}, 1)


MEMBER = """
import sys, time
from nanollama.parallel.team import Connected
team = Connected(int(sys.argv[1]), 3, sys.argv[2], {}, 30)
team.exchange(0)
if sys.argv[1] == sys.argv[3]:
    if sys.argv[4]:
        team.leave(sys.argv[4])
        time.sleep(30)
    sys.exit(1)
team.exchange(1)
"""


@pytest.mark.parametrize(("victim", "error"), [(1, ""), (0, ""), (2, "DataError: no such file")])
def test_all_end_when_one_does_and_say_which(victim: int, error: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    started = [subprocess.Popen([sys.executable, "-c", MEMBER, str(process), address, str(victim), error], cwd=ROOT,
                                stderr=subprocess.PIPE, text=True) for process in range(3)]  # fmt: skip
    others = [process for index, process in enumerate(started) if index != victim]
    for process in others:
        _, said = process.communicate(timeout=60)
        assert process.returncode == EXIT_STATUS
        assert f"error: process {victim} (" in said and (error or "is gone") in said
    started[victim].kill()
    started[victim].communicate()


def test_places_are_found() -> None:
    find = distributed.find
    assert find(environment={}) is None
    assert find("a:1", 2, 1, {}) == distributed.Place("a:1", 2, 1)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_STEP_NUM_TASKS": "16",
             "SLURM_PROCID": "9", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "1"}  # fmt: skip
    assert find(environment=slurm) == distributed.Place("gpu003:61447", 16, 9, None, "SLURM")
    gpus = {**slurm, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    place = find(environment=gpus)
    assert place is not None and place.local_devices == (1,)
    assert find(environment={**slurm, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    pod = {"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "train-0.train", "JAX_NUM_PROCESSES": "2"}
    assert find(environment=pod) == distributed.Place("train-0.train:8476", 2, 1, None, "Kubernetes")
    tpu = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t0,t1"}
    assert find(environment=tpu) == distributed.Place("t0:8476", 2, 1, None, "the TPU pod")


@pytest.mark.parametrize(("nodes", "host"), [
    ("node1", "node1"), ("node1,node2", "node1"), ("gpu[003-005,9],other", "gpu003"), ("a[1,3]-x,b", "a1-x"),
])  # fmt: skip
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert distributed.first_host(nodes) == host


@pytest.mark.parametrize(("arguments", "message"), [
    (["--processes=2"], "--coordinator: is not given. Give all of"),
    (["--coordinator=a:1", "--processes=2", "--process=2"], "--process: 2 of 2 processes"),
    (["--coordinator=a", "--processes=2", "--process=1"], "--coordinator: 'a' has no port"),
    (["--coordinator=127.0.0.1:9", "--processes=2", "--process=1", "--join-timeout=0.5"], "process 0 did not answer"),
])  # fmt: skip
def test_bad_flags_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    file = tmp_path / "config.py"
    file.write_text(f"def get_config(arg):\n    return {settings(data)!r}\n")
    assert front_door.main([f"--config={file}", f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_kubernetes_must_say_how_many() -> None:
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES"):
        distributed.find(environment={"JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "a"})
