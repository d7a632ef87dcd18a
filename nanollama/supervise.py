"""Runs one command so that it gets our signals and nothing of it outlives us.

Owns the child process: its output on the screen and in a log, signals, and the removal of what is left over.
Knows nothing of stages or of what the command does. Standard library only.
"""

import codecs
import contextlib
import dataclasses
import errno
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

TOKEN = "NANOLLAMA_STAGE_TOKEN"  # environment variable by which a command's processes are found again
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TICK_SECONDS = 5

# Becomes the command after asking the kernel to be killed when its parent dies (prctl PR_SET_PDEATHSIG, which
# survives exec). A program of its own, as Python between fork and exec is unsafe in a threaded program.
LAUNCH = """
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
os.execvp(command[0], command)
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int  # exit code as a shell gives it: 128 + n after signal n
    stopped_by: int  # the signal that asked us to stop, 0 = none
    last_lines: tuple[str, ...]


def supervise(
    command: Sequence[str], *, log: Path, token: str, tick: Callable[[], None], keep_lines: int = 15
) -> Outcome:
    """Run `command` to its end; its output goes to our stdout and to `log`.

    `tick` is called every five seconds. SIGINT, SIGTERM and SIGHUP reach the command and its children as
    SIGTERM (a trainer saves and exits); a second one kills them. When we die, even by kill -9, so does it.
    Errors: FileNotFoundError when there is no such program.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, "no such program", command[0])
    with (
        open(log, "ab") as log_file,
        subprocess.Popen(
            [sys.executable, "-IS", "-c", LAUNCH, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, TOKEN: token, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, through us
        ) as child,
    ):
        try:
            with _forward_signals(child) as received:
                lines = _copy_output(child, log_file, tick, keep_lines)
                code = child.wait()
        finally:
            kill_left_over(token)
    return Outcome(code if code >= 0 else 128 - code, received[0] if received else 0, lines)


def kill_left_over(token: str) -> int:
    """Kill every process that was started under `token` and still runs; returns how many there were.

    The environment of a process tells, so a reused process id is never taken for one of ours. Linux only.
    """
    wanted, killed = f"{TOKEN}={token}".encode(), 0
    for environ in Path("/proc").glob("[0-9]*/environ"):
        pid = int(environ.parent.name)
        try:
            if pid != os.getpid() and wanted in environ.read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        except OSError:
            continue  # it ended meanwhile, or belongs to another user
    return killed


@contextlib.contextmanager
def _forward_signals(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy_output(
    child: subprocess.Popen[bytes], log_file: IO[bytes], tick: Callable[[], None], keep_lines: int
) -> tuple[str, ...]:
    """Copy what `child` prints until it ends, also when a process it left behind holds the pipe open."""
    assert child.stdout is not None
    tail: deque[bytes] = deque(maxlen=keep_lines)
    part, next_tick = b"", time.monotonic() + TICK_SECONDS
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a chunk may end inside a character
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            ready = selector.select(timeout=0.5)
            data = os.read(child.stdout.fileno(), 65536) if ready else b""
            if data:
                log_file.write(data)
                log_file.flush()
                sys.stdout.write(decoder.decode(data))
                sys.stdout.flush()
                *whole, part = (part + data).split(b"\n")
                tail.extend(whole)
            elif ready or child.poll() is not None:
                break
            if time.monotonic() >= next_tick:
                tick()
                next_tick = time.monotonic() + TICK_SECONDS
    tail.extend([part] if part else [])
    return tuple(line.decode(errors="replace").rpartition("\r")[2] for line in tail)
