"""Learning rates over steps, as optax schedules: pure functions of the step, safe under jit.

Owns the convention of every schedule: the rate at step s is the one used for the update that leads from s to
s + 1, so a run of N steps uses s = 0 ... N - 1. Warm-up over W steps gives (s + 1) / W of the peak: the first
update is not wasted on a rate of zero, and update W - 1 is the first at the peak. A decay of D steps reaches
`final_fraction` of the peak at step N - 1 exactly, and stays there if training goes on. Knows nothing of
optimizers. WSD: arXiv:2404.06395; the 1-sqrt shape: arXiv:2405.18392.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from nanollama.config import ConfigError, ScheduleConfig

# How much of the way from the peak to the final rate is left, after a fraction x of the decay.
DECAY_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    "one_minus_sqrt": lambda x: 1 - jnp.sqrt(x),
}


def make_schedule(schedule: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
    """`rate(step)`, float32: warm-up, then constant, cosine to the end, or WSD's stable part and its decay.

    peak: the highest rate; steps: of the whole run. Errors: ConfigError when the parts do not fit into `steps`.
    """
    decay_steps = {"constant": 0, "cosine": steps - schedule.warmup_steps, "wsd": schedule.decay_steps}[schedule.name]
    if decay_steps < 0 or schedule.warmup_steps + decay_steps > steps:
        raise ConfigError(
            "config.schedule",
            f"warmup_steps={schedule.warmup_steps} + decay_steps={decay_steps} is more than steps={steps}",
            "Shorten them or train for more steps.",
        )
    shape = DECAY_SHAPES["cosine" if schedule.name == "cosine" else schedule.decay_shape]
    warmup_steps, final, first_decayed = schedule.warmup_steps, schedule.final_fraction, steps - decay_steps

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) + 1  # updates finished after this one; exact below 2**24
        warm = jnp.minimum(done / max(warmup_steps, 1), 1.0)
        decayed = jnp.clip((done - first_decayed) / max(decay_steps, 1), 0.0, 1.0) if decay_steps else jnp.zeros(())
        return jnp.float32(peak) * warm * (final + (1 - final) * shape(decayed))

    return rate
