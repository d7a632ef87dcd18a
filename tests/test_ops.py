"""Pure functions against slow twins written independently: NumPy loops, rotation matrices, whole logits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.ops.attention import MaskSpec, attend
from nanollama.ops.losses import cross_entropy_reference, cross_entropy_sums, token_log_probs
from nanollama.ops.mlp import swiglu, swiglu_reference
from nanollama.ops.norms import rms_norm, rms_norm_reference
from nanollama.ops.rope import apply_rope, rope_tables

BACKENDS = ["xla_chunked", "reference"]


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(
        scale * np.random.default_rng(seed).standard_normal(shape, np.float32)
    )  # compiles nothing


def close(got: jax.Array, wanted: np.ndarray | jax.Array, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(wanted, np.float64),
                               rtol=tolerance, atol=tolerance)  # fmt: skip


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


# --- attention


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


Attend = Callable[[jax.Array, jax.Array, jax.Array, MaskSpec], jax.Array]


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


# --- losses

Loss = Callable[..., tuple[jax.Array, ...]]


def loss_inputs(rows: int, length: int, vocabulary: int = 53) -> tuple[jax.Array, ...]:
    """hidden, head, targets, weights; weights are 0, 1 and a fraction, so that weighting shows."""
    targets = jax.random.randint(jax.random.key(2), (rows, length), 0, vocabulary)
    weights = jax.random.choice(jax.random.key(3), jnp.array([0.0, 1.0, 0.5]), (rows, length))
    return (
        normal(0, rows, length, 16),
        normal(1, 16, vocabulary, scale=0.5),
        targets,
        weights.at[0, 0].set(1.0),
    )


def check_loss(function: Loss, rows: int, length: int, chunk: int, z_loss: float) -> None:
    """Values and gradients of total / weight equal the whole-logit twin's; zero weight, zero gradient."""
    hidden, head, targets, weights = loss_inputs(rows, length)

    def mean(loss: Loss, hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        sums = loss(hidden, head, targets, weights, z_loss=z_loss)
        return sums[0] / sums[3], sums

    def run(loss: Loss) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
        step = jax.value_and_grad(functools.partial(mean, loss), argnums=(0, 1), has_aux=True)
        (_, sums), gradients = jax.jit(step)(hidden, head)
        return sums, gradients

    (sums, gradients), (plain_sums, plain_gradients) = (
        run(functools.partial(function, chunk_tokens=chunk)), run(cross_entropy_reference),
    )  # fmt: skip
    for got, wanted in zip(jax.tree.leaves(sums), jax.tree.leaves(plain_sums), strict=True):
        close(got, wanted, 2e-5)
    for got, wanted in zip(gradients, plain_gradients, strict=True):
        close(got, wanted, 2e-6)
    assert np.all(np.asarray(gradients[0])[np.asarray(weights) == 0] == 0.0)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 7), (2, 16)])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_chunked_loss_equals_the_plain_one(rows: int, length: int, chunk: int) -> None:
    for z_loss in (0.0, 0.1):
        check_loss(cross_entropy_sums, rows, length, chunk, z_loss)


def test_loss_mutants_are_caught() -> None:
    def shifts_again(
        hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, **kw: float
    ) -> tuple:
        return cross_entropy_sums(hidden, head, jnp.roll(targets, -1, axis=1), weights, **kw)  # type: ignore[arg-type]

    def ignores_weights(
        hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, **kw: float
    ) -> tuple:
        return cross_entropy_sums(hidden, head, targets, jnp.ones_like(weights), **kw)  # type: ignore[arg-type]

    def drops_last_chunk(
        hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, **kw: float
    ) -> tuple:
        kept = weights.at[:, -1].set(0.0)
        sums = cross_entropy_sums(hidden, head, targets, kept, **kw)  # type: ignore[arg-type]
        return (*sums[:3], weights.sum(), sums[4])

    def no_z_gradient(
        hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, **kw: float
    ) -> tuple:
        sums = cross_entropy_sums(
            hidden, head, targets, weights, z_loss=0.0, chunk_tokens=int(kw["chunk_tokens"])
        )
        plain = cross_entropy_reference(hidden, head, targets, weights, z_loss=kw["z_loss"])
        return (sums.total + jax.lax.stop_gradient(plain.z), sums.nll, plain.z, *sums[3:])

    for mutant in (shifts_again, ignores_weights, drops_last_chunk, no_z_gradient):
        with pytest.raises(AssertionError):
            check_loss(mutant, 3, 7, 5, 0.1)


