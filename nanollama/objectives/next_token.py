"""Next-token prediction: the loss of pre-training and of everything that looks like it.

Targets arrive shifted and weighted (`nanollama.data.format`); nothing here shifts or masks.
"""

from typing import Any

import jax

from nanollama.config import LossConfig
from nanollama.models.decoder import Decoder, head
from nanollama.models.lora import dropout_rngs
from nanollama.ops.losses import LossSums, cross_entropy_sums

Batch = dict[str, jax.Array]


def loss_sums(params: Any, batch: Batch, decoder: Decoder, loss: LossConfig) -> tuple[jax.Array, LossSums]:
    """(sum to minimise, all sums) over the batch's tokens, float32; ready for `jax.value_and_grad(has_aux=True)`.

    batch: tokens, targets, positions, first_key [B, T] int32; weights [B, T] float32, 0 where nothing is learned.
    Without first_key each row is one document.
    """
    hidden_BTD, _ = decoder.apply(
        {"params": params}, batch["tokens"], batch["positions"], batch.get("first_key"), rngs=dropout_rngs(batch)
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
    return sums.total, sums
