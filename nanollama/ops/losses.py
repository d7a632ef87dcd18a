"""Cross-entropy over a large vocabulary without ever holding [B, T, V] logits.

Losses return sums, so that accumulation and data parallelism give exact token-weighted means (DESIGN law 5).
Targets arrive already shifted; nothing here shifts.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanollama.ops.moe import MoeSums
from nanollama.ops.products import product


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars. Only `total` carries gradients."""

    total: jax.Array  # what is minimised: nll + z, and the routers' losses
    nll: jax.Array  # weight * -log p(target), nats
    z: jax.Array  # z_loss * weight * logsumexp^2
    weight: jax.Array
    correct: jax.Array  # weight where the target is the most likely token
    moe: MoeSums | None = None  # of models with experts; what is minimised of it is in `total`

    def __add__(self, other: "LossSums") -> "LossSums":  # type: ignore[override]
        sums: LossSums = jax.tree.map(operator.add, self, other)
        return sums


def cross_entropy_reference(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float,
    vocabulary: int | None = None,
) -> LossSums:
    """The slow twin: whole logits, plain autodiff."""
    logits_BTV = (hidden_BTD @ head_DV.astype(hidden_BTD.dtype)).astype(jnp.float32)[..., :vocabulary]
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll = jnp.sum(weights_BT * (lse_BT - target_BT))
    z = z_loss * jnp.sum(weights_BT * lse_BT**2)
    correct = jnp.sum(weights_BT * (target_BT >= logits_BTV.max(axis=-1)))
    return LossSums(nll + z, nll, z, jnp.sum(weights_BT), correct)


def cross_entropy_sums(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float,
    chunk_tokens: int,
    vocabulary: int | None = None,
) -> LossSums:
    """Cross-entropy + z-loss sums, at most `chunk_tokens` tokens' logits at one time.

    vocabulary: columns of the head from here on only pad it: their logits are -inf. None: there are none.

    The forward pass computes the gradients chunk by chunk (so logits are computed once, never kept). Chunks
    cut T, not B, so that a batch sharded over devices stays sharded. Gradients flow through `total` only.
    """
    chunks = _split(hidden_BTD, targets_BT, weights_BT, chunk_tokens)
    total, rest = _chunked(hidden_BTD, head_DV, chunks, z_loss, vocabulary)
    return LossSums(total, *rest)


def token_log_probs(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk_tokens: int,
    vocabulary: int | None = None,
) -> jax.Array:
    """log p(target) of each token, [B, T] float32, nats; differentiable, logits never whole.

    vocabulary: as in `cross_entropy_sums`.
    """
    T = targets_BT.shape[1]
    hidden_CBcD, targets_CBc, _ = _split(hidden_BTD, targets_BT, jnp.zeros(targets_BT.shape), chunk_tokens)
    head = head_DV.astype(hidden_BTD.dtype)

    @jax.checkpoint
    def one(hidden_BcD: jax.Array, targets_Bc: jax.Array) -> jax.Array:
        logits = without_padding(jnp.dot(hidden_BcD, head, preferred_element_type=jnp.float32), vocabulary)
        target = jnp.take_along_axis(logits, targets_Bc[..., None], axis=-1)[..., 0]
        return target - jax.nn.logsumexp(logits, axis=-1)

    logp_CBc = jax.lax.map(lambda chunk: one(*chunk), (hidden_CBcD, targets_CBc))
    return jnp.moveaxis(logp_CBc, 0, 1).reshape(targets_BT.shape[0], -1)[:, :T]


