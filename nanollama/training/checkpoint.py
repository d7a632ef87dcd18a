"""Checkpoints: saved in the background, atomic, verified byte by byte, restored onto any mesh.

The only file that imports Orbax. Owns `<directory>/<step>/`: `state` (arrays), `metadata` (JSON: config,
lineage) and `integrity.json`, which is written before the folder takes its final name: a folder named by a
number is complete, or was damaged later. Checkpoint step n is the state after n steps. Knows nothing of models
or the loop.

    python -m nanollama.training.checkpoint hash DIR     what bits the newest good checkpoint holds
    python -m nanollama.training.checkpoint list DIR     every checkpoint, good or damaged
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts  # what Orbax stores arrays with

from nanollama.config import CheckpointConfig, ModelConfig
from nanollama.training.compatibility import check_arrays, check_model
from nanollama.training.integrity import CheckpointError, find_damage, state_hashes, tree_hash, write_hash_list

__all__ = ["CheckpointError", "Checkpoints", "restore_params", "tree_hash"]

log = logging.getLogger(__name__)
CHUNK_BYTES, LEAST_CHUNK_BYTES = 16 << 20, 1 << 20  # what of an array is compressed, and later read, at one time


class Checkpoints:
    """The checkpoints of one run: one writer (the run folder's lock sees to it), any number of readers."""

    def __init__(self, directory: str | Path, config: CheckpointConfig):
        self.directory = Path(directory).absolute()
        self._config = config
        self._verified: set[int] = set()
        self._saving: int | None = None

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Copy `state` to the host and return; write, hash and commit in the background, then drop old ones.

        The arrays may be donated as soon as this returns. An earlier save still running is waited for.
        Errors: CheckpointError when this save or the one before failed (disk full); earlier ones stay good.
        """
        self.wait()
        manager = self._manager
        self._set_aside_from(step)
        self._saving = step
        try:
            items = ocp.args.Composite(state=self._arguments(state), metadata=ocp.args.JsonSave(dict(metadata)))
            with jax.transfer_guard("allow"):  # copies to the host are what a save is
                manager.save(step, args=items, force=True)
        except OSError as error:
            raise self._save_error(error) from error
        if not self._config.asynchronous:
            self.wait()

    def check(self) -> None:
        """Raise CheckpointError if the save in the background has failed; cheap enough for every step."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being saved. Errors: CheckpointError when the save failed."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            self._verified.add(self._saving)
        except Exception as error:  # Orbax raises whatever its threads raised: OSError, XlaRuntimeError, ValueError
            raise self._save_error(error) from error
        finally:
            self._saving = None

    def close(self) -> None:
        """Finish the save that runs, and release Orbax's threads."""
        try:
            self.wait()
        finally:
            if "_manager" in self.__dict__:
                self._manager.close()
                del self._manager

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, damaged ones too, oldest first."""
        return _steps(self.directory)

    def latest(self) -> int | None:
        """Step of the newest checkpoint whose every byte is as saved; warns of each newer one that it skips."""
        for unfinished in sorted(self.directory.glob("*.orbax-checkpoint-tmp*")):
            log.warning("skipping %s: its saving was cut off. The next save removes it.", unfinished)
        for step in reversed(self.steps()):
            damage = None if step in self._verified else find_damage(self._folder(step))
            if damage is None:
                self._verified.add(step)
                return step
            log.warning("skipping damaged checkpoint %s: %s", self._folder(step), damage)
        return None

    def restore(
        self, step: int, abstract_state: Any, *, model: ModelConfig | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """(state, metadata) of checkpoint `step`, on the shardings of `abstract_state` (ShapeDtypeStructs).

        Errors: CheckpointError, before any array is read, when the checkpoint is absent or damaged, when it is
        of another architecture than `model`, or when arrays differ in shape or type: each difference is named.
        """
        folder = self._folder(step)
        if step not in self._verified and (damage := _absent_or_damaged(folder)):
            raise CheckpointError(f"{folder}: {damage}. Restore another step: {self.steps()}.")
        metadata = read_metadata(folder)
        if model is not None:
            check_model(folder, metadata, model)
        check_arrays(folder, saved_arrays(folder), abstract_state)
        return _read_arrays(folder, ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(abstract_state)), metadata

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep,
            keep_period=self._config.milestone_every or None,
            cleanup_tmp_directories=True,
            save_root_metadata=False,
            # Called between the last byte and the rename: the hashes are part of what is committed atomically.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_hash_list),
        )
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=self._handlers)

    _handlers: dict[str, Any] | None = None  # Orbax's own

    def _arguments(self, state: Any) -> ocp.args.CheckpointArgs:
        return ocp.args.StandardSave(state, save_args=jax.tree.map(_in_chunks, state))

    def _write_hash_list(self) -> None:
        for folder in self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            write_hash_list(folder)

    def _set_aside_from(self, step: int) -> None:
        """Rename damaged checkpoints at or after `step`: the run was resumed from before them, and they must
        neither stop the save nor count among those to keep. A good one is never touched."""
        newer = [newer for newer in self.steps() if newer >= step]
        for other in newer:
            if other in self._verified or find_damage(self._folder(other)) is None:
                raise CheckpointError(
                    f"{self._folder(other)} is a good checkpoint, and step {step} is being saved. "
                    "Resume from it, or choose another run folder, or move it away."
                )
            if jax.process_index():
                continue  # the first process does it
            aside = self._folder(other).with_name(f"{other}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            self._folder(other).rename(aside)
            log.warning("renamed damaged checkpoint %s to %s", self._folder(other), aside.name)
        if newer:
            self._manager.reload()

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _save_error(self, error: BaseException) -> CheckpointError:
        step, self._saving = self._saving, None
        # Orbax has already struck the checkpoints from its list that this save would have replaced: start afresh.
        with contextlib.suppress(Exception):
            self.__dict__.pop("_manager").close()
        good = self.latest()
        free = shutil.disk_usage(self.directory).free / 1e9
        return CheckpointError(
            f"saving step {step} to {self.directory} failed: {str(error).strip().splitlines()[0]} ({free:.2f} GB free "
            "there). " + (
                f"The checkpoint of step {good} is good: make room, and resume from it."
                if good is not None
                else "There is no earlier checkpoint: make room, and start again."
            )
        )


def _in_chunks(array: Any) -> ocp.SaveArgs:
    """Cut along the leading axes first, so that a layer or expert is read alone; else a device's share is one chunk."""
    size, axes = array.nbytes, 0
    while size > CHUNK_BYTES and size // array.shape[axes] >= LEAST_CHUNK_BYTES:
        size, axes = size // array.shape[axes], axes + 1
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(axes)))


