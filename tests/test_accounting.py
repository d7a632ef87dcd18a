"""Counts by formula against real parameter trees, hand counts and XLA's own cost analysis."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.config import ComputeConfig, ConfigError, LatentConfig, ModelConfig, MoeConfig
from nanollama.models import __main__ as models_main
from nanollama.models import accounting
from nanollama.models.decoder import Decoder, head, init_cache, init_params
from nanollama.models.families import PRESETS, preset
from nanollama.ops.losses import cross_entropy_reference


def real_parameters(model: ModelConfig) -> int:
    decoder = Decoder(model, ComputeConfig())
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(decoder, 0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_exact(name: str) -> None:
    for tied in (False, True):
        model = dataclasses.replace(ModelConfig(**preset(name)), tie_embeddings=tied)
        count = accounting.count_parameters(model)
        assert count.total == real_parameters(model)
        assert count.total == count.embedding + count.layers + count.head + model.hidden_size


def test_presets_have_the_size_of_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        "llama-micro": 3.8e6,
        "llama-23m": 23e6,
        "llama-42m": 42e6,
        "llama-124m": 124e6,
        "nanollama-1b": 1.1e9,
    }
    for name, size in sizes.items():
        total = accounting.count_parameters(ModelConfig(**preset(name))).total
        assert abs(total / size - 1) < 0.06, f"{name}: {total:,}"
    models_main.main()
    printed = capsys.readouterr().out
    assert "1,100,048,384" in printed  # about 1.1B


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'nanollama-1b'"):
        preset("nanolama-1b")


def test_flops_equal_a_hand_count() -> None:
    model = ModelConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
    )
    # multiply-adds of one token in one layer: query, key, value, output, then gate, up, down
    layer = 16 * 16 + 16 * 8 + 16 * 8 + 16 * 16 + 3 * 16 * 24
    # scores and values: 32 positions, causality leaves half of them, 4 heads of 4
    attention = 2 * (32 / 2) * 4 * 4
    forward = 2 * (3 * (layer + attention) + 16 * 100)
    flops = accounting.flops_per_token(model, 32)
    assert flops.forward == forward
    assert flops.backward == 2 * forward
    assert flops.train == 3 * forward
    assert flops.attention == 3 * 3 * 2 * attention


def test_windows_experts_and_latents_equal_a_hand_count() -> None:
    model = ModelConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=6,
        sliding_window=8, full_attention_layers=1,
        moe=MoeConfig(num_experts=4, experts_per_token=2, expert_size=8, shared_size=8, first_dense_layers=1,
                      shared_gate=True, selection_bias=True),
        latent=LatentConfig(kv_lora_rank=5, qk_rope_head_dim=2, qk_nope_head_dim=4, v_head_dim=3, q_lora_rank=7),
    )  # fmt: skip
    # queries down and up, latent and rotated key, keys and values up, output
    attention = 16 * 7 + 7 * 4 * 6 + 16 * (5 + 2) + 5 * 4 * (4 + 3) + 4 * 3 * 16
    router_and_shared = 16 * 4 + 3 * 16 * 8 + 16
    matrices = 3 * attention + 3 * 16 * 24 + 2 * (router_and_shared + 2 * 3 * 16 * 8)
    # of 32 queries: all 32 / 2 keys in the first layer; 8, but for the first 8 queries half of that, in the others
    keys = 32 / 2 + 2 * (24 * 8 + 8 * 4) / 32
    flops = accounting.flops_per_token(model, 32)
    assert flops.forward == 2 * (matrices + 16 * 100) + 2 * keys * 4 * (6 + 3)
    assert accounting.kv_cache_bytes(model, 10, 4) == 3 * 10 * (5 + 2) * 4
    count = accounting.count_parameters(model)
    assert count.total == real_parameters(model)
    assert count.total - count.active == 2 * 2 * 3 * 16 * 8


@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
def test_flops_agree_with_cost_analysis(kind: str) -> None:
    """Within 1 %, of an unrolled model: XLA counts the body of a scan once. It adds norms, softmax and rotations, and
    the reference attention it counts does the masked half too: 2 x the causal FLOPs. Experts: all on every token."""
    fields: dict = {}
    if kind == "experts":
        fields["moe"] = MoeConfig(num_experts=4, experts_per_token=4, expert_size=768, shared_size=512)
    if kind == "latent":
        fields["latent"] = LatentConfig(kv_lora_rank=256, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64)
    model = ModelConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=3072, num_layers=3, num_heads=8,
        num_kv_heads=8 if kind == "latent" else 4, head_dim=128, **fields,
    )  # fmt: skip
    length, decoder = 64, Decoder(model, ComputeConfig(attention="reference", moe="capacity", moe_capacity=1.0))
    params = nn.unbox(jax.eval_shape(lambda: init_params(decoder, 0)))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(length)[None]
        hidden, _ = decoder.apply({"params": params}, tokens, positions, jnp.zeros_like(tokens))
        return cross_entropy_reference(hidden, head(params), tokens, jnp.ones(tokens.shape), z_loss=0.0).total

    def measured(function: object) -> float:
        return jax.jit(function).lower(params, tokens).cost_analysis()["flops"] / length  # type: ignore[call-overload]

    flops = accounting.flops_per_token(model, length)
    for got, formula, causal in [
        (measured(loss), flops.forward, flops.attention / 3),
        (measured(jax.grad(loss)), flops.train, flops.attention),
    ]:
        error = got / (formula + causal) - 1
        print(f"{kind}: XLA {got:.5g}, formula {formula + causal:.5g}, {error:+.3%}")
        assert abs(error) < 0.01, f"XLA {got:.4g}, formula {formula + causal:.4g}"


def test_cache_bytes_are_those_of_the_cache() -> None:
    model = ModelConfig(**preset("llama-micro"))
    cache = jax.eval_shape(lambda: init_cache(model, 3, 50, jnp.bfloat16))
    real = sum(leaf.size * leaf.dtype.itemsize for leaf in (cache.k_LBSGK, cache.v_LBSGK))
    assert real == 3 * accounting.kv_cache_bytes(model, 50)


def test_mfu_is_train_flops_over_peak() -> None:
    model = ModelConfig(**preset("nanollama-1b"))
    count = accounting.count_parameters(model)
    six_n = 6 * (
        count.non_embedding - model.hidden_size * (2 * model.num_layers + 1)
    )  # norms multiply nothing
    attention = 6 * model.num_layers * 4096 * model.num_heads * model.head_dim
    np.testing.assert_allclose(
        accounting.mfu(model, 4096, tokens_per_second=1e4, peak_flops=1e15), (six_n + attention) * 1e4 / 1e15
    )
