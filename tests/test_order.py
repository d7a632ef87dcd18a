"""What comes after what on CPU: nothing is kept from the forward pass that the backward pass computes again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tiny import QUICK, Training, random_batch, tiny_config

from nanollama.ops import chunked_attention, mlp
from nanollama.ops.masks import MaskSpec
from nanollama.ops.order import after
from nanollama.parallel import backend
from nanollama.training import step

LAYERS, T, K = 4, 256, 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_are_those_of_the_array(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)) * 1e-3, dtype)
    for other in (jnp.float32(-3.0), jnp.full((64, 1), jnp.inf), jnp.zeros((64, 3), jnp.bfloat16)):
        got = jax.jit(after)(x, other)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got.view(jnp.uint16), x.view(jnp.uint16))
    rows = jnp.isnan(jax.jit(after)(x, jnp.zeros((64, 1)).at[5].set(jnp.nan))).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(rows), [5])


@pytest.mark.parametrize("platform", ["cpu", "gpu", "cuda", "tpu"])
def test_only_programs_for_cpus_are_changed(platform):
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        equations = jax.make_jaxpr(after)(jnp.ones((4, 2)), jnp.ones((4, 2))).eqns
    assert bool(equations) == (platform == "cpu")


def attention_layers(q_BTHK: jax.Array) -> jax.Array:
    first_key_BT = jnp.zeros(q_BTHK.shape[:2], jnp.int32)
    for _ in range(LAYERS):
        q_BTHK += chunked_attention.attend_chunked(q_BTHK, q_BTHK, q_BTHK, MaskSpec(first_key_BT), 1.0)
    return jnp.sum(q_BTHK)


def one_layer(x_BTHK: jax.Array) -> jax.Array:
    mask = MaskSpec(jnp.zeros(x_BTHK.shape[:2], jnp.int32))
    return jnp.sum(chunked_attention.attend_chunked(x_BTHK, x_BTHK, x_BTHK, mask, 1.0) ** 2)


def mlp_layers(x_NF: jax.Array) -> jax.Array:
    for _ in range(LAYERS):
        x_NF = mlp.swiglu(jnp.roll(x_NF, 1, axis=0), x_NF)
    return jnp.sum(x_NF)


def working_memory(function, x: jax.Array) -> int:
    return jax.jit(jax.grad(function)).lower(x).compile(QUICK).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("module", "function", "x"),
    [(chunked_attention, attention_layers, jnp.zeros((1, T, 1, K))), (mlp, mlp_layers, jnp.zeros((512, 1024)))],
)
def test_what_is_computed_again_is_not_kept(module, function, x, monkeypatch):
    ours = working_memory(function, x)
    monkeypatch.setattr(module, "after", lambda x, other: x)
    kept = working_memory(function, x)
    assert ours < 0.75 * kept, f"{ours} bytes, {kept} without an order"


@pytest.mark.parametrize("function", [one_layer, jax.grad(one_layer)], ids=["forward", "backward"])
def test_attention_takes_its_blocks_in_turn(function, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8 * 64 + 8, 8, K)), jnp.float32)  # the last block is short

    def compiled():
        return jax.jit(lambda x: function(x)).lower(x).compile(QUICK)

    ours = compiled()
    monkeypatch.setattr(chunked_attention, "_in_turn", lambda x, done: x)
    at_once = compiled()
    np.testing.assert_array_equal(ours(x), at_once(x))
    memory, all_scores = (program.memory_analysis().temp_size_in_bytes for program in (ours, at_once))
    assert memory < 0.42 * all_scores, f"{memory} bytes, {all_scores} with the scores of all blocks"


def test_the_step_copies_no_parameter_and_runs_once_the_compilers_memory_is_given_back(monkeypatch):
    given_back = []
    monkeypatch.setattr(backend, "give_back_memory", lambda: given_back.append(True))
    training = Training(tiny_config())
    program = step.compile_step(training.step, training.state, training.put(random_batch(0)))
    assert given_back
    text = program.as_text()
    copies = [line for line in text.splitlines() if " copy(%state_params" in line]
    assert not copies, copies
