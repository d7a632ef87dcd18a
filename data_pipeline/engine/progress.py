"""Progress for people: a bar on a terminal, a plain line every few seconds elsewhere (logs, notebooks).

Knows only a label, a share done and a note; writes to standard error, so that results can be piped.
"""

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_SECONDS = 5.0
BAR_SECONDS = 0.1


class Progress:
    """`with Progress("corpus") as progress: progress.update("code", 0.4, "5.1 MB")`."""

    def __init__(self, title: str, stream: Any = None):
        self.title, self.stream = title, stream or sys.stderr
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._next = time.monotonic() + PLAIN_SECONDS
        self._interval = PLAIN_SECONDS

    def __enter__(self) -> "Progress":
        if getattr(self.stream, "isatty", lambda: False)():
            try:
                self._bar = _rich_bar()
            except ImportError:
                return self
            self._bar.start()
            self._next, self._interval = time.monotonic(), BAR_SECONDS
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, label: str, share: float | None, note: str = "", force: bool = False) -> None:
        """Show that `label` is `share` done (None: unknown). Cheap to call for every document."""
        now = time.monotonic()
        if now < self._next and not force:
            return
        self._next = now + self._interval
        if self._bar is not None:
            if label not in self._tasks:
                self._tasks[label] = self._bar.add_task(label, total=1.0, note="")
            self._bar.update(self._tasks[label],
                             completed=share or 0.0,
                             total=None if share is None else 1.0,
                             note=note)
        else:
            percent = "" if share is None else f" {share:4.0%}"
            print(f"{self.title}: {label}{percent} {note}".rstrip(), file=self.stream, flush=True)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    return Bar(TextColumn("{task.description}"),
               BarColumn(),
               TaskProgressColumn(),
               TextColumn("{task.fields[note]}"),
               TimeElapsedColumn(),
               console=Console(stderr=True))
