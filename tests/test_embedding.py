"""The gradient of the embedding on GPUs: sums by id in one order, on one device and on a mesh, no scatter-add."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.config import MeshConfig
from nanollama.models import mesh_embedding
from nanollama.ops.embedding import sums_by_id
from nanollama.parallel.mesh import make_mesh

SIZE, WIDTH = 16, 3


def whole_numbers(*shape: int) -> np.ndarray:
    """Of which every order of summing gives the same bits."""
    return np.random.default_rng(0).integers(-50, 50, shape).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65])
def test_sums_are_those_of_a_scatter(count: int) -> None:
    """Ids outside the table, as a mesh's other devices have them, count nowhere."""
    values, ids = whole_numbers(count, WIDTH), np.random.default_rng(count).integers(-3, SIZE + 3, count)
    ids[: count // 2] = 5  # one id of a long run
    expected = np.zeros((SIZE, WIDTH), np.float32)
    inside = (ids >= 0) & (ids < SIZE)
    np.add.at(expected, ids[inside], values[inside])
    np.testing.assert_array_equal(jax.jit(sums_by_id, static_argnums=2)(values, ids, SIZE), expected)


def test_sums_of_bfloat16_are_float32() -> None:
    values = jnp.full((1000, 1), 1.0, jnp.bfloat16)  # bfloat16 has no 257
    sums = jax.jit(sums_by_id, static_argnums=2)(values, jnp.zeros(1000, jnp.int32), 1)
    assert float(sums[0, 0]) == 1000


def gradient(look_up: Callable[[jax.Array, jax.Array], jax.Array], mesh: MeshConfig) -> np.ndarray:
    table, tokens = whole_numbers(SIZE, WIDTH), np.random.default_rng(1).integers(0, SIZE, (8, 6))
    weight, tokens = jnp.asarray(whole_numbers(8, 6, WIDTH)), jnp.asarray(tokens)
    where = make_mesh(mesh, jax.devices()[: 8 if mesh != MeshConfig(1) else 1])

    def loss(table: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(where.abstract_mesh):
            return jnp.sum(look_up(table, tokens) * weight)

    with jax.sharding.set_mesh(where):
        return np.asarray(jax.jit(jax.grad(loss))(table))


@pytest.mark.parametrize("mesh", [
    MeshConfig(1), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, context=2, expert=2),
    MeshConfig(data=1, tensor=8), MeshConfig(stage=2, data=4),
], ids=str)  # fmt: skip
def test_the_gradient_is_the_same_on_a_mesh(mesh: MeshConfig) -> None:
    expected = gradient(lambda table, tokens: table[tokens], MeshConfig(1))
    np.testing.assert_array_equal(gradient(functools.partial(mesh_embedding.ordered, SIZE), mesh), expected)


def test_gpus_take_it_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(kind: str) -> str:
        monkeypatch.setattr(mesh_embedding, "device", lambda: (kind, ""))
        table, tokens = jnp.zeros((SIZE, WIDTH)), jnp.zeros((2, 4), jnp.int32)
        return str(jax.make_jaxpr(jax.grad(lambda table: mesh_embedding.look_up(table, tokens).sum()))(table))

    assert "argsort" in text("gpu") and "scatter-add" not in text("gpu")
    assert "argsort" not in text("cpu") and "scatter-add" in text("cpu")
