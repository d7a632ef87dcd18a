"""Which backend computes attention, what each refuses, and that all that run here mask and shard alike."""

import dataclasses
import functools
import json
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tiny import QUICK, quickly

from nanollama.config import ComputeConfig, MeshConfig, ModelConfig
from nanollama.data.strict import FieldError
from nanollama.kernels import flash, tuning
from nanollama.kernels.flash_programs import Tile, Tiles
from nanollama.models import mesh_attention
from nanollama.models.decoder import Decoder, init_params
from nanollama.ops import attention
from nanollama.ops.attention import attend
from nanollama.ops.masks import MaskSpec, slide
from nanollama.ops.vendor_attention import attend_cudnn
from nanollama.parallel.mesh import make_mesh

INTERPRETED = ["pallas_interpret", "splash_interpret"]


def inputs(
    T: int = 128, heads: tuple[int, int] = (4, 2), K: int = 16, dtype: Any = np.float32, B: int = 2
) -> tuple[jax.Array, ...]:
    generator = np.random.default_rng(0)
    shapes = [(B, T, heads[0], K), (B, T, heads[1], K), (B, T, heads[1], K)]
    return tuple(jnp.asarray(generator.standard_normal(shape, np.float32), dtype) for shape in shapes)


def first_keys(T: int = 128, B: int = 2) -> jax.Array:
    """Documents of 1, 40 and 60 positions, then padding."""
    index = np.arange(T)
    first = np.where(index < 1, 0, np.where(index < 41, 1, np.where(index < 101, 41, index)))
    return jnp.asarray(np.broadcast_to(first, (B, T)).astype(np.int32))


@functools.cache
def plain_gpu() -> AbstractMesh:
    return mesh_of("NVIDIA H200", "gpu")


def mesh_of(kind: str, platform: str) -> AbstractMesh:
    """What a program traced for one such device has for a mesh; no such device is needed."""
    device = AbstractDevice(device_kind=kind, num_cores=1 if platform == "tpu" else None, platform=platform)
    return AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


# --- the choice


@pytest.fixture(autouse=True)
def no_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing measured before has a say."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._entries.cache_clear()


def chosen(mesh: AbstractMesh | None, mask: MaskSpec, backend: str = "auto", **shapes: Any) -> str:
    q, k, v = inputs(**{"K": 64, "dtype": jnp.bfloat16, "T": mask.first_key_BT.shape[1], **shapes})
    if mesh is None:
        return attention.resolve(q, k, v, mask, backend)
    with jax.sharding.use_abstract_mesh(mesh):
        return attention.resolve(q, k, v, mask, backend)


def test_auto_chooses_by_device_mask_and_shape() -> None:
    packed, plain = MaskSpec(first_keys()), MaskSpec(jnp.zeros((2, 128), jnp.int32), documents=False)
    tpu = mesh_of("TPU v5", "tpu")
    assert chosen(None, packed) == "xla_chunked"  # this machine
    assert chosen(plain_gpu(), packed) == "pallas"
    assert chosen(plain_gpu(), packed, K=24) == "xla_chunked"
    assert chosen(plain_gpu(), plain, K=24) == "cudnn"
    assert chosen(plain_gpu(), MaskSpec(jnp.zeros((2, 4), jnp.int32))) == "xla_chunked", "too short for a kernel"
    assert chosen(tpu, packed) == "splash"
    assert chosen(tpu, slide(packed, 5)) == "splash"
    assert chosen(tpu, slide(packed, jnp.int32(5))) == "xla_chunked"
    assert chosen(tpu, MaskSpec(first_keys(130))) == "xla_chunked"


