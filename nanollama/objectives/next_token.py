"""Next-token prediction: the loss of pre-training and of everything that looks like it, and its held-out twin.

Targets arrive shifted and weighted (`nanollama.data.format`); nothing here shifts or masks. Models with experts add
their routers' losses.
"""

from typing import Any

import jax

from nanollama.config import LossConfig
from nanollama.models.decoder import Decoder, head, router_sums
from nanollama.models.feed_forward import ROUTERS
from nanollama.models.lora import DROPOUT_SEEDS
from nanollama.ops.losses import LossSums, cross_entropy_sums, token_log_probs
from nanollama.ops.moe import moe_sums, real_tokens
from nanollama.parallel import context

Batch = dict[str, jax.Array]


def loss_sums(
    params: Any, batch: Batch, decoder: Decoder, loss: LossConfig, *, micro_batches: int = 0
) -> tuple[jax.Array, LossSums]:
    """(sum to minimise, all sums) over the batch's tokens, float32; ready for `jax.value_and_grad(has_aux=True)`.

    batch: tokens, targets, positions, first_key [B, T] int32; weights [B, T] float32, 0 where nothing is learned.
    Without first_key each row is one document. micro_batches: that pass through the mesh's pipeline stages, where it
    has some.
    """
    moe = decoder.model.moe
    batch, hidden_BTD, state = _forward(params, batch, decoder, micro_batches)
    sums = cross_entropy_sums(
        hidden_BTD,
        head(params),
        batch["targets"],
        batch["weights"],
        z_loss=loss.z_loss,
        chunk_tokens=decoder.compute.loss_chunk_tokens,
        vocabulary=decoder.model.vocab_size,
    )
    if moe is not None:
        weight_B, of_rows = batch["weights"].sum(axis=1), router_sums(state)
        if context.size() > 1:
            weight_B = context.row_sums(weight_B)
            of_rows = jax.tree.map(lambda x_LB: context.row_sums(x_LB, axis=1), of_rows)
        routers = moe_sums(of_rows, weight_B, moe.experts_per_token, loss.balance)
        total = sums.total + loss.balance_loss * routers.balance + loss.router_z_loss * routers.z
        sums = sums._replace(total=total, moe=routers)
    return sums.total, sums


def target_log_probs(params: Any, batch: Batch, decoder: Decoder, *, micro_batches: int = 0) -> jax.Array:
    """log p(target) of each token, [B, T] float32, nats. Arguments: as `loss_sums`."""
    batch, hidden_BTD, _ = _forward(params, batch, decoder, micro_batches)
    chunk, size = decoder.compute.loss_chunk_tokens, decoder.model.vocab_size
    logp_BT = token_log_probs(hidden_BTD, head(params), batch["targets"], chunk_tokens=chunk, vocabulary=size)
    return context.to_rows(logp_BT) if context.size() > 1 else logp_BT


def _forward(params: Any, batch: Batch, decoder: Decoder, micro_batches: int) -> tuple[Batch, jax.Array, Any]:
    """(batch, final hidden states, what the routers left), all cut into pieces where the mesh has a context axis."""
    moe, first_key_BT = decoder.model.moe, batch.get("first_key")
    real_BT = None if moe is None else batch["weights"] > 0 if first_key_BT is None else real_tokens(first_key_BT)
    pieces = context.size() > 1
    if pieces:  # a device has two pieces of each of its rows: everything but attention treats them as rows
        names = ("tokens", "positions", "first_key", "targets", "weights", DROPOUT_SEEDS)
        arrays = {name: batch[name] for name in names if name in batch}
        batch = context.to_pieces(arrays if real_BT is None else {**arrays, "real": real_BT})
        first_key_BT, real_BT = batch.get("first_key"), batch.get("real")
    (hidden_BTD, _), state = decoder.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        first_key_BT,
        real_BT=real_BT,
        starts_B=context.starts(*batch["tokens"].shape) if pieces else None,
        seeds_BT=batch.get(DROPOUT_SEEDS),
        micro_batches=micro_batches,
        mutable=[ROUTERS],
    )
    return batch, hidden_BTD, state
