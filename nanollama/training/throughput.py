"""How fast a run is: tokens per second, MFU and the peak it is measured against, time left, memory.

Knows nothing of steps' own figures, nor of where these are written.
"""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from nanollama.accelerators import peak_flops
from nanollama.models.accounting import MFU_CONVENTION


class Throughput:
    """Tokens per second over a sliding window of steps, MFU and time left.

    The first step holds compilation and starts the clock; time inside `pause()` (evaluation, sampling) does
    not count as training time, but does count for the time left. FLOP/s are those of all devices together.
    """

    def __init__(self, *, steps: int, flops_per_token: float = 0.0, peak: float | None = None,
                 window: int = 20, clock: Callable[[], float] = time.perf_counter):
        self._steps, self._flops, self._peak, self._clock = steps, flops_per_token, peak, clock
        # training seconds and tokens at the end of each of the last steps
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)
        self._paused, self._tokens = 0.0, 0
        self._first: tuple[int, float] | None = None

    def update(self, step: int, tokens: int) -> dict[str, float]:
        """Step `step` of `tokens` tokens (all hosts) is done. Returns {} until two steps are."""
        now = self._clock()
        self._tokens += tokens
        self._marks.append((now - self._paused, self._tokens))
        if self._first is None:
            self._first = (step, now)
            return {}
        (oldest, before), (newest, after) = self._marks[0], self._marks[-1]
        rate = (after - before) / max(newest - oldest, 1e-9)
        first_step, started = self._first
        figures = {"tokens_per_second": rate, "seconds": (newest - oldest) / (len(self._marks) - 1),
                   "eta_seconds": (self._steps - step) * (now - started) / max(step - first_step, 1)}
        if self._flops and self._peak:
            figures["mfu"] = rate * self._flops / self._peak
        return figures

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside is not training."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start


def total_peak(devices: Sequence[jax.Device], dtype: str = "float32") -> tuple[float | None, str]:
    """FLOP/s of all devices together (None: unknown) and the sentence that says what MFU means in this run.

    A CPU has no data-sheet peak that says anything, so its largest matmul rate is measured (under 0.5 s),
    once per host: virtual devices share the host's cores.
    """
    kind, count = devices[0].device_kind, len(devices)
    if devices[0].platform == "cpu":
        hosts = len({device.process_index for device in devices})
        peak = measured_matmul_flops(dtype) * hosts
        return peak, (f"{MFU_CONVENTION}. Peak here: {peak / 1e9:,.0f} GFLOP/s, the {dtype} matmul rate "
                      "measured on this CPU at start.")
    single = peak_flops(kind)
    if single is None:
        return None, f"MFU is not measured: no peak rate known for {kind!r} (add it to nanollama/accelerators.py)."
    return single * count, (f"{MFU_CONVENTION}. Peak here: {single / 1e12:,.0f} TFLOP/s dense bfloat16 for "
                            f"each {kind}, {count} in use.")


def measured_matmul_flops(dtype: str = "float32", size: int = 1024, seconds: float = 0.2) -> float:
    """Best FLOP/s of repeated [size, size] matmuls on the default device; takes `seconds` once compiled."""
    multiply = jax.jit(lambda left, right: left @ right)
    ones = jax.jit(lambda: jnp.ones((size, size), dtype))()
    multiply(ones, ones).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(ones, ones).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_bytes() -> int:
    """Peak bytes in use: of the fullest local device if the backend tells, else of this process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(peaks):
        return int(max(peaks))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