def test_auto_follows_what_was_measured_as_far_as_the_mask_allows() -> None:
    packed, plain = MaskSpec(first_keys()), MaskSpec(jnp.zeros((2, 128), jnp.int32), documents=False)
    tiles = Tiles(Tile(32, 32), Tile(32, 64), Tile(64, 16))
    mosaic_tiles = tuning.MOSAIC_TILES[128]
    entry = {"backend": "cudnn", "tiles": tuning.tiles_as_dict(tiles), "milliseconds": {}}
    entry |= {"mosaic_tiles": tuning.tiles_as_dict(mosaic_tiles)}
    shapes = [tuning.Shape("bfloat16", 64, 64, 2, 128, is_plain) for is_plain in (True, False)]
    path = tuning.save("NVIDIA H200", {tuning.name(shape): entry for shape in shapes})
    assert json.loads(path.read_text())["jax"] == jax.__version__
    assert chosen(plain_gpu(), plain) == "cudnn"
    assert chosen(plain_gpu(), packed) == "pallas", "a table never makes documents leak"
    assert tuning.lookup("NVIDIA H200", shapes[1]) == tuning.Choice("cudnn", tiles, mosaic_tiles)
    assert tuning.lookup("NVIDIA H100", shapes[1]).tiles == tuning.DEFAULT_TILES[64]
    path.write_text("{}")
    tuning._entries.cache_clear()
    with pytest.raises(ValueError, match=r"not a table of measured tiles\. Delete it"):
        tuning.lookup("NVIDIA H200", shapes[0])


def test_auto_takes_mosaic_only_where_it_was_measured_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, shape = MaskSpec(first_keys()), tuning.Shape("bfloat16", 64, 64, 2, 128, plain=False)
    monkeypatch.setattr(flash, "MOSAIC_JAX", (0, 1))
    assert chosen(plain_gpu(), packed) == "pallas"
    tiles = {name: tuning.tiles_as_dict(Tiles()) for name in ("tiles", "mosaic_tiles")}
    for kind in ("NVIDIA H200", "NVIDIA A100"):
        tuning.save(kind, {tuning.name(shape): {"backend": "mosaic", **tiles, "milliseconds": {}}})
    assert chosen(plain_gpu(), packed) == "mosaic"
    assert chosen(plain_gpu(), packed, dtype=np.float32) == "pallas", "another shape of the table"
    assert chosen(mesh_of("NVIDIA A100", "gpu"), packed) == "pallas", "no table makes it run where it cannot"
    monkeypatch.setattr(flash, "MOSAIC_JAX", (99, 0))
    assert chosen(plain_gpu(), packed) == "pallas"


@pytest.mark.parametrize(
    ("backend", "mesh", "mask", "shapes", "reason"),
    [
        ("pallas", None, MaskSpec(first_keys()), {}, "it is for a GPU, and this program is for a CPU"),
        ("cudnn", None, MaskSpec(first_keys()), {}, "it is for a GPU"),
        ("splash", plain_gpu(), MaskSpec(first_keys()), {}, "it is for a TPU, and this program is for a GPU"),
        ("pallas", plain_gpu(), MaskSpec(first_keys()), {"K": 24}, "head dim 24 is not a multiple of 16"),
        ("mosaic", None, MaskSpec(first_keys()), {}, "it is for a GPU, and this program is for a CPU"),
        ("mosaic", mesh_of("NVIDIA A100", "gpu"), MaskSpec(first_keys()), {}, "it is (for Hopper|written for)"),
        ("cudnn", plain_gpu(), MaskSpec(first_keys()), {}, "it knows no document boundaries"),
        (
            "cudnn", plain_gpu(), slide(MaskSpec(first_keys(), documents=False), jnp.int32(9)), {},
            "it knows no document boundaries",
        ),
        (
            "cudnn", plain_gpu(), MaskSpec(first_keys(), documents=False), {"dtype": np.float32},
            "it computes in bfloat16 or float16, not float32",
        ),
        ("cudnn", plain_gpu(), MaskSpec(first_keys(), documents=False), {"K": 20}, "a multiple of 8 up to 256"),
        ("splash_interpret", None, MaskSpec(first_keys(130)), {}, "rows of 130 are not a multiple of 128"),
        ("splash_interpret", None, slide(MaskSpec(first_keys()), jnp.int32(9)), {}, "it needs a static one"),
        ("splash_interpret", None, MaskSpec(first_keys(), jnp.int32(0)), {}, "queries are part of a key cache"),
    ],
)  # fmt: skip
def test_a_forced_backend_says_why_it_cannot(
    backend: str, mesh: AbstractMesh | None, mask: MaskSpec, shapes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FieldError, match=f"config.compute.attention: '{backend}' cannot compute this: .*{reason}"):
        chosen(mesh, mask, backend, **shapes)


