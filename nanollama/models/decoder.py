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
from nanollama.ops.attention import MaskSpec, attend, slide
from nanollama.ops.mlp import swiglu
from nanollama.ops.norms import rms_norm
from nanollama.ops.rope import apply_rope, rope_tables
from nanollama.parallel.mesh import constrain

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values written so far, and where the next go. L is an axis, or a tuple's (see `unstack`)."""

    k_LBSGK: Any
    v_LBSGK: Any
    write_index: jax.Array  # int32 scalar: key index of the next query


class Context(NamedTuple):
    """What every layer reads alike."""

    cos_BTC: jax.Array
    sin_BTC: jax.Array
    mask: MaskSpec  # of a layer that sees all of its document


def _normal(std: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(stddev=std)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    model: ModelConfig
    compute: ComputeConfig

    def _param(self, name: str, axes: tuple[str, ...], shape: tuple[int, ...], init: Any) -> jax.Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache_BSGK: tuple[jax.Array, jax.Array] | None,
        window: jax.Array | None,
        context: Context,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        m, dtype = self.model, x_BTD.dtype
        D, H, G, K, F = m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim, m.intermediate_size
        std, residual_std = _normal(m.init_std), _normal(m.init_std * (2 * m.num_layers) ** -0.5)
        attention_norm = self._param("attention_norm", ("norm",), (D,), nn.initializers.ones)
        query = self._param("query", ("embed", "heads", "head_dim"), (D, H, K), std).astype(dtype)
        key = self._param("key", ("embed", "kv_heads", "head_dim"), (D, G, K), std).astype(dtype)
        value = self._param("value", ("embed", "kv_heads", "head_dim"), (D, G, K), std).astype(dtype)
        output = self._param("output", ("heads", "head_dim", "embed"), (H, K, D), residual_std).astype(dtype)
        mlp_norm = self._param("mlp_norm", ("norm",), (D,), nn.initializers.ones)
        gate = self._param("gate", ("embed", "ffn"), (D, F), std).astype(dtype)
        up = self._param("up", ("embed", "ffn"), (D, F), std).astype(dtype)
        down = self._param("down", ("ffn", "embed"), (F, D), residual_std).astype(dtype)

        B, T, _ = x_BTD.shape
        with jax.named_scope("attention"):
            x_ND = x_BTD.reshape(B * T, D)
            h_ND = rms_norm(x_ND, attention_norm, m.norm_eps)
            q_BTHK = (h_ND @ query.reshape(D, H * K)).reshape(B, T, H, K)
            k_BTGK = (h_ND @ key.reshape(D, G * K)).reshape(B, T, G, K)
            v_BTGK = (h_ND @ value.reshape(D, G * K)).reshape(B, T, G, K)
            if m.qkv_bias:
                zeros = nn.initializers.zeros
                q_BTHK += self._param("query_bias", ("heads", "head_dim"), (H, K), zeros).astype(dtype)
                k_BTGK += self._param("key_bias", ("kv_heads", "head_dim"), (G, K), zeros).astype(dtype)
                v_BTGK += self._param("value_bias", ("kv_heads", "head_dim"), (G, K), zeros).astype(dtype)
            q_BTHK = constrain(q_BTHK, "batch", None, "heads", None)
            k_BTGK = constrain(k_BTGK, "batch", None, "kv_heads", None)
            v_BTGK = constrain(v_BTGK, "batch", None, "kv_heads", None)
            if m.qk_norm:
                query_norm = self._param("query_norm", ("norm",), (K,), nn.initializers.ones)
                key_norm = self._param("key_norm", ("norm",), (K,), nn.initializers.ones)
                q_BTHK = rms_norm(q_BTHK, query_norm, m.norm_eps)
                k_BTGK = rms_norm(k_BTGK, key_norm, m.norm_eps)
            q_BTHK = apply_rope(q_BTHK, context.cos_BTC, context.sin_BTC)
            k_BSGK, v_BSGK = apply_rope(k_BTGK, context.cos_BTC, context.sin_BTC), v_BTGK
            if cache_BSGK is not None:
                k_BSGK, v_BSGK = cache_BSGK = (
                    _write(cache_BSGK[0], k_BSGK, context.mask.query_start),
                    _write(cache_BSGK[1], v_BSGK, context.mask.query_start),
                )
            a_BTHK = attend(
                q_BTHK,
                k_BSGK.astype(dtype),
                v_BSGK.astype(dtype),
                context.mask if window is None else slide(context.mask, window),
                backend=self.compute.attention,
            )
            x_ND = x_ND + a_BTHK.reshape(B * T, H * K) @ output.reshape(H * K, D)
        with jax.named_scope("mlp"):
            x_ND = x_ND + swiglu(rms_norm(x_ND, mlp_norm, m.norm_eps), gate, up, down)
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
        embedding_VD = self.param(
            "embedding",
            nn.with_logical_partitioning(_normal(m.init_std), ("vocab", "embed")),
            (V, D),
            jnp.float32,
        )
        if not m.tie_embeddings:  # declared here, used by `head`
            self.param(
                "head",
                nn.with_logical_partitioning(_normal(m.init_std), ("embed", "vocab")),
                (D, V),
                jnp.float32,
            )
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
        scale_D = self.param(
            "final_norm", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (D,), jnp.float32
        )
        return rms_norm(x_BTD, scale_D, m.norm_eps), cache

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


def _write(cache_BSGK: jax.Array, new_BTGK: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache_BSGK, new_BTGK.astype(cache_BSGK.dtype), index, axis=1)


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
