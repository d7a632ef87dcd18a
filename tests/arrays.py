"""Random arrays and their comparison, for the tests of `nanollama.ops`."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(
        scale * np.random.default_rng(seed).standard_normal(shape, np.float32)
    )  # compiles nothing


def close(got: jax.Array, wanted: np.ndarray | jax.Array, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(wanted, np.float64),
                               rtol=tolerance, atol=tolerance)  # fmt: skip
