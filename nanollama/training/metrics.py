"""What a run says while it trains: metrics.jsonl, TensorBoard, Weights & Biases, and lines for a person.

Owns the metrics file: a step is never in it twice, whatever was killed. Knows nothing of data, of the loop or of how
anything is measured: it is given host numbers.
`tensorboardX` and `wandb` are imported only where the config asks for them.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from nanollama.config import LoggingConfig
from nanollama.data.files import write_atomic
from nanollama.quantities import duration
from nanollama.training.metric_sinks import TensorBoard, Wandb

FILE_NAME = "metrics.jsonl"

class MetricsLog:
    """Writes what it is given to every place the config names; used by the process that logs, so by host 0.

    Lines of steps after `resume_step` belong to a run that was killed past its last checkpoint: they are
    dropped before the first write, and their events are kept in the one event that says where the run goes
    on. With `resume_step=0` nothing was saved, so no line is kept.
    Errors: ConfigError names the missing package and its extra.
    """

    def __init__(self, workdir: str | Path, logging: LoggingConfig, *, resume_step: int, steps: int = 0,
                 convention: str = "", name: str = "", stream: TextIO | None = None):
        self._every, self._steps, self._stream = logging.every, steps, stream
        self._path = Path(workdir) / FILE_NAME
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Packages are looked for before the file is touched: a run that cannot start changes nothing.
        self._sinks: list[TensorBoard | Wandb] = []
        if logging.tensorboard:
            self._sinks.append(TensorBoard(Path(workdir) / "tensorboard", resume_step))
        if logging.wandb_project:
            self._sinks.append(Wandb(Path(workdir), logging.wandb_project, name))
        dropped = _truncate(self._path, resume_step)
        self._written = {(line["kind"], line["step"]) for line in read_metrics(self._path)}
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        if convention:  # also in the file, so that whoever reads the figures later knows what they mean
            self._write(resume_step, "event", {"event": "convention", "text": convention})
            self._say(convention)
        if resume_step > 0 or dropped:
            events = [line for line in dropped if line["kind"] == "event"]
            last = max((line["step"] for line in dropped), default=0)
            again = f"; {len(dropped)} lines of the interrupted run, up to step {last}, are computed again"
            self.event(resume_step, f"resumed at step {resume_step}{again if dropped else ''}",
                       event="resumed",
                       earlier_events=[f"step {line['step']}: {line.get('text', '')}" for line in events])

    def due(self, step: int) -> bool:
        """Whether step `step` (1 = the first) is one to log."""
        return step % self._every == 0 or step in (1, self._steps)

    def train(self, step: int, scalars: Mapping[str, Any], host: Mapping[str, Any]) -> None:
        """One train line: `scalars` are the step's own figures, `host` what the host measured (tokens,
        tokens_per_second, mfu, seconds, eta_seconds, epochs, source_tokens, memory_bytes)."""
        line = {**scalars, **host}
        if self._write(step, "train", line):
            self._say(train_line(step, self._steps, line))

    def validation(self, step: int, figures: Mapping[str, Any]) -> None:
        """One validation line: nll, perplexity, bits_per_byte and, under "sources", the same per source."""
        if self._write(step, "validation", figures):
            self._say(validation_line(step, figures))

    def event(self, step: int, text: str, **fields: Any) -> None:
        """Something that happened: a resume, a stop, a NaN; shown in the report."""
        self._write(step, "event", {"text": text, **fields})
        self._say(f"step {step}: {text}")

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _write(self, step: int, kind: str, figures: Mapping[str, Any]) -> bool:
        """False when the line is there already: evaluating again after a resume gives the same figures."""
        if kind != "event" and (kind, step) in self._written:
            return False
        self._written.add((kind, step))
        self._file.write(_dump({"step": step, "kind": kind, **figures}))
        self._file.flush()
        if kind != "event":
            numbers = dict(_flatten(figures, kind))
            for sink in self._sinks:
                sink.write(step, numbers)
        return True

    def _say(self, text: str) -> None:
        print(text, file=self._stream or sys.stdout, flush=True)


class NoLog:
    """The log of a process that is not the first: one writes for all."""

    def due(self, step: int) -> bool:
        return False

    def train(self, step: int, scalars: Mapping[str, Any], host: Mapping[str, Any]) -> None: ...

    def validation(self, step: int, figures: Mapping[str, Any]) -> None: ...

    def event(self, step: int, text: str, **fields: Any) -> None: ...

    def close(self) -> None: ...


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, oldest first; none if there is no file. A line a kill cut off is left out."""
    lines = []
    if Path(path).is_file():
        for raw in Path(path).read_bytes().splitlines():
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict) and {"step", "kind"} <= line.keys():
                lines.append(_decode(line))
    return lines


def train_line(step: int, steps: int, line: Mapping[str, Any]) -> str:
    """The console line of one step; figures that were not measured are left out."""
    width = len(str(steps or step))
    parts = [f"step {step:>{width}}" + (f"/{steps}" if steps else "")]
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("loss", "loss", "{:.4f}".format), ("learning_rate", "lr", "{:.2e}".format),
        ("expert_load_max", "load", "{:.2f}x".format), ("grad_norm", "grad", "{:.3f}".format),
        ("tokens_per_second", "tok/s", "{:,.0f}".format),
        ("mfu", "MFU", "{:.1%}".format), ("epochs", "epochs", _epochs), ("eta_seconds", "ETA", duration),
        ("memory_bytes", "mem", lambda count: f"{count / 2**30:.2f} GiB")]
    parts += [f"{label} {text(line[key])}" for key, label, text in shown if line.get(key) is not None]
    return "  ".join(parts)


def validation_line(step: int, figures: Mapping[str, Any]) -> str:
    """The console line of one validation, the sources' bits per byte behind it."""
    shown = [("nll", "nll", 4), ("perplexity", "perplexity", 3), ("bits_per_byte", "bits/byte", 4)]
    text = "  ".join(f"{label} {figures[key]:.{digits}f}" for key, label, digits in shown
                     if figures.get(key) is not None)
    sources = {name: value["bits_per_byte"] for name, value in (figures.get("sources") or {}).items()
               if isinstance(value, Mapping) and value.get("bits_per_byte") is not None}
    per_source = ", ".join(f"{name} {value:.4f}" for name, value in sources.items())
    behind = f"  (bits/byte by source: {per_source})" if len(sources) > 1 else ""
    return f"validation at step {step}  {text}{behind}"


def _truncate(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Drop the lines after `resume_step` (all of them at 0), atomically, and return them."""
    lines = read_metrics(path)
    last = resume_step if resume_step > 0 else -1
    if path.is_file():
        write_atomic(path, "".join(_dump(line) for line in lines if line["step"] <= last))
    return [line for line in lines if line["step"] > last]


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps(_encode(line), ensure_ascii=False) + "\n"


def _encode(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become "nan", "inf", "-inf"; NumPy's become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "text" else _decode(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value


def _flatten(figures: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}/{name}")
        elif hasattr(value, "__float__") and not isinstance(value, str):
            yield f"{prefix}/{name}", float(value)


def _epochs(epochs: Any) -> str:
    """One number, or the range over the sources."""
    values = sorted(epochs.values()) if isinstance(epochs, Mapping) else [epochs]
    if not values:
        return "0"
    return f"{values[0]:.2f}" + (f" to {values[-1]:.2f}" if f"{values[0]:.2f}" != f"{values[-1]:.2f}" else "")
