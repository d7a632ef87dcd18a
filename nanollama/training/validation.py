"""Held-out loss: every row of a validation split once, per token, per byte and per source.

Owns the figures' conventions: nll in nats per predicted token; a document is bos + tokens + eos, bos is not
predicted, eos is; the first token of a later row of a document longer than a row is not, though its bytes count;
perplexity = exp(nll); bits per byte = nll of all tokens / ln 2 / UTF-8 bytes of the text. Knows nothing of the loop
or of checkpoints; `evals.perplexity` uses it too.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanollama.config import Config
from nanollama.data.loader import validation_batches
from nanollama.data.mixture import open_mixture
from nanollama.models.decoder import Decoder, Params
from nanollama.objectives import next_token
from nanollama.parallel.mesh import batch_sharding


class Validation:
    """The validation split of a run's data, scored on demand.

    Errors on construction: those of `open_mixture`, so that a missing split is found before the first step.
    """

    def __init__(self, config: Config, decoder: Decoder, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._mixture = open_mixture(config.data, split="validation", vocab_size=config.model.vocab_size)
        self._bytes_S = np.asarray([
            member.packed.source_count("validation", source, "bytes")
            for member in self._mixture.sets for source in member.packed.sources
        ])
        self._token_nll = make_token_nll(decoder, mesh, config.batch.micro_batches)

    def run(self, params: Params) -> dict[str, Any]:
        """Figures over the split (or its first `config.evaluation.batches` batches), whole and per source."""
        mixture, limit = self._mixture, self._config.evaluation.batches
        sums = np.zeros((2, len(mixture.sources)))
        for batch in validation_batches(mixture, global_batch=self._config.batch.global_rows, limit=limit):
            arrays = put_whole(batch.arrays, batch_sharding(self._mesh))
            nll_BT = jax.device_get(self._token_nll(params, arrays))
            sums += sum_by_source(nll_BT, batch.arrays["weights"], batch.source_ids_BT, len(mixture.sources))
        bytes_S = self._bytes_S
        if limit:  # the bytes of a part of the split: as many per label as in all of it
            bytes_S = bytes_S * sums[1] / np.maximum(mixture.source_labels, 1)
        return figures_by_source(sums[0], sums[1], bytes_S, mixture.sources)


def put_whole(arrays: Mapping[str, np.ndarray], where: NamedSharding) -> dict[str, jax.Array]:
    """Arrays that every process has whole, on `where`: each process puts the part of its devices."""
    with jax.transfer_guard("allow"):  # said explicitly, like device_put, which would compare the processes' arrays
        return {name: jax.make_array_from_callback(x.shape, where, x.__getitem__) for name, x in arrays.items()}


def make_token_nll(
    decoder: Decoder, mesh: Mesh, micro_batches: int = 0
) -> Callable[[Params, Mapping[str, jax.Array]], jax.Array]:
    """Compiled (params, batch) -> weight * -log p(target), [B, T] float32, whole on every device.

    micro_batches: that pass through the mesh's pipeline stages; 0: each device goes through all layers.
    """

    def token_nll(params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            logp_BT = next_token.target_log_probs(params, dict(batch), decoder, micro_batches=micro_batches)
        return -batch["weights"] * logp_BT

    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(token_nll, in_shardings=(None, batch_sharding(mesh)), out_shardings=whole)


def sum_by_source(
    values_BT: np.ndarray, weights_BT: np.ndarray, source_ids_BT: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of `values` and of `weights` per source, float64 [count] each."""
    ids = source_ids_BT.ravel()
    return (
        np.bincount(ids, values_BT.ravel().astype(np.float64), count),
        np.bincount(ids, weights_BT.ravel().astype(np.float64), count),
    )


def figures(nll: float, tokens: float, utf8_bytes: float) -> dict[str, float]:
    """Per token and per byte figures of an nll sum (nats) over `tokens` predictions and `utf8_bytes` of text."""
    mean = float(nll) / float(tokens)
    return {
        "nll": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": float(nll) / math.log(2) / float(utf8_bytes) if utf8_bytes else math.nan,
        "tokens": int(tokens),
        "bytes": int(utf8_bytes),
    }


def figures_by_source(
    nll_S: np.ndarray, tokens_S: np.ndarray, bytes_S: np.ndarray, names: Iterable[str]
) -> dict[str, Any]:
    """`figures` of everything, and under "sources" of each source that has predictions."""
    sums = zip(names, nll_S, tokens_S, bytes_S, strict=True)
    parts = {name: figures(nll, tokens, size) for name, nll, tokens, size in sums if tokens}
    return {**figures(nll_S.sum(), tokens_S.sum(), bytes_S.sum()), "sources": parts}
