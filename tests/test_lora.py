"""Adapters: nothing changes at step 0, only they learn, on any mesh; merged, saved apart, and found again."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from test_sharding_equivalence import assert_close
from tiny import MODEL, Training, host_state, random_batch, tiny_config

from nanollama.config import ConfigError, LoraConfig, MeshConfig, MoeConfig, OptimizerConfig
from nanollama.models import lora as loras
from nanollama.models.decoder import Decoder, head
from nanollama.training import state as states
from nanollama.training.integrity import tree_hash

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.25, targets=("query", "value", "layers/d*n"), train_rows_from=120)
CONFIG = tiny_config(rows=8, micro_batches=2, lora=LORA, model=dataclasses.replace(MODEL, qkv_bias=True))
ADAPTED = ("query", "value", "down")


@functools.cache
def trained() -> Training:
    """Three steps on one device."""
    training = Training(CONFIG)
    for step in range(3):
        training.train(random_batch(step))
    return training


def logits(params: Any, lora: LoraConfig | None) -> np.ndarray:
    batch = random_batch(9, rows=2)
    decoder = Decoder(CONFIG.model, CONFIG.compute, lora)

    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden, _ = decoder.apply({"params": params}, batch["tokens"], batch["positions"], batch["first_key"])
        return hidden @ head(params)

    return np.asarray(run(params))


def test_step_0_is_the_base_bit_for_bit() -> None:
    params = host_state(CONFIG).params
    adapters = {name for name in params["layers"] if name.endswith(loras.A)}
    assert adapters == {f"{name}{loras.A}" for name in ADAPTED}
    assert all(np.abs(params["layers"][name]).max() > 0.1 for name in adapters)
    assert np.array_equal(logits(params, LORA), logits(loras.base(params), None))


def test_only_adapters_and_new_rows_learn_and_have_optimizer_state() -> None:
    before, after = host_state(CONFIG), jax.device_get(trained().state)
    assert tree_hash(loras.base(after.params)) == tree_hash(loras.base(before.params))
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(loras.learned(before.params)),
        jax.tree.leaves(loras.learned(after.params)), strict=True,
    ):  # fmt: skip
        assert np.abs(new - old).max() > 0, jax.tree_util.keystr(path)
    size = sum(x.nbytes for x in jax.tree.leaves(loras.learned(after.params)))
    state = sum(x.nbytes for x in jax.tree.leaves(after.opt_state))
    assert 2 * size <= state <= 2 * size + 16, "two moments of what learns, and a few counters"
    total = sum(x.nbytes for x in jax.tree.leaves(after.params))
    assert size < total / 3


def test_merged_equals_unmerged() -> None:
    params = jax.device_get(trained().state.params)
    whole = logits(params, LORA)
    merged = loras.merge(params, LORA)
    assert not any(loras.is_learned(name) for name in [*merged, *merged["layers"]])
    assert np.abs(logits(merged, None) - whole).max() <= 1e-5
    assert np.abs(whole - logits(loras.base(params), None)).max() > 1e-3, "training has changed the model"
    stabilised = loras.merge(params, dataclasses.replace(LORA, rank_stabilised=True))
    assert np.abs(logits(stabilised, None) - whole).max() > 1e-4
    on_device = jax.jit(functools.partial(loras.merge, lora=LORA))(params)
    assert_close(jax.device_get(on_device), merged, 1e-6)


def test_stacked_experts_merge_each_with_its_own() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 8, 4)), rng.normal(size=(2, 3, 4, 6))
    expected = np.einsum("lxir,lxro->lxio", a, b)
    np.testing.assert_allclose(loras.product(a, b, (2, 3, 8, 6)), expected)


def test_a_mesh_gives_the_same_adapters() -> None:
    """Dropout included: its masks depend on the token, the layer and the weight, not on who computes them."""
    found = Training(CONFIG, MeshConfig(1, tensor=2, context=2, stage=2))
    params = found.state.params["layers"]
    assert params[f"query{loras.B}"].addressable_shards[0].data.size == params[f"query{loras.B}"].size // 4
    for step in range(3):
        found.train(random_batch(step))
    assert_close(
        jax.device_get(loras.learned(found.state.params)), jax.device_get(loras.learned(trained().state.params)), 2e-3
    )  # Adam divides by the root of tiny gradients
    assert_close(jax.device_get(found.state.opt_state[1].mu), jax.device_get(trained().state.opt_state[1].mu), 1e-4)


def test_elastic_mode_gives_the_same_adapters() -> None:
    """In another number of micro-batches, too."""
    config = dataclasses.replace(CONFIG, batch=dataclasses.replace(CONFIG.batch, micro_batches=4))
    training = Training(dataclasses.replace(config, determinism="elastic"), MeshConfig(data=2))
    for step in range(3):
        training.train(random_batch(step))
    expected = jax.device_get(trained().state.opt_state[1].mu)
    assert_close(jax.device_get(training.state.opt_state[1].mu), expected, 1e-4)


def test_dropout_is_in_training_only_and_of_seed_and_step() -> None:
    training = trained()
    batch = training.put(random_batch(0))
    gradient = jax.jit(training.gradient_program)

    def at(step: int) -> str:
        seeded = loras.with_dropout_seeds(batch, LORA, 0, np.int32(step))
        return tree_hash(gradient(training.state.params, seeded)[0])

    assert at(1) == at(1)
    assert at(1) != at(2)
    plain = loras.merge(jax.device_get(training.state.params), LORA)
    without = Training(dataclasses.replace(CONFIG, lora=None))
    assert_close(without.token_nll(plain, batch), training.token_nll(training.state.params, batch), 1e-5)


def test_each_token_layer_and_weight_has_a_mask_of_its_own() -> None:
    seeds_BT = loras.dropout_seeds(0, np.int32(7), (8, 32))
    masks = [np.asarray(loras.Dropout(seeds_BT.reshape(-1), np.int32(layer)).mask(name, 64, 0.25))
             for layer in (0, 1) for name in ("query", "value")]  # fmt: skip
    rows = np.concatenate(masks)
    assert len(np.unique(rows, axis=0)) == len(rows) == 4 * 256
    assert abs(rows.mean() - 0.75) < 0.01, "65,536 values: three standard deviations are 0.005"


def test_muon_orthogonalises_both_factors() -> None:
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name="muon", learning_rate=1e-3))
    abstract = states.abstract_state(config, Training(config).optimizer)
    momenta = {jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(abstract.opt_state)}
    assert sum("lora" in name and "'muon'" in name for name in momenta) == 2 * len(ADAPTED)
    assert sum("embedding_rows" in name or "head_rows" in name for name in momenta) == 4


def test_a_target_that_is_no_layer_names_the_nearest() -> None:
    for wrong, near in (("quary", "query"), ("layers/dwn", "down"), ("embedding", None)):
        with pytest.raises(ConfigError, match=f"Did you mean '{near}'" if near else "config.lora.targets"):
            states.logical_axes(MODEL, LoraConfig(targets=("value", wrong)))


def test_adapters_are_never_left_out_in_silence() -> None:
    with pytest.raises(ValueError, match="Decoder was made without it"):
        logits(host_state(CONFIG).params, None)


# --- experts ---

MOE = LoraConfig(rank=4, alpha=8.0, dropout=0.25, targets=("expert_*", "shared_up", "output"))
MOE_CONFIG = tiny_config(
    rows=8,
    lora=MOE,
    model=dataclasses.replace(
        MODEL, moe=MoeConfig(num_experts=4, experts_per_token=2, expert_size=32, shared_size=32, first_dense_layers=1)
    ),
)


def test_experts_have_adapters_of_their_own() -> None:
    one, mesh = Training(MOE_CONFIG), Training(MOE_CONFIG, MeshConfig(1, fsdp=2, expert=2))
    a = one.state.params["layers"][f"expert_up{loras.A}"]
    assert a.shape == (1, 4, 32, 4), "[layers, experts, inputs, rank]"
    assert f"output{loras.A}" in one.state.params["dense_layers"]
    gradients, expected = mesh.gradient(random_batch(0))[0], one.gradient(random_batch(0))[0]
    assert set(gradients["layers"]) == {
        f"{name}{suffix}" for name in ("expert_gate", "expert_up", "expert_down", "shared_up", "output")
        for suffix in (loras.A, loras.B)
    }  # fmt: skip
    assert_close(gradients, expected, 1e-5)
    per_expert = np.abs(gradients["layers"][f"expert_down{loras.B}"]).max(axis=(0, 2, 3))
    assert per_expert.min() > 0 and len(set(per_expert.tolist())) == 4
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype), loras.learned(
        host_state(MOE_CONFIG).params))  # fmt: skip
    params = loras.with_learned(host_state(MOE_CONFIG).params, moved)
    batch = one.put(random_batch(3))
    plain = Training(dataclasses.replace(MOE_CONFIG, lora=None))
    whole = one.token_nll(params, batch)
    assert_close(plain.token_nll(loras.merge(params, MOE), batch), whole, 1e-5)
    fresh = one.token_nll(host_state(MOE_CONFIG).params, batch)
    assert abs(float(whole.sum()) / float(fresh.sum()) - 1) > 1e-3
