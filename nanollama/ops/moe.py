"""Mixture of experts: who is chosen, how the chosen ones are computed, and how even their loads are.

Pure; knows neither parameters nor meshes. Letters as in `models.decoder`, and
    E experts    J experts per token    F width of one    C slots of an expert    M = N * J assignments

The router is float32 throughout: a rounded score chooses another expert. There are five ways to compute the same sum
over a token's experts: `dropless` (tokens sorted by expert, one ragged product), `blocked` (the same in dense blocks,
for CPU), `grouped` (the same blocks through our kernels, for GPU), `capacity` (an equal number of slots per expert; the
same sum unless a token finds no slot, which is counted) and `dense`, the slow twin (every expert on every token).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanollama.config import MoeConfig
from nanollama.data.strict import FieldError
from nanollama.kernels import grouped as kernels
from nanollama.ops.device import device
from nanollama.ops.mlp import swiglu


class Routing(NamedTuple):
    """Each token's experts."""

    experts_NJ: jax.Array  # int32
    weights_NJ: jax.Array  # float32: what each one's output is multiplied by
    scores_NE: jax.Array  # float32, positive, sum 1: what the balance loss evens out
    logsumexp_N: jax.Array  # of the logits


class Experts(NamedTuple):
    """Weights of E SwiGLU feed-forwards."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


class RouterSums(NamedTuple):
    """What one layer's router did, summed over the real tokens of each row; float32, [B] or [B, E].

    Rows are kept apart because the sequence-wise loss needs them; whatever is made of them is a sum over rows.
    """

    tokens_B: jax.Array
    load_BE: jax.Array  # assignments
    scores_BE: jax.Array
    z_B: jax.Array  # logsumexp^2
    dropped_B: jax.Array  # assignments without a slot


class MoeSums(NamedTuple):
    """What the layers of a batch's mixtures did: sums over rows, ready to be added up over micro-batches and devices.

    balance, z: per row the mean over its real tokens, times the row's loss weight, summed over layers; divided by the
    batch's weight they are means in which a row counts by its labels. Only these two carry gradients.
    """

    balance: jax.Array  # `uneven`
    z: jax.Array  # logsumexp^2
    load_LE: jax.Array  # assignments
    dropped: jax.Array  # assignments without a slot


def route(logits_NE: jax.Array, moe: MoeConfig, bias_E: jax.Array | None = None) -> Routing:
    """Choose experts by float32 logits.

    softmax (Mixtral, arXiv:2401.04088; Qwen-MoE; DeepSeek V2, arXiv:2405.04434) or sigmoid scores (DeepSeek V3,
    arXiv:2412.19437). The bias is added for choosing only. With groups, only the best ones are chosen from: judged by
    their best expert (V2), or with sigmoid by the sum of their two best (V3).
    """
    scores_NE = jax.nn.softmax(logits_NE) if moe.scoring == "softmax" else jax.nn.sigmoid(logits_NE)
    choice_NE = jax.lax.stop_gradient(scores_NE)
    if bias_E is not None:
        choice_NE += jax.lax.stop_gradient(bias_E)
    if moe.groups > 1:
        choice_NGX = choice_NE.reshape(len(choice_NE), moe.groups, -1)
        judged = 1 if moe.scoring == "softmax" else 2
        group_NG = jax.lax.top_k(choice_NGX, judged)[0].sum(axis=-1)
        _, best_Nk = jax.lax.top_k(group_NG, moe.groups_per_token)
        kept_NG = jnp.any(best_Nk[..., None] == jnp.arange(moe.groups), axis=1)
        choice_NE = jnp.where(kept_NG[..., None], choice_NGX, -jnp.inf).reshape(choice_NE.shape)
    _, experts_NJ = jax.lax.top_k(choice_NE, moe.experts_per_token)
    chosen_NJE = experts_NJ[..., None] == jnp.arange(scores_NE.shape[1])  # a look-up's gradient would be a scatter
    weights_NJ = jnp.sum(jnp.where(chosen_NJE, scores_NE[:, None], 0.0), axis=-1)
    if moe.normalize:
        weights_NJ /= weights_NJ.sum(axis=1, keepdims=True) + 1e-20  # sigmoids can all be 0
    if moe.scoring == "sigmoid":
        scores_NE /= scores_NE.sum(axis=1, keepdims=True) + 1e-20
    return Routing(experts_NJ, weights_NJ * moe.scale, scores_NE, jax.nn.logsumexp(logits_NE, axis=-1))


def mix(
    x_ND: jax.Array, routing: Routing, experts: Experts, *, path: str, factor: float, real_N: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The experts' weighted sum [N, D] by the path of that name, and which assignments were dropped, if any can be.

    Errors: those of `resolve`.
    """
    path = resolve(path, routing.experts_NJ.size, experts.gate_EDF.shape)
    if path == "capacity":
        return capacity(x_ND, routing, experts, factor=factor, real_N=real_N)
    return PATHS[path](x_ND, routing, experts), None


