"""Norms, SwiGLU and RoPE against slow twins written independently: NumPy formulas, rotation matrices."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal

from nanollama.ops.mlp import swiglu, swiglu_reference
from nanollama.ops.norms import rms_norm, rms_norm_reference
from nanollama.ops.rope import apply_rope, rope_tables

# --- norms and mlp


def check_rms_norm(function: Callable[..., jax.Array]) -> None:
    x, scale = np.asarray(normal(0, 3, 5, 8, scale=4.0)), np.asarray(normal(1, 8))
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.1) * scale
    close(function(jnp.asarray(x), jnp.asarray(scale), 0.1), expected, 1e-6)


def test_rms_norm_is_its_formula() -> None:
    check_rms_norm(rms_norm)
    x = jnp.full((2, 256), 300.0, jnp.bfloat16)  # a bfloat16 sum of 256 squares would stop growing early
    got = rms_norm(x, jnp.ones(256), 1e-5)
    assert got.dtype == jnp.bfloat16 and np.all(np.asarray(got) == 1.0)


def test_rms_norm_mutants_are_caught() -> None:
    def eps_outside(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
        return x / (jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) + eps) * scale

    def centred(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
        return rms_norm(x - x.mean(-1, keepdims=True), scale, eps)

    for mutant in (eps_outside, centred):
        with pytest.raises(AssertionError):
            check_rms_norm(mutant)


def check_swiglu(function: Callable[..., jax.Array]) -> None:
    gate, up = (np.asarray(normal(i, 5, 7), np.float64) for i in range(2))
    close(function(*map(jnp.float32, (gate, up))), gate / (1 + np.exp(-gate)) * up, 1e-5)


def test_swiglu_is_its_formula() -> None:
    check_swiglu(swiglu)
    with pytest.raises(AssertionError):  # gate and up swapped, the usual slip when weights are converted
        check_swiglu(lambda gate, up: swiglu(up, gate))


@pytest.mark.parametrize(
    ("function", "twin", "shapes"),
    [
        (functools.partial(rms_norm, eps=0.1), functools.partial(rms_norm_reference, eps=0.1), [(3, 5, 8), (8,)]),
        (swiglu, swiglu_reference, [(5, 6), (5, 6)]),
    ],
    ids=["rms_norm", "swiglu"],
)
def test_gradients_by_hand_are_those_of_autodiff(
    function: Callable[..., jax.Array], twin: Callable[..., jax.Array], shapes: list[tuple[int, ...]]
) -> None:
    a, b, cotangent = normal(1, *shapes[0], scale=2.0), normal(2, *shapes[1]), normal(3, *shapes[0])

    def gradients(f: Callable[..., jax.Array], dtype: str) -> tuple[jax.Array, ...]:
        return jax.grad(lambda a, b: jnp.sum(f(a, b) * cotangent), (0, 1))(a.astype(dtype), b)

    for got, wanted in zip(gradients(function, "float32"), gradients(twin, "float32"), strict=True):
        close(got, wanted, 1e-5)
    for got, wanted in zip(gradients(function, "bfloat16"), gradients(twin, "float32"), strict=True):
        close(got, wanted, 5e-2)


def kept_bytes(function: Callable[..., jax.Array], *arguments: jax.Array) -> int:
    """What the backward pass of `function` keeps from its forward pass."""
    _, pullback = jax.eval_shape(lambda *x: jax.vjp(function, *x), *arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


def test_norm_and_swiglu_keep_their_low_precision_inputs_only() -> None:
    x, scale = jnp.zeros((64, 32), jnp.bfloat16), jnp.ones(32)
    assert kept_bytes(lambda x, s: rms_norm(x, s, 1e-5), x, scale) == x.nbytes + scale.nbytes
    assert kept_bytes(swiglu, x, x) == 2 * x.nbytes
    assert kept_bytes(lambda x, s: rms_norm_reference(x, s, 1e-5), x, scale) > 3 * x.nbytes
    assert kept_bytes(swiglu_reference, x, x) > 4 * x.nbytes


# --- rope


def rotation_matrix(position: int, head_dim: int, theta: float) -> np.ndarray:
    """R [K, K] with R x = the rotated x: pair i is dims (i, i + K/2), angle position * theta^(-2i/K)."""
    matrix, half = np.zeros((head_dim, head_dim)), head_dim // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / head_dim)
        matrix[i, i] = matrix[i + half, i + half] = np.cos(angle)
        matrix[i, i + half], matrix[i + half, i] = -np.sin(angle), np.sin(angle)
    return matrix


def check_rope(rotate: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
    """`rotate(x_BTHK, positions_BT)` is the rotation matrix of each position, theta 10,000."""
    positions = np.array([[0, 1, 2, 257], [1000, 4095, 7, 7]], np.int32)
    x = normal(0, 2, 4, 3, 8)
    matrices = np.stack([[rotation_matrix(p, 8, 10_000.0) for p in row] for row in positions])
    close(rotate(x, jnp.asarray(positions)), np.einsum("btij,bthj->bthi", matrices, np.asarray(x)), 5e-4)


def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    return apply_rope(x, *rope_tables(positions, x.shape[-1], 10_000.0))


def test_rope_is_the_rotation_matrix() -> None:
    check_rope(rope)


def test_rope_mutants_are_caught() -> None:
    def interleaved(x: jax.Array, positions: jax.Array) -> jax.Array:
        order = jnp.array([0, 2, 4, 6, 1, 3, 5, 7])
        return rope(x[..., order], positions)[..., jnp.argsort(order)]

    def backwards(x: jax.Array, positions: jax.Array) -> jax.Array:
        return rope(x, -positions)

    def rounded(x: jax.Array, positions: jax.Array) -> jax.Array:  # bfloat16 positions: 257 becomes 256
        return rope(x, positions.astype(jnp.bfloat16).astype(jnp.int32))

    for mutant in (interleaved, backwards, rounded):
        with pytest.raises(AssertionError):
            check_rope(mutant)


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)

    def score(query: int, key: int) -> float:
        return float(jnp.sum(rope(q, jnp.array([[query]])) * rope(k, jnp.array([[key]]))))

    for distance in (0, 1, 13):
        scores = [score(start + distance, start) for start in (0, 5, 900)]
        np.testing.assert_allclose(scores, scores[0], atol=2e-3)
    assert abs(score(13, 0) - score(0, 13)) > 1e-2  # but on its sign too
