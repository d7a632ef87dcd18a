"""determinism='same_mesh': two runs are equal, and a run killed with -9 and resumed equals the unbroken one."""

import random
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from run_training import ROWS, config_for
from tiny import Training, host_state, random_batch

from nanollama.config import MeshConfig
from nanollama.training.checkpoint import Checkpoints, restore_numpy
from nanollama.training.integrity import state_hashes
from nanollama.training.state import abstract_state

SCRIPT = Path(__file__).with_name("run_training.py")
CONFIG, MESH, STEPS = config_for("same_mesh"), MeshConfig(2, 2, 1), 8


@pytest.fixture(scope="module")
def training() -> Training:
    return Training(CONFIG, MESH)


def train(training: Training, batches: range) -> None:
    for number in batches:
        training.train(random_batch(number, ROWS))


@pytest.fixture(scope="module")
def unbroken(training) -> dict:
    train(training, range(1, STEPS + 1))
    return state_hashes(training.state)


def test_two_runs_are_equal(unbroken):
    again = Training(CONFIG, MESH)
    train(again, range(1, STEPS + 1))
    assert state_hashes(again.state) == unbroken


def test_killed_at_random_steps_and_resumed(unbroken, tmp_path):
    """Two kills, each with a save under way; what runs after them comes from the compilation cache."""
    deaths = sorted(random.Random(0).sample(range(1, STEPS), 2))
    for die_at in [*deaths, 0]:
        done = subprocess.run(
            [sys.executable, SCRIPT, tmp_path, "same_mesh", "8", str(STEPS), str(die_at)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (-9 if die_at else 0), done.stderr
    assert state_hashes(restore_numpy(tmp_path)) == unbroken


@pytest.mark.parametrize("mutant", [None, "a batch twice", "a batch left out", "moments forgotten"])
def test_what_a_resume_must_not_get_wrong(training, unbroken, tmp_path, mutant):
    training.state = jax.device_put(host_state(CONFIG), training.shardings)
    train(training, range(1, 6))
    checkpoints = Checkpoints(tmp_path, CONFIG.checkpoint)
    checkpoints.save(5, training.state, {})
    checkpoints.close()
    training.state, _ = checkpoints.restore(5, abstract_state(CONFIG, training.optimizer, training.mesh))
    if mutant == "moments forgotten":
        fresh = jax.device_put(host_state(CONFIG).opt_state, training.shardings.opt_state)
        training.state = training.state.replace(opt_state=fresh)
    first = {"a batch twice": 5, "a batch left out": 7}.get(mutant, 6)
    train(training, range(first, first + STEPS - 5))
    assert (state_hashes(training.state) == unbroken) == (mutant is None)
