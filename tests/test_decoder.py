"""The decoder's promises: packing never leaks, nothing sees the future, speed knobs change no number."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.config import ComputeConfig, ModelConfig
from nanollama.models import attention as attention_module
from nanollama.models.decoder import Decoder, head, init_cache, init_params
from nanollama.ops.attention import MaskSpec, attend
from nanollama.ops.losses import cross_entropy_sums

MODEL = ModelConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
BACKENDS = ["xla_chunked", "reference"]


@functools.cache
def parameters(model: ModelConfig = MODEL) -> Any:
    """Random values in the decoder's own tree, large enough that attention matters; compiles nothing."""
    generator = np.random.default_rng(0)
    abstract = nn.unbox(jax.eval_shape(lambda: init_params(Decoder(model, ComputeConfig()), 0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * generator.standard_normal(leaf.shape, np.float32)), abstract
    )


def packed_row(lengths: list[int], total: int) -> dict[str, np.ndarray]:
    """One row of documents of these lengths, then padding to `total`, as the loader derives it."""
    tokens = np.random.default_rng(1).integers(1, MODEL.vocab_size, total)
    positions, first_key = np.zeros(total, int), np.arange(total)
    targets, weights = np.zeros(total, int), np.zeros(total)
    low = 0
    for length in lengths:
        span = slice(low, low + length)
        positions[span], first_key[span] = np.arange(length), low
        targets[low : low + length - 1] = tokens[low + 1 : low + length]
        weights[low : low + length - 1] = 1
        low += length
    tokens[low:] = 0
    row = {"tokens": tokens, "positions": positions, "first_key": first_key}
    row |= {"targets": targets, "weights": weights}
    return {name: value[None].astype(np.int32) for name, value in row.items()}


def forward(
    params: Any, row: dict[str, np.ndarray], model: ModelConfig = MODEL, **compute: Any
) -> tuple[jax.Array, jax.Array]:
    """Loss sum and final hidden states."""
    decoder = Decoder(model, ComputeConfig(**{"scan_unroll": 1, **compute}))
    hidden, _ = decoder.apply({"params": params}, row["tokens"], row["positions"], row["first_key"])
    sums = cross_entropy_sums(
        hidden, head(params), row["targets"], row["weights"], z_loss=1e-3, chunk_tokens=32
    )
    return sums.total, hidden


def loss_and_gradient(
    params: Any, row: dict[str, np.ndarray], model: ModelConfig = MODEL, **compute: Any
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    def step(params: Any, row: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return forward(params, row, model, **compute)  # type: ignore[arg-type]

    return jax.jit(jax.value_and_grad(step, has_aux=True))(params, row)


def assert_trees_close(got: Any, wanted: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


# --- packing


def split_rows(row: dict[str, np.ndarray], lengths: list[int]) -> dict[str, np.ndarray]:
    """Each document of a packed row at the start of a row of its own, padded to the same length."""
    total, ends = row["tokens"].shape[1], np.cumsum(lengths)
    alone = [packed_row([length], total) for length in lengths]
    for piece, length, end in zip(alone, lengths, ends, strict=True):
        for name in ("tokens", "targets", "weights"):
            piece[name][:, :length] = row[name][:, end - length : end]
    return {name: np.concatenate([piece[name] for piece in alone]) for name in row}


def check_packing(backend: str, gradients: bool = True) -> None:
    """Logits, loss and gradients of documents in one row equal those of each document in a row of its own."""
    lengths, params = [1, 41, 30], parameters()
    row = packed_row(lengths, 77)
    alone = split_rows(row, lengths)
    if gradients:
        (loss, packed), gradient = loss_and_gradient(params, row, attention=backend)
        (wanted_loss, wanted), wanted_gradient = loss_and_gradient(params, alone, attention=backend)
        np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
        assert_trees_close(gradient, wanted_gradient, 1e-4)
    else:
        run = jax.jit(lambda params, row: forward(params, row, attention=backend)[1])
        packed, wanted = run(params, row), run(params, alone)
    logits_TV = packed[0, : sum(lengths)] @ params["head"]
    wanted_TV = jnp.concatenate([wanted[i, :length] for i, length in enumerate(lengths)]) @ params["head"]
    np.testing.assert_allclose(logits_TV, wanted_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_logits_and_gradients_equal_stand_alone_ones(backend: str) -> None:
    check_packing(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_ignores_documents_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "attend", ignores_documents)
    with pytest.raises(AssertionError):
        check_packing(backend, gradients=False)


def ignores_documents(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, **options: Any) -> jax.Array:
    return attend(q, k, v, MaskSpec(jnp.zeros_like(mask.first_key_BT), mask.query_start), **options)


def sees_the_next_token(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, **options: Any) -> jax.Array:
    return attend(q, k, v, MaskSpec(mask.first_key_BT, jnp.int32(1)), **options)


# --- causality and isolation, by gradient


def influence(backend: str, row: dict[str, np.ndarray]) -> np.ndarray:
    """[T, T] size of d output_t / d input embedding_t'. Every position holds its own token, so the gradient
    to the embedding table's rows is the gradient to the positions' inputs."""
    params, length = parameters(), row["tokens"].shape[1]
    row = {**row, "tokens": np.arange(length, dtype=np.int32)[None]}
    direction = np.random.default_rng(2).standard_normal(MODEL.hidden_size).astype(np.float32)

    def project(embedding: jax.Array) -> jax.Array:
        _, hidden = forward({**params, "embedding": embedding}, row, attention=backend)
        return (hidden @ direction)[0]

    jacobian_TVD = jax.jit(jax.jacrev(project))(params["embedding"])
    return np.abs(np.asarray(jacobian_TVD)).max(axis=-1)[:, :length]


def check_influence(backend: str) -> None:
    """Exactly zero from the future and from other documents, never zero inside a document's past."""
    row = packed_row([20, 1, 50], 74)
    size = influence(backend, row)
    query, key = np.indices(size.shape)
    allowed = (key <= query) & (key >= row["first_key"][0][:, None])
    assert np.all(size[~allowed] == 0.0)
    assert np.all(size[allowed] > 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_from_the_future_or_other_documents(backend: str) -> None:
    check_influence(backend)


@pytest.mark.parametrize("mutant", [ignores_documents, sees_the_next_token])
def test_leaks_are_caught(mutant: Callable[..., jax.Array], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "attend", mutant)
    with pytest.raises(AssertionError):
        check_influence("reference")


# --- cache


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_steps_equal_one_whole_pass(backend: str) -> None:
    """Left-padded rows of unequal lengths: a prefill, a chunk of three and a single token."""
    params, total = parameters(), 12
    lengths = np.array([12, 9, 1])[:, None]
    index, padding = np.arange(total), total - lengths
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab_size, (3, total)).astype(np.int32)
    positions, first_key = np.maximum(index - padding, 0), np.where(index < padding, index, padding)
    decoder = Decoder(MODEL, ComputeConfig(attention=backend, scan_unroll=1))  # type: ignore[arg-type]

    @jax.jit
    def stepwise(params: Any) -> tuple[jax.Array, jax.Array]:
        cache, pieces = init_cache(MODEL, 3, 20, jnp.float32), []
        for low, high in [(0, 8), (8, 11), (11, 12)]:
            inputs = (x[:, low:high] for x in (tokens, positions, first_key))
            hidden, cache = decoder.apply({"params": params}, *inputs, cache)
            pieces.append(hidden)
        return jnp.concatenate(pieces, axis=1), cache.write_index

    got, written = stepwise(params)
    assert int(written) == total
    # the same rows, moved left, in one pass without a cache
    left = (index + padding) % total
    row = {**packed_row([total], total), "tokens": np.take_along_axis(tokens, left, axis=1)}
    row = {name: np.broadcast_to(value, (3, total)) for name, value in row.items()}
    _, wanted = jax.jit(lambda params: forward(params, row, attention="reference"))(params)
    for b in range(3):
        np.testing.assert_allclose(got[b, padding[b, 0] :], wanted[b, : lengths[b, 0]], rtol=1e-4, atol=1e-4)


# --- speed knobs


def test_unroll_and_remat_change_no_number() -> None:
    """Same parameter tree and results for every way to run the layers."""
    row, params = packed_row([9, 7], 16), parameters()
    (loss, _), gradient = loss_and_gradient(params, row)
    for unroll, remat in [(0, "dots"), (1, "names"), (1, "full")]:  # beside (1, "none")
        compute = ComputeConfig(scan_unroll=unroll, remat=remat)  # type: ignore[arg-type]
        abstract = nn.unbox(jax.eval_shape(lambda c=compute: init_params(Decoder(MODEL, c), 0)))
        assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, params)
        (other, _), gradients = loss_and_gradient(params, row, scan_unroll=unroll, remat=remat)
        np.testing.assert_allclose(other, loss, rtol=1e-6)
        assert_trees_close(gradients, gradient, 1e-5)


def test_tied_and_untied_heads() -> None:
    """Tied: no head of its own, and the embedding's gradient sums both uses."""
    model = dataclasses.replace(MODEL, tie_embeddings=True)
    tied = parameters(model)
    assert set(parameters()) - set(tied) == {"head"}
    row = packed_row([12], 12)
    (loss, _), gradient = loss_and_gradient(tied, row, model)
    (untied_loss, _), parts = loss_and_gradient({**tied, "head": tied["embedding"].T}, row)
    np.testing.assert_allclose(loss, untied_loss, rtol=1e-6)
    assert_trees_close(gradient["embedding"], parts["embedding"] + parts["head"].T, 1e-5)


def test_bfloat16_stays_near_float32() -> None:
    params, row = parameters(), packed_row([30], 30)
    full, low = (jax.jit(lambda p, d=d: forward(p, row, dtype=d)[1])(params) for d in ("float32", "bfloat16"))
    assert low.dtype == jnp.bfloat16
    error = float(jnp.linalg.norm(low.astype(jnp.float32) - full) / jnp.linalg.norm(full))
    assert error < 0.03, f"relative error {error:.4f}"
