"""Attention as XLA computes it, in chunks and whole, against a twin in NumPy that loops over queries."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal

from nanollama.ops.attention import MaskSpec, attend

BACKENDS = ["xla_chunked", "reference"]
Attend = Callable[[jax.Array, jax.Array, jax.Array, MaskSpec], jax.Array]


def attention_twin(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, first_key: np.ndarray, start: int, scale: float | None = None
) -> np.ndarray:
    """Full attention with repeated KV heads, a loop over queries, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(q.shape[:3]):
        group = h // (q.shape[2] // k.shape[2])
        keys = slice(first_key[b, t], start + t + 1)
        scores = k[b, keys, group] @ q[b, t, h] * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, keys, group]
    return out


def documents(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """first_key [rows, length] of random documents; the row's last eighth is padding, which sees itself."""
    generator = np.random.default_rng(seed)
    starts = generator.random((rows, length)) < 0.1
    starts[:, 0] = True
    index = np.arange(length)
    first_key = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    padding = length - length // 8
    first_key[:, padding:] = index[padding:]
    return first_key.astype(np.int32)


def check_attention(function: Attend, rows: int, length: int, keys: int, heads: tuple[int, int]) -> None:
    """Queries are the last `length` of `keys` positions that are written; later cache slots hold garbage."""
    H, G = heads
    q, k, v = normal(1, rows, length, H, 8), normal(2, rows, keys, G, 8), normal(3, rows, keys, G, 8)
    start = 0 if keys == length else keys - length - 2
    first_key = documents(rows, start + length)[:, start:]
    mask = MaskSpec(jnp.asarray(first_key), None if keys == length else jnp.int32(start))
    if keys != length:
        k, v = k.at[:, start + length :].set(1e4), v.at[:, start + length :].set(1e4)
    close(jax.jit(function)(q, k, v, mask), attention_twin(q, k, v, first_key, start), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "length", "keys"),
    [(1, 1, 1), (2, 7, 7), (1, 64, 64), (2, 65, 65), (1, 130, 130), (3, 1, 33), (2, 5, 80)],
)
def test_attention_is_full_attention_with_repeated_heads(
    backend: str, rows: int, length: int, keys: int
) -> None:
    for heads in [(4, 4), (4, 2), (6, 1)]:
        check_attention(functools.partial(attend, backend=backend), rows, length, keys, heads)


def test_attention_mutants_are_caught() -> None:
    def wrong_groups(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
        H, G = q.shape[2], k.shape[2]  # head h reads KV head h % G instead of h // (H/G)
        order = jnp.arange(H).reshape(H // G, G).T.ravel()
        return attend(q[:, :, order], k, v, mask)[:, :, jnp.argsort(order)]

    def sees_next(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
        start = 0 if mask.query_start is None else mask.query_start
        return attend(q, k, v, MaskSpec(mask.first_key_BT, jnp.int32(start) + 1), backend="reference")

    def leaks(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
        return attend(q, k, v, MaskSpec(jnp.zeros_like(mask.first_key_BT), mask.query_start))

    for mutant in (wrong_groups, sees_next, leaks):
        with pytest.raises(AssertionError):
            check_attention(mutant, 2, 65, 65, (4, 2))
        with pytest.raises(AssertionError):
            check_attention(mutant, 2, 5, 80, (4, 2))


@pytest.mark.parametrize("cached", [False, True])
def test_attention_gradients_equal_the_reference(cached: bool) -> None:
    length, keys = (70, 70) if not cached else (70, 90)
    q, k, v = normal(1, 2, length, 4, 8), normal(2, 2, keys, 2, 8), normal(3, 2, keys, 2, 8)
    mask = MaskSpec(jnp.asarray(documents(2, length)), jnp.int32(0) if cached else None)
    cotangent = normal(4, 2, length, 4, 8)

    def gradients(backend: str) -> tuple[jax.Array, ...]:
        return jax.jit(
            jax.grad(lambda *x: jnp.sum(attend(*x, mask, backend=backend) * cotangent), (0, 1, 2))
        )(q, k, v)

    for got, wanted in zip(gradients("xla_chunked"), gradients("reference"), strict=True):
        close(got, wanted, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_may_be_narrower_than_keys_and_the_scale_another(backend: str) -> None:
    """As latent attention (MLA) has it."""
    q, k, v = normal(1, 2, 70, 4, 12), normal(2, 2, 70, 2, 12), normal(3, 2, 70, 2, 8)
    first_key = documents(2, 70)
    mask, cotangent = MaskSpec(jnp.asarray(first_key)), normal(4, 2, 70, 4, 8)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, backend: str) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, mask, backend=backend, scale=0.2)
        return jnp.sum(out * cotangent), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    (_, out), gradients = run(q, k, v, backend)
    close(out, attention_twin(*map(np.asarray, (q, k, v)), first_key, 0, 0.2), 2e-5)
    for got, wanted in zip(gradients, run(q, k, v, "reference")[1], strict=True):
        close(got, wanted, 2e-5)


def test_attention_in_bfloat16_stays_near_float32() -> None:
    q, k, v = normal(1, 1, 65, 4, 16), normal(2, 1, 65, 2, 16), normal(3, 1, 65, 2, 16)
    mask = MaskSpec(jnp.asarray(documents(1, 65)))
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = attend(*low, mask)
    assert got.dtype == jnp.bfloat16
    close(got, attend(*[x.astype(jnp.float32) for x in low], mask, backend="reference"), 2e-2)


def test_attention_refuses_what_it_cannot_do() -> None:
    q, k = jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 2, 4))
    mask = MaskSpec(jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 KV heads"):
        attend(q, k, k, mask)
    with pytest.raises(ValueError, match=r"2 queries and 5 keys need mask\.query_start"):
        attend(jnp.zeros((1, 2, 4, 4)), jnp.zeros((1, 5, 2, 4)), jnp.zeros((1, 5, 2, 4)), mask)
    with pytest.raises(ValueError, match="disagree: q and k share their head dim"):
        attend(k, k[..., :3], k, mask)
    with pytest.raises(ValueError, match="unknown backend 'flash'"):
        attend(k, k, k, mask, backend="flash")
