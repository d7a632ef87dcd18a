"""The flash kernels for Mosaic GPU: simulated on CPU against dense attention, lowered and, where XLA's CUDA compiler is
installed, compiled for an H200 that is not there. Nothing here has seen a card.
"""

import dataclasses
import functools
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import attention as benchmark
from nanollama.kernels import flash, intervals, tune, tuning
from nanollama.kernels.flash import flash_attention
from nanollama.kernels.flash_programs import Settings, Tile, Tiles
from nanollama.planning import aot, targets
from tests.test_flash import check, shifted

has_interface = pytest.mark.skipif(
    jax.__version_info__ < flash.MOSAIC_JAX, reason="this JAX has another interface of Mosaic GPU"
)
simulates = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="JAX 0.11 simulates a GPU too, but stalls at times where CPU threads are few"
)
mosaic = functools.partial(flash_attention, compiler="mosaic")
TWO = Tiles(Tile(128, 64, 12, 2), Tile(128, 64, 12, 2), Tile(64, 128, 12, 2))  # consumers


@simulates
@pytest.mark.parametrize(
    "case",
    [
        dict(T=200, heads=(2, 1), dims=(64, 64), tiles=TWO),  # documents, padding, an odd length, two heads a KV head
        dict(  # two slots for six tiles; one and three consumers; values of another width
            T=300, heads=(1, 1), dims=(128, 64), window=90,
            tiles=Tiles(Tile(192, 64, 16, 2), Tile(64, 64, 8, 2), Tile(64, 192, 16, 2)),
        ),
        dict(T=70, heads=(1, 1), dims=(64, 64), more_keys=100, rows=2, tiles=TWO),  # a key cache
    ],
    ids=["documents", "window", "cache"],
)  # fmt: skip
def test_mosaic_is_dense_attention(case: dict[str, Any]) -> None:
    check(**{"rows": 1, "function": mosaic, **case})


@simulates
def test_warpgroups_do_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of each kernel, more tiles than slots: barriers put reads and writes of shared memory in order."""
    from jax.experimental.pallas import mosaic_gpu

    simulation = functools.partial(mosaic_gpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(mosaic_gpu, "InterpretGPUParams", simulation)
    tiles = Tiles(*(dataclasses.replace(tile, stages=1) for tile in TWO.each()))
    check(T=128, heads=(1, 1), dims=(64, 64), rows=1, tiles=tiles, function=mosaic)


@simulates
def test_skipping_one_tile_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "key_tiles", shifted(intervals.key_tiles, intervals.LOW, 1))
    with pytest.raises(AssertionError, match="output"):
        check(T=128, heads=(1, 1), dims=(64, 64), rows=1, tiles=TWO, function=mosaic, gradients=False)


# --- for a card that is not here

CASES = [
    (dim, part, tile)
    for dim, parts in tune.MOSAIC_CANDIDATES.items()
    for part, tiles in parts.items()
    for tile in dict.fromkeys((getattr(tuning.MOSAIC_TILES[dim], part), *tiles))
]


def program(dim: int, part: str, tile: Tile, sharding: Any = None) -> Any:
    """One kernel lowered for CUDA. Errors: those of JAX where the tile's shared memory is more than Hopper has."""
    from nanollama.kernels import flash_mosaic

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    B, T, H, G = 1, 384, 4, 2
    arguments = [array((B, T, heads, dim)) for heads in (H, G, G)] + [array((B, T), jnp.int32), array((B,), jnp.int32)]
    if part != "forward":
        arguments += [array((B, T, H, dim)), array((B, H, T), jnp.float32), array((B, H, T), jnp.float32)]
    settings = Settings(0.125, Tiles(tile, tile, tile), False, "mosaic")
    function = functools.partial(getattr(flash_mosaic, part), settings)
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


@has_interface
@pytest.mark.parametrize(("dim", "part", "tile"), CASES)
def test_every_tile_lowers_for_cuda(dim: int, part: str, tile: Tile) -> None:
    text = program(dim, part, tile).as_text()
    assert f"flash_{part}" in text and "mosaic_gpu" in text


@has_interface
def test_a_tile_that_no_multiprocessor_holds_does_not_lower() -> None:
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        program(128, "forward", Tile(128, 256, 12, 3))


