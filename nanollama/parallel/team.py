"""The processes of one run: who is there, do they agree, is one of them gone.

Owns one TCP connection from every process to process 0, opened before JAX's own service takes the same port and kept
to the end. The kernel closes a dead process's connection, so the others learn of it at once and by name, where a
collective would hang and JAX's service would abort them a minute later with a stack trace. A process that only falls
silent (its host lost power) is given up after `SILENCE` seconds. Knows nothing of JAX or of what is run.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

SILENCE = 20.0  # seconds without a sign of life; a sign is sent every SILENCE / 5
GRACE = 3.0  # seconds for the other processes to meet the same error themselves
EXIT_STATUS = 5  # of a process that ends because another one did


class TeamError(RuntimeError):
    """The processes cannot start together; the message says which of them, and why."""


class Team:
    """What a run sees of its processes; this one is a process alone."""

    process, processes = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.process == 0

    def exchange(self, value: Any) -> list[Any]:
        """Every process's `value` (JSON), by process; returns when all have called it."""
        return [value]

    def leave(self, error: str = "") -> None:
        """Say that this process ends, with what error; without one, wait until all do."""

    def verdict(self, seconds: float) -> None:
        """Wait so long for the news that another process is gone, which ends this one."""


class Connected(Team):
    """One of several processes."""

    def __init__(self, process: int, processes: int, address: str, facts: Mapping[str, str], timeout: float):
        """Come together at `address` (host:port of process 0). `facts` must be equal everywhere.

        Errors: TeamError names the processes that did not come in `timeout` seconds or came twice, the facts that
        differ, or the port that is taken.
        """
        self.process, self.processes = process, processes
        self._changed = threading.Condition()
        self._ending = False
        self._rounds: dict[int, dict[int, Any]] = {}  # exchange number -> process -> value; process 0 only
        self._results: dict[int, list[Any]] = {}
        self._round = 0
        host, _, port = address.rpartition(":")
        facts = {"--processes": str(processes), **facts}
        hello = {"process": process, "name": f"process {process}", "facts": facts,
                 "where": f"{socket.gethostname()}, pid {os.getpid()}"}  # fmt: skip
        if process == 0:
            self._peers, self._names = _gather(int(port), processes, hello, timeout)
        else:
            self._peers, self._names = _report(host, int(port), hello, timeout)
        self._left: set[int] = set()
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        self._sending = threading.Lock()
        for peer in self._peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def exchange(self, value: Any) -> list[Any]:
        self._round += 1
        number = self._round
        if self.process == 0:
            self._put(0, number, value)
        else:
            self._send(0, {"round": number, "value": value})
        with self._changed:
            while number not in self._results:
                self._changed.wait()  # a process that is gone ends this one, see `_end`
            return self._results.pop(number)

    def leave(self, error: str = "") -> None:
        for peer in self._peers:
            self._send(peer, {"bye": error})
        if error:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._ending or len(self._left) == len(self._peers), timeout=60)
            self._ending = True
        for connection in self._peers.values():
            connection.close()

    def verdict(self, seconds: float) -> None:
        time.sleep(seconds)

    def _listen(self, peer: int) -> None:
        """Read what `peer` sends until it says goodbye, or is gone."""
        with contextlib.suppress(OSError, ValueError), self._peers[peer].makefile("r", encoding="utf-8") as lines:
            for line in lines:
                self._heard[peer] = time.monotonic()
                message = json.loads(line)
                if "round" in message:
                    self._put(peer, message["round"], message["value"])
                elif "results" in message:
                    with self._changed:
                        self._results[message["number"]] = message["results"]
                        self._changed.notify_all()
                elif "end" in message:
                    self._end(message["end"])
                elif "bye" in message:
                    with self._changed:
                        self._left.add(peer)
                        self._changed.notify_all()
                    if message["bye"]:
                        time.sleep(GRACE)
                        self._end(f"{self._names[peer]} ended with: {message['bye']}")
                    return
        self._end(f"{self._names[peer]} is gone: killed, out of memory, or its host or network is down.")

    def _put(self, process: int, number: int, value: Any) -> None:
        """Process 0: note a value; with the last one, send the results to all.

        To itself last: it may say goodbye as soon as it has them, and nobody reads on after that.
        """
        with self._changed:
            values = self._rounds.setdefault(number, {})
            values[process] = value
            if len(values) < self.processes:
                return
            results = [values[index] for index in range(self.processes)]
            del self._rounds[number]
        for peer in self._peers:
            self._send(peer, {"number": number, "results": results})
        with self._changed:
            self._results[number] = results
            self._changed.notify_all()

    def _beat(self) -> None:
        while not self._ending:
            time.sleep(SILENCE / 5)
            for peer in self._peers:
                self._send(peer, {"alive": True})
                silent = time.monotonic() - self._heard[peer]
                if silent > SILENCE and peer not in self._left:
                    self._end(f"{self._names[peer]} has not been heard of for {silent:.0f} s.")

    def _send(self, peer: int, message: Any) -> None:
        with contextlib.suppress(OSError), self._sending:  # a peer that is gone is noticed where it is listened to
            self._peers[peer].sendall(json.dumps(message).encode() + b"\n")

    def _end(self, text: str) -> None:
        """End this process, and through process 0 all others, because one of them ended before its time."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
        for peer in self._peers:
            self._send(peer, {"end": text})
        print(f"error: {text} So this process ends too; start all again with --resume.", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_STATUS)  # the main thread may wait in a collective for ever


def differences(facts: list[Mapping[str, str]], names: list[str]) -> list[str]:
    """Where a process's facts are not those of the first, one line each."""
    first, lines = facts[0], []
    for other, name in zip(facts[1:], names[1:], strict=True):
        lines += [f"{key}: {first.get(key, 'absent')} on {names[0]}, {other.get(key, 'absent')} on {name}"
                  for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]  # fmt: skip
    return lines


