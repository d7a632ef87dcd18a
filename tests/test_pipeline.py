"""Pipeline stages: the schedule. That losses and gradients are one device's is in test_sharding_equivalence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Training, tiny_config

from nanollama.config import ConfigError, MeshConfig
from nanollama.parallel import pipeline
from nanollama.parallel.mesh import make_mesh


def test_micro_batches_leave_in_order_and_extras_are_theirs():
    mesh = make_mesh(MeshConfig(data=2, stage=4))
    x = np.arange(6 * 2 * 4 * 3, dtype=np.float32).reshape(6, 2, 4, 3)

    def run(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return pipeline.run(lambda w, x, c: (x * 2 + w, c), jnp.arange(4.0), x, jnp.arange(6))

    out, extras = jax.jit(run)(x)
    expected = x
    for stage in range(4):
        expected = expected * 2 + stage
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(extras, np.repeat(np.arange(6)[:, None], 4, axis=1))


def test_stages_must_divide_the_layers():
    with pytest.raises(ConfigError, match="stage=4 does not divide the layers dimension of 2"):
        Training(tiny_config(rows=8), MeshConfig(1, stage=4))
