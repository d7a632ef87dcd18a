"""Next-token prediction: the loss of pre-training and of everything that looks like it.

Targets arrive shifted and weighted (`nanollama.data.format`); nothing here shifts or masks. Models with experts add
their routers' losses.
"""

from typing import Any

import jax

from nanollama.config import LossConfig
from nanollama.models.decoder import Decoder, head, router_sums
from nanollama.models.feed_forward import ROUTERS
from nanollama.models.lora import dropout_rngs
from nanollama.ops.losses import LossSums, cross_entropy_sums
from nanollama.ops.moe import moe_sums, real_tokens

Batch = dict[str, jax.Array]


def loss_sums(params: Any, batch: Batch, decoder: Decoder, loss: LossConfig) -> tuple[jax.Array, LossSums]:
    """(sum to minimise, all sums) over the batch's tokens, float32; ready for `jax.value_and_grad(has_aux=True)`.

    batch: tokens, targets, positions, first_key [B, T] int32; weights [B, T] float32, 0 where nothing is learned.
    Without first_key each row is one document.
    """
    moe, first_key_BT = decoder.model.moe, batch.get("first_key")
    real_BT = None if moe is None else batch["weights"] > 0 if first_key_BT is None else real_tokens(first_key_BT)
    (hidden_BTD, _), state = decoder.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        first_key_BT,
        real_BT=real_BT,
        mutable=[ROUTERS],
        rngs=dropout_rngs(batch),
    )
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
        weight_B = batch["weights"].sum(axis=1)
        routers = moe_sums(router_sums(state), weight_B, moe.experts_per_token, loss.balance)
        total = sums.total + loss.balance_loss * routers.balance + loss.router_z_loss * routers.z
        sums = sums._replace(total=total, moe=routers)
    return sums.total, sums
