"""RoPE scaling against transformers' own functions, at positions beyond the trained length."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.config import ConfigError, ModelConfig, RopeScaling, check_model
from nanollama.ops.rope import frequencies, rope_tables

HEAD_DIM, ORIGINAL = 16, 64
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "yarn": RopeScaling("yarn", 4.0, ORIGINAL),
    "yarn-exact-ramp": RopeScaling("yarn", 4.0, ORIGINAL, beta_fast=16.0, beta_slow=2.0, truncate=False),
    "yarn-factor": RopeScaling("yarn", 4.0, ORIGINAL, attention_factor=1.25),
    "llama3": RopeScaling("llama3", 8.0, ORIGINAL),
}
# (frequencies, factor of cos and sin) that transformers 5.23 computes for theta 10000; made by
# transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS, with dynamic NTK at a length of 200
GOLDEN: dict[str, tuple[list[float], float]] = {
    "linear": (
        [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.0,
    ),
    "yarn": (
        [1.0, 0.237170815, 0.049999997, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.138629436111989,
    ),
    "yarn-exact-ramp": (
        [1.0, 0.14849025, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.138629436111989,
    ),
    "yarn-factor": (
        [1.0, 0.237170815, 0.049999997, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.25,
    ),
    "llama3": (
        [1.0, 0.244384587, 0.0130422562, 0.00395284733, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05],
        1.0,
    ),
    "dynamic": (
        [1.0, 0.229258373, 0.0525593981, 0.0120496824, 0.00276249065, 0.000633324089, 0.000145194848, 3.3287135e-05],
        1.0,
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str) -> None:
    expected, amplitude = GOLDEN[name]
    found, factor = frequencies(HEAD_DIM, 10_000.0, SCALINGS[name])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert factor == pytest.approx(amplitude, rel=1e-7)
    plain, _ = frequencies(HEAD_DIM, 10_000.0)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(plain, expected, rtol=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_beyond_the_trained_length(name: str) -> None:
    frequency, amplitude = GOLDEN[name]
    positions = np.array([[0, 1, ORIGINAL - 1, ORIGINAL, 3 * ORIGINAL, 16 * ORIGINAL]])
    cos, sin = rope_tables(positions, HEAD_DIM, 10_000.0, SCALINGS[name])
    angles = positions[..., None].astype(np.float64) * np.array(frequency)
    np.testing.assert_allclose(cos, amplitude * np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin, amplitude * np.sin(angles), atol=1e-4)


def test_ntk_is_a_larger_theta_whose_slowest_pair_is_stretched_by_factor() -> None:
    plain, _ = frequencies(HEAD_DIM, 10_000.0)
    found, amplitude = frequencies(HEAD_DIM, 10_000.0, RopeScaling("ntk", 4.0))
    assert amplitude == 1.0
    assert found[0] == plain[0]
    assert found[-1] == pytest.approx(plain[-1] / 4, rel=1e-6)


def test_dynamic_ntk_has_each_documents_own_length() -> None:
    scaling = RopeScaling("dynamic_ntk", 4.0, ORIGINAL)
    positions = np.concatenate([np.arange(200), np.arange(40), np.arange(90), np.zeros(6, int)])[None]
    cos, _ = rope_tables(jnp.asarray(positions), HEAD_DIM, 10_000.0, scaling)
    np.testing.assert_allclose(cos[0, 150], np.cos(150 * np.array(GOLDEN["dynamic"][0])), atol=1e-4)
    plain, _ = rope_tables(jnp.arange(40)[None], HEAD_DIM, 10_000.0)
    np.testing.assert_allclose(cos[0, 200:240], plain[0], atol=1e-5)  # a short one is as without scaling
    alone, _ = rope_tables(jnp.arange(90)[None], HEAD_DIM, 10_000.0, scaling)
    np.testing.assert_allclose(cos[0, 240:330], alone[0], atol=1e-6)  # packed or alone: the same
    assert np.abs(np.asarray(cos[0, 240:330] - cos[0, :90])).max() > 1e-2


@pytest.mark.parametrize(("change", "field"), [
    (dict(type="yarn", factor=4.0), "original_length"),
    (dict(type="dynamic_ntk", factor=4.0), "original_length"),
    (dict(type="linear", factor=0.25), "factor"),
    (dict(type="llama3", factor=8.0, original_length=64, low_frequency_factor=4.0), "low_frequency_factor"),
    (dict(type="yarn", factor=8.0, original_length=64, beta_slow=40.0), "beta_slow"),
])  # fmt: skip
def test_impossible_scalings_are_refused(change: dict[str, Any], field: str) -> None:
    model = ModelConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
                        head_dim=8)  # fmt: skip
    with pytest.raises(ConfigError, match=field):
        check_model(dataclasses.replace(model, rope_scaling=RopeScaling(**change)))