# --- masks


def test_a_static_window_is_the_traced_one() -> None:
    q, k, v = inputs(T=200)
    mask = MaskSpec(first_keys(200))
    static, traced = slide(mask, 30), slide(mask, jnp.int32(30))
    assert static.window == 30 and traced.folded
    np.testing.assert_array_equal(static.first_keys(), traced.first_keys())
    np.testing.assert_array_equal(static.first_keys(slice(50, 60)), traced.first_keys()[:, 50:60])
    for backend in ("xla_chunked", "reference"):
        got, wanted = (quickly(functools.partial(attend, backend=backend), q, k, v, m) for m in (static, traced))
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_rows_of_a_cache_may_start_apart() -> None:
    """Row b's queries begin at key 3 b: as each row alone."""
    q, k, v = inputs(T=64)
    q, starts = q[:, :5], jnp.array([0, 3], jnp.int32)
    mask = MaskSpec(jnp.zeros((2, 5), jnp.int32), starts)
    for backend in ("xla_chunked", "reference"):
        got = quickly(functools.partial(attend, backend=backend), q, k, v, mask)
        for b in range(2):
            alone = MaskSpec(mask.first_key_BT[:1], starts[b])
            row = [x[b : b + 1] for x in (q, k, v)]
            wanted = quickly(functools.partial(attend, backend="reference"), *row, alone)
            np.testing.assert_allclose(got[b : b + 1], wanted, atol=1e-6)


@pytest.mark.parametrize("window", [0, 7])
def test_cudnn_is_asked_for_the_same_mask(window: int) -> None:
    """The call that would go to cuDNN, computed by XLA."""
    q, k, v = inputs(T=40)
    mask = MaskSpec(jnp.zeros((2, 40), jnp.int32), window=window, documents=False)
    got = attend_cudnn(q, k, v, mask, 0.3, implementation="xla")
    np.testing.assert_allclose(got, attend(q, k, v, mask, backend="reference", scale=0.3), atol=1e-5)


@pytest.mark.parametrize("window", [0, 30])
def test_splash_is_the_reference(window: int) -> None:
    """Documents by segment ids, windows by its own mask; values and gradients."""
    q, k, v = inputs()
    mask, cotangent = MaskSpec(first_keys(), window=window), inputs()[0][..., ::-1]

    def loss(backend: str, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*arrays, mask, backend=backend, scale=0.3)
        return jnp.sum(out * cotangent), out

    (_, got), gradients = quickly(
        jax.value_and_grad(functools.partial(loss, "splash_interpret"), (0, 1, 2), True), q, k, v
    )
    (_, wanted), twins = quickly(jax.value_and_grad(functools.partial(loss, "reference"), (0, 1, 2), True), q, k, v)
    for a, b in zip((got, *gradients), (wanted, *twins), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4)


# --- in the decoder

MODEL = ModelConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16
)