def test_zero_weights_give_zero_sums_and_no_nan() -> None:
    hidden, head, targets, weights = loss_inputs(2, 5)
    total, gradient = jax.value_and_grad(
        lambda h: cross_entropy_sums(h, head, targets, 0 * weights, z_loss=0.1, chunk_tokens=4).total
    )(hidden)
    assert float(total) == 0.0 and np.all(np.asarray(gradient) == 0.0)


def test_loss_in_bfloat16_stays_near_float32() -> None:
    hidden, head, targets, weights = loss_inputs(2, 33)

    def run(dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        def total(head: jax.Array) -> jax.Array:
            return cross_entropy_sums(
                hidden.astype(dtype), head, targets, weights, z_loss=1e-4, chunk_tokens=16
            ).total

        return jax.jit(jax.value_and_grad(total))(head)

    (low, low_gradient), (full, full_gradient) = run(jnp.dtype("bfloat16")), run(jnp.dtype("float32"))
    assert low_gradient.dtype == jnp.float32  # of the float32 master
    np.testing.assert_allclose(low, full, rtol=5e-3)
    error = np.linalg.norm(low_gradient - full_gradient) / np.linalg.norm(full_gradient)
    assert error < 1e-2, f"relative gradient error {error:.4f}; 8 bits of mantissa explain about 0.004"


def temporary_bytes(loss: Loss, tokens: int, vocabulary: int) -> int:
    """Of the compiled value-and-gradient step; nothing is run."""
    shapes = [(1, tokens, 64), (64, vocabulary), (1, tokens), (1, tokens)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def total(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return loss(hidden, head, targets, weights, z_loss=1e-4)[0]

    return (
        jax.jit(jax.grad(total, argnums=(0, 1)))
        .lower(*arguments)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def check_memory(loss: Loss) -> None:
    # 4,096 tokens in chunks of 256: a chunk's logits, exponentials and gradients are 1/16 of the whole ones;
    # the step also keeps a head gradient and hidden states, which are 1/50 of the whole logits here.
    tokens, vocabulary, chunk = 4096, 8192, 256
    whole = temporary_bytes(cross_entropy_reference, tokens, vocabulary)
    chunked = temporary_bytes(functools.partial(loss, chunk_tokens=chunk), tokens, vocabulary)
    assert whole >= tokens * vocabulary * 4, "the twin is expected to hold whole logits"
    assert chunked < whole / 8, f"{chunked / 2**20:.0f} MiB chunked, {whole / 2**20:.0f} MiB whole"


def test_chunked_loss_never_holds_the_logits() -> None:
    check_memory(cross_entropy_sums)

    def one_chunk(*arguments: jax.Array, z_loss: float, chunk_tokens: int) -> tuple[jax.Array, ...]:
        return cross_entropy_sums(*arguments, z_loss=z_loss, chunk_tokens=4096)

    with pytest.raises(AssertionError):
        check_memory(one_chunk)


@pytest.mark.parametrize("chunk", [1, 6, 1024])
def test_token_log_probs_are_the_log_softmax(chunk: int) -> None:
    hidden, head, targets, _ = loss_inputs(2, 9)

    def plain(hidden: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], -1)[..., 0]

    def ours(hidden: jax.Array) -> jax.Array:
        return token_log_probs(hidden, head, targets, chunk_tokens=chunk)

    close(ours(hidden), plain(hidden), 1e-5)
    cotangent = normal(5, 2, 9)
    got, wanted = (jax.grad(lambda h, f=f: jnp.sum(f(h) * cotangent))(hidden) for f in (ours, plain))
    close(got, wanted, 1e-5)
