"""The decoder. Linen declares the parameters with their logical axes; pure functions in `ops` compute.

Letters in tensor names, here and everywhere:
    B batch rows    T query positions    S key positions    D hidden size    V vocabulary
    H query heads   G KV heads           K head dim         F ffn size       L layers
    N = B * T tokens, flattened          C = K / 2 rotary pairs

Parameters of all layers are stacked along a leading L axis, always; `scan_unroll` only changes speed.
The same code trains, evaluates and samples: with a cache, queries continue the keys already written.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanollama.config import ComputeConfig, ModelConfig
from nanollama.models.attention import Context, grouped_query_attention
from nanollama.models.feed_forward import gated_feed_forward
from nanollama.models.linear import norm_scale, normal, parameter
from nanollama.ops.attention import MaskSpec
from nanollama.ops.norms import rms_norm
from nanollama.ops.rope import rope_tables
from nanollama.parallel.mesh import constrain

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values written so far, and where the next go. L is an axis, or a tuple's (see `unstack`)."""

    k_LBSGK: Any
    v_LBSGK: Any
    write_index: jax.Array  # int32 scalar: key index of the next query


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    model: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache_BSGK: tuple[jax.Array, jax.Array] | None,
        window: jax.Array | None,
        context: Context,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        m, (B, T, D) = self.model, x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D)
        with jax.named_scope("attention"):
            h_ND = rms_norm(x_ND, norm_scale(self, "attention_norm", D), m.norm_eps)
            a_ND, cache_BSGK = grouped_query_attention(
                self, m, h_ND, cache_BSGK, window, context, backend=self.compute.attention
            )
            x_ND = x_ND + a_ND
        with jax.named_scope("mlp"):
            h_ND = rms_norm(x_ND, norm_scale(self, "mlp_norm", D), m.norm_eps)
            x_ND = x_ND + gated_feed_forward(self, m, h_ND)
        return constrain(x_ND.reshape(B, T, D), "batch", None, "activation_embed"), cache_BSGK


class Decoder(nn.Module):
    """Tokens to final hidden states; multiply by `head(params)` for logits."""

    model: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        first_key_BT: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """hidden_BTD after the final norm in the compute dtype, and the cache with this call's keys written.

        first_key_BT: key index of the first key each query may see (`ops.attention.MaskSpec`).
        """
        m, dtype = self.model, jnp.dtype(self.compute.dtype)
        V, D = m.vocab_size, m.hidden_size
        embedding_VD = parameter(self, "embedding", ("vocab", "embed"), (V, D), normal(m.init_std))
        if not m.tie_embeddings:  # declared here, used by `head`
            parameter(self, "head", ("embed", "vocab"), (D, V), normal(m.init_std))
        # Whole rows before the lookup: a gather from rows cut over fsdp makes XLA replicate its result and gradient.
        rows_VD = constrain(embedding_VD, "vocab", "activation_embed")
        x_BTD = constrain(rows_VD[tokens_BT].astype(dtype), "batch", None, "activation_embed")
        cos_BTC, sin_BTC = rope_tables(positions_BT, m.head_dim, m.rope_theta, m.rope_scaling)
        context = Context(
            cos_BTC, sin_BTC, MaskSpec(first_key_BT, None if cache is None else cache.write_index)
        )
        if isinstance(self.get_variable("params", "layers"), tuple):
            x_BTD, cache = self._apart(x_BTD, cache, context)
        else:
            layers = _stack(m, self.compute)(model=m, compute=self.compute, name="layers")
            keys_values = None if cache is None else (cache.k_LBSGK, cache.v_LBSGK)
            x_BTD, keys_values = layers(x_BTD, keys_values, _windows(m), context)
            if cache is not None:
                cache = Cache(keys_values[0], keys_values[1], cache.write_index + tokens_BT.shape[1])
        return rms_norm(x_BTD, norm_scale(self, "final_norm", D), m.norm_eps), cache

    def _apart(
        self, x_BTD: jax.Array, cache: Cache | None, context: Context
    ) -> tuple[jax.Array, Cache | None]:
        """The layers one by one, with the parameters and the cache that `unstack` gives."""
        block, keys, values = Block(self.model, self.compute, parent=None), [], []
        windows = _windows(self.model)
        for number, params in enumerate(self.get_variable("params", "layers")):
            old = None if cache is None else (cache.k_LBSGK[number], cache.v_LBSGK[number])
            window = None if windows is None else windows[number]
            x_BTD, new = block.apply({"params": params}, x_BTD, old, window, context)
            if new is not None:
                keys.append(new[0])
                values.append(new[1])
        if cache is not None:
            cache = Cache(tuple(keys), tuple(values), cache.write_index + x_BTD.shape[1])
        return x_BTD, cache


def unstack(tree: Any) -> Any:
    """Parameters or a cache with a tuple of L layers for their first axis; `Decoder` takes both forms.

    For decoding: one token through a slice of stacked weights is slow on CPU (one row of llama-23m: 35 ms of
    CPU time a token, 10 ms unstacked), and a stacked cache is copied whole for every token.
    """

    def split(stacked: Any) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten(stacked)
        return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*map(list, leaves), strict=True))

    if isinstance(tree, Cache):
        return Cache(split(tree.k_LBSGK), split(tree.v_LBSGK), tree.write_index)
    return {**tree, "layers": split(tree["layers"])}


def head(params: Params) -> jax.Array:
    """Output matrix [D, V], float32: its own, or the embedding's transpose where they are tied."""
    return params["head"] if "head" in params else params["embedding"].T


def init_cache(model: ModelConfig, batch: int, length: int, dtype: Any) -> Cache:
    """Empty cache for `length` positions of `batch` rows."""
    shape = (model.num_layers, batch, length, model.num_kv_heads, model.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def init_params(decoder: Decoder, seed: int) -> Any:
    """Fresh parameters in Linen's boxes, which carry the logical axes (see `training.state`)."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return decoder.init(jax.random.key(seed), tokens, tokens, tokens)["params"]


def _windows(model: ModelConfig) -> jax.Array | None:
    """Keys that a query of each layer sees, [L]; None where all layers see everything."""
    if not model.sliding_window:
        return None
    full = jnp.arange(model.num_layers) < model.full_attention_layers
    return jnp.where(full, jnp.iinfo(jnp.int32).max, model.sliding_window)


def _stack(model: ModelConfig, compute: ComputeConfig) -> Any:
    """`Block`, rematerialised as asked, scanned over L layers with stacked parameters."""
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    block: Any = Block
    if compute.remat != "none":
        block = nn.remat(Block, prevent_cse=False, policy=policies[compute.remat])
    unroll = compute.scan_unroll or model.num_layers
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),
        length=model.num_layers,
        unroll=min(unroll, model.num_layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