def _split(
    hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cut T into C chunks of c, padding the last with weight 0: [C, B, c, D], [C, B, c], [C, B, c]."""
    B, T, D = hidden_BTD.shape
    count = -(-B * T // chunk_tokens)
    length = -(-T // min(count, T))
    count = -(-T // length)
    padding = count * length - T
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0))).reshape(B, count, length, D)
    targets = jnp.pad(targets_BT, ((0, 0), (0, padding))).reshape(B, count, length)
    weights = jnp.pad(weights_BT.astype(jnp.float32), ((0, 0), (0, padding))).reshape(B, count, length)
    return jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0), jnp.moveaxis(weights, 1, 0)


Chunks = tuple[jax.Array, jax.Array, jax.Array]
Rest = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(
    hidden_BTD: jax.Array, head_DV: jax.Array, chunks: Chunks, z_loss: float, vocabulary: int | None
) -> tuple[jax.Array, Rest]:
    """Sums without gradients: what evaluation runs."""
    head = head_DV.astype(hidden_BTD.dtype)
    nll, z, weight, correct = jax.lax.map(lambda chunk: _chunk_sums(chunk, head, z_loss, vocabulary)[0], chunks)
    return nll.sum() + z.sum(), (nll.sum(), z.sum(), weight.sum(), correct.sum())


def without_padding(logits: jax.Array, vocabulary: int | None) -> jax.Array:
    """The logits, -inf from column `vocabulary` on; None or as many as there are: the logits themselves."""
    if vocabulary is None or vocabulary == logits.shape[-1]:
        return logits
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(columns < vocabulary, logits, -jnp.inf)


def _chunk_sums(
    chunk: Chunks, head_DV: jax.Array, z_loss: float, vocabulary: int | None
) -> tuple[Rest, tuple[jax.Array, ...]]:
    hidden_BcD, targets_Bc, weights_Bc = chunk
    hidden_ND, targets_N, weights_N = (
        hidden_BcD.reshape(-1, hidden_BcD.shape[-1]),
        targets_Bc.ravel(),
        weights_Bc.ravel(),
    )
    logits_NV = without_padding(jnp.dot(hidden_ND, head_DV, preferred_element_type=jnp.float32), vocabulary)
    max_N1 = logits_NV.max(axis=-1, keepdims=True)
    exp_NV = jnp.exp(logits_NV - max_N1)
    sum_N1 = exp_NV.sum(axis=-1, keepdims=True)
    lse_N = (jnp.log(sum_N1) + max_N1)[:, 0]
    target_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    sums = (
        jnp.sum(weights_N * (lse_N - target_N)),
        z_loss * jnp.sum(weights_N * lse_N**2),
        jnp.sum(weights_N),
        jnp.sum(weights_N * (target_N >= max_N1[:, 0])),
    )
    return sums, (hidden_ND, targets_N, weights_N, exp_NV, sum_N1, lse_N)


def _chunked_forward(
    hidden_BTD: jax.Array, head_DV: jax.Array, chunks: Chunks, z_loss: float, vocabulary: int | None
) -> tuple[tuple[jax.Array, Rest], tuple[jax.Array, jax.Array]]:
    """As `_chunked`, with d total / d hidden and d total / d head computed while the logits are there."""
    head = head_DV.astype(hidden_BTD.dtype)

    def step(carry: tuple[Rest, jax.Array], chunk: Chunks) -> tuple[tuple[Rest, jax.Array], jax.Array]:
        sums, head_gradient = carry
        more, (hidden_ND, targets_N, weights_N, exp_NV, sum_N1, lse_N) = _chunk_sums(chunk, head, z_loss, vocabulary)
        # d/dlogits of w * (lse - target + z * lse^2) = w * (p * (1 + 2 z lse) - onehot)
        scale_N1 = (weights_N * (1.0 + 2.0 * z_loss * lse_N))[:, None] / sum_N1
        onehot_NV = jax.lax.broadcasted_iota(jnp.int32, exp_NV.shape, 1) == targets_N[:, None]
        logits_gradient = (exp_NV * scale_N1 - jnp.where(onehot_NV, weights_N[:, None], 0.0)).astype(
            head.dtype
        )
        hidden_gradient = product(logits_gradient, head, (((1,), (1,)), ((), ())))
        head_gradient += jax.lax.dot_general(
            hidden_ND, logits_gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        summed = tuple(a + b for a, b in zip(sums, more, strict=True))
        return (summed, head_gradient), hidden_gradient.reshape(chunk[0].shape)  # type: ignore[return-value]

    zero = jnp.zeros((), jnp.float32)
    initial = ((zero, zero, zero, zero), jnp.zeros(head_DV.shape, jnp.float32))
    (sums, head_gradient), gradient_CBcD = jax.lax.scan(step, initial, chunks)
    B, T, D = hidden_BTD.shape
    hidden_gradient = jnp.moveaxis(gradient_CBcD, 0, 1).reshape(B, -1, D)[:, :T]
    return (sums[0] + sums[1], sums), (hidden_gradient, head_gradient.astype(head_DV.dtype))


def _chunked_backward(
    z_loss: float, vocabulary: int | None, residuals: tuple[jax.Array, jax.Array], cotangents: tuple
) -> tuple:
    hidden_gradient, head_gradient = residuals
    total = cotangents[0]
    return (
        hidden_gradient * total.astype(hidden_gradient.dtype),
        head_gradient * total.astype(head_gradient.dtype),
        None,
    )


_chunked.defvjp(_chunked_forward, _chunked_backward)
