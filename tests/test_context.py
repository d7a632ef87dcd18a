"""Context parallelism: pieces are put together again as they were, and nothing but the layout changes."""

import jax
import numpy as np
import pytest
from test_sharding_equivalence import assert_close
from tiny import LENGTH, Training, random_batch, tiny_config

from nanollama.config import ConfigError, MeshConfig
from nanollama.parallel import context
from nanollama.parallel.mesh import make_mesh

CONFIG = tiny_config(rows=8, micro_batches=2)


def test_pieces_hold_every_token_once_and_balance():
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    x_BT = np.arange(4 * 16).reshape(4, 16)

    def cut(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            pieces = context.to_pieces({"x": x})["x"]
            return pieces, context.starts(*pieces.shape), context.row_sums(pieces.sum(axis=1))

    pieces, starts, sums = jax.jit(cut)(x_BT)
    assert sorted(np.ravel(pieces)) == list(range(64))
    np.testing.assert_array_equal(starts, pieces[:, 0] % 16)
    np.testing.assert_array_equal(sums, x_BT.sum(axis=1))
    device, row, half = 1, 2, 1
    np.testing.assert_array_equal(pieces[device * 8 + row * 2 + half], x_BT[row, 8:12])


@pytest.fixture(scope="module")
def expected():
    return Training(CONFIG).gradient(random_batch(0))


@pytest.mark.parametrize("mesh", [
    MeshConfig(1, context=2), MeshConfig(1, context=4, tensor=2), MeshConfig(2, context=2, fsdp=2),
], ids=["context", "context-tensor", "data-fsdp-context"])  # fmt: skip
def test_loss_and_gradients_equal_the_single_device_run(expected, mesh):
    """Documents cross the pieces' borders in most rows."""
    gradients, sums = Training(CONFIG, mesh).gradient(random_batch(0))
    assert sums.weight == expected[1].weight
    assert_close(sums, expected[1], 1e-6)
    assert_close(gradients, expected[0], 5e-6)


def test_pieces_must_divide_the_length():
    with pytest.raises(ConfigError, match=rf"context: 8 devices .* do not divide sequence_length={LENGTH + 8}"):
        context.check_length(LENGTH + 8, 8)
