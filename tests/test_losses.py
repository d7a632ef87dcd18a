"""The chunked loss against the one that makes all logits: values, gradients, memory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal

from nanollama.ops.losses import cross_entropy_reference, cross_entropy_sums, token_log_probs

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
    """Sums, with gradients (training) and without (evaluation), and gradients of total / weight equal the whole-logit
    twin's; zero weight, zero gradient."""
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
    evaluated = jax.jit(functools.partial(function, chunk_tokens=chunk, z_loss=z_loss))(hidden, head, targets, weights)
    for several in (sums, evaluated):
        for got, wanted in zip(jax.tree.leaves(several), jax.tree.leaves(plain_sums), strict=True):
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
