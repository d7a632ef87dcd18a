"""`ops.moe.mix` on a mesh: our kernels, which XLA cannot cut, run whole on each device's tokens.

Each device gathers the experts' weights and computes its own tokens; along `tensor` it has a part of every expert, and
the parts' sums are added. The other paths are XLA's own operations, which it cuts by itself.
"""

import jax
from jax.sharding import PartitionSpec

from nanollama.ops import moe
from nanollama.parallel.mesh import cuts_arrays, partition_spec


def mix(
    x_ND: jax.Array, routing: moe.Routing, experts: moe.Experts, *, path: str, factor: float, real_N: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """As `ops.moe.mix`, on the mesh of the program being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    path = moe.resolve(path, routing.experts_NJ.size, experts.gate_EDF.shape)
    if not (path.startswith("grouped") and cuts_arrays(mesh)):
        return moe.mix(x_ND, routing, experts, path=path, factor=factor, real_N=real_N)
    tokens = partition_spec(("batch", None), x_ND.shape, mesh)
    into = partition_spec((None, None, "ffn"), experts.gate_EDF.shape, mesh)
    out_of = PartitionSpec(None, into[2], None)

    def on_one_device(
        x_ND: jax.Array, experts_NJ: jax.Array, weights_NJ: jax.Array, experts: moe.Experts
    ) -> jax.Array:
        local = routing._replace(experts_NJ=experts_NJ, weights_NJ=weights_NJ)
        y_ND = moe.PATHS[path](x_ND, local, experts)
        return y_ND if into[2] is None else jax.lax.psum(y_ND, into[2])

    y_ND = jax.shard_map(
        on_one_device,
        in_specs=(tokens, tokens, tokens, moe.Experts(into, into, out_of)),  # type: ignore[arg-type]
        out_specs=tokens,
        check_vma=False,  # kernels do not say how their results vary
    )(x_ND, routing.experts_NJ, routing.weights_NJ, experts)
    return y_ND, None
