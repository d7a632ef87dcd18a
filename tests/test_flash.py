"""The flash kernels, interpreted on CPU, against dense attention; which tiles they visit; that they lower for CUDA.

Nothing here measures: what a GPU does with the kernels is for `benchmarks/attention.py` to say.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tiny import quickly

from benchmarks import attention as benchmark
from nanollama.kernels import intervals, tune, tuning
from nanollama.kernels.flash import flash_attention
from nanollama.kernels.flash_programs import Tile, Tiles

SMALL = Tiles(Tile(32, 16), Tile(16, 32), Tile(32, 16))  # unequal sides, so that a mix-up of q and k shows


def documents(rows: int, length: int, window: int = 0) -> np.ndarray:
    """first_key of random documents, a window if one is asked for, and padding at the end that sees itself."""
    generator, index = np.random.default_rng(0), np.arange(length)
    starts = generator.random((rows, length)) < 0.04
    starts[:, 0] = True
    first_key = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    if window:
        first_key = np.maximum(first_key, index - window + 1)
    first_key[:, length - length // 8 :] = index[length - length // 8 :]
    return first_key.astype(np.int32)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, start: jax.Array, scale: float) -> jax.Array:
    """The slow twin, written anew: repeated heads, the whole mask."""
    repeats = q.shape[2] // k.shape[2]
    scores = jnp.einsum("bthk,bshk->bhts", q, jnp.repeat(k, repeats, 2)) * scale
    key, query = jnp.arange(k.shape[1]), start[:, None] + jnp.arange(q.shape[1])
    seen = (key >= first_key[..., None]) & (key <= query[..., None])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshj->bthj", weights, jnp.repeat(v, repeats, 2))


def check(
    T: int, heads: tuple[int, int], dims: tuple[int, int], *, window: int = 0, more_keys: int = 0,
    tiles: Tiles = SMALL, rows: int = 2, scale: float = 0.1, function: Callable[..., jax.Array] = flash_attention,
    gradients: bool = True,
) -> None:  # fmt: skip
    """Values and gradients equal dense attention's. `more_keys`: queries are the last of a longer row of keys."""
    generator = np.random.default_rng(1)
    S = T + more_keys
    shapes = [(rows, T, heads[0], dims[0]), (rows, S, heads[1], dims[0]), (rows, S, heads[1], dims[1])]
    q, k, v, cotangent = (
        jnp.asarray(generator.standard_normal(shape, np.float32)) for shape in (*shapes, (*shapes[0][:3], dims[1]))
    )
    start = jnp.arange(rows, dtype=jnp.int32) if more_keys else jnp.zeros(rows, jnp.int32)
    first_key = jnp.asarray(documents(rows, T, window))

    def run(function: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = function(q, k, v, first_key, start, scale=scale)
            return jnp.sum(out * cotangent), out

        if not gradients:
            return (quickly(lambda *x: loss(*x)[1], q, k, v),)
        (_, out), slopes = quickly(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), q, k, v)
        return (out, *slopes)

    ours = run(functools.partial(function, tiles=tiles, interpret=True))
    for got, wanted, name in zip(ours, run(dense), ["output", "dq", "dk", "dv"], strict=False):
        np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "case",
    [
        dict(T=150, heads=(4, 2), dims=(32, 32)),  # documents, padding, an odd length
        dict(T=128, heads=(4, 1), dims=(16, 16), window=40),
        dict(T=77, heads=(2, 2), dims=(48, 16), tiles=Tiles()),  # latent attention; tiles longer than the row
        dict(T=33, heads=(2, 1), dims=(80, 80), more_keys=40),  # a key cache, its rows at different starts
    ],
    ids=["documents", "window", "value-dim", "cache"],
)
def test_flash_is_dense_attention(case: dict[str, Any]) -> None:
    check(**case)


def test_flash_in_bfloat16_stays_near_float32() -> None:
    generator = np.random.default_rng(1)
    q, k, v = (jnp.asarray(generator.standard_normal((1, 64, 2, 16)), jnp.bfloat16) for _ in range(3))
    first_key, start = jnp.asarray(documents(1, 64)), jnp.zeros(1, jnp.int32)
    got = flash_attention(q, k, v, first_key, start, scale=0.25, tiles=SMALL, interpret=True)
    assert got.dtype == jnp.bfloat16
    wanted = dense(*(x.astype(jnp.float32) for x in (q, k, v)), first_key, start, scale=0.25)
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=2e-2)


# --- which tiles


