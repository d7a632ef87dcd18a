"""What proves that a checkpoint is whole, and that two states are the same bits.

Owns the hash list `integrity.json` of a checkpoint folder, and the hash of a tree of arrays. Knows files and
arrays only: neither Orbax nor training.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanollama.data.files import DataError, read_json, sha256_file, sha256_json, write_json

HASH_LIST = "integrity.json"
# Orbax writes these two at the very moment of the commit, after the hashes are taken; they hold times and class
# names, nothing that is restored.
_NOT_HASHED = {HASH_LIST, "_CHECKPOINT_METADATA", "commit_success.txt"}


class CheckpointError(DataError):
    """A checkpoint that cannot be saved or used; the message says which, why and what to do."""


def write_hash_list(folder: Path) -> None:
    """List every file of a finished but not yet committed checkpoint, with its size and SHA-256."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    listed = {name: path for name, path in files.items() if path.name not in _NOT_HASHED}
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
        hashes = dict(zip(listed, pool.map(sha256_file, listed.values()), strict=True))
    entries = {name: {"bytes": path.stat().st_size, "sha256": hashes[name]} for name, path in listed.items()}
    write_json(folder / HASH_LIST, {"files": entries, "sha256": sha256_json(entries)})


def find_damage(folder: Path) -> str | None:
    """None when every byte of the checkpoint is as it was saved; else what is wrong, naming the file."""
    try:
        listed = read_json(folder / HASH_LIST)
        entries = listed["files"]
        if listed["sha256"] != sha256_json(entries):
            return f"{HASH_LIST} is damaged"
    except FileNotFoundError:
        return f"it has no {HASH_LIST} (cut off while saving, or saved by another program)"
    except (DataError, KeyError, TypeError, UnicodeDecodeError):
        return f"{HASH_LIST} is damaged"
    for name, entry in entries.items():  # sizes first: a cut-off file is found without reading gigabytes
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: sha256_file(folder / name), entries)
        for name, found in zip(entries, hashes, strict=True):
            if found != entries[name]["sha256"]:
                return f"the bytes of {name} are not those that were saved"
    return None


def checkpoint_hash(folder: Path) -> str:
    """One SHA-256 for all bytes of a checkpoint folder: that of its hash list."""
    return str(read_json(folder / HASH_LIST)["sha256"])


def tree_hash(tree: Any) -> str:
    """SHA-256 over (path, dtype, shape, bytes) of every array, in the order of the paths.

    The same values give the same hash, however many devices hold them and whichever container types (dataclass,
    named tuple, dict) hold the arrays. Needs every shard on this process.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    digest = hashlib.sha256()
    for path in sorted(leaves):
        array = np.asarray(jax.device_get(leaves[path]))
        digest.update(f"{path}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def state_hashes(state: Any) -> dict[str, Any]:
    """{step, params, optimizer, combined} of a TrainState, or of a dict with its fields."""
    fields = state if isinstance(state, dict) else vars(state)
    hashes = {
        "step": int(jax.device_get(fields["step"])),
        "params": tree_hash(fields["params"]),
        "optimizer": tree_hash(fields.get("opt_state", {})),
    }
    return {**hashes, "combined": sha256_json(hashes)}
