"""Grouped products: values and gradients against one product a block, on a mesh, and lowered for CUDA."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from test_sharding_equivalence import assert_close
from tiny import COMPUTE, MODEL, Training, random_batch, tiny_config

from nanollama.config import MeshConfig, MoeConfig
from nanollama.kernels import grouped
from nanollama.kernels.grouped import ROWS, grouped_matmul

BLOCKS = np.array([2, 0, 1, 3, 0])  # of each group: none, one, several; two more are nobody's
END, COUNT = np.cumsum(BLOCKS), 8
GROUP = np.minimum((np.arange(COUNT)[:, None] >= END).sum(axis=1), len(BLOCKS) - 1)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return grouped_matmul(x, weights, jnp.asarray(GROUP), jnp.asarray(END), interpret=True)


def reference(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Blocks that are nobody's hold nothing."""
    out = jnp.einsum("cri,cio->cro", x.reshape(COUNT, ROWS, -1), weights[GROUP])
    return jnp.where(np.arange(COUNT)[:, None, None] < END[-1], out, 0.0).reshape(len(x), -1)


def difference() -> float:
    """Of values and gradients, relative to the largest."""
    x, weights = normal(COUNT * ROWS, 48), normal(len(BLOCKS), 48, 80)

    def both(function: Any) -> Any:
        def loss(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = function(x, weights)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, weights)

    pairs = zip(jax.tree.leaves(both(product)), jax.tree.leaves(both(reference)), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def test_a_block_is_multiplied_by_its_group_s_matrix() -> None:
    assert difference() < 1e-5


@pytest.mark.parametrize("name", ["_of_groups", "_of_rows"])
def test_a_group_that_ends_a_block_early_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(grouped, name)
    place = {"_of_groups": 2, "_of_rows": 3}[name]

    def wrong(*arguments: Any, **named: Any) -> Any:
        return right(*arguments[:place], arguments[place] - 1, *arguments[place + 1 :], **named)

    monkeypatch.setattr(grouped, name, wrong)
    assert difference() > 1e-3


@pytest.mark.once
@pytest.mark.parametrize("mesh", [
    MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, expert=2, context=2, stage=2),
], ids=str)  # fmt: skip
def test_gradients_on_a_mesh_equal_one_device(mesh: MeshConfig) -> None:
    model = dataclasses.replace(MODEL, moe=MoeConfig(4, 2, 32))
    config = tiny_config(rows=16, micro_batches=2, model=model)
    compute = dataclasses.replace(COMPUTE, moe="grouped_interpret")
    batch = random_batch(0, rows=16)
    gradients, sums = Training(dataclasses.replace(config, compute=compute), mesh).gradient(batch)
    expected_gradients, expected = Training(config).gradient(batch)
    assert_close(sums, expected, 2e-6)
    assert_close(gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize("sides", [(2048, 1408), (48, 80)])
def test_lowers_for_cuda(sides: tuple[int, int]) -> None:
    """Whether it is fast is for a card to say."""
    arguments = [jax.ShapeDtypeStruct((COUNT * ROWS, sides[0]), jnp.bfloat16)]
    arguments += [jax.ShapeDtypeStruct((len(BLOCKS), *sides), jnp.bfloat16)]
    arguments += [jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in (GROUP, END)]

    def loss(*arguments: jax.Array) -> jax.Array:
        return grouped_matmul(*arguments).astype(jnp.float32).sum()

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Tt]riton.*", DeprecationWarning)
        text = jax.jit(jax.grad(loss, (0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "grouped_rows" in text and "grouped_weights" in text and text.count("triton") >= 2


def test_what_cannot_be_multiplied_is_refused() -> None:
    with pytest.raises(ValueError, match="sides of 24 are not multiples of 16"):
        grouped_matmul(normal(ROWS, 24), normal(1, 24, 32), jnp.zeros(1, int), jnp.ones(1, int))
    assert not grouped.why_not(10**6, 64, 2048, 1408)
    assert "beyond what Triton's programs can index" in grouped.why_not(128, 256, 7168, 2048)
