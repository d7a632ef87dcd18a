"""Where a run's parameters come from: a seed, another run's checkpoint, or this run's own; adapters and their base.

Owns the rules by which a checkpoint may be trained on, and which part of a state is saved: a run of adapters saves
these and the optimizer, and names its base by path and hash. A checkpoint with a base is read whole here, merged.
Knows nothing of the loop.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanollama.config import Config, ConfigError, LoraConfig, check
from nanollama.data.files import read_json
from nanollama.data.strict import from_mapping
from nanollama.data.tokenizer import Tokenizer
from nanollama.models import lora as loras
from nanollama.ops.rounding import widened
from nanollama.training import state as states
from nanollama.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    find_step_folder,
    read_metadata,
    restore_params,
)
from nanollama.training.compatibility import check_model
from nanollama.training.integrity import checkpoint_hash
from nanollama.training.state import TrainState
from nanollama.training.stored_parameters import Read, parameter_infos, parameter_reader

# What a new run may change of the model that it starts from: how far it reads. Shapes stay, so do the weights.
CONTEXT_FIELDS = ("rope_theta", "rope_scaling", "max_position_embeddings")


def find_parent(config: Config, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What `config.initial_checkpoint` is: {path, step, hash, tokenizer}; None where there is none.

    Errors: CheckpointError and DataError when there is no good checkpoint, or its model or tokenizer is another.
    """
    if not config.initial_checkpoint:
        return None
    folder = _initial_folder(config)
    metadata = read_metadata(folder)
    check_model(folder, metadata, config.model, besides=() if config.lora else CONTEXT_FIELDS)
    if not metadata.get("tokenizer"):
        raise CheckpointError(
            f"{folder} was imported without a tokenizer, so nothing says what its ids mean. Put tokenizer.json or "
            "tokenizer.model beside the published weights and import them again."
        )
    mend = f"Set config.data.tokenizer to {folder.parent.parent / 'tokenizer'}, and use sets packed with it."
    tokenizer.require(metadata["tokenizer"], f"config.initial_checkpoint {folder}", mend)
    return {
        "path": config.initial_checkpoint,
        "step": int(folder.name),
        "hash": checkpoint_hash(folder),
        "tokenizer": metadata["tokenizer"],
    }


def with_new_rows(config: Config, workdir: Path) -> Config:
    """`config` with an id as `lora.train_rows_from`, also where it says None.

    That is the first id of the tokens that `export.add_tokens` gave the initial checkpoint: a run that trained since
    has trained their rows, so there are none, 0. A run that goes on in `workdir` keeps its own. Errors: ConfigError.
    """
    lora, said = config.lora, workdir / "config.json"
    if lora is None or lora.train_rows_from is not None:
        return config
    if Checkpoints(workdir / "checkpoints", config.checkpoint).steps() and said.is_file():
        first = (read_json(said).get("lora") or {}).get("train_rows_from")
    else:
        added = read_metadata(_initial_folder(config)).get("lineage", {}).get("added_tokens") or {}
        first = min(added.values(), default=0)
    config = dataclasses.replace(config, lora=dataclasses.replace(lora, train_rows_from=first or 0))
    check(config)
    return config


