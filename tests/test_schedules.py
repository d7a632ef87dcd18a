"""Learning rate schedules against a plain Python twin and at their corners."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.config import ConfigError, ScheduleConfig
from nanollama.training.schedules import DECAY_SHAPES, make_schedule

PEAK = 3e-4


def twin(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """The same rate, branch by branch."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    decay_steps = {"wsd": schedule.decay_steps, "cosine": steps - schedule.warmup_steps, "constant": 0}[schedule.name]
    if step < steps - decay_steps or decay_steps == 0:
        return peak
    x = min((step + 1 - (steps - decay_steps)) / decay_steps, 1.0)
    name = "cosine" if schedule.name == "cosine" else schedule.decay_shape
    left = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "one_minus_sqrt": 1 - math.sqrt(x)}[name]
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * left)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (1, 0), (7, 20), (0, 50), (30, 20)])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wsd", "linear"),
        ("wsd", "cosine"),
        ("wsd", "one_minus_sqrt"),
        ("cosine", "linear"),
        ("constant", "linear"),
    ],
)
def test_equals_twin(name, shape, warmup, decay, final):
    schedule = ScheduleConfig(
        name=name, warmup_steps=warmup, decay_steps=decay, decay_shape=shape, final_fraction=final
    )
    rate = jax.jit(make_schedule(schedule, PEAK, 50))
    expected = [twin(schedule, PEAK, 50, step) for step in range(60)]
    # A cosine near its end subtracts two numbers close to 1: absolute error of a few float32 steps of the peak.
    np.testing.assert_allclose(rate(jnp.arange(60)), expected, rtol=1e-6, atol=2e-7 * PEAK)


@pytest.mark.parametrize("shape", DECAY_SHAPES)
def test_corners_are_exact(shape):
    schedule = ScheduleConfig(warmup_steps=4, decay_steps=10, decay_shape=shape, final_fraction=0.125)
    rate = make_schedule(schedule, 1.0, 100)
    exact = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 50: 1.0, 89: 1.0, 99: 0.125, 100: 0.125, 10_000: 0.125}
    assert {step: float(rate(step)) for step in exact} == exact
    assert 0.125 < float(rate(90)) < 1.0, "the decay starts at step N - D"


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_first_update_is_not_wasted(name):
    assert float(make_schedule(ScheduleConfig(name=name, warmup_steps=10), 1.0, 100)(0)) == np.float32(0.1)


def test_cosine_halfway_and_end():
    rate = make_schedule(ScheduleConfig(name="cosine", final_fraction=0.0), 1.0, 100)
    assert float(rate(49)) == pytest.approx(0.5, abs=1e-6) and float(rate(99)) == 0.0


def test_runs_that_differ_only_in_length_share_the_stable_part():
    """WSD's point: a run can be prolonged from its stable part."""
    short = make_schedule(ScheduleConfig(warmup_steps=10, decay_steps=20), PEAK, 100)
    long = make_schedule(ScheduleConfig(warmup_steps=10, decay_steps=20), PEAK, 1000)
    steps = jnp.arange(80)
    np.testing.assert_array_equal(short(steps), long(steps))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"config\.schedule: warmup_steps=60 \+ decay_steps=50"):
        make_schedule(ScheduleConfig(warmup_steps=60, decay_steps=50), PEAK, 100)
