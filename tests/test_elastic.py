"""determinism='elastic': the same bits on 1, 2, 4 and 8 devices, and through kills with changes between them."""

import functools
import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_training import ROWS, config_for
from tiny import Training, host_state, random_batch, tiny_config

from nanollama.config import ConfigError, MeshConfig
from nanollama.parallel.mesh import make_mesh
from nanollama.training import elastic
from nanollama.training.elastic import TreeSum
from nanollama.training.integrity import state_hashes, tree_hash

SCRIPT = Path(__file__).with_name("run_training.py")
CONFIG = config_for("elastic")
PLAIN = tiny_config(ROWS, schedule=CONFIG.schedule)


@functools.cache
def training_on(devices: int, config=CONFIG) -> Training:
    """Compiled once for all tests."""
    return Training(config, MeshConfig(data=devices))


def train(devices: list[int], steps: int, config=CONFIG) -> Training:
    """`steps` steps, the number of devices changing from step to step as `devices` says, around and around."""
    runs = {count: training_on(count, config) for count in devices}
    state = host_state(config)
    for step, count in zip(range(1, steps + 1), itertools.cycle(devices), strict=False):
        run = runs[count]
        run.state = jax.device_put(state, run.shardings)
        run.train(random_batch(step, ROWS))
        state = run.state
    return run


@pytest.fixture(scope="module")
def unbroken() -> str:
    return tree_hash(train([1], 4).state)


@pytest.mark.parametrize("devices", [[2], [8], [8, 1, 4, 2]], ids=str)
def test_same_bits_on_any_number_of_devices(unbroken, devices):
    assert tree_hash(train(devices, 4).state) == unbroken


def test_data_parallel_alone_does_not_do_it():
    """The mutant: one sharded program, whose all-reduce sums in an order that depends on the devices."""
    assert tree_hash(train([1], 4, PLAIN).state) != tree_hash(train([8], 4, PLAIN).state)


def test_kills_with_device_changes_between(tmp_path):
    """8 -> 1 -> 4 devices, a process each, killed with -9 while saving: the bits of an unbroken run."""
    for devices, die_at in ((8, 2), (1, 5), (4, 0)):
        done = subprocess.run(
            [sys.executable, SCRIPT, tmp_path, "elastic", str(devices), "7", str(die_at)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (-9 if die_at else 0), done.stderr
    command = [sys.executable, "-m", "nanollama.training.checkpoint", "hash", tmp_path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = state_hashes(train([1], 7).state)
    assert dict(line.split() for line in printed.splitlines()) == {k: str(v) for k, v in expected.items()}


def test_equals_the_plain_step_but_for_rounding():
    batch = random_batch(0, ROWS)
    found = []
    for run in (training_on(8), training_on(1, PLAIN)):
        run.state = jax.device_put(host_state(run.config), run.shardings)
        found.append(jax.device_get(run.train(batch)))
    metrics, expected = found
    assert metrics.keys() == expected.keys() and metrics["weight"] == expected["weight"]
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def collectives(function) -> set[str]:
    mesh = make_mesh(MeshConfig(data=8))
    program = elastic.on_each_device(function, mesh)
    text = program.lower(jnp.ones((3,)), {"tokens": jnp.ones((8, 2, 4))}).compile().as_text()
    return {word for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if word in text}


def test_devices_do_not_speak_to_each_other():
    assert collectives(lambda params, batch: params * batch["tokens"].sum()) == set()
    mutant = collectives(lambda params, batch: params * jax.lax.psum(batch["tokens"].sum(), "data"))
    assert mutant == {"all-reduce"}


def slow_tree(values: list[np.ndarray]) -> np.ndarray:
    """The definition: pair neighbours, level by level; the odd one out moves up."""
    while len(values) > 1:
        values = [values[i] if i + 1 == len(values) else values[i] + values[i + 1] for i in range(0, len(values), 2)]
    return values[0]


@pytest.mark.parametrize("count", [*range(1, 10), 12, 16, 32])
def test_tree_sum_does_not_depend_on_the_order_of_arrival(count):
    values = list(np.random.default_rng(count).normal(size=(count, 50)).astype(np.float32))

    def tree_sum(order) -> np.ndarray:
        tree = TreeSum(count, np.add)
        for index in order:
            tree.put(index, values[index])
        return tree.total

    expected = slow_tree(values)
    orders = [list(range(count)), list(reversed(range(count)))]
    orders += [random.Random(seed).sample(range(count), count) for seed in range(5)]
    assert all(np.array_equal(tree_sum(order), expected) for order in orders)
    if count > 8:  # the mutant: a running sum in the order of arrival
        assert any(not np.array_equal(sum(values[i] for i in order), sum(values)) for order in orders[1:])


@pytest.mark.parametrize("count", [1, 2, 7, 8, 32, 100])
def test_tree_sum_keeps_few_values(count):
    alive = most = 0

    def add(left, right):
        nonlocal alive
        alive -= 1
        return left + right

    tree = TreeSum(count, add)
    for index in range(count):
        alive += 1
        tree.put(index, 1)
        most = max(most, alive)
    assert tree.total == count and most <= math.log2(count) + 1


def test_devices_must_divide_the_micro_batches():
    with pytest.raises(ConfigError, match=r"config\.batch\.micro_batches: 4 is not divisible by the 8 devices"):
        Training(tiny_config(8, 4, determinism="elastic"), MeshConfig(data=8))
