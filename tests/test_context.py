"""Context parallelism: pieces are put together again as they were; held-out loss with it, and with pipeline stages.

That losses and gradients are one device's is in test_sharding_equivalence.
"""

from unittest import mock

import jax
import numpy as np
import pytest
from tiny import LENGTH, QUICK, Training, random_batch, tiny_config

from nanollama.config import ConfigError, MeshConfig
from nanollama.parallel import context, pipeline
from nanollama.parallel.mesh import make_mesh
from nanollama.training.validation import make_token_nll


def test_pieces_hold_every_token_once_and_balance():
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    x_BT = np.arange(4 * 16).reshape(4, 16)

    def cut(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            pieces = context.to_pieces({"x": x})["x"]
            whole = context.to_rows(pieces)
            return pieces, context.starts(*pieces.shape), context.row_sums(pieces.sum(axis=1)), whole

    pieces, starts, sums, whole = jax.jit(cut)(x_BT)
    np.testing.assert_array_equal(whole, x_BT)
    assert sorted(np.ravel(pieces)) == list(range(64))
    np.testing.assert_array_equal(starts, pieces[:, 0] % 16)
    np.testing.assert_array_equal(sums, x_BT.sum(axis=1))
    device, row, half = 1, 2, 1
    np.testing.assert_array_equal(pieces[device * 8 + row * 2 + half], x_BT[row, 8:12])


def held_out(mesh: MeshConfig) -> tuple[np.ndarray, float]:
    """(nll of each token, floating-point operations of a device)."""
    config, batch = tiny_config(rows=8, micro_batches=2), random_batch(0)
    training = Training(config, mesh)
    program = make_token_nll(training.decoder, training.mesh, config.batch.micro_batches)
    with mock.patch.object(pipeline, "run", wraps=pipeline.run) as run:
        compiled = program.lower(training.state.params, training.put(batch)).compile(QUICK)
    assert run.called == (mesh.stage > 1)
    return jax.device_get(compiled(training.state.params, training.put(batch))), compiled.cost_analysis()["flops"]


def test_held_out_figures_equal_those_of_one_device() -> None:
    """And each device does its part of the work."""
    expected_BT, flops = held_out(MeshConfig(1))
    for mesh in (MeshConfig(1, context=4), MeshConfig(1, fsdp=2, context=2, stage=2)):
        nll_BT, flops_each = held_out(mesh)
        np.testing.assert_allclose(nll_BT, expected_BT, rtol=1e-5, atol=1e-6)
        assert flops_each < 0.5 * flops


def test_pieces_must_divide_the_length():
    with pytest.raises(ConfigError, match=rf"context: 8 devices .* do not divide sequence_length={LENGTH + 8}"):
        context.check_length(LENGTH + 8, 8)