def resolve(path: str, assignments: int, shape_EDF: tuple[int, ...]) -> str:
    """The path that `mix` will take; auto: blocked on CPU, grouped on GPU where it can, else dropless.

    On two CPU cores, forward and backward of 2048 tokens of width 256 through 2 of 8 experts of width 512 take 0.40
    processor seconds blocked, 1.60 dropless, 0.88 dense, 0.25 with capacity 1.25.
    Errors: ValueError on an unknown path, FieldError where a path cannot do what is asked.
    """
    if path not in ("auto", "capacity", *PATHS):
        raise ValueError(f"moe: unknown path {path!r}; known: auto, capacity, {', '.join(PATHS)}")
    where, reason = device()[0], kernels.why_not(assignments + shape_EDF[0] * kernels.ROWS, *shape_EDF)
    if path == "auto":
        return {"cpu": "blocked", "gpu": "dropless" if reason else "grouped"}.get(where, "dropless")
    if path.startswith("grouped"):
        if path == "grouped" and where != "gpu":
            reason = f"it is for a GPU, and this program is for a {where.upper()}"
        if reason:
            wrong = f"{path!r} cannot compute this: {reason}"
            raise FieldError("config.compute.moe", wrong, "'auto' takes one that can.")
    return path


def dense(x_ND: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """The slow twin: every expert on every token, one expert after another."""
    chosen_NJE = routing.experts_NJ[..., None] == jnp.arange(len(experts.gate_EDF))
    weights_EN = jnp.sum(chosen_NJE * routing.weights_NJ[..., None], axis=1).T

    def add(y_ND: jax.Array, expert: tuple[Experts, jax.Array]) -> tuple[jax.Array, None]:
        (gate_DF, up_DF, down_FD), weight_N = expert
        out_ND = swiglu(x_ND @ gate_DF, x_ND @ up_DF) @ down_FD
        return y_ND + weight_N[:, None] * out_ND, None

    y_ND, _ = jax.lax.scan(add, jnp.zeros(x_ND.shape, jnp.float32), (experts, weights_EN))
    return y_ND.astype(x_ND.dtype)


def dropless(x_ND: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """Assignments sorted by expert, then each product is one ragged matrix product (arXiv:2211.15841)."""
    (N, D), E, J = x_ND.shape, len(experts.gate_EDF), routing.experts_NJ.shape[1]
    expert_M = routing.experts_NJ.reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    place_M = jnp.argsort(order_M)  # of each assignment in the order
    sizes_E = jnp.sum(expert_M[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    sorted_MD = _take(jnp.repeat(x_ND, J, axis=0), order_M, place_M)
    gate_MF, up_MF = (jax.lax.ragged_dot(sorted_MD, w, sizes_E) for w in (experts.gate_EDF, experts.up_EDF))
    out_MD = jax.lax.ragged_dot(swiglu(gate_MF, up_MF), experts.down_EFD, sizes_E)
    return _combine(_take(out_MD, place_M, order_M).reshape(N, J, D), routing)


def capacity(
    x_ND: jax.Array, routing: Routing, experts: Experts, *, factor: float, real_N: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(sum over the experts that had a slot left, dropped_NJ bool): C = factor * M / E slots per expert.

    Slots go by rank of choice, then by position (arXiv:2006.16668): a token loses its last choice first. Tokens that
    are not real take no slots. Every shape is known when compiling, and every product is dense.
    """
    (N, D), E, J = x_ND.shape, len(experts.gate_EDF), routing.experts_NJ.shape[1]
    C, M = slots(N, J, E, factor), N * J
    expert_NJ = routing.experts_NJ if real_N is None else jnp.where(real_N[:, None], routing.experts_NJ, E)
    chosen_JNE = expert_NJ.T[..., None] == jnp.arange(E)
    before_JN = jnp.cumsum(chosen_JNE.reshape(M, E), axis=0, dtype=jnp.int32).reshape(J, N, E)
    rank_NJ = jnp.sum(jnp.where(chosen_JNE, before_JN - 1, 0), axis=-1).T
    has_slot_NJ = (expert_NJ < E) & (rank_NJ < C)
    slot_M = jnp.where(has_slot_NJ, expert_NJ * C + rank_NJ, E * C).reshape(M)  # E * C: none
    holder_S = jnp.full(E * C + 1, M, jnp.int32).at[slot_M].set(jnp.arange(M, dtype=jnp.int32))[:-1]  # M: nobody
    x_ECD = _take(jnp.repeat(x_ND, J, axis=0), holder_S, slot_M).reshape(E, C, D)
    gate_ECF, up_ECF = (jnp.einsum("ecd,edf->ecf", x_ECD, w) for w in (experts.gate_EDF, experts.up_EDF))
    out_ECD = jnp.einsum("ecf,efd->ecd", swiglu(gate_ECF, up_ECF), experts.down_EFD)
    out_NJD = _take(out_ECD.reshape(E * C, D), slot_M, holder_S).reshape(N, J, D)
    return _combine(out_NJD, routing), (expert_NJ < E) & ~has_slot_NJ


class Blocks(NamedTuple):
    """Assignments sorted by expert into C = M / rows + E blocks of one expert each; an expert's last is filled up."""

    holder_S: jax.Array  # the assignment in each of the C * rows slots; M: nobody
    slot_M: jax.Array  # of each assignment
    expert_C: jax.Array  # of each block; what nobody needed counts as the last expert's
    end_E: jax.Array  # the first block after each expert's


def in_blocks(routing: Routing, num_experts: int, rows: int) -> Blocks:
    """Where each assignment goes."""
    E, M = num_experts, routing.experts_NJ.size
    C = -(-M // rows) + E
    expert_M = routing.experts_NJ.reshape(-1)
    chosen_ME = expert_M[:, None] == jnp.arange(E)
    rank_M = jnp.sum(jnp.where(chosen_ME, jnp.cumsum(chosen_ME, axis=0, dtype=jnp.int32) - 1, 0), axis=1)
    blocks_E = -(-chosen_ME.sum(axis=0, dtype=jnp.int32) // rows)
    end_E = jnp.cumsum(blocks_E)
    slot_M = (end_E - blocks_E)[expert_M] * rows + rank_M
    holder_S = (
        jnp.full(C * rows, M, jnp.int32).at[slot_M].set(jnp.arange(M, dtype=jnp.int32), unique_indices=True)
    )
    expert_C = jnp.minimum(jnp.sum(jnp.arange(C)[:, None] >= end_E, axis=1, dtype=jnp.int32), E - 1)
    return Blocks(holder_S, slot_M, expert_C, end_E)


def blocked(x_ND: jax.Array, routing: Routing, experts: Experts, *, rows: int = 128) -> jax.Array:
    """`dropless` for CPU, where a ragged product is slow: every product is dense, a block times a copy of its expert's
    weights."""
    (N, D), E, J = x_ND.shape, len(experts.gate_EDF), routing.experts_NJ.shape[1]
    blocks = in_blocks(routing, E, rows)
    is_of_CE = (blocks.expert_C[:, None] == jnp.arange(E)).astype(x_ND.dtype)
    x_SD = _take(jnp.repeat(x_ND, J, axis=0), blocks.holder_S, blocks.slot_M)
    x_CRD = x_SD.reshape(-1, rows, D)
    # Copies by a product with ones: exact, and so is its gradient, a sum over an expert's blocks.
    gate_CDF, up_CDF, down_CFD = (jnp.einsum("ce,eio->cio", is_of_CE, weights) for weights in experts)
    hidden_CRF = swiglu(jnp.einsum("crd,cdf->crf", x_CRD, gate_CDF), jnp.einsum("crd,cdf->crf", x_CRD, up_CDF))
    out_CRD = jnp.einsum("crf,cfd->crd", hidden_CRF, down_CFD)
    return _combine(_take(out_CRD.reshape(-1, D), blocks.slot_M, blocks.holder_S).reshape(N, J, D), routing)


def grouped(x_ND: jax.Array, routing: Routing, experts: Experts, *, interpret: bool = False) -> jax.Array:
    """`dropless` for GPUs, by our kernels: a block times the weights of its expert, which nothing copies."""
    (N, D), E, J = x_ND.shape, len(experts.gate_EDF), routing.experts_NJ.shape[1]
    blocks = in_blocks(routing, E, kernels.ROWS)

    def product(x_SI: jax.Array, weights_EIO: jax.Array) -> jax.Array:
        return kernels.grouped_matmul(x_SI, weights_EIO, blocks.expert_C, blocks.end_E, interpret=interpret)

    x_SD = _take(jnp.repeat(x_ND, J, axis=0), blocks.holder_S, blocks.slot_M)
    out_SD = product(swiglu(product(x_SD, experts.gate_EDF), product(x_SD, experts.up_EDF)), experts.down_EFD)
    return _combine(_take(out_SD, blocks.slot_M, blocks.holder_S).reshape(N, J, D), routing)


def slots(tokens: int, experts_per_token: int, num_experts: int, factor: float) -> int:
    """Slots of each expert; never more than there are tokens."""
    return min(tokens, math.ceil(factor * tokens * experts_per_token / num_experts))


def router_sums(routing: Routing, real_BT: jax.Array, dropped_NJ: jax.Array | None = None) -> RouterSums:
    """Sums over the tokens that `real_BT` marks."""
    B, T = real_BT.shape
    real_BT1 = real_BT.astype(jnp.float32)[..., None]
    E = routing.scores_NE.shape[1]
    chosen_NE = jnp.sum(routing.experts_NJ[..., None] == jnp.arange(E), axis=1, dtype=jnp.float32)
    dropped_N = jnp.zeros(B * T) if dropped_NJ is None else dropped_NJ.sum(axis=1, dtype=jnp.float32)

    def total(x_NX: jax.Array) -> jax.Array:
        return jnp.sum(x_NX.reshape(B, T, -1) * real_BT1, axis=1)

    return RouterSums(
        real_BT1[..., 0].sum(axis=1),
        total(chosen_NE),
        total(routing.scores_NE),
        total(routing.logsumexp_N**2)[:, 0],
        total(dropped_N)[:, 0],
    )


def moe_sums(sums: RouterSums, weight_B: jax.Array, experts_per_token: int, balance: str) -> MoeSums:
    """Of [L, B, ...] router sums; weight_B: each row's loss weight.

    balance: "sequence", loads even within each row (DeepSeek V2 and V3); "batch", over all rows here (Switch, Mixtral),
    which is a product of means and so no sum over micro-batches.
    """
    tokens_LB, load_LBE, scores_LBE = sums.tokens_B, sums.load_BE, sums.scores_BE
    z_LB, load_LE = sums.z_B / jnp.maximum(tokens_LB, 1.0), load_LBE.sum(axis=1)
    if balance == "batch":
        load_LBE, scores_LBE, tokens_LB = (x.sum(axis=1, keepdims=True) for x in (load_LBE, scores_LBE, tokens_LB))
    uneven_LB = uneven(load_LBE, scores_LBE, tokens_LB, experts_per_token)
    return MoeSums(jnp.sum(weight_B * uneven_LB), jnp.sum(weight_B * z_LB), load_LE, sums.dropped_B.sum())


def real_tokens(first_key_BT: jax.Array) -> jax.Array:
    """Which tokens are not padding, bool [B, T].

    Padding is at the end of a row and sees only itself (`data.format`). A piece of one single token right before it
    looks alike and counts as padding.
    """
    alone_BT = first_key_BT == jnp.arange(first_key_BT.shape[1])
    return jax.lax.cummin(alone_BT.astype(jnp.int32), axis=1, reverse=True) == 0


def uneven(load_XE: jax.Array, scores_XE: jax.Array, tokens_X: jax.Array, experts_per_token: int) -> jax.Array:
    """E sum_e f_e P_e, [X]: 1 when loads are even, more the less they are.

    f_e: share of the assignments that expert e got; P_e: mean score. arXiv:2101.03961 equations 4 to 6 with one
    expert per token, DeepSeek V3's equations 17 to 20 with X = rows; the definition in transformers is
    experts_per_token times this.
    """
    tokens_X1 = jnp.maximum(tokens_X, 1.0)[..., None]
    share_XE = load_XE / (tokens_X1 * experts_per_token)
    return load_XE.shape[-1] * jnp.sum(jax.lax.stop_gradient(share_XE) * scores_XE / tokens_X1, axis=-1)


def updated_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """Balancing without an auxiliary loss (arXiv:2408.15664, algorithm 1): each bias one step of `rate` up where the
    expert's load was below the layer's mean, down where it was above."""
    return bias_LE + rate * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)


def _combine(out_NJD: jax.Array, routing: Routing) -> jax.Array:
    y_ND = jnp.sum(out_NJD.astype(jnp.float32) * routing.weights_NJ[..., None], axis=1)
    return y_ND.astype(out_NJD.dtype)


@jax.custom_vjp
def _take(x_RD: jax.Array, index_S: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """x_RD[index_S], 0 where the index is R. inverse_R: where each row went, S where nowhere.

    So the gradient is a look-up too: a scatter would be slow, and add in another order each time on a GPU.
    """
    del inverse_R
    return jnp.take(x_RD, index_S, axis=0, mode="fill", fill_value=0)


def _take_forward(x_RD: jax.Array, index_S: jax.Array, inverse_R: jax.Array) -> tuple[jax.Array, Any]:
    return _take(x_RD, index_S, inverse_R), (index_S, inverse_R)


def _take_backward(residuals: Any, gradient_SD: jax.Array) -> tuple[jax.Array, None, None]:
    index_S, inverse_R = residuals
    return _take(gradient_SD, inverse_R, index_S), None, None


_take.defvjp(_take_forward, _take_backward)

PATHS: dict[str, Callable[[jax.Array, Routing, Experts], jax.Array]] = {
    "dropless": dropless,
    "blocked": blocked,
    "grouped": grouped,
    "grouped_interpret": functools.partial(grouped, interpret=True),
    "dense": dense,
}
