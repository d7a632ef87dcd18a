"""The compiled train step: aliased, sharded as it came, silent, guarded; and its metrics."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import MODEL, QUICK, Training, random_batch, tiny_config

from nanollama.config import ComputeConfig, ConfigError, LossConfig, MeshConfig, ScheduleConfig
from nanollama.data.files import DataError
from nanollama.ops.losses import LossSums
from nanollama.parallel.mesh import make_mesh
from nanollama.training import step
from nanollama.training.schedules import make_schedule

REMATERIALIZED = "Involuntary full rematerialization"


def bytes_on_one_device(state) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))


def compile_a_bad_lookup(mesh: MeshConfig) -> None:
    """Rows cut over fsdp are looked up as they are: the decoder without its constraint on the embedding."""
    on = make_mesh(mesh)
    where = NamedSharding(on, PartitionSpec("tensor", "fsdp"))
    rows = NamedSharding(on, PartitionSpec(("data", "fsdp"), None, None))
    table_VD = jax.device_put(jnp.ones((64, 32)), where)
    tokens_BT = jax.device_put(jnp.zeros((8, 16), jnp.int32), step.batch_sharding(on))

    def loss(table_VD, tokens_BT):
        return jnp.sum(jnp.sin(jax.lax.with_sharding_constraint(table_VD[tokens_BT], rows)))

    jax.jit(jax.grad(loss), out_shardings=where).lower(table_VD, tokens_BT).compile()


def compile_step_on_a_mesh() -> None:
    """What the test below runs in a process of its own: prints to stderr what XLA says, and marks between."""
    for mesh in (MeshConfig(2, 2, 2), MeshConfig(1, 4, 2)):  # which one XLA minds depends on its version
        compile_a_bad_lookup(mesh)
    print("MUTANT ENDS", file=sys.stderr, flush=True)
    for mesh in (MeshConfig(2, 2, 2), MeshConfig(1, fsdp=2, context=2, stage=2)):
        training = Training(tiny_config(rows=16, micro_batches=2), mesh)
        before, batch = training.state, training.put(random_batch(0, rows=16))
        compiled = training.step.lower(before, batch).compile(QUICK)
        assert compiled.memory_analysis().alias_size_in_bytes == bytes_on_one_device(before)
        after, _ = compiled(before, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(before)), "the donated state is still alive"
        assert jax.tree.map(lambda x: x.sharding, after) == training.shardings
        assert int(after.step) == 1 and after.step.dtype == jnp.int32
    other = Training(tiny_config(rows=16), MeshConfig(1, 4, 2))
    jax.jit(other.gradient_program).lower(other.state.params, other.put(random_batch(0, rows=16))).compile(QUICK)


def test_state_is_aliased_and_nothing_is_rematerialized():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest, test_step"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; test_step.compile_step_on_a_mesh()"],
        # nanollama keeps XLA's warnings off the screen, and a program from the cache is not compiled
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mutant, _, printed = done.stderr.partition("MUTANT ENDS")
    assert REMATERIALIZED in mutant, "the mutant printed nothing: this test could not fail"
    assert REMATERIALIZED not in printed


@pytest.fixture(scope="module")
def training() -> Training:
    schedule = ScheduleConfig(warmup_steps=10, decay_steps=100)
    return Training(tiny_config(schedule=schedule, loss=LossConfig(z_loss=1e-2)))


def test_metrics(training):
    expected_rate = make_schedule(training.config.schedule, 1e-3, training.config.steps)
    for number in range(3):
        batch = random_batch(number)
        sums: LossSums = training.gradient(batch)[1]
        metrics = jax.device_get(training.train(batch))
        assert metrics["learning_rate"] == float(expected_rate(number))
        assert metrics["weight"] == batch["weights"].sum() == sums.weight
        np.testing.assert_allclose(metrics["loss"], sums.nll / sums.weight, rtol=1e-6)
        np.testing.assert_allclose(metrics["z_loss"], sums.z / sums.weight, rtol=1e-6)
        np.testing.assert_allclose(metrics["total"], metrics["loss"] + metrics["z_loss"], rtol=1e-6)
        assert metrics["accuracy"] == np.float32(sums.correct / sums.weight)
        assert abs(metrics["loss"] - np.log(MODEL.vocab_size)) < 0.1, "an untrained model guesses evenly"
        assert metrics["z_loss"] > 0.1 and 0 < metrics["update_norm"] < 1 and 0 < metrics["grad_norm"] < 10
        assert metrics["finite"] and metrics["finite"].dtype == bool
    assert int(training.state.step) == 3


def test_a_number_that_is_not_finite_is_flagged(training):
    poisoned = dataclasses.replace(training.state, params=jax.tree.map(jnp.copy, training.state.params))
    poisoned.params["layers"]["up"] = poisoned.params["layers"]["up"].at[1, 0, 0].set(jnp.nan)
    copies = jax.device_put(jax.tree.map(jnp.copy, poisoned), training.shardings)
    _, metrics = training.step(copies, training.put(random_batch(0)))
    assert not metrics["finite"]


def test_sums_add_up_exactly(training):
    batch = random_batch(0)
    whole = training.gradient(batch)[1]
    parts = []
    for keep in (np.arange(8) < 3, np.arange(8) >= 3):
        part = {**batch, "weights": batch["weights"] * keep[:, None].astype(np.float32)}
        parts.append(training.gradient(part)[1])
    summed = parts[0] + parts[1]
    assert summed.weight == whole.weight and summed.correct == whole.correct
    np.testing.assert_allclose(jax.tree.leaves(summed), jax.tree.leaves(whole), rtol=1e-6)


def test_batch_without_a_loss_token_is_refused(training):
    batch = {**random_batch(0), "weights": np.zeros((8, 32), np.float32)}
    with pytest.raises(DataError, match="no token with a loss weight"):
        training.put(batch)


def test_rows_must_divide():
    with pytest.raises(ConfigError, match=r"global_rows: 8 is not divisible by micro_batches=2 x data\*fsdp\*expert=8"):
        Training(tiny_config(rows=8, micro_batches=2), MeshConfig(4, 2, 1))


def test_unmasked_documents_are_one_document_a_row():
    batch = random_batch(0)
    whole = {**batch, "first_key": np.zeros_like(batch["first_key"])}
    config = tiny_config()
    unmasked = Training(dataclasses.replace(config, data=dataclasses.replace(config.data, mask_documents=False)))
    (got, _), (wanted, _), (masked, _) = (
        training.gradient(rows)
        for training, rows in ((unmasked, batch), (Training(config), whole), (Training(config), batch))
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    assert not np.allclose(got["head"], masked["head"], atol=1e-3 * np.abs(masked["head"]).max())


def gradient_of(**compute: object) -> jax.stages.Lowered:
    """Of four layers and rows so many that what layers keep is most of the working memory."""
    model = dataclasses.replace(MODEL, num_layers=4)
    training = Training(tiny_config(rows=32, model=model, compute=ComputeConfig(loss_chunk_tokens=128, **compute)))
    return jax.jit(training.gradient_program).lower(training.state.params, training.put(random_batch(0, 32)))


def test_what_is_computed_again_is_not_kept():
    """With the settings as they come: XLA:CPU would merge what unrolled layers compute twice."""
    needed = {
        remat: gradient_of(remat=remat).compile(QUICK).memory_analysis().temp_size_in_bytes
        for remat in ("none", "full")
    }
    assert needed["full"] < 0.6 * needed["none"]


def test_layers_unrolled_with_remat_stand_behind_barriers():
    barriers = {
        unroll: gradient_of(remat="full", scan_unroll=unroll).as_text().count("optimization_barrier")
        for unroll in (0, 1, 2)
    }
    assert barriers[0] == barriers[1] < barriers[2]