@functools.cache
def parameters() -> Any:
    generator = np.random.default_rng(0)
    abstract = nn.unbox(jax.eval_shape(lambda: init_params(Decoder(MODEL, ComputeConfig()), 0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * generator.standard_normal(leaf.shape, np.float32)), abstract)


def hidden(backend: str, tokens: np.ndarray, first_key: Any) -> jax.Array:
    decoder = Decoder(MODEL, ComputeConfig(scan_unroll=1, attention=backend))  # type: ignore[arg-type]
    positions = np.arange(tokens.shape[1])[None] - np.asarray(0 if first_key is None else first_key)
    positions = np.broadcast_to(positions, tokens.shape).astype(np.int32)
    run = functools.partial(lambda params, *rest: decoder.apply({"params": params}, *rest)[0])
    return quickly(run, parameters(), tokens, positions, first_key)


def check_isolation(backend: str, first_key: Any) -> None:
    """Positions 41 to 100 of a packed row, against the same document in a row of its own."""
    tokens = np.random.default_rng(1).integers(1, 97, (1, 128)).astype(np.int32)
    alone = np.roll(tokens, -41, axis=1)
    packed, wanted = hidden(backend, tokens, first_key), hidden("xla_chunked", alone, np.zeros((1, 128), np.int32))
    np.testing.assert_allclose(packed[:, 41:101], wanted[:, :60], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", INTERPRETED)
def test_a_document_in_a_packed_row_is_the_document_alone(backend: str) -> None:
    check_isolation(backend, first_keys(B=1))


def test_a_leak_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(request: attention.Request) -> jax.Array:
        mask = dataclasses.replace(request.mask, first_key_BT=0 * request.mask.first_key_BT)
        return attention.attend_reference(*request._replace(mask=mask))

    monkeypatch.setitem(attention.BACKENDS, "pallas_interpret", leaks)
    with pytest.raises(AssertionError):
        check_isolation("pallas_interpret", first_keys(B=1))


def test_no_first_keys_are_one_document_a_row() -> None:
    tokens = np.random.default_rng(1).integers(1, 97, (1, 32)).astype(np.int32)
    got, wanted = hidden("auto", tokens, None), hidden("auto", tokens, np.zeros((1, 32), np.int32))
    np.testing.assert_array_equal(got, wanted)


def test_saved_names_spare_the_second_forward_of_attention() -> None:
    """Loops of the compiled step: an interpreted kernel is some of them, and XLA drops what nothing uses."""
    row = jnp.zeros((1, 32), jnp.int32)

    def loops(remat: Any) -> int:
        decoder = Decoder(MODEL, ComputeConfig(scan_unroll=1, attention="pallas_interpret", remat=remat))
        step = jax.jit(jax.value_and_grad(lambda p: decoder.apply({"params": p}, row, row, row)[0].sum()))
        return int(step.lower(parameters()).compile(compiler_options=QUICK).as_text().count(" while("))

    assert loops("none") == loops("names") == loops("dots") < loops("full")


# --- on a mesh


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8)])
def test_kernels_on_a_mesh_are_the_kernels_on_one_device(sizes: tuple[int, int, int]) -> None:
    """Rows over data and fsdp, heads over tensor; with 8 tensor shards each needs the KV head of its query head."""
    q, k, v = inputs(heads=(8, 2), T=32, B=4)
    mask, cotangent = MaskSpec(first_keys(32, B=4)), inputs(heads=(8, 2), T=32, B=4)[0][..., ::-1]
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, first_key: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            here = dataclasses.replace(mask, first_key_BT=first_key)
            return jnp.sum(mesh_attention.attend(q, k, v, here, backend="pallas_interpret") * cotangent)

    got = quickly(jax.grad(loss, (0, 1, 2)), *(jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P())) for x in
                                               (q, k, v, mask.first_key_BT)))  # fmt: skip
    wanted = jax.grad(lambda *x: jnp.sum(attend(*x, mask, backend="reference") * cotangent), (0, 1, 2))(q, k, v)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


# --- lowering for devices that are not here


@pytest.mark.parametrize(("mesh", "platform", "backend", "calls"), [
    (plain_gpu(), "cuda", "auto", ("flash_kv_gradient", "triton")),
    (plain_gpu(), "cuda", "mosaic", ("flash_forward", "flash_q_gradient", "flash_kv_gradient", "mosaic_gpu")),
    (mesh_of("TPU v5", "tpu"), "tpu", "auto", ("tpu_custom_call",)),
])  # fmt: skip
def test_a_training_step_lowers_with_the_kernel_of_its_device(
    mesh: AbstractMesh, platform: str, backend: Any, calls: tuple[str, ...]
) -> None:
    if backend == "mosaic" and jax.__version_info__ < flash.MOSAIC_JAX:
        pytest.skip("this JAX has another interface of Mosaic GPU")
    model = dataclasses.replace(MODEL, head_dim=64)
    decoder = Decoder(model, ComputeConfig(dtype="bfloat16", scan_unroll=1, attention=backend))
    params = nn.unbox(jax.eval_shape(lambda: init_params(Decoder(model, ComputeConfig()), 0)))
    row = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(params: Any, tokens: jax.Array, positions: jax.Array, first_key: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, tokens, positions, first_key)[0].astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Tt]riton.*", DeprecationWarning)
        text = jax.jit(jax.grad(loss)).trace(params, row, row, row).lower(lowering_platforms=(platform,)).as_text()
    assert all(call in text for call in calls)