class LazyArray:
    """An array whose parts are made when their turn to be written comes, and dropped after. For `LazyCheckpoints`."""

    def __init__(
        self,
        read: Callable[[tuple[int, ...]], np.ndarray],
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        *,
        stacked: int = 0,
    ):
        """read: the part at an index of the first `stacked` axes; with 0 of them, everything."""
        self.read, self.shape, self.dtype, self.stacked = read, shape, np.dtype(dtype), stacked
        self.ndim, self.size = len(shape), int(np.prod(shape, dtype=np.int64))
        self.nbytes = self.size * self.dtype.itemsize


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes LazyArrays as Orbax writes NumPy arrays, but one part after the other."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Semaphore(1)
        self._error: Exception | None = None

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        async with self._turn:
            if self._error is None:  # after an error the others only end, so that none is left waiting
                try:
                    store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
                    for index in np.ndindex(value.shape[: value.stacked]):
                        await store[index].write(value.read(index), can_reference_source_data_indefinitely=True)
                except Exception as error:
                    self._error = error

    async def _background_serialize(self, *arguments: Any, **options: Any) -> None:
        await super()._background_serialize(*arguments, **options)
        if self._error is not None:
            raise self._error


class LazyCheckpoints(Checkpoints):
    """Saves trees of LazyArrays, one part in memory at a time. What it writes is read like any checkpoint."""

    def __init__(self, directory: str | Path, config: CheckpointConfig):
        super().__init__(directory, dataclasses.replace(config, asynchronous=False))
        registry = ocp.type_handlers.create_type_handler_registry(
            (LazyArray, _OneByOne()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is written, but Orbax warns where it is not known
        )
        self._handlers = {
            "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "metadata": ocp.JsonCheckpointHandler(),
        }

    def _arguments(self, state: Any) -> ocp.args.CheckpointArgs:
        def chunks(array: LazyArray) -> ocp.SaveArgs:  # a part is written at one time, so a chunk is never of two
            return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(array.stacked)))
        return ocp.args.PyTreeSave(state, save_args=jax.tree.map(chunks, state))


