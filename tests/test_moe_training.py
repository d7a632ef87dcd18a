"""Training models with experts: accumulation, meshes, unrolling, padding, balance by bias, resuming."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding_equivalence import assert_close
from tiny import COMPUTE, MODEL, QUICK, Training, host_state, quickly, random_batch, tiny_config

from nanollama.config import (
    ComputeConfig,
    ConfigError,
    LatentConfig,
    LossConfig,
    MeshConfig,
    MoeConfig,
    as_dict,
    resolve,
)
from nanollama.models.decoder import Decoder, init_cache, unstack
from nanollama.objectives import next_token
from nanollama.training.optim import is_matrix
from nanollama.training.state import logical_axes

MOE = dataclasses.replace(
    MODEL,
    num_layers=2,
    num_kv_heads=4,
    head_dim=16,
    moe=MoeConfig(8, 2, 16, shared_size=16, first_dense_layers=1, scoring="sigmoid", selection_bias=True),
    latent=LatentConfig(kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
)
LOSS = LossConfig(balance_loss=0.01, router_z_loss=0.001, bias_update_rate=0.01)
CONFIG = tiny_config(rows=16, micro_batches=2, model=MOE, loss=LOSS)
WHOLE = tiny_config(rows=16, model=MOE, loss=LOSS)


def batch(rows: int = 16) -> dict[str, np.ndarray]:
    """Random rows of which some end in padding."""
    arrays = random_batch(0, rows=rows)
    length = arrays["tokens"].shape[1]
    index = np.arange(length, dtype=np.int32)[None]
    padding = index >= np.where(np.arange(rows) % 3, length, 20)[:, None]
    arrays["first_key"] = np.where(padding, index, np.minimum(arrays["first_key"], 19)).astype(np.int32)
    arrays["positions"] = (index - arrays["first_key"]).astype(np.int32)
    arrays["weights"] = np.where(padding, 0, arrays["weights"]).astype(np.float32)
    return arrays


@functools.cache
def one_device() -> tuple[Any, Any]:
    return Training(WHOLE).gradient(batch())


def test_accumulated_gradients_and_sums_equal_those_of_one_batch() -> None:
    gradients, sums = Training(CONFIG).gradient(batch())
    expected_gradients, expected = one_device()
    assert_close(sums, expected, 1e-6)
    assert_close(gradients, expected_gradients, 1e-5)
    assert np.array_equal(sums.moe.load_LE, expected.moe.load_LE)
    real = (batch()["first_key"] < np.arange(32)) | (np.arange(32) < 20)
    assert sums.moe.load_LE.sum() == 2 * real.sum(), "two experts for each token that is not padding"
    assert sums.total > sums.nll + sums.z, "the routers' losses are minimised"
    assert not np.any(gradients["layers"]["router_bias"]), "the bias learns by its rule alone"


@pytest.mark.parametrize(("mesh", "path"), [
    (MeshConfig(data=1, expert=8), "dropless"),
    (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), "capacity"),
])  # fmt: skip
def test_meshes_equal_one_device(mesh: MeshConfig, path: str) -> None:
    """Capacity as large as never to drop: then how experts are computed changes nothing."""
    compute = dataclasses.replace(COMPUTE, moe=path, moe_capacity=8.0)
    training = Training(dataclasses.replace(WHOLE, compute=compute), mesh)
    experts = training.state.params["layers"]["expert_gate"]
    assert experts.addressable_shards[0].data.shape[1] == 8 // mesh.expert
    gradients, sums = training.gradient(batch())
    expected_gradients, expected = one_device()
    assert_close(sums, expected, 1e-6)
    assert_close(gradients, expected_gradients, 1e-5)


def test_a_step_moves_biases_by_the_rule_and_reports_loads() -> None:
    training = Training(CONFIG)
    metrics = jax.device_get(training.train(batch()))
    load = one_device()[1].moe.load_LE
    wanted = 0.01 * np.sign(load.mean(axis=1, keepdims=True) - load)
    np.testing.assert_array_equal(training.state.params["layers"]["router_bias"], wanted.astype(np.float32))
    np.testing.assert_allclose(metrics["expert_load"], load / load.mean(axis=1, keepdims=True), rtol=1e-6)
    assert metrics["expert_load_max"] == pytest.approx((load / load.mean(axis=1, keepdims=True)).max())
    assert metrics["dropped"] == 0 and metrics["finite"] and 1 <= metrics["balance_loss"] < 8
    once, training.state = jax.device_get(training.state), jax.device_put(host_state(CONFIG), training.shardings)
    training.train(batch())
    for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(training.state), strict=True):
        assert np.array_equal(x, y), "the same bits"


@pytest.mark.once
def test_unrolling_and_remat_change_no_number() -> None:
    """Same tree and results for every way to run the layers; routers' sums included."""
    model = dataclasses.replace(MOE, num_layers=3)
    params = host_state(dataclasses.replace(WHOLE, model=model)).params

    def run(compute: ComputeConfig) -> Any:
        loss = functools.partial(next_token.loss_sums, decoder=Decoder(model, compute), loss=LOSS)
        program = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
        return program(params, batch())

    (_, sums), gradients = run(ComputeConfig(scan_unroll=0, remat="full"))
    (_, expected), wanted = run(ComputeConfig(scan_unroll=1))
    assert_close(sums, expected, 1e-6)
    assert_close(gradients, wanted, 1e-5)


