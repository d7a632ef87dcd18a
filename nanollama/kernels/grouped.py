"""Matrix products of blocks of rows with the matrix of each block's own group: what experts multiply by on a GPU.

XLA:GPU makes of `jax.lax.ragged_dot` one product of all rows with all groups' matrices, and a copy of the rows for each
group. Here a block of ROWS rows reads one matrix: forward, the gradient of the rows (the same program, the matrices
transposed) and that of the matrices (one program for each tile of each group, over that group's blocks). Triton's.

Letters: S rows, C blocks, E groups, I and O the matrices' sides. Knows nothing of experts, meshes or models.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

ROWS = 128  # of a block
_SIDE, _DEPTH = 128, 64  # largest tile of a matrix, and steps of the sums; as in published Triton kernels, not measured
_SMALLEST = 16  # side of a product in Triton


def why_not(rows: int, groups: int, *sides: int) -> str:
    """Why so many rows cannot be multiplied by so many matrices of these sides; empty where they can."""
    odd = [side for side in sides if side % _SMALLEST]
    if odd:
        return f"sides of {', '.join(map(str, odd))} are not multiples of {_SMALLEST}"
    largest = max(rows * max(sides), groups * math.prod(sides))
    return f"an array of {largest:,} values is beyond what Triton's programs can index" if largest >= 2**31 else ""


def grouped_matmul(
    x_SI: jax.Array, weights_EIO: jax.Array, group_C: jax.Array, end_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """[S, O] in x's dtype: rows c ROWS to (c + 1) ROWS times the matrix of group_C[c].

    Group e has the blocks from end_E[e - 1] (0 for the first) up to end_E[e], exclusive; group_C says the same. Rows of
    blocks past the last group's are 0 in the result and have no gradient. interpret: as XLA operations, on any device.
    Errors: ValueError where `why_not` has a reason.
    """
    if reason := why_not(len(x_SI), *weights_EIO.shape):
        raise ValueError(f"grouped_matmul: {reason}")
    return _grouped(interpret, x_SI, weights_EIO, group_C.astype(jnp.int32), end_E.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(interpret: bool, x: jax.Array, weights: jax.Array, group: jax.Array, end: jax.Array) -> jax.Array:
    return _of_rows(x, weights, group, end, transposed=False, interpret=interpret)


def _forward(interpret: bool, *arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped(interpret, *arguments), arguments


def _backward(interpret: bool, kept: tuple[jax.Array, ...], gradient_SO: jax.Array) -> tuple[Any, ...]:
    x_SI, weights_EIO, group_C, end_E = kept
    x_gradient_SI = _of_rows(gradient_SO, weights_EIO, group_C, end_E, transposed=True, interpret=interpret)
    return x_gradient_SI, _of_groups(x_SI, gradient_SO, end_E, weights_EIO.dtype, interpret), None, None


_grouped.defvjp(_forward, _backward)


def _of_rows(
    x_SI: jax.Array, weights: jax.Array, group_C: jax.Array, end_E: jax.Array, *, transposed: bool, interpret: bool
) -> jax.Array:
    """x times weights [E, I, O], or where `transposed` times those of [E, O, I]."""
    groups, inputs, outputs = weights.shape[0], x_SI.shape[1], weights.shape[1 if transposed else 2]
    tile, depth = _tile(outputs, _SIDE), _tile(inputs, _DEPTH)
    if transposed:
        of_weights = pl.BlockSpec((groups, tile, inputs), lambda o, c: (0, o, 0))
    else:
        of_weights = pl.BlockSpec((groups, inputs, tile), lambda o, c: (0, 0, o))
    result: jax.Array = pl.pallas_call(
        functools.partial(_rows_program, steps=inputs // depth, depth=depth, transposed=transposed),
        grid=(outputs // tile, len(group_C)),  # tiles of one block beside each other: they read the same rows
        in_specs=[
            pl.BlockSpec((None,), lambda o, c: (c,)),
            pl.BlockSpec((None,), lambda o, c: (groups - 1,)),
            pl.BlockSpec((ROWS, inputs), lambda o, c: (c, 0)),
            of_weights,
        ],
        out_specs=pl.BlockSpec((ROWS, tile), lambda o, c: (c, o)),
        out_shape=jax.ShapeDtypeStruct((x_SI.shape[0], outputs), x_SI.dtype),
        name="grouped_rows",
        **_how(interpret),
    )(group_C, end_E, x_SI, weights)
    return result


def _rows_program(
    group_ref: Any, end_ref: Any, x_ref: Any, weights_ref: Any, out_ref: Any, *, steps: int, depth: int,
    transposed: bool,
) -> None:  # fmt: skip
    group = group_ref[...]

    def add(step: jax.Array, sum_ro: jax.Array) -> jax.Array:
        part = pl.ds(step * depth, depth)
        weights_io = weights_ref[group, :, part].T if transposed else weights_ref[group, part, :]
        return sum_ro + jnp.dot(x_ref[:, part], weights_io, preferred_element_type=jnp.float32)

    is_used = jnp.minimum(jnp.maximum(end_ref[...] - pl.program_id(1), 0), 1)  # a select of scalars does not compile
    sum_ro = jax.lax.fori_loop(0, is_used * steps, add, jnp.zeros(out_ref.shape, jnp.float32))
    out_ref[...] = sum_ro.astype(out_ref.dtype)


def _of_groups(x_SI: jax.Array, gradient_SO: jax.Array, end_E: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    """[E, I, O]: of each group, its rows of x, transposed, times its rows of the gradient."""
    (rows, inputs), outputs = x_SI.shape, gradient_SO.shape[1]
    tile_i, tile_o = _tile(inputs, _SIDE), _tile(outputs, _SIDE)
    begin_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    result: jax.Array = pl.pallas_call(
        _groups_program,
        grid=(outputs // tile_o, inputs // tile_i, len(end_E)),
        in_specs=[
            pl.BlockSpec((None,), lambda o, i, e: (e,)),
            pl.BlockSpec((None,), lambda o, i, e: (e,)),
            pl.BlockSpec((rows, tile_i), lambda o, i, e: (0, i)),
            pl.BlockSpec((rows, tile_o), lambda o, i, e: (0, o)),
        ],
        out_specs=pl.BlockSpec((None, tile_i, tile_o), lambda o, i, e: (e, i, o)),
        out_shape=jax.ShapeDtypeStruct((len(end_E), inputs, outputs), dtype),
        name="grouped_weights",
        **_how(interpret),
    )(begin_E, end_E, x_SI, gradient_SO)
    return result


def _groups_program(begin_ref: Any, end_ref: Any, x_ref: Any, gradient_ref: Any, out_ref: Any) -> None:
    def add(step: jax.Array, sum_io: jax.Array) -> jax.Array:
        part = pl.ds(step * _DEPTH, _DEPTH)
        return sum_io + jnp.dot(x_ref[part, :].T, gradient_ref[part, :], preferred_element_type=jnp.float32)

    steps = ROWS // _DEPTH
    sums = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = jax.lax.fori_loop(begin_ref[...] * steps, end_ref[...] * steps, add, sums).astype(out_ref.dtype)


def _tile(side: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides the side."""
    return min(largest, side & -side)


def _how(interpret: bool) -> dict[str, Any]:
    """Triton's parameters, always: without them versions of JAX disagree on which compiler to use."""
    return dict(compiler_params=triton.CompilerParams(num_warps=8, num_stages=3), interpret=interpret)
