"""Checkpoints: atomic, verified, kept and dropped by rule, restored anywhere, refused when they do not fit."""

import dataclasses
import errno
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import MODEL

from nanollama.config import CheckpointConfig
from nanollama.data.strict import to_mapping
from nanollama.training import checkpoint, integrity
from nanollama.training.checkpoint import CheckpointError, Checkpoints, restore_params, tree_hash

METADATA = {"config": {"model": to_mapping(MODEL)}, "tokenizer": "abc", "source_tokens": {"a": 7}}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


def make_state(step: int = 0, sharding: jax.sharding.Sharding | None = None) -> State:
    key = jax.random.key(step)
    params = {"matrix": jax.random.normal(key, (16, 32)), "layers": {"norm": jnp.ones((8,)) * step}}
    state = State(jnp.int32(step), params, ((), {"mu": jax.tree.map(lambda x: x * 0.5, params)}))
    return (
        state
        if sharding is None
        else jax.device_put(
            state,
            jax.tree.map(lambda x: sharding if x.ndim else NamedSharding(sharding.mesh, PartitionSpec()), state),
        )
    )


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def rows_sharding(devices: int) -> NamedSharding:
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec("x"))


def save_steps(directory: Path, *steps: int, **config) -> Checkpoints:
    checkpoints = Checkpoints(directory, CheckpointConfig(**config))
    for step in steps:
        checkpoints.save(step, make_state(step), METADATA)
    checkpoints.wait()
    return checkpoints


def test_round_trip_keeps_bits_and_metadata(tmp_path):
    checkpoints = save_steps(tmp_path, 7)
    assert checkpoints.latest() == 7
    state, metadata = checkpoints.restore(7, abstract(make_state(7)), model=MODEL)
    assert isinstance(state, State) and metadata == METADATA
    assert tree_hash(state) == tree_hash(make_state(7)) != tree_hash(make_state(8))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_restores_onto_another_device_count(tmp_path, devices):
    with_eight = make_state(3, rows_sharding(8))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(3, with_eight, METADATA)
    checkpoints.wait()
    target = abstract(make_state(0, rows_sharding(devices)))
    state, _ = checkpoints.restore(3, target)
    assert state.params["matrix"].sharding == target.params["matrix"].sharding
    assert tree_hash(state) == tree_hash(with_eight)


def test_keeps_the_last_n_and_the_milestones(tmp_path):
    assert save_steps(tmp_path, *range(1, 9), keep=2, milestone_every=3).steps() == [3, 6, 7, 8]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_may_be_donated_at_once(tmp_path, asynchronous):
    add_one = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"x": jnp.arange(1 << 20, dtype=jnp.float32)}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=9, asynchronous=asynchronous))
    for step in range(3):
        checkpoints.save(step, state, METADATA)
        state = add_one(state)
    checkpoints.close()
    for step in range(3):
        restored, _ = checkpoints.restore(step, abstract(state))
        np.testing.assert_array_equal(restored["x"], np.arange(1 << 20, dtype=np.float32) + step)


def test_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    disk = threading.Event()
    monkeypatch.setattr(
        checkpoint, "write_hash_list", lambda folder: (disk.wait(60), integrity.write_hash_list(folder))
    )
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, make_state(1), METADATA)  # returns, although the disk does not
    checkpoints.check()
    assert checkpoints.steps() == [], "no folder may have its final name before its hashes are in it"
    disk.set()
    checkpoints.wait()
    assert checkpoints.latest() == 1


def test_works_under_the_loops_transfer_guard(tmp_path):
    state = make_state(1)
    with jax.transfer_guard("disallow"):
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        checkpoints.save(1, state, METADATA)
        checkpoints.check()
        checkpoints.wait()
        checkpoints.restore(1, abstract(state))