def tiles_of(mask: np.ndarray, q: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """[Q, P]: whether a tile of a dense mask holds anything, and whether it is whole."""
    T, S = mask.shape
    cut = mask.reshape(T // q, q, S // k, k)
    return cut.any((1, 3)), cut.all((1, 3))


def check_bounds(q: int, k: int, start: int, rising: bool) -> None:
    """`key_tiles` and `query_tiles` against the tiles of the dense mask."""
    T, S = 128, 192
    first_key = documents(3, T, window=50) + start
    if not rising:  # nothing nanollama makes, but no reason to be wrong
        first_key = np.random.default_rng(2).integers(0, start + np.arange(T) + 1, (3, T)).astype(np.int32)
    starts = jnp.full(3, start, jnp.int32)
    key, query = np.arange(S), start + np.arange(T)
    for function in (intervals.key_tiles, intervals.query_tiles):
        bounds = np.asarray(function(jnp.asarray(first_key), starts, S, q, k))
        for b in range(3):
            some, whole = tiles_of((key >= first_key[b][:, None]) & (key <= query[:, None]), q, k)
            if bounds.shape[1] != len(some):
                some, whole = some.T, whole.T
            for (low, whole_low, whole_high, high), held, filled in zip(bounds[b], some, whole, strict=True):
                where = np.flatnonzero(held)
                assert 0 <= low <= whole_low <= whole_high <= high <= len(held)
                assert np.all(filled[whole_low:whole_high])
                if len(where) == 0:
                    assert low == high
                elif rising:  # nothing missed, nothing visited in vain, nothing compared in vain
                    assert (low, high) == (where[0], where[-1] + 1)
                    assert whole_high - whole_low == np.count_nonzero(filled)
                else:
                    assert low <= where[0] and high > where[-1]


@pytest.mark.parametrize(("q", "k"), [(16, 16), (32, 16), (16, 64)])
@pytest.mark.parametrize("start", [0, 37])
@pytest.mark.parametrize("rising", [True, False])
def test_bounds_are_the_tiles_of_the_dense_mask(q: int, k: int, start: int, rising: bool) -> None:
    check_bounds(q, k, start, rising)


def test_packed_rows_cost_the_sum_of_their_documents() -> None:
    """8 documents in a row of 4,096: an eighth of the causal tiles, forward and backward."""
    starts, zero = jnp.arange(4096, dtype=jnp.int32)[None] // 512 * 512, jnp.zeros((1, 4096), jnp.int32)
    for function in (intervals.key_tiles, intervals.query_tiles):

        def visited(first_key: jax.Array, function: Callable[..., jax.Array] = function) -> int:
            bounds = function(first_key, jnp.zeros(1, jnp.int32), 4096, 64, 64)
            return int((bounds[..., intervals.HIGH] - bounds[..., intervals.LOW]).sum())

        assert visited(zero) == 64 * 65 // 2
        assert visited(starts) == 8 * (8 * 9 // 2)


def test_excluded_tiles_are_not_read() -> None:
    """NaN in all of the first document: the second one's outputs and gradients do not notice."""
    generator, T = np.random.default_rng(1), 128
    q, k, v = (jnp.asarray(generator.standard_normal((1, T, 2, 16), np.float32)) for _ in range(3))
    first_key = jnp.asarray(np.where(np.arange(T) < 64, 0, 64)[None].astype(np.int32))
    poison = jnp.where(jnp.arange(T) < 64, jnp.nan, 1.0)[None, :, None, None]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = flash_attention(q, k, v, first_key, jnp.zeros(1, jnp.int32), scale=0.25, tiles=SMALL, interpret=True)
        return jnp.sum(out[:, 64:])

    gradients = quickly(jax.grad(loss, (0, 1, 2)), q * poison, k * poison, v * poison)
    assert all(bool(jnp.all(jnp.isfinite(g[:, 64:]))) for g in gradients)


def shifted(function: Callable[..., jax.Array], column: int, by: int) -> Callable[..., jax.Array]:
    def mutant(*arguments: Any) -> jax.Array:
        bounds = function(*arguments)
        return jnp.maximum(bounds.at[..., column].add(by), 0)

    return mutant


@pytest.mark.parametrize("name", ["key_tiles", "query_tiles"])
@pytest.mark.parametrize("column", [intervals.LOW, intervals.WHOLE_LOW, intervals.WHOLE_HIGH, intervals.HIGH])
@pytest.mark.parametrize("by", [-1, 1])
def test_bounds_one_tile_off_are_caught(name: str, column: int, by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, name, shifted(getattr(intervals, name), column, by))
    with pytest.raises(AssertionError):
        check_bounds(16, 16, 0, True)


def test_a_kernel_that_skips_one_tile_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(intervals, "key_tiles", shifted(intervals.key_tiles, intervals.LOW, 1))
        with pytest.raises(AssertionError, match="output"):
            check(T=96, heads=(2, 1), dims=(16, 16), rows=1, gradients=False)
    monkeypatch.setattr(intervals, "query_tiles", shifted(intervals.query_tiles, intervals.HIGH, -1))
    with pytest.raises(AssertionError, match="dk"):
        check(T=96, heads=(2, 1), dims=(16, 16), rows=1)


def test_ignoring_the_first_key_is_caught() -> None:
    def ignores(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, *rest: Any, **how: Any) -> jax.Array:
        return flash_attention(q, k, v, 0 * first, *rest, **how)

    with pytest.raises(AssertionError, match="output"):
        check(T=96, heads=(2, 1), dims=(16, 16), rows=1, function=ignores, gradients=False)


def test_bad_head_dims_are_refused() -> None:
    x = jnp.zeros((1, 4, 1, 24))
    with pytest.raises(ValueError, match="head dim 24 is not a multiple of 16"):
        flash_attention(x, x, x, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32), scale=1.0)


# --- lowering


def lowered(keys: int, values: int, tiles: Tiles, length: int = 256) -> str:
    """The program that CUDA would get for values and gradients, made without a GPU."""
    shapes = [(2, length, 4, keys), (2, length, 2, keys), (2, length, 2, values)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arguments += [jax.ShapeDtypeStruct((2, length), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array, start: jax.Array) -> jax.Array:
        return flash_attention(q, k, v, first_key, start, scale=0.125, tiles=tiles).astype(jnp.float32).sum()

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Tt]riton.*", DeprecationWarning)
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (80, 80)])
def test_every_kernel_lowers_for_cuda(dims: tuple[int, int]) -> None:
    text = lowered(*dims, Tiles())
    assert all(name in text for name in ("flash_forward", "flash_q_gradient", "flash_kv_gradient"))
    assert text.count("triton") >= 3


CASES = [(part, tile) for part, tiles in tune.CANDIDATES.items() for tile in tiles]
CASES += [(part, getattr(tiles, part)) for tiles in tuning.DEFAULT_TILES.values() for part in tune.CANDIDATES]


@pytest.mark.parametrize(("part", "tile"), list(dict.fromkeys(CASES)))
def test_every_tile_lowers_for_cuda(part: str, tile: Tile) -> None:
    """As much as can be said of a tile without a GPU; whether it fits one is for `kernels.tune` to find."""
    tiles = dataclasses.replace(Tiles(), **{part: tile})
    assert f"num_warps = {tile.warps}" in lowered(64, 64, tiles).replace("i32", "").replace(" :", "")


# --- measuring


def test_tuning_keeps_the_fastest_of_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: 64 x 64 is the fastest forward tile, and two of the others do not compile."""
    seen: list[Tiles] = []

    def flash_of(problem: Any, tiles: Tiles, *_: Any) -> Any:
        seen.append(tiles)
        number = len(seen) - 1  # what the made-up kernel returns, so that the clock knows it
        if tiles.forward == Tile(128, 32, 4, 3):
            return lambda q, *_: q.reshape(7)  # refused while it is traced
        return lambda q, *_: 0 * q + number

    monkeypatch.setattr(tune, "flash", flash_of)

    def clock(function: Any, arguments: Any) -> float:
        returned = jax.tree.leaves(function(*arguments))
        tiles = seen[int(returned[min(1, len(returned) - 1)].max())]
        if tiles.q_gradient == Tile(64, 32, 4, 3):
            raise RuntimeError("out of shared memory")
        return 2.0 - (tiles.forward == Tile(64, 64, 4, 3)) - 0.5 * (tiles.kv_gradient == Tile(32, 64, 4, 3))

    entry = tune.tune(tune.Problem(1, 32, 2, 1, 16, plain=False), interpret=True, clock=clock)
    assert entry["backend"] == "pallas"
    tiles = Tiles(*(Tile(**entry["tiles"][part]) for part in tune.CANDIDATES))
    assert (tiles.forward, tiles.kv_gradient) == (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3))
    assert tiles.q_gradient == tuning.default_tiles(16).q_gradient
    assert entry["milliseconds"] == {"forward": 1.0, "forward_and_backward": 0.5}


def test_the_benchmark_runs_interpreted(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = [
        "--interpret",
        "--lengths=32",
        "--head-dims=16",
        "--group=2",
        "--repeats=1",
        f"--out={tmp_path / 'a.json'}",
    ]
    assert benchmark.main(options) == 0
    entries = json.loads((tmp_path / "a.json").read_text())["entries"]
    assert [entry["documents"] for entry in entries] == [1, tune.DOCUMENTS]
    assert all(entry["pallas"]["forward_ms"] > 0 and "failed" not in entry["xla_causal"] for entry in entries)
    assert tune.main([]) == 2 and "the kernels are for GPUs" in capsys.readouterr().err
