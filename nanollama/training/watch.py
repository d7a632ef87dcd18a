"""What the loop tells the world: one step late, so that it never waits for the step that is running.

Owns the account of tokens per source, and the refusal to go on from a loss that is not finite. Knows nothing of
how a step is computed.
"""

from typing import Any

import jax
import numpy as np

from nanollama.config import Config
from nanollama.data.loader import Loader
from nanollama.training.checkpoint import Checkpoints
from nanollama.training.metrics import MetricsLog, NoLog
from nanollama.training.throughput import Throughput, memory_bytes

_LOGGED = ("loss", "z_loss", "accuracy", "learning_rate", "grad_norm", "update_norm")
_LOGGED_OF_EXPERTS = ("balance_loss", "router_z_loss", "expert_load_max", "expert_load_min", "dropped", "expert_load")


class NotFinite(RuntimeError):
    """Loss, gradient or update is NaN or infinite. The state that came of it is never saved."""


class Watch:
    """Reads each step's figures when the next step is on its way; see `catch_up`."""

    def __init__(
        self,
        config: Config,
        log: MetricsLog | NoLog,
        throughput: Throughput,
        loader: Loader,
        checkpoints: Checkpoints,
        source_tokens: np.ndarray,
    ):
        """source_tokens: labels seen so far per source of `loader`, [S] int64."""
        self.throughput = throughput
        self._config, self._log, self._loader, self._checkpoints = config, log, loader, checkpoints
        self.source_tokens = source_tokens
        self._pending: tuple[int, dict[str, jax.Array], np.ndarray] | None = None

    def dispatched(self, step: int, scalars: dict[str, jax.Array], source_tokens: np.ndarray) -> None:
        """Step `step`, with so many labels per source in its global batch, is on its way: report the one before it."""
        self.catch_up()
        self._pending = (step, scalars, source_tokens)

    def catch_up(self) -> None:
        """Wait for the newest step and report it. Errors: NotFinite names the step and the last good checkpoint."""
        if self._pending is None:
            return
        (step, scalars, source_tokens), self._pending = self._pending, None
        values = {name: value.tolist() for name, value in jax.device_get(scalars).items()}
        self.source_tokens += source_tokens
        if not values["finite"]:
            self._stop(step, values)
        rows, length = self._config.batch.global_rows, self._config.data.sequence_length
        speed = self.throughput.update(step, rows * length)
        if self._log.due(step):
            host: dict[str, Any] = {
                "tokens": int(self.source_tokens.sum()),
                **speed,
                "epochs": self._loader.epochs(self.source_tokens),
                "source_tokens": dict(zip(self._loader.sources, self.source_tokens.tolist(), strict=True)),
                "memory_bytes": memory_bytes(),
            }
            names = _LOGGED + (_LOGGED_OF_EXPERTS if self._config.model.moe else ())
            self._log.train(step, {name: values[name] for name in names}, host)

    def _stop(self, step: int, values: dict[str, Any]) -> None:
        self._checkpoints.wait()
        good = self._checkpoints.latest()
        where = f"The last good checkpoint is step {good}" if good else "No checkpoint was saved before"
        shown = ", ".join(f"{name} {values[name]:.4g}" for name in _LOGGED)
        message = (
            f"step {step} is not finite: {shown}. {where}; nothing later was saved. Lower "
            "config.optimizer.learning_rate, lengthen config.schedule.warmup_steps, or look at the batch of step "
            f"{step - 1}; --resume goes on from the last good checkpoint."
        )
        self._log.event(step, message, event="not_finite")
        raise NotFinite(message)
