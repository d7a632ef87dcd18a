"""Every token counts once: accumulation, masks and labels, with the mutants that have fooled other trainers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding_equivalence import assert_close
from tiny import LENGTH, MODEL, Training, random_batch, tiny_config

from nanollama.config import OptimizerConfig, ScheduleConfig
from nanollama.models.decoder import head

ROWS = 32


@functools.cache
def mean_gradient(micro_batches: int) -> tuple[Any, Any]:
    gradients, sums = Training(tiny_config(ROWS, micro_batches)).gradient(random_batch(3, ROWS))
    return jax.tree.map(lambda g: g / sums.weight, gradients), sums


@functools.cache
def row_by_row() -> list[tuple[Any, Any]]:
    """(summed gradients, sums) of each row alone: plain Python accumulation."""
    training, batch = Training(tiny_config(1)), random_batch(3, ROWS)
    program = jax.jit(lambda params, row: training.gradient_program(params, row))
    return [
        jax.device_get(program(training.state.params, {k: x[r : r + 1] for k, x in batch.items()})) for r in range(ROWS)
    ]


def test_uneven_rows_make_a_hard_case():
    weights = random_batch(3, ROWS)["weights"].sum(axis=1)
    assert weights.min() < 6 and weights.max() > 28


def test_accumulation_changes_nothing():
    """1 x 32 = 32 x 1, although rows hold between 10 % and 100 % loss tokens."""
    gradients, sums = mean_gradient(ROWS)
    expected, expected_sums = mean_gradient(1)
    assert sums.weight == expected_sums.weight and sums.correct == expected_sums.correct
    np.testing.assert_allclose(jax.tree.leaves(sums), jax.tree.leaves(expected_sums), rtol=1e-6)
    assert_close(gradients, expected, 5e-6)


def test_mean_of_means_is_caught():
    rows = row_by_row()
    weight = sum(sums.weight for _, sums in rows)
    exact = jax.tree.map(lambda *g: sum(g) / weight, *(gradients for gradients, _ in rows))
    assert_close(exact, mean_gradient(1)[0], 5e-6)
    mutant = jax.tree.map(
        lambda *g: sum(g) / ROWS,
        *(jax.tree.map(lambda x, s=sums: x / s.weight, gradients) for gradients, sums in rows),
    )
    with pytest.raises(AssertionError):
        assert_close(mutant, mean_gradient(1)[0], 5e-6)


def masked_tail(scramble: int | None) -> dict[str, np.ndarray]:
    """Row 0 has no weight after position 10, row 1 none at all; their masked targets scrambled if asked."""
    batch = random_batch(5)
    batch["weights"][0, 10:] = 0
    batch["weights"][1] = 0
    if scramble is not None:
        masked = batch["weights"] == 0
        batch["targets"][masked] = np.random.default_rng(scramble).integers(0, MODEL.vocab_size, masked.sum())
        batch["tokens"][0, 11:] = (batch["tokens"][0, 11:] + 1 + scramble) % MODEL.vocab_size
        batch["tokens"][1] = (batch["tokens"][1] + 1 + scramble) % MODEL.vocab_size
    return batch


def check_masked_tokens_teach_nothing(gradient) -> None:
    """Exactly nothing: the bits do not change, whatever stands where the weight is 0 and no learned token looks."""
    expected = jax.tree.leaves(gradient(masked_tail(None)))
    for scramble in range(2):
        for found, wanted in zip(jax.tree.leaves(gradient(masked_tail(scramble))), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_masked_tokens_have_exactly_zero_gradient():
    training = Training(tiny_config())
    program = jax.jit(training.gradient_program)

    def gradient(batch):
        return jax.device_get(program(training.state.params, batch)[0])

    def mutant(batch):  # a mask that is almost, but not quite, off
        return gradient({**batch, "weights": np.maximum(batch["weights"], np.float32(1e-3))})

    check_masked_tokens_teach_nothing(gradient)
    with pytest.raises(AssertionError):
        check_masked_tokens_teach_nothing(mutant)


def counting(seed: int, shift: int) -> dict[str, np.ndarray]:
    """Rows n, n + 1, n + 2, ... modulo 64; targets shifted by `shift` (1 is right, 2 is the bug of a seed system)."""
    start = np.random.default_rng(seed).integers(0, 64, (8, 1))
    tokens = (start + np.arange(LENGTH + 2)) % 64
    index = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (8, LENGTH))
    return {
        "tokens": tokens[:, :LENGTH].astype(np.int32),
        "targets": tokens[:, shift : shift + LENGTH].astype(np.int32),
        "weights": np.ones((8, LENGTH), np.float32),
        "positions": index.copy(),
        "first_key": np.zeros((8, LENGTH), np.int32),
    }


def continue_greedily(training: Training, start: list[int], count: int) -> list[int]:
    """`count` tokens after `start`, each the most likely one; padded to one shape."""

    @jax.jit
    def logits_TV(params, tokens_1T):
        positions = jnp.arange(LENGTH)[None]
        hidden_BTD, _ = training.decoder.apply({"params": params}, tokens_1T, positions, jnp.zeros_like(positions))
        return (hidden_BTD @ head(params))[0]

    tokens = list(start)
    for _ in range(count):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(logits_TV(training.state.params, padded)[len(tokens) - 1])))
    return tokens[len(start) :]


def check_continues_counting(training: Training, shift: int) -> None:
    for number in range(80):
        metrics = training.train(counting(number, shift))
    assert metrics["accuracy"] > 0.99, "it did not learn at all"
    assert continue_greedily(training, [20, 21, 22], 8) == list(range(23, 31))


def test_label_is_shifted_exactly_once():
    """Trained on n, n + 1, n + 2 it continues them. Shifted twice the loss falls just as nicely; only this sees it."""
    config = tiny_config(
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=10),
    )
    check_continues_counting(Training(config), shift=1)
    with pytest.raises(AssertionError, match=r"\[24, 26, 28"):
        check_continues_counting(Training(config), shift=2)
