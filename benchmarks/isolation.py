"""Whether documents of a packed row see each other on this device, for every attention backend that can run here.

    python benchmarks/isolation.py [--length=2048] [--head-dims=64,128]

A small decoder, random weights, a row of four documents. Two checks of each backend, in bfloat16:
`leak`: another document's tokens are changed: the logits of this one must keep every bit, and the gradient of its loss
to the other's embeddings must be exactly zero. `alone`: the logits of a document in the packed row beside those it has
in a row of its own, as a share of their size. A backend that cannot mask documents must refuse. Exit status 1 if
one leaks. Needs jax, flax, numpy and einops only.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import RESULTS, write
from nanollama.config import ComputeConfig, ModelConfig
from nanollama.data.strict import FieldError
from nanollama.models.decoder import Decoder, head, init_params
from nanollama.parallel import backend

DOCUMENTS = 4
CLOSE = 0.03  # of the logits' size: bfloat16 sums in another order


def model_of(head_dim: int) -> ModelConfig:
    return ModelConfig(512, 4 * head_dim, 8 * head_dim, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=head_dim)


def check(name: str, head_dim: int, length: int) -> dict[str, Any]:
    """Both checks of one backend. Errors: FieldError where it refuses."""
    model, generator = model_of(head_dim), np.random.default_rng(0)
    decoder = Decoder(model, ComputeConfig(dtype="bfloat16", attention=name))  # type: ignore[arg-type]
    params = nn.meta.unbox(init_params(Decoder(model, ComputeConfig()), 0))
    starts = np.sort(generator.choice(np.arange(1, length - 1), DOCUMENTS - 1, replace=False))
    first = np.concatenate([[0], starts])[np.searchsorted(starts, np.arange(length), side="right")]
    begin, end = int(starts[1]), int(starts[2])  # the third document
    tokens = generator.integers(model.vocab_size, size=(1, length), dtype=np.int32)
    other = np.where((np.arange(length) < begin) | (np.arange(length) >= end), (tokens + 7) % model.vocab_size, tokens)
    alone = np.zeros_like(tokens)
    alone[:, : end - begin] = tokens[:, begin:end]
    first_alone = np.where(np.arange(length) < end - begin, 0, np.arange(length))

    @jax.jit
    def logits(tokens: jax.Array, first: jax.Array) -> jax.Array:
        positions = jnp.arange(length)[None] - first
        hidden, _ = decoder.apply({"params": params}, tokens, positions, first)
        return jnp.dot(hidden, head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)[0]

    @jax.jit
    def gradient(table: jax.Array, tokens: jax.Array, first: jax.Array) -> jax.Array:
        """Of the third document's loss to the embedding table."""

        def loss(table: jax.Array) -> jax.Array:
            changed = {**params, "embedding": table}
            hidden, _ = decoder.apply({"params": changed}, tokens, jnp.arange(length)[None] - first, first)
            return jnp.sum(hidden[0, begin:end].astype(jnp.float32) ** 3)

        return jax.grad(loss)(table)

    def row(array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(array, (1, length)), jnp.int32)

    packed, changed, single = (
        np.asarray(logits(jnp.asarray(text), row(where)))
        for text, where in ((tokens, first), (other, first), (alone, first_alone))
    )
    same = bool(np.array_equal(packed[begin:end], changed[begin:end]))
    distance = np.abs(packed[begin:end] - single[: end - begin]).max() / np.abs(packed[begin:end]).max()
    slopes = np.asarray(gradient(params["embedding"], jnp.asarray(tokens), row(first)))
    unseen = np.setdiff1d(np.arange(model.vocab_size), tokens[0, begin:end])  # tokens of the other documents only
    quiet = float(np.abs(slopes[unseen]).max(initial=0.0))
    return {
        "bits_kept": same,
        "gradient_of_others": quiet,
        "alone_distance": round(float(distance), 6),
        "leaks": not same or quiet != 0.0 or not distance < CLOSE,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--backends", default="auto,xla_chunked,pallas,cudnn,splash")
    parser.add_argument("--out", type=Path, default=RESULTS / "isolation.json")
    options = parser.parse_args(arguments)
    backend.start()
    figures: dict[str, Any] = {}
    for dim in map(int, options.head_dims.split(",")):
        for name in options.backends.split(","):
            key = f"{name}, head dim {dim}"
            try:
                f = figures[key] = check(name, dim, options.length)
            except FieldError as error:
                figures[key] = {"refused": str(error)}
                print(f"{key:<28}refuses: {str(error)[:90]}")
                continue
            print(f"{key:<28}{'LEAKS' if f['leaks'] else 'isolated'}; gradient {f['gradient_of_others']:g}, "
                  f"alone {f['alone_distance']:.4f}", flush=True)  # fmt: skip
    leaking = [key for key, value in figures.items() if value.get("leaks")]
    write(options.out, "documents of a packed row, bfloat16", {"length": options.length, "backends": figures}, "jax")
    if leaking:
        print(f"error: documents see each other: {'; '.join(leaking)}", file=sys.stderr)
    return 1 if leaking else 0


if __name__ == "__main__":
    sys.exit(main())