@has_interface
@pytest.mark.skipif(aot.missing(targets.parse("h200x1")) is not None, reason="needs the extra cuda-plan")
@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs CUDA's assembler")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("part", ["forward", "q_gradient", "kv_gradient"])
def test_default_tiles_compile_and_stay_in_registers(
    dim: int, part: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Down to Hopper's machine code. Of dK and dV at 128 the accumulators alone take half of a thread's registers."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    target = targets.parse("h200x1")
    sharding = NamedSharding(Mesh(np.array(aot.devices(target)), ("x",)), PartitionSpec())
    lowered = program(dim, part, getattr(tuning.MOSAIC_TILES[dim], part), sharding)
    lowered.compile(compiler_options=aot._options(target))
    said = "".join(capfd.readouterr())
    assert "for 'sm_90a'" in said and "serialized" not in said
    if (dim, part) != (128, "kv_gradient"):
        assert "0 bytes spill stores" in said


# --- refusals and measurements


def test_it_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(flash, "MOSAIC_JAX", (99, 0))
        assert "as JAX 99.0 has it, and this is JAX" in flash.why_not_mosaic(64, 64)
        x = jnp.zeros((1, 4, 1, 64))
        with pytest.raises(ValueError, match=r"it is written for Mosaic GPU as JAX 99\.0 has it"):
            mosaic(x, x, x, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32), scale=1.0)
    monkeypatch.setattr(flash, "MOSAIC_JAX", (0, 1))
    for kind in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"):
        assert flash.why_not_mosaic(64, 128, jnp.bfloat16, kind) == ""
    assert "is for NVIDIA A100" in flash.why_not_mosaic(64, 64, jnp.bfloat16, "NVIDIA A100-SXM4-40GB")
    assert "head dim 80 is neither of (64, 128)" in flash.why_not_mosaic(64, 80, jnp.bfloat16, "NVIDIA H200")
    assert "not float32" in flash.why_not_mosaic(64, 64, jnp.float32, "NVIDIA H200")


@pytest.mark.parametrize("tile", [Tile(64, 64, 12, 2), Tile(128, 64, 4, 2), Tile(128, 32, 12, 2)])
def test_tiles_that_warpgroups_cannot_share_are_refused(tile: Tile) -> None:
    with pytest.raises(ValueError, match="is no tile of Mosaic GPU"):
        flash.check_mosaic(Tiles(tile, TWO.q_gradient, TWO.kv_gradient))


def test_tuning_lets_it_win_only_with_the_right_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up: Mosaic GPU's kernels, which return float32 here, take half as long."""

    def flash_of(problem: Any, tiles: Tiles, interpret: bool = False, compiler: str = "triton") -> Any:
        mosaic = compiler == "mosaic"
        wrong = mosaic and tiles.forward.stages == 4
        dtype = jnp.float32 if mosaic else jnp.bfloat16
        return lambda q, k, v, *mask: (q + k + (2 if wrong else 1) * v).astype(dtype)

    monkeypatch.setattr(tune, "flash", flash_of)
    monkeypatch.setattr(tune, "why_not_mosaic", lambda *_: "")
    problem = tune.Problem(1, 32, 2, 2, 64, plain=False)
    candidates = {part: tiles[:1] for part, tiles in tune.CANDIDATES.items()}
    for fastest, backend in ((Tile(128, 128, 12, 2), "mosaic"), (Tile(128, 64, 12, 4), "pallas")):
        parts = {"forward": (fastest,), "q_gradient": (), "kv_gradient": ()}

        def clock(function: Any, arguments: Any) -> float:
            returned = jax.tree.leaves(function(*arguments))
            return 1.0 if returned[min(1, len(returned) - 1)].dtype == jnp.float32 else 2.0

        monkeypatch.setitem(tuning.MOSAIC_TILES, 64, Tiles(fastest, TWO.q_gradient, TWO.kv_gradient))
        entry = tune.tune(problem, candidates, {64: parts}, interpret=True, clock=clock)
        assert entry["backend"] == backend
        assert entry["mosaic_tiles"]["forward"] == vars(fastest)
        assert entry["milliseconds"]["mosaic_forward_and_backward"] == 1.0


def test_the_benchmark_measures_it_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tune.Problem(1, 32, 2, 2, 64, plain=True)
    for reason, measured in (("", True), ("it is for Hopper", False)):
        monkeypatch.setattr(benchmark, "why_not_mosaic", lambda *_, reason=reason: reason)
        assert ("mosaic" in benchmark.sides_of(problem, interpret=False)) == measured
