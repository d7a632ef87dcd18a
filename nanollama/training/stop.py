"""Asking a run to stop: SIGTERM (preemption) and Ctrl-C finish the step, save, and leave.

Knows nothing of what is being run.
"""

import signal
from types import FrameType, TracebackType


class StopSignal:
    """While active, the first SIGTERM or SIGINT only sets `requested`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
        print(f"{self.requested.name}: finishing this step, then saving. Once more stops at once.", flush=True)