def restore_params(path: str | Path, shardings: Any = None, dtype: Any = None) -> tuple[Any, dict[str, Any]]:
    """(params, metadata) of a run folder's, checkpoints folder's or step folder's newest good checkpoint.

    shardings: one Sharding for all parameters, or a tree of them; default: the first device.
    dtype: cast to it while reading; default: as saved. Errors: CheckpointError.
    """
    folder = find_step_folder(path)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = saved_arrays(folder)["params"]
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings or default, saved)
    abstract = {
        "params": jax.tree.map(
            lambda array, sharding: jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=sharding),
            saved,
            shardings,
        )
    }
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    )
    params = _read_arrays(folder, ocp.PyTreeCheckpointHandler(), arguments)["params"]
    return params, read_metadata(folder)


def restore_numpy(path: str | Path) -> dict[str, Any]:
    """The whole state {step, params, opt_state} as NumPy arrays on the host, of `path` as in `restore_params`."""
    folder = find_step_folder(path)
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved_arrays(folder))
    return _read_arrays(folder, ocp.PyTreeCheckpointHandler(), ocp.args.PyTreeRestore(restore_args=arguments))


def find_step_folder(path: str | Path) -> Path:
    """The step folder that `path` (a run, checkpoints or step folder) means: the newest good one."""
    path = Path(path).absolute()
    if path.name.isdigit() and path.is_dir():
        if damage := _absent_or_damaged(path):
            raise CheckpointError(f"{path}: {damage}. Use another step: {_steps(path.parent)}.")
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    step = Checkpoints(directory, CheckpointConfig()).latest()
    if step is None:
        raise CheckpointError(
            f"{path}: no good checkpoint there. Give a run folder, its checkpoints folder, or a "
            "folder in it that is named by a step number."
        )
    return directory / str(step)


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit() and path.is_dir())


def _absent_or_damaged(folder: Path) -> str | None:
    return find_damage(folder) if folder.is_dir() else "no such checkpoint"


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """What was saved beside the arrays of a step folder."""
    return json.loads((Path(folder) / "metadata" / "metadata").read_text(encoding="utf-8"))


def saved_arrays(folder: Path) -> Any:
    """Shapes and types of the saved state, as plain dicts and lists; reads no array."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.metadata(folder / "state").tree


def _read_arrays(folder: Path, handler: ocp.CheckpointHandler, arguments: ocp.args.CheckpointArgs) -> Any:
    # The item's handler, not a Checkpointer: that one warns of every other item in the folder.
    with contextlib.closing(handler), jax.transfer_guard("allow"):
        return handler.restore(folder / "state", args=arguments)


def main(arguments: list[str] | None = None) -> None:
    """`hash DIR` and `list DIR`."""
    parser = argparse.ArgumentParser(prog="nanollama.training.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["hash", "list"])
    parser.add_argument("directory", help="run folder, checkpoints folder, or (hash) one step's folder")
    options = parser.parse_args(arguments)
    if options.command == "hash":
        for name, value in state_hashes(restore_numpy(options.directory)).items():
            print(f"{name:<10} {value}")
        return
    path = Path(options.directory)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for step in _steps(directory):
        size = sum(file.stat().st_size for file in (directory / str(step)).rglob("*") if file.is_file())
        print(f"{step:>10} {size / 1e6:>12.1f} MB  {find_damage(directory / str(step)) or 'good'}")


if __name__ == "__main__":
    main()