def _name(hello: Mapping[str, Any]) -> str:
    return f"{hello['name']} ({hello['where']})"


def _gather(port: int, processes: int, hello: dict[str, Any], timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Process 0: wait for all others, compare, and tell each that it may start, or why not."""
    hellos, peers = {0: hello}, {}
    deadline = time.monotonic() + timeout
    try:
        server = socket.create_server(("", port), backlog=processes)
    except OSError as error:
        raise TeamError(f"port {port} cannot be opened on this host ({os.strerror(error.errno or 0)}). Was process 0 "
                        "started twice, or does another run use the port?") from error
    with server:
        while len(hellos) < processes and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                other = _read_line(connection, left)
                if (there := hellos.get(other["process"])) is not None:
                    _answer(connection, f"{_name(other)} came where {_name(there)} is already. Give every process its "
                            "own --process.", _name(hello))
                else:
                    hellos[other["process"]], peers[other["process"]] = other, connection
    missing = [index for index in range(processes) if index not in hellos]
    known = [hellos[index] for index in sorted(hellos)]
    problem = ""
    if found := differences([one["facts"] for one in known], [_name(one) for one in known]):
        more = f"\n  and {len(found) - 12} more" if len(found) > 12 else ""
        problem = ("the processes are not alike, and would compute different things:\n  " + "\n  ".join(found[:12])
                   + more + "\nGive all of them the same config, flags and packages.")  # fmt: skip
    elif missing:
        came = ", ".join(_name(one) for one in known)
        problem = (f"process {', '.join(map(str, missing))} of {processes} did not come to port {port} within "
                   f"{timeout:.0f} s; there are {came}. Look at its log, its host and the firewall, or give "
                   "--join-timeout.")  # fmt: skip
    names = {index: _name(one) for index, one in hellos.items()}
    for connection in peers.values():
        _answer(connection, problem, names[0])
    if problem:
        raise TeamError(problem)
    return peers, names


def _answer(connection: socket.socket, problem: str, first: str) -> None:
    """Tell one process that it may start, or the `problem`; `first`: the name of process 0."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps({"problem": problem, "first": first}).encode() + b"\n")
        connection.settimeout(None)
    if problem:
        connection.close()


def _report(host: str, port: int, hello: dict[str, Any], timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
    """Another process: tell process 0 that it is here, and hear whether to start."""
    deadline, connection = time.monotonic() + timeout, None
    while connection is None:
        try:
            connection = socket.create_connection((host, port), timeout=5)
        except OSError as error:  # not there yet
            if time.monotonic() > deadline:
                raise TeamError(
                    f"process 0 did not answer at {host}:{port} within {timeout:.0f} s ({error}). Is it running, and "
                    "does its host let others reach this port?"
                ) from error
            time.sleep(0.2)
    connection.sendall(json.dumps(hello).encode() + b"\n")
    try:
        answer = _read_line(connection, max(deadline - time.monotonic(), 1) + 10)
    except (OSError, ValueError) as error:
        connection.close()
        raise TeamError(f"process 0 at {host}:{port} was there, and is gone: look at its log, and whether "
                        f"{hello['name']} was started twice") from error
    if answer["problem"]:
        connection.close()
        raise TeamError(answer["problem"])
    connection.settimeout(None)
    return {0: connection}, {0: answer["first"]}


def _read_line(connection: socket.socket, timeout: float) -> Any:
    """One JSON line, byte by byte: nothing of what follows may be taken."""
    connection.settimeout(timeout)
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            raise OSError("closed")
        line += byte
    return json.loads(line)
