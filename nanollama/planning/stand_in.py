"""What stands for attention while memory is planned: a flash kernel's shapes and lifetimes, and none of its work.

The kernels themselves cannot be compiled for a card that is absent (cuDNN, measured tiles), and XLA's attention takes
minutes to compile at 4,096 positions and holds more memory than any of them. It computes nonsense, so no config can
choose it: it is put in the decoder's place for `attend` only while a program is traced that never runs.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanollama.kernels.flash import LSE_NAME, OUTPUT_NAME
from nanollama.models import attention


@contextlib.contextmanager
def flash_memory() -> Iterator[None]:
    """While active, models are traced with `stand_in` for attention."""
    with mock.patch.object(attention, "attend", stand_in):
        yield


def stand_in(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGJ: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """Keeps q, k, v, the output [B, T, H, J] and its logsumexp for the backward pass, and O(T) beside them."""
    return _stand_in(q_BTHK, k_BSGK, v_BSGJ)


@jax.custom_vjp
def _stand_in(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    B, T, G = q.shape[0], q.shape[1], k.shape[2]
    values = (v + k.sum(-1, keepdims=True))[:, :T, :, None]  # [B, T, G, 1, J]
    out = (q.reshape(B, T, G, -1, q.shape[-1]).sum(-1, keepdims=True) * values).reshape(B, T, -1, v.shape[-1])
    out, lse = checkpoint_name(out, OUTPUT_NAME), checkpoint_name(out.astype(jnp.float32).sum(-1), LSE_NAME)
    return out, (q, k, v, out, lse)


def _backward(residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, lse = residuals
    each = (gradient * out).sum(-1, keepdims=True) * lse[..., None].astype(out.dtype)  # [B, T, H, 1]
    group = each.reshape(*each.shape[:2], k.shape[2], -1).sum(-1, keepdims=True)  # [B, T, G, 1]
    group = jnp.pad(group, ((0, 0), (0, k.shape[1] - q.shape[1]), (0, 0), (0, 0)))
    return each * q, group * k, group * v


_stand_in.defvjp(_forward, _backward)
