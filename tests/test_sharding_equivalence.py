"""A mesh changes where the numbers are, not the numbers: losses and gradients equal the single-device run's."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import Training, host_state, random_batch, tiny_config

from nanollama.config import MeshConfig, OptimizerConfig
from nanollama.parallel.mesh import make_mesh
from nanollama.training.integrity import tree_hash
from nanollama.training.optim import make_optimizer
from nanollama.training.state import abstract_state, init_state

CONFIG = tiny_config(rows=16, micro_batches=2)
MESHES = [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 4, 2), MeshConfig(1, 1, 4)]
MUON = tiny_config(optimizer=OptimizerConfig(name="muon", learning_rate=1e-3))


@functools.cache
def single_device_gradient() -> tuple[Any, Any]:
    return Training(CONFIG).gradient(random_batch(0, rows=16))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Each array's largest error, relative to its largest value: a sum of n float32 terms whose order changed is off
    by about 6e-8 * sqrt(n) of the terms' size, however small the sum itself comes out."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        error = np.max(np.abs(np.float64(x) - np.float64(y))) / max(float(np.max(np.abs(y))), 1e-30)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.data}x{mesh.fsdp}x{mesh.tensor}")
def test_loss_and_gradients_equal_the_single_device_run(mesh):
    training = Training(CONFIG, mesh)
    gradients, sums = training.gradient(random_batch(0, rows=16))
    expected_gradients, expected_sums = single_device_gradient()
    assert sums.weight == expected_sums.weight
    assert_close(sums, expected_sums, 1e-6)
    assert_close(gradients, expected_gradients, 5e-6)


def test_a_wrong_gradient_would_be_found():
    gradients, _ = single_device_gradient()
    without_one_row, _ = Training(CONFIG).gradient(
        {
            **random_batch(0, rows=16),
            "weights": random_batch(0, rows=16)["weights"] * (np.arange(16) > 0)[:, None],
        }
    )
    with pytest.raises(AssertionError):
        assert_close(without_one_row, gradients, 5e-6)


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_update_on_a_mesh_equals_one_device(config):
    """The optimizer alone, on gradients that are all of ordinary size (Adam divides by the root of tiny ones)."""
    random = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), host_state(config).params)
    updates = []
    for mesh in (MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)):
        training = Training(config, mesh)
        update = jax.jit(
            training.optimizer.update, out_shardings=(training.shardings.params, training.shardings.opt_state)
        )
        on_device = jax.device_put(gradients, training.shardings.params)
        updates.append(update(on_device, training.state.opt_state, training.state.params)[0])
    assert_close(jax.device_get(updates[1]), jax.device_get(updates[0]), 2e-5)


def test_state_is_born_sharded_with_the_same_bits_on_any_mesh():
    optimizer = make_optimizer(CONFIG)
    state, shardings = init_state(CONFIG, optimizer, make_mesh(MeshConfig(2, 2, 2)))
    assert tree_hash(state) == tree_hash(host_state(CONFIG))
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    largest = state.params["layers"]["gate"]
    assert largest.addressable_shards[0].data.size == largest.size // 4, "cut over fsdp and tensor"
    other, _ = init_state(dataclasses.replace(CONFIG, seed=1), optimizer, make_mesh(MeshConfig(1, 1, 1)))
    assert tree_hash(other) != tree_hash(state)


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_optimizer_state_lies_beside_its_parameters(config):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    state = abstract_state(config, make_optimizer(config), mesh)
    params = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
    moments = 0
    for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
        name = next((name for name in params if jax.tree_util.keystr(path).endswith(name)), None)
        if name is None:
            assert x.sharding == NamedSharding(mesh, PartitionSpec()) and x.size <= 3
        else:
            assert (x.shape, x.sharding) == (params[name].shape, params[name].sharding)
            moments += 1
    assert moments == {"adamw": 2 * 12, "muon": 2 * 5 + 7}[config.optimizer.name]


def test_the_expert_axis_holds_rows_too():
    """In a model without experts it is another data axis."""
    gradients, sums = Training(CONFIG, MeshConfig(data=2, expert=4)).gradient(random_batch(0, rows=16))
    expected_gradients, expected_sums = single_device_gradient()
    assert_close(sums, expected_sums, 1e-6)
    assert_close(gradients, expected_gradients, 5e-6)