def fresh(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at step 0: random, or with the parameters of `config.initial_checkpoint`, read onto the mesh."""
    if not config.initial_checkpoint:
        return states.init_state(config, optimizer, mesh)[0]
    shardings = states.state_shardings(config, optimizer, mesh)
    params = restore_whole(find_step_folder(config.initial_checkpoint), _base(shardings.params, config))
    if config.lora is not None:
        new = functools.partial(states.fresh_adapters, config, optimizer)
        adapters = jax.jit(new, out_shardings=loras.learned(shardings.params))(jax.device_put(config.seed))
        params = loras.with_learned(params, adapters)
    begin = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = jax.device_put(np.zeros((), np.int32), shardings.step)
    opt_state = begin(widened(loras.learned(params)))
    return TrainState(step, states.stored(params, config), opt_state)


def own(state: TrainState) -> TrainState:
    """What a run saves of its state: all of it, or without the base of its adapters."""
    return dataclasses.replace(state, params=loras.learned(state.params))


def resumed(
    checkpoints: Checkpoints, step: int, config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, dict[str, Any]]:
    """(state, metadata) of this run's checkpoint `step`. Errors: CheckpointError, also when the base is another."""
    abstract = states.abstract_state(config, optimizer, mesh)
    state, metadata = checkpoints.restore(step, own(abstract), model=config.model)
    if config.lora is not None:
        where = jax.tree.map(lambda array: array.sharding, _base(abstract.params, config))
        base = restore_whole(_find_base(metadata, checkpoints.directory, config.initial_checkpoint), where)
        params = states.stored(loras.with_learned(base, state.params), config)
        state = dataclasses.replace(state, params=params)
    return state, metadata


def restore_whole(folder: Path, shardings: Any = None) -> Any:
    """Parameters of a step folder as a plain model's; adapters are merged into their base, found by its path.

    shardings: a tree like the result, or one for all; default the first device. Errors: CheckpointError.
    """
    metadata = read_metadata(folder)
    lora = lora_of(metadata)
    if lora is None:
        if isinstance(shardings, dict):
            _check_names(folder, shardings)
        return restore_params(folder, shardings)[0]
    base = restore_whole(_find_base(metadata, folder.parent), shardings)
    where = jax.tree.map(lambda array: array.sharding, base)
    one = jax.tree.leaves(where)[0]
    everywhere = NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
    adapters, _ = restore_params(folder, everywhere)

    def merge(base: Any, adapters: Any) -> Any:
        return loras.merge(loras.with_learned(base, adapters), lora)

    return jax.jit(merge, donate_argnums=0, out_shardings=where)(base, adapters)


def merged_reader(folder: Path) -> Callable[[str, int], Read]:
    """As `stored_parameters.parameter_reader`, merged as above: (path, stacked axes) -> `Read`."""
    metadata = read_metadata(folder)
    lora, saved = lora_of(metadata), set(parameter_infos(folder))
    if lora is None:
        return functools.partial(parameter_reader, folder)
    base = merged_reader(_find_base(metadata, folder.parent))

    def reader(path: str, stacked: int) -> Read:
        name = path.rpartition("/")[2]
        prefix = path.removesuffix(name)
        names = (name + loras.A, name + loras.B, loras.NEW_ROWS.get(name, ""))
        beside = {one: parameter_reader(folder, prefix + one, stacked) for one in names if prefix + one in saved}
        of_base = base(path, stacked)

        def read(index: tuple[int, ...]) -> np.ndarray:
            found = {one: of_one(index) for one, of_one in beside.items()}
            return np.asarray(loras.merge_one(name, of_base(index), found.get, lora), np.float32)

        return read

    return reader


def whole_parameter_infos(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """As `stored_parameters.parameter_infos`, of the plain model."""
    metadata = read_metadata(folder)
    if lora_of(metadata) is None:
        return parameter_infos(folder)
    return whole_parameter_infos(_find_base(metadata, folder.parent))


def lora_of(metadata: Mapping[str, Any]) -> LoraConfig | None:
    """The adapters that a checkpoint's metadata speaks of."""
    found = metadata.get("config", {}).get("lora")
    return None if found is None else from_mapping(LoraConfig, found, "config.lora")


def _find_base(metadata: Mapping[str, Any], directory: Path, path: str = "") -> Path:
    """The step folder of the base of a checkpoint in `directory`, proved by its hash.

    path: where to look first, when the base was moved; then where the run found it, then beside the run.
    """
    base = metadata["parent"]
    run = directory.parent
    places = [Path(place) for place in dict.fromkeys([path, base["path"]]) if place]
    places.append(run.parent / Path(base["path"]).name)
    for place in places:
        try:
            folder = find_step_folder(place)
        except CheckpointError:
            continue
        if folder.name != str(base["step"]) and (folder.parent / str(base["step"])).is_dir():
            folder = find_step_folder(folder.parent / str(base["step"]))  # the base was trained on since
        if checkpoint_hash(folder) == base["hash"]:
            return folder
        raise CheckpointError(
            f"{folder} is not the base of the adapters in {run}: its hash is {checkpoint_hash(folder)}, theirs was "
            f"{base['hash']}. Put the base back, or train the adapters again on this one."
        )
    raise CheckpointError(
        f"{run} holds adapters, and their base is gone: step {base['step']} of {base['path']} (hash {base['hash']}); "
        f"looked in {', '.join(map(str, places))}. Put it back in one of these."
    )


def _initial_folder(config: Config) -> Path:
    try:
        return find_step_folder(config.initial_checkpoint)
    except CheckpointError as error:
        raise ConfigError("config.initial_checkpoint", str(error), "Or leave it empty to start anew.") from error


def _base(tree: Any, config: Config) -> Any:
    return tree if config.lora is None else loras.base(tree)


def _check_names(folder: Path, wanted: Any) -> None:
    """The same names: shapes follow from the model, which was compared."""
    leaves = jax.tree_util.tree_leaves_with_path(wanted)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    saved = set(parameter_infos(folder))
    if names != saved:
        raise CheckpointError(
            f"{folder}: its parameters are not those of its model: {', '.join(sorted(names ^ saved))}. It was written "
            "by another version: train or import it again."
        )
