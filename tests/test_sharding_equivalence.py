"""A mesh changes where the numbers are, not the numbers: losses and gradients equal the single-device run's.

Every axis alone and every pair of axes, each with a dense model and with one of experts, each program with documents in
its rows and without. Meshes of three axes are in test_context, test_lora, test_moe_training and test_step.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import MODEL, QUICK, Training, host_state, random_batch, tiny_config

from nanollama.config import Config, LossConfig, MeshConfig, MoeConfig, OptimizerConfig
from nanollama.parallel.mesh import AXES, make_mesh
from nanollama.training.integrity import tree_hash
from nanollama.training.optim import make_optimizer
from nanollama.training.state import abstract_state, init_state

CONFIG = tiny_config(rows=16, micro_batches=2)
MUON = tiny_config(optimizer=OptimizerConfig(name="muon", learning_rate=1e-3))
# The shared expert is a dense feed-forward, so that this model has what the dense one has, and more; its one KV head is
# what two tensor shards share.
EXPERTS = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(MODEL, num_kv_heads=1, moe=MoeConfig(4, 2, 16, shared_size=32)),
    loss=LossConfig(balance_loss=0.01, router_z_loss=0.001),
)
PAIRS = [dict.fromkeys(pair, 2) for pair in itertools.combinations(AXES, 2)]


def documents_and_rows() -> list[dict[str, np.ndarray]]:
    """A batch with two documents in each row, and one in which a row is one document."""
    packed = random_batch(0, rows=16)
    positions = np.broadcast_to(np.arange(packed["tokens"].shape[1], dtype=np.int32), packed["tokens"].shape)
    return [packed, {**random_batch(1, rows=16), "positions": positions, "first_key": np.zeros_like(positions)}]


def gradients_of(config: Config, mesh: MeshConfig) -> list[tuple[Any, Any]]:
    """(gradients, sums) of each of `documents_and_rows`, by one compiled program."""
    training = Training(config, mesh)
    return [training.gradient(batch) for batch in documents_and_rows()]


@functools.cache
def on_one_device(config: Config) -> list[tuple[Any, Any]]:
    return gradients_of(config, MeshConfig(1))


def check(config: Config, mesh: MeshConfig) -> None:
    for (gradients, sums), (expected_gradients, expected) in zip(
        gradients_of(config, mesh), on_one_device(config), strict=True
    ):
        assert sums.weight == expected.weight
        assert_close(sums, expected, 2e-6)
        assert_close(gradients, expected_gradients, 1e-5)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Each array's largest error, relative to its largest value: a sum of n float32 terms whose order changed is off
    by about 6e-8 * sqrt(n) of the terms' size, however small the sum itself comes out."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        error = np.max(np.abs(np.float64(x) - np.float64(y))) / max(float(np.max(np.abs(y))), 1e-30)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"


@pytest.mark.once
@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("axes", [
    dict(data=8), dict(fsdp=8), dict(expert=4), dict(context=4), dict(tensor=4), dict(stage=2),
], ids="-".join)  # fmt: skip
def test_each_axis_alone(axes: dict[str, int], config: Config) -> None:
    """In a model without experts the expert axis is another data axis."""
    check(config, MeshConfig(**{"data": 1, **axes}))


@pytest.mark.parametrize("config", [pytest.param(CONFIG, id="dense", marks=pytest.mark.once),
                                    pytest.param(EXPERTS, id="experts")])  # fmt: skip
@pytest.mark.parametrize("axes", PAIRS, ids="-".join)
def test_each_pair_of_axes(axes: dict[str, int], config: Config) -> None:
    check(config, MeshConfig(**{"data": 1, **axes}))


@pytest.mark.parametrize("axes", [dict(context=4, tensor=2), dict(context=2, tensor=4)], ids=str)
def test_each_device_picks_its_key_value_heads(axes: dict[str, int]) -> None:
    """Four shards are more than the two KV heads; where context cuts the rows each picks those of its query heads."""
    check(CONFIG, MeshConfig(**{"data": 1, **axes}))


def test_a_wrong_gradient_would_be_found() -> None:
    """One row of sixteen left out; and documents that see each other."""
    (gradients, _), _ = on_one_device(CONFIG)
    packed, _ = documents_and_rows()
    training = Training(CONFIG)
    for wrong in (
        {**packed, "weights": packed["weights"] * (np.arange(16) > 0)[:, None]},
        {**packed, "first_key": np.zeros_like(packed["first_key"])},
    ):
        with pytest.raises(AssertionError):
            assert_close(training.gradient(wrong)[0], gradients, 1e-5)


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])
def test_update_on_a_mesh_equals_one_device(config):
    """The optimizer alone, on gradients that are all of ordinary size (Adam divides by the root of tiny ones)."""
    random = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), host_state(config).params)
    updates = []
    for mesh in (MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)):
        training = Training(config, mesh)
        update = jax.jit(
            training.optimizer.update,
            out_shardings=(training.shardings.params, training.shardings.opt_state),
            compiler_options=QUICK,
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


def test_where_each_parameter_is_cut() -> None:
    """Numbers are the same wherever they are, so the comparisons above do not see a parameter that is whole."""

    def cuts(config: Config, mesh: MeshConfig) -> dict[str, str]:
        params = abstract_state(config, make_optimizer(config), make_mesh(mesh)).params
        return {jax.tree_util.keystr(at, simple=True, separator="/"): " ".join(axis or "-" for axis in x.sharding.spec)
                for at, x in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip

    assert cuts(EXPERTS, MeshConfig(1, fsdp=2, expert=2, tensor=2)) == {
        "embedding": "tensor fsdp", "head": "fsdp tensor", "final_norm": "-",
        **{f"layers/{name}": how for names, how in (
            ("attention_norm mlp_norm", "- -"), ("query", "- fsdp tensor -"), ("key value", "- fsdp - -"),
            ("output", "- tensor - fsdp"), ("router", "- fsdp -"), ("expert_gate expert_up", "- expert fsdp tensor"),
            ("expert_down", "- expert tensor fsdp"), ("shared_gate shared_up", "- fsdp tensor"),
            ("shared_down", "- tensor fsdp"),
        ) for name in names.split()},
    }  # fmt: skip
    assert cuts(CONFIG, MeshConfig(1, tensor=2))["layers/key"] == "- - tensor -", "a KV head for each"
    staged = cuts(CONFIG, MeshConfig(1, stage=2))
    assert {how.split()[0] for name, how in staged.items() if "/" in name} == {"stage"}


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
