"""Training in fewer bits: stochastic rounding, bfloat16 state, 8-bit products. Each with what goes wrong without it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import COMPUTE, Training, host_state, random_batch, tiny_config

from nanollama.config import CheckpointConfig, OptimizerConfig
from nanollama.models.decoder import Decoder
from nanollama.ops.fp8 import GRADIENTS, VALUES, fp8_matmul, quantise
from nanollama.ops.rounding import add_rounded, round_stochastically
from nanollama.training.checkpoint import Checkpoints
from nanollama.training.state import abstract_state

FULL = OptimizerConfig(learning_rate=3e-3)
SHORT = dataclasses.replace(FULL, momentum_dtype="bfloat16", parameter_dtype="bfloat16")


# --- stochastic rounding


def test_rounds_to_a_neighbour_and_on_average_to_the_value() -> None:
    low, high = np.float32(1.0), np.float32(1.0078125)  # neighbours in bfloat16
    for share in (0.25, 0.9):
        x = jnp.full(40_000, low + share * (high - low))
        got = np.asarray(round_stochastically(x, jax.random.key(1)), np.float32)
        assert set(np.unique(got)) == {low, high}
        np.testing.assert_allclose((got == high).mean(), share, atol=0.01)  # 4 standard deviations
        negative = np.asarray(round_stochastically(-x, jax.random.key(1)), np.float32)
        np.testing.assert_array_equal(negative, -got)  # away from zero as often as towards it


def test_what_bfloat16_holds_is_kept_and_nothing_becomes_finite() -> None:
    x = jnp.array([0.0, -2.5, 3.0e38, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    exact = x.at[2].set(jnp.asarray(3.0e38, jnp.bfloat16).astype(jnp.float32))
    got = round_stochastically(exact, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(got, np.float32), exact)


def drift(add: Any) -> np.ndarray:
    """How far 200 updates of 1/4096 of a parameter's size move it, relative to how far they should."""
    parameters = {"a": jnp.ones(2000, jnp.bfloat16), "b": jnp.ones(2000, jnp.bfloat16)}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 1 / 4096, jnp.float32), parameters)
    add = jax.jit(add)
    for step in range(200):
        parameters = add(parameters, updates, jnp.int32(step))
    return np.array([(np.asarray(x, np.float32).mean() - 1) * 4096 / 200 for x in parameters.values()])


def test_small_updates_add_up() -> None:
    np.testing.assert_allclose(drift(add_rounded), 1, atol=0.1)


def test_nearest_rounding_and_a_key_that_never_changes_are_caught() -> None:
    def nearest(parameters: Any, updates: Any, step: jax.Array) -> Any:
        return jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), parameters, updates)

    def same_key(parameters: Any, updates: Any, step: jax.Array) -> Any:
        return add_rounded(parameters, updates, 0 * step)

    for mutant in (nearest, same_key):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(drift(mutant), 1, atol=0.1)
    one, other = add_rounded((jnp.ones(99, jnp.bfloat16),) * 2, (jnp.full(99, 1 / 300),) * 2, jnp.int32(3))
    assert np.any(np.asarray(one != other)), "leaves must not share their noise"


# --- bfloat16 parameters and moments


