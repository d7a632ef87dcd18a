"""Products made in float32 and rounded afterwards: the same values as plain ones, to a rounding, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.ops import products


@pytest.fixture(params=[True, False], ids=["rounded", "plain"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_WIDE_IS_FAST", request.param)
    return bool(request.param)


def operands(dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((24, 16), (16, 40), (24, 40))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))  # type: ignore


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_values_and_gradients(dtype: str, tolerance: float, wide: bool) -> None:
    x, weight, cotangent = operands(dtype)
    out, pull = jax.vjp(products.matmul, x, weight)
    x64, weight64, cotangent64 = (np.asarray(a, np.float64) for a in (x, weight, cotangent))
    wanted = (x64 @ weight64, cotangent64 @ weight64.T, x64.T @ cotangent64)
    for got, want in zip((out, *pull(cotangent)), wanted, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max())


def test_bfloat16_products_are_wide_only_where_that_is_fast(wide: bool) -> None:
    x, weight, _ = operands("bfloat16")
    text = str(jax.make_jaxpr(jax.grad(lambda x, w: products.matmul(x, w).sum(), (0, 1)))(x, weight))
    assert ("preferred_element_type=float32" in text) == wide
    assert not products.rounds_afterwards(jnp.float32)
