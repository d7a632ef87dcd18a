"""Attention: one entry, `attend`, and the choice of its backend.

Masks are intervals (`ops.masks`): one integer per query. A backend that cannot mask what it is asked to raises and
says why; only "auto" chooses another. Nothing here knows parameters or meshes. J is the head dim of the values: K, but
for latent attention (MLA), whose queries and keys are wider.

    xla_chunked   any device and mask; the fastest on CPU
    pallas        GPU: our flash kernels, any mask; forward and backward skip what the intervals exclude
    mosaic        Hopper: the same, written for Mosaic GPU; "auto" takes it only where it was measured to win
    cudnn         GPU: one document a row
    splash        TPU: documents and static windows
    reference     the slow twin, dense; for tests. So are the kernels as XLA operations: *_interpret
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanollama.data.strict import FieldError
from nanollama.kernels import flash, tuning
from nanollama.ops.chunked_attention import attend_chunked
from nanollama.ops.device import device
from nanollama.ops.masks import MaskSpec as MaskSpec
from nanollama.ops.masks import slide as slide
from nanollama.ops.vendor_attention import attend_cudnn, attend_splash, why_not_cudnn, why_not_splash

SHORTEST = 128  # queries; below, a GPU kernel has no tiles to share among its processors (decoding)


class Request(NamedTuple):
    """What a backend is asked to compute, of which shapes, masks and types decide whether it can."""

    q_BTHK: jax.Array
    k_BSGK: jax.Array
    v_BSGJ: jax.Array
    mask: MaskSpec
    scale: float


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGJ: jax.Array,
    mask: MaskSpec,
    *,
    backend: str = "auto",
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped KV heads (H a multiple of G), [B, T, H, J] in q's dtype.

    scale: what scores are multiplied by; None = K ** -0.5. Errors: ValueError when the shapes disagree or the
    backend is unknown; FieldError when it is not for this device or cannot compute this (the message says why).
    """
    scale = q_BTHK.shape[3] ** -0.5 if scale is None else scale
    name = resolve(q_BTHK, k_BSGK, v_BSGJ, mask, backend)
    with jax.named_scope(name):
        return BACKENDS[name](Request(q_BTHK, k_BSGK, v_BSGJ, mask, scale))


def resolve(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, mask: MaskSpec, backend: str) -> str:
    """The backend that `attend` will use; its errors."""
    T, H, S, G = q_BTHK.shape[1], q_BTHK.shape[2], k_BSGK.shape[1], k_BSGK.shape[2]
    if q_BTHK.shape[3] != k_BSGK.shape[3] or k_BSGK.shape[:3] != v_BSGJ.shape[:3]:
        raise ValueError(
            f"attend: shapes of q {q_BTHK.shape}, k {k_BSGK.shape} and v {v_BSGJ.shape} disagree: q and k share "
            "their head dim, k and v all but theirs"
        )
    if H % G:
        raise ValueError(f"attend: {H} query heads are not a multiple of {G} KV heads")
    if mask.query_start is None and T != S:
        raise ValueError(f"attend: {T} queries and {S} keys need mask.query_start")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"attend: unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    request = Request(q_BTHK, k_BSGK, v_BSGJ, mask, 1.0)
    where, kind = device()
    if backend == "auto":
        return choose(request, where, kind)
    reason = why_not(backend, request, where, kind)
    if reason:
        raise FieldError(
            "config.compute.attention", f"{backend!r} cannot compute this: {reason}", "'auto' takes one that can."
        )
    return backend


def choose(request: Request, where: str, kind: str) -> str:
    """What "auto" takes: on GPU the faster by the measured table (`kernels.tuning`), else by rule."""
    if where == "gpu":
        if request.q_BTHK.shape[1] < SHORTEST:
            return "xla_chunked"
        measured = tuning.lookup(kind, shape(request)).backend
        order = [name for name in (measured, "pallas", "cudnn") if name]
    else:
        order = ["splash"] if where == "tpu" else []
    return next((name for name in order if not why_not(name, request, where, kind)), "xla_chunked")


def why_not(backend: str, request: Request, where: str, kind: str) -> str:
    """Why `backend` cannot compute the request on the platform `where`, a device of this kind; empty where it can."""
    needs = {"pallas": "gpu", "mosaic": "gpu", "cudnn": "gpu", "splash": "tpu"}.get(backend, where)
    if needs != where:
        return f"it is for a {needs.upper()}, and this program is for a {where.upper()}"
    if backend.startswith("pallas"):
        return flash.why_not(request.q_BTHK.shape[3], request.v_BSGJ.shape[3])
    if backend == "mosaic":
        q, v = request.q_BTHK, request.v_BSGJ
        return flash.why_not_mosaic(q.shape[3], v.shape[3], q.dtype, kind)
    if backend == "cudnn":
        return why_not_cudnn(request.q_BTHK, request.v_BSGJ, request.mask)
    if backend.startswith("splash"):
        return why_not_splash(request.q_BTHK, request.mask)
    return ""


def shape(request: Request) -> tuning.Shape:
    """What the speed of a kernel depends on."""
    q, v = request.q_BTHK, request.v_BSGJ
    plain = not (request.mask.documents or request.mask.folded)
    return tuning.Shape(str(q.dtype), q.shape[3], v.shape[3], q.shape[2] // v.shape[2], q.shape[1], plain)


def attend_pallas(request: Request, interpret: bool = False, compiler: str = "triton") -> jax.Array:
    """Our kernels with the tiles of the table."""
    q, k, v, mask, scale = request
    choice = tuning.lookup(device()[1], shape(request))
    first_key_BT = jnp.broadcast_to(mask.first_keys(), q.shape[:2])
    return flash.flash_attention(
        q, k, v, first_key_BT, mask.starts(), scale=scale, tiles=choice.tiles_of(compiler), interpret=interpret,
        compiler=compiler,
    )  # fmt: skip


def attend_reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, mask: MaskSpec, scale: float
) -> jax.Array:
    """The slow twin: repeats KV heads and builds the dense mask. For tests."""
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHJ = (jnp.repeat(x, groups, axis=2).astype(jnp.float32) for x in (k_BSGK, v_BSGJ))
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK.astype(jnp.float32), k_BSHK) * scale
    key_S = jnp.arange(k_BSGK.shape[1])
    seen_BTS = (key_S >= mask.first_keys()[..., None]) & (key_S <= mask.query_keys()[..., None])
    probabilities = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores_BHTS, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshj->bthj", probabilities, v_BSHJ).astype(q_BTHK.dtype)


BACKENDS: dict[str, Callable[[Request], jax.Array]] = {
    "xla_chunked": lambda request: attend_chunked(*request),
    "pallas": attend_pallas,
    "mosaic": functools.partial(attend_pallas, compiler="mosaic"),
    "cudnn": lambda request: attend_cudnn(*request),
    "splash": lambda request: attend_splash(*request),
    "reference": lambda request: attend_reference(*request),
    "pallas_interpret": functools.partial(attend_pallas, interpret=True),
    "splash_interpret": lambda request: attend_splash(*request, interpret=True),
}
