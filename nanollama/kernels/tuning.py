"""Which tiles, and which backend: measured on the card at hand and kept, or a default.

    python -m nanollama.kernels.tune        # measures on this GPU (see there) and writes the table

The table is one JSON file per device kind and version of JAX in the cache folder ($XDG_CACHE_HOME or ~/.cache,
nanollama/attention). A run that is resumed after its table changed rounds otherwise, so measure before a run. Nothing
here measures or imports more than jax.
"""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from nanollama.kernels.flash_programs import Tile, Tiles


class Shape(NamedTuple):
    """What a kernel's speed depends on."""

    dtype: str
    key_dim: int
    value_dim: int
    heads_per_kv_head: int
    length: int  # queries; rounded up to a power of two in the table
    plain: bool  # one document a row, so that cuDNN can compute it too


class Choice(NamedTuple):
    """`backend` is empty where nothing was measured."""

    backend: str
    tiles: Tiles
    mosaic_tiles: Tiles

    def tiles_of(self, compiler: str) -> Tiles:
        return self.mosaic_tiles if compiler == "mosaic" else self.tiles


# Not measured by us: tiles that fit an SM's shared memory and registers, and that published Triton kernels use.
DEFAULT_TILES = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 128, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}

# Nor these: the largest that compile with no register in memory (docs/kernels.md), or for dK and dV at 128 the fewest.
MOSAIC_TILES = {
    64: Tiles(Tile(128, 128, 12, 3), Tile(128, 128, 12, 2), Tile(64, 128, 12, 3)),
    128: Tiles(Tile(128, 128, 12, 2), Tile(128, 64, 12, 2), Tile(64, 128, 12, 3)),
}


def lookup(kind: str, shape: Shape) -> Choice:
    """The measured choice for this shape on this kind of device, else the default tiles of its head dim."""
    entry, dim = _entries(table_path(kind)).get(name(shape)), max(shape.key_dim, shape.value_dim)
    return entry or Choice("", default_tiles(dim), default_tiles(dim, "mosaic"))


def default_tiles(head_dim: int, compiler: str = "triton") -> Tiles:
    """For the smallest head dim of the compiler's table that holds this one, else for its largest."""
    table = MOSAIC_TILES if compiler == "mosaic" else DEFAULT_TILES
    return next((tiles for dim, tiles in table.items() if head_dim <= dim), table[max(table)])


def name(shape: Shape) -> str:
    """The shape's key in the table."""
    length = 1 << (shape.length - 1).bit_length()
    kind = "plain" if shape.plain else "packed"
    return f"{shape.dtype}-k{shape.key_dim}-v{shape.value_dim}-r{shape.heads_per_kv_head}-t{length}-{kind}"


def table_path(kind: str) -> Path:
    """Where the table of a kind of device is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return cache / "nanollama" / "attention" / f"{slug}-jax-{jax.__version__}.json"


def save(kind: str, measured: dict[str, dict[str, Any]]) -> Path:
    """Add entries (of `tune.tune`, by `name`) to the table; written whole or not at all."""
    path = table_path(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _read(path) | measured
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"device": kind, "jax": jax.__version__, "entries": entries}, indent=1) + "\n")
    temporary.replace(path)
    _entries.cache_clear()
    return path


def tiles_as_dict(tiles: Tiles) -> dict[str, Any]:
    return dataclasses.asdict(tiles)


def tiles_from_dict(tiles: dict[str, Any]) -> Tiles:
    return Tiles(*(Tile(**tiles[part]) for part in Tiles.__dataclass_fields__))


def _read(path: Path) -> dict[str, Any]:
    """Errors: ValueError when the file is not such a table."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())["entries"]
        assert isinstance(entries, dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path}: not a table of measured tiles. Delete it, and measure again if you like.") from error
    return entries


@functools.cache  # one program, one table: what was measured meanwhile serves the next process
def _entries(path: Path) -> dict[str, Choice]:
    try:
        return {
            key: Choice(entry["backend"], tiles_from_dict(entry["tiles"]), tiles_from_dict(entry["mosaic_tiles"]))
            for key, entry in _read(path).items()
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a table of measured tiles. Delete it, and measure again if you like.") from error