def data_files(folder: Path) -> list[str]:
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in files if Path(name).name not in ("_CHECKPOINT_METADATA", "commit_success.txt")]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def check_every_flip_is_found(folder: Path) -> None:
    names = data_files(folder)
    assert any(name.startswith("state/d/") or "/d/" in name for name in names) and "metadata/metadata" in names
    for name in names:
        flip_bit(folder / name)
        damage = integrity.find_damage(folder)
        assert damage is not None and Path(name).name in damage, f"a flipped bit in {name} is not found"
        flip_bit(folder / name)
    assert integrity.find_damage(folder) is None


def test_a_flipped_bit_in_any_file_is_found(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    check_every_flip_is_found(tmp_path / "1")
    monkeypatch.setattr(integrity, "sha256_file", lambda path: "0" * 64)  # the mutant: sizes only
    save_steps(tmp_path / "mutant", 1)
    with pytest.raises(AssertionError, match="is not found"):
        check_every_flip_is_found(tmp_path / "mutant" / "1")


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_bit, cut_off, Path.unlink])
def test_damaged_checkpoint_is_skipped_and_named(tmp_path, caplog, damage):
    save_steps(tmp_path, 1, 2)
    damaged = max((tmp_path / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    damage(damaged)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.latest() == 1
    assert str(tmp_path / "2") in caplog.text and damaged.name in caplog.text
    with pytest.raises(CheckpointError, match=damaged.name):
        checkpoints.restore(2, abstract(make_state()))


def test_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "absent", CheckpointConfig())
    assert checkpoints.latest() is None and checkpoints.steps() == []
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoints.restore(1, abstract(make_state()))
    with pytest.raises(CheckpointError, match="no good checkpoint there"):
        restore_params(tmp_path)


def test_run_resumed_from_before_a_damaged_checkpoint_replaces_it(tmp_path, caplog):
    save_steps(tmp_path, 1, 2, 3, keep=2).close()
    cut_off(tmp_path / "3" / "state" / "manifest.ocdbt")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    assert checkpoints.latest() == 2
    checkpoints.save(3, make_state(3), METADATA)
    checkpoints.close()
    assert checkpoints.steps() == [2, 3] and Checkpoints(tmp_path, CheckpointConfig()).latest() == 3
    assert (tmp_path / "3.damaged").is_dir() and "renamed damaged checkpoint" in caplog.text


def test_good_checkpoint_is_never_overwritten(tmp_path):
    save_steps(tmp_path, 5).close()
    with pytest.raises(CheckpointError, match="5 is a good checkpoint, and step 4 is being saved"):
        Checkpoints(tmp_path, CheckpointConfig()).save(4, make_state(4), METADATA)


def test_disk_full_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints = save_steps(tmp_path, 1, keep=1)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_hash_list", full)
    checkpoints.save(2, make_state(2), METADATA)
    with pytest.raises(CheckpointError, match=r"saving step 2 .*No space left on device.* GB free.*step 1 is good"):
        checkpoints.wait()
    monkeypatch.undo()
    assert Checkpoints(tmp_path, CheckpointConfig()).latest() == 1
    checkpoints.save(3, make_state(3), METADATA)  # room was made: goes on
    checkpoints.close()
    assert checkpoints.steps() == [3]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    header = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\nfrom test_checkpoint import *\n"
    return subprocess.run(
        [sys.executable, "-c", header + code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_file_system_that_refuses_to_write_stops_with_a_clear_message(tmp_path):
    """The real thing: no file may grow past 64 kB, as if the disk were full in the middle of an array."""
    code = """
import resource
checkpoints = save_steps(Path(sys.argv[1]), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    checkpoints.save(2, {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}, METADATA)
    checkpoints.wait()
except CheckpointError as error:
    sys.exit(f"stopped: {error}")
"""
    result = run_python(code, str(tmp_path))
    assert result.returncode == 1, result.stderr
    assert "stopped: saving step 2 to" in result.stderr and "The checkpoint of step 1 is good" in result.stderr
    assert Checkpoints(tmp_path, CheckpointConfig()).latest() == 1


def test_kill_in_the_middle_of_a_save(tmp_path, caplog):
    code = """
import signal
checkpoints = save_steps(Path(sys.argv[1]), 1)
checkpoint.write_hash_list = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(2, make_state(2), METADATA)
checkpoints.wait()
"""
    assert run_python(code, str(tmp_path)).returncode == -9
    assert list(tmp_path.glob("2.orbax-checkpoint-tmp*")) and not (tmp_path / "2").exists()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.latest() == 1
    assert "2.orbax-checkpoint-tmp: its saving was cut off" in caplog.text
    checkpoints.save(2, make_state(2), METADATA)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2] and not list(tmp_path.glob("*tmp*"))


def test_checkpoint_of_another_model_names_the_fields_and_reads_nothing(tmp_path, monkeypatch):
    checkpoints = save_steps(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_read_arrays", lambda *a, **k: pytest.fail("arrays were read"))
    other = dataclasses.replace(MODEL, num_layers=4, rope_theta=5e5, init_std=0.01)
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, abstract(make_state()), model=other)
    assert "config.model.num_layers: checkpoint 2, asked 4" in str(error.value)
    assert "config.model.rope_theta: checkpoint 10000.0, asked 500000.0" in str(error.value)
    assert "init_std" not in str(error.value) and "hidden_size" not in str(error.value)
    wide = make_state()
    wide.params["matrix"] = jnp.zeros((16, 48))
    wide.params["extra"] = jnp.zeros((2,))
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, abstract(wide), model=MODEL)
    assert "params/matrix: checkpoint float32[16, 32], asked float32[16, 48]" in str(error.value)
    assert "params/extra: checkpoint has none, asked float32[2]" in str(error.value)


def test_restore_params_for_evaluation(tmp_path):
    save_steps(tmp_path / "checkpoints", 1, 2).close()
    for path, step in ((tmp_path, 2), (tmp_path / "checkpoints", 2), (tmp_path / "checkpoints" / "1", 1)):
        params, metadata = restore_params(path)
        assert tree_hash(params) == tree_hash(make_state(step).params) and metadata == METADATA
    params, _ = restore_params(tmp_path, shardings=rows_sharding(8), dtype=jnp.bfloat16)
    assert params["matrix"].dtype == jnp.bfloat16 and params["matrix"].sharding == rows_sharding(8)


def test_tree_hash_sees_values_paths_types_and_shapes_only():
    tree = {"a": {"b": np.arange(4, dtype=np.float32)}, "c": np.int32(3)}
    assert tree_hash(tree) == tree_hash({"c": jnp.int32(3), "a": {"b": jnp.arange(4.0)}})
    assert tree_hash((tree, tree)) == tree_hash([tree, tree])
    x = np.arange(4, dtype=np.float32)
    changed = [x.reshape(2, 2), x.astype(np.float16), x.view(np.int32), np.nextafter(x, 9, dtype=np.float32)]
    hashes = {tree_hash(tree)} | {tree_hash({"a": {"b": other}, "c": np.int32(3)}) for other in changed}
    hashes |= {tree_hash({"a": {"B": x}, "c": np.int32(3)}), tree_hash({"a": {"b": x}})}
    assert len(hashes) == 7


def test_command_line_prints_hashes_and_lists(tmp_path, capsys):
    save_steps(tmp_path / "checkpoints", 1, 2).close()
    flip_bit(tmp_path / "checkpoints" / "1" / "metadata" / "metadata")
    checkpoint.main(["hash", str(tmp_path)])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = integrity.state_hashes(make_state(2))
    assert printed == {name: str(value) for name, value in expected.items()}
    assert list(printed) == ["step", "params", "optimizer", "combined"]
    checkpoint.main(["list", str(tmp_path)])
    first, second = capsys.readouterr().out.splitlines()
    assert "metadata/metadata are not those that were saved" in first and second.endswith("good")


def test_no_noise(tmp_path, caplog):
    """A warning must mean something: a whole save and restore logs none."""
    with caplog.at_level(logging.WARNING):
        checkpoints = save_steps(tmp_path, 1)
        checkpoints.restore(checkpoints.latest(), abstract(make_state()), model=MODEL)
        restore_params(tmp_path)
        checkpoints.close()
    assert caplog.text == ""