def test_matrices_and_first_moments_are_bfloat16_and_the_rest_is_not() -> None:
    state = abstract_state(tiny_config(optimizer=SHORT), Training(tiny_config(optimizer=SHORT)).optimizer)
    names = {jax.tree_util.keystr(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(state)}
    for name, dtype in names.items():
        if ".mu" in name or (".params" in name and "norm" not in name):
            assert dtype == jnp.bfloat16, name
        elif ".nu" in name or ".params" in name:
            assert dtype == jnp.float32, name


STEPS = 30


@functools.cache
def losses(config: Any) -> tuple[list[float], Training]:
    """Of one batch learned by heart, and the run after its last step."""
    training, batch = Training(config), random_batch(0)
    return [float(jax.device_get(training.train(batch)["loss"])) for _ in range(STEPS)], training


def test_bfloat16_state_learns_as_float32_does_and_resumes_to_the_bit(tmp_path: Any) -> None:
    config = tiny_config(optimizer=SHORT)
    (short, training), (full, _) = losses(config), losses(tiny_config(optimizer=FULL))
    assert full[0] - full[-1] > 1.0
    np.testing.assert_allclose(short[-1], full[-1], rtol=0.03)
    unbroken, batch = jax.device_get(training.state), random_batch(0)
    training.state = jax.device_put(host_state(config), training.shardings)
    for _ in range(12):
        training.train(batch)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(12, training.state, {})
    checkpoints.wait()
    wanted = abstract_state(config, training.optimizer, training.mesh)
    training.state, _ = checkpoints.restore(12, wanted)
    checkpoints.close()
    for _ in range(STEPS - 12):
        training.train(batch)
    for a, b in zip(jax.tree.leaves(jax.device_get(training.state)), jax.tree.leaves(unbroken), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- 8 bits


def operands(N: int = 24, I: int = 32, O: int = 16) -> tuple[jax.Array, jax.Array, jax.Array]:  # noqa: E741
    generator = np.random.default_rng(0)
    shapes = [(N, I), (I, O), (N, O)]
    return tuple(jnp.asarray(generator.standard_normal(shape, np.float32)) for shape in shapes)  # type: ignore[return-value]


def test_fp8_products_are_those_of_the_rounded_operands() -> None:
    """Against NumPy with ml_dtypes' own rounding."""

    def rounded(x: jax.Array, dtype: Any) -> np.ndarray:
        array = np.asarray(x, np.float32)
        scale = np.abs(array).max() / np.float32(ml_dtypes.finfo(dtype).max)
        return (array / scale).astype(dtype).astype(np.float32) * scale

    x, weight, cotangent = operands()
    got, pullback = jax.vjp(fp8_matmul, x, weight)
    x8, weight8 = rounded(x, ml_dtypes.float8_e4m3fn), rounded(weight, ml_dtypes.float8_e4m3fn)
    cotangent8 = rounded(cotangent, ml_dtypes.float8_e5m2)
    for a, b in zip(
        (got, *pullback(cotangent)), (x8 @ weight8, cotangent8 @ weight8.T, x8.T @ cotangent8), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    exact = np.asarray(x @ weight)
    assert 1e-3 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.05  # 3 bits of mantissa are there, no more


def test_fp8_fills_its_range_and_minds_zeros_and_outliers() -> None:
    for dtype in (VALUES, GRADIENTS):
        low, scale = quantise(jnp.array([1e-3, -7.0, 0.0]), dtype)
        assert float(jnp.abs(low.astype(jnp.float32)).max()) == float(jnp.finfo(dtype).max)
        np.testing.assert_allclose(low.astype(jnp.float32)[1] * scale, -7.0, rtol=1e-6)
        zeros, one = quantise(jnp.zeros(3), dtype)
        assert float(one) == 1.0 and not np.any(np.asarray(zeros.astype(jnp.float32)))
    x, weight, cotangent = (operand * 1e6 for operand in operands())
    out, pullback = jax.vjp(fp8_matmul, x, weight)
    assert all(bool(jnp.all(jnp.isfinite(part))) for part in (out, *pullback(cotangent)))


def test_fp8_keeps_8_bits_for_the_backward_pass() -> None:
    x, weight, _ = (operand.astype(jnp.bfloat16) for operand in operands())
    _, pullback = jax.eval_shape(lambda x, w: jax.vjp(fp8_matmul, x, w), x, weight)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback)) == x.size + weight.size + 8


def test_fp8_learns_as_float32_does() -> None:
    """The loss check: the same data, the layers' products in 8 bits."""
    full, _ = losses(tiny_config(optimizer=FULL))
    low, _ = losses(tiny_config(optimizer=FULL, compute=dataclasses.replace(COMPUTE, fp8=True)))
    assert low != full, "nothing was computed in 8 bits"
    assert full[0] - full[-1] > 1.0
    np.testing.assert_allclose(low[-1], full[-1], rtol=0.03)


def test_fp8_reaches_every_layer_product_and_not_the_head() -> None:
    config = tiny_config(compute=dataclasses.replace(COMPUTE, fp8=True))
    decoder, tokens = Decoder(config.model, config.compute), jnp.zeros((1, 4), jnp.int32)
    variables = jax.eval_shape(decoder.init, jax.random.key(0), tokens, tokens, tokens)
    text = str(jax.make_jaxpr(lambda v: decoder.apply(v, tokens, tokens, tokens)[0])(variables))
    assert text.count("new_dtype=float8_e4m3fn") == 2 * 7  # q, k, v, o, gate, up, down