def test_cached_steps_with_unstacked_layers_equal_one_pass() -> None:
    """Latents are what is cached; a prefill of five tokens and then one by one, against all at once."""
    params = host_state(CONFIG).params
    decoder, total = Decoder(MOE, ComputeConfig(scan_unroll=1)), 8
    tokens = np.random.default_rng(3).integers(0, MOE.vocab_size, (2, total)).astype(np.int32)
    positions, first_key = np.broadcast_to(np.arange(total), (2, total)), np.array([[0] * 8, [2] * 8])
    first_key = np.minimum(first_key, np.arange(total))
    positions = np.maximum(np.arange(total) - first_key.max(axis=1, keepdims=True), 0)

    def stepwise(form: Callable[[Any], Any], params: Any) -> jax.Array:
        cache, pieces = form(init_cache(MOE, 2, 12, jnp.float32)), []
        for low, high in [(0, 5), (5, 6), (6, 8)]:
            inputs = (x[:, low:high] for x in (tokens, positions, first_key))
            hidden, cache = decoder.apply({"params": form(params)}, *inputs, cache)
            pieces.append(hidden)
        return jnp.concatenate(pieces, axis=1)

    wanted, _ = quickly(decoder.apply, {"params": params}, tokens, positions, first_key)
    for form in (unstack, lambda tree: tree):
        np.testing.assert_allclose(quickly(functools.partial(stepwise, form), params), wanted, atol=2e-5)
    heads = jax.eval_shape(lambda: init_cache(MOE, 1, 1, jnp.float32))
    assert heads.k_LBSGK.size + heads.v_LBSGK.size == 2 * (16 + 8), "per layer a latent and one rotated key"


def test_what_muon_treats() -> None:
    axes = logical_axes(MOE)
    treated = {name for name, names in axes["layers"].items() if is_matrix(names)}
    assert treated == {
        "expert_gate", "expert_up", "expert_down", "shared_gate", "shared_up", "shared_down", "query", "key_value_down",
        "key_value_up", "output",
    }  # fmt: skip


@pytest.mark.parametrize(("change", "field"), [
    (dict(loss=dict(balance="batch", balance_loss=0.1), batch=dict(global_rows=4, micro_batches=2)), "loss.balance"),
    (dict(loss=dict(balance_loss=-1.0)), "loss.balance_loss"),
    (dict(compute=dict(moe="capacity", moe_capacity=0.0)), "compute.moe_capacity"),
    (dict(compute=dict(moe="dropped")), "compute.moe"),
    (dict(model=as_dict(CONFIG)["model"] | dict(moe=None), loss=dict(balance_loss=0.1)), "loss.balance_loss"),
])  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        resolve(as_dict(CONFIG) | change)
