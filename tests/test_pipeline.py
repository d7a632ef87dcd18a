"""Pipeline stages: the same losses and gradients as one device, alone and with other axes, dense and with experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding_equivalence import assert_close
from tiny import MODEL, Training, random_batch, tiny_config

from nanollama.config import ConfigError, LossConfig, MeshConfig
from nanollama.model_config import MoeConfig
from nanollama.parallel import pipeline
from nanollama.parallel.mesh import make_mesh

DENSE = tiny_config(rows=8, micro_batches=4)
EXPERTS = dataclasses.replace(
    DENSE,
    model=dataclasses.replace(MODEL, moe=MoeConfig(num_experts=4, experts_per_token=2, expert_size=16)),
    loss=LossConfig(balance_loss=0.01, router_z_loss=0.001),
)
CASES = [
    (DENSE, MeshConfig(1, stage=2)),
    (DENSE, MeshConfig(2, stage=2, tensor=2)),
    (DENSE, MeshConfig(1, stage=2, fsdp=2, context=2)),
    (EXPERTS, MeshConfig(1, stage=2, expert=2)),
    (EXPERTS, MeshConfig(1, context=2, expert=2, tensor=2)),
]


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


@pytest.fixture(scope="module")
def expected():
    found = {}

    def of(config):
        if config not in found:
            found[config] = Training(config).gradient(random_batch(0))
        return found[config]

    return of


@pytest.mark.parametrize(("config", "mesh"), CASES, ids=[
    "stage", "data-tensor-stage", "fsdp-context-stage", "experts-stage", "experts-context-tensor",
])  # fmt: skip
def test_loss_and_gradients_equal_the_single_device_run(expected, config, mesh):
    gradients, sums = Training(config, mesh).gradient(random_batch(0))
    expected_gradients, expected_sums = expected(config)
    assert sums.weight == expected_sums.weight
    assert_close(sums, expected_sums, 2e-6)
    assert_close(gradients, expected_gradients, 1e-5)


def test_stages_must_divide_the_layers():
    with pytest.raises(ConfigError, match="stage=4 does not divide the layers dimension of 2"):
        Training(DENSE, MeshConfig(1, stage=4))
