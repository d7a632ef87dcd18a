"""Processes that are killed half-way, on machines that may be too busy to kill them in time."""

import signal
import subprocess
import time
from collections.abc import Callable


def kill_when(
    reached: Callable[[], bool], start: Callable[[], subprocess.Popen[bytes]], undo: Callable[[], object]
) -> None:
    """Starts a process and kills it (SIGKILL) once `reached`; if it ended before, undoes its work and tries again."""
    for _ in range(5):
        process = start()
        while not reached() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            return
        undo()
    raise AssertionError(f"it ended (exit status {process.returncode}) before it could be killed, five times")
