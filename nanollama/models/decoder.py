"""The decoder. Linen declares the parameters with their logical axes; pure functions in `ops` compute.

Letters in tensor names, here and everywhere:
    B batch rows    T query positions    S key positions    D hidden size    V vocabulary
    H query heads   G KV heads           K head dim         F ffn size       L layers
    N = B * T tokens, flattened          C = K / 2 rotary pairs

Parameters of all layers are stacked along a leading L axis, always; `scan_unroll` only changes speed. Where a mixture
of experts begins after some dense layers, those are a stack of their own.
The same code trains, evaluates and samples: with a cache, queries continue the keys already written.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanollama.config import ComputeConfig, LoraConfig, ModelConfig
from nanollama.kernels.flash import LSE_NAME, OUTPUT_NAME
from nanollama.models import lora as loras
from nanollama.models.attention import Context, attention, cache_heads
from nanollama.models.feed_forward import ROUTERS, gated_feed_forward, mixture_of_experts
from nanollama.models.linear import norm_scale, normal, parameter
from nanollama.models.mesh_embedding import look_up
from nanollama.ops.masks import MaskSpec
from nanollama.ops.moe import RouterSums
from nanollama.ops.norms import rms_norm
from nanollama.ops.products import PRODUCT_NAME
from nanollama.ops.rope import rope_tables
from nanollama.parallel import pipeline
from nanollama.parallel.context import join_rows, split_rows
from nanollama.parallel.mesh import constrain

Params = dict[str, Any]
LAYERS, DENSE_LAYERS = "layers", "dense_layers"  # names of the stacks' parameters
head = loras.head  # of the parameters, [D, V]


class Cache(NamedTuple):
    """Keys and values written so far, and where the next go. L is an axis, or a tuple's (see `unstack`).

    With latent attention the latents and the shared rotated keys, G = 1 head each (`models.attention.cache_heads`).
    """

    k_LBSGK: Any
    v_LBSGK: Any
    write_index: jax.Array  # int32 scalar: key index of the next query


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    model: ModelConfig
    compute: ComputeConfig
    experts: bool = False  # a mixture of experts in place of the feed-forward
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache_BSGK: tuple[jax.Array, jax.Array] | None,
        layer: "Layer",
        context: Context,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        m, (B, T, D) = self.model, x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D)
        dropout = None if context.seeds_BT is None else loras.Dropout(context.seeds_BT.reshape(-1), layer.number)
        with jax.named_scope("attention"):
            h_ND = rms_norm(x_ND, norm_scale(self, "attention_norm", D), m.norm_eps)
            a_ND, cache_BSGK = attention(
                self, m, h_ND, cache_BSGK, layer.window, context, dropout, backend=self.compute.attention
            )
            x_ND = x_ND + a_ND
        with jax.named_scope("mlp"):
            h_ND = rms_norm(x_ND, norm_scale(self, "mlp_norm", D), m.norm_eps)
            if self.experts and m.moe is not None:
                x_ND = x_ND + mixture_of_experts(self, m, m.moe, h_ND, context.real_BT, dropout, self.compute)
            else:
                x_ND = x_ND + gated_feed_forward(self, m, h_ND, dropout)
        return constrain(x_ND.reshape(B, T, D), "batch", None, "activation_embed"), cache_BSGK


class Decoder(nn.Module):
    """Tokens to final hidden states; multiply by `head(params)` for logits.

    A mixture of experts leaves [L, ...] `ops.moe.RouterSums` of its layers in the collection `feed_forward.ROUTERS`
    where the caller makes that mutable: see `router_sums`.
    """

    model: ModelConfig
    compute: ComputeConfig
    lora: LoraConfig | None = None  # adapters beside the weights, see `models.lora`

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        first_key_BT: jax.Array | None,
        cache: Cache | None = None,
        real_BT: jax.Array | None = None,
        starts_B: jax.Array | None = None,
        seeds_BT: jax.Array | None = None,
        micro_batches: int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """hidden_BTD after the final norm in the compute dtype, and the cache with this call's keys written.

        first_key_BT: key index of the first key each query may see (`ops.masks.MaskSpec`); None promises that each row
        is one document from its first position on. real_BT: bool, tokens that count in the routers' sums; None: all.
        starts_B: where in its row each begins, if these are pieces (`parallel.context`). seeds_BT: of adapters' dropout
        (`models.lora.dropout_seeds`); None: without. micro_batches: of rows that pass through the mesh's pipeline
        stages; 0: no pipeline.
        """
        m, dtype = self.model, jnp.dtype(self.compute.dtype)
        embedding_VD = self._tables()
        # Whole rows before the lookup: a gather from rows cut over fsdp makes XLA replicate its result and gradient.
        rows_VD = constrain(embedding_VD, "vocab", "activation_embed")
        x_BTD = constrain(look_up(rows_VD, tokens_BT).astype(dtype), "batch", None, "activation_embed")
        rotated = m.head_dim if m.latent is None else m.latent.qk_rope_head_dim
        # Behind a barrier, else XLA computes cosines again in every layer, for every head.
        cos_BTC, sin_BTC = jax.lax.optimization_barrier(
            rope_tables(positions_BT, rotated, m.rope_theta, m.rope_scaling)
        )
        mask = MaskSpec(
            jnp.zeros_like(tokens_BT) if first_key_BT is None else first_key_BT,
            starts_B if cache is None else cache.write_index,
            window=0 if m.full_attention_layers else m.sliding_window,
            documents=first_key_BT is not None,
            pieces=starts_B is not None,
        )
        real_BT = jnp.ones(tokens_BT.shape, bool) if real_BT is None else real_BT
        context = Context(cos_BTC, sin_BTC, mask, real_BT, seeds_BT)
        if isinstance(self.get_variable("params", LAYERS), tuple):
            x_BTD, cache = self._apart(x_BTD, cache, context)
        else:
            written: list[Any] = []
            for stack in stacks(m):
                if micro_batches and pipeline.stages() > 1:
                    x_BTD = self._pipelined(x_BTD, stack, context, micro_batches)
                    continue
                layers = _scanned(m, self.compute, self.lora, stack)
                x_BTD, new = layers(x_BTD, _part(cache, stack), _numbered(m, stack), context)
                written.append(new)
            if cache is not None:
                keys, values = jax.tree.map(lambda *parts: jnp.concatenate(parts), *written)
                cache = Cache(keys, values, cache.write_index + tokens_BT.shape[1])
        return rms_norm(x_BTD, norm_scale(self, "final_norm", m.hidden_size), m.norm_eps), cache

    def _tables(self) -> jax.Array:
        """Declares the embedding, and the head that `head` uses; returns the embedding."""
        m, zeros = self.model, nn.initializers.zeros
        V, D, first = m.vocab_size + m.vocab_padding, m.hidden_size, self.lora.train_rows_from if self.lora else 0
        tables = {"embedding": parameter(self, "embedding", ("vocab", "embed"), (V, D), normal(m.init_std))}
        if not m.tie_embeddings:
            parameter(self, "head", ("embed", "vocab"), (D, V), normal(m.init_std))
        if first:
            name = loras.NEW_ROWS["embedding"]
            tables[name] = parameter(self, name, ("added", "embed"), (V - first, D), zeros)
            if not m.tie_embeddings:
                parameter(self, loras.NEW_ROWS["head"], ("embed", "added"), (D, V - first), zeros)
        return loras.embedding(tables)

    def _pipelined(self, x_BTD: jax.Array, stack: "Stack", context: Context, micro_batches: int) -> jax.Array:
        """The layers of a stack, cut over the mesh's pipeline stages."""
        count, layers = pipeline.stages(), stack.high - stack.low
        block = Block(self.model, self.compute, stack.experts, self.lora, parent=None)
        weights = jax.tree.map(
            lambda w: w.reshape(count, layers // count, *w.shape[1:]),
            (self.get_variable("params", stack.name), _numbered(self.model, stack)),
        )

        def layer(x_BTD: jax.Array, weights: Any, context: Context) -> tuple[jax.Array, Any]:
            params, number = weights
            (x_BTD, _), state = block.apply({"params": params}, x_BTD, None, number, context, mutable=[ROUTERS])
            return x_BTD, state.get(ROUTERS, {})

        remat, unroll = _remat(self.compute), _unroll(self.compute, layers // count)
        if remat is not None:
            layer = jax.checkpoint(layer, prevent_cse=unroll > 1, policy=remat)

        def stage(weights: Any, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Any]:
            return jax.lax.scan(lambda x, w: layer(x, w, context), x_BTD, weights, unroll=unroll)

        pieces = context.mask.pieces
        x_MBTD, context_M = jax.tree.map(
            lambda x: split_rows(x, micro_batches, pieces=pieces), (x_BTD, context)
        )
        x_MBTD = constrain(x_MBTD, None, "batch", None, "activation_embed")
        x_MBTD, sums = pipeline.run(stage, weights, x_MBTD, context_M)
        if sums and self.is_mutable_collection(ROUTERS):

            def of_layers(x: jax.Array) -> jax.Array:  # [M, S, L / S, B / M, ...] -> [L, B, ...]
                x_LM = jnp.moveaxis(x, 0, 2).reshape(layers, micro_batches, *x.shape[3:])
                return jax.vmap(lambda x_M: join_rows(x_M, pieces=pieces))(x_LM)

            self.put_variable(ROUTERS, stack.name, jax.tree.map(of_layers, sums))
        return constrain(join_rows(x_MBTD, pieces=pieces), "batch", None, "activation_embed")

    def _apart(
        self, x_BTD: jax.Array, cache: Cache | None, context: Context
    ) -> tuple[jax.Array, Cache | None]:
        """The layers one by one, with the parameters and the cache that `unstack` gives."""
        keys, values = [], []
        for stack in stacks(self.model):
            block = Block(self.model, self.compute, stack.experts, self.lora, parent=None)
            layers = _numbered(self.model, stack)
            for index, params in enumerate(self.get_variable("params", stack.name)):
                number = stack.low + index
                old = None if cache is None else (cache.k_LBSGK[number], cache.v_LBSGK[number])
                layer = jax.tree.map(lambda x_L, index=index: x_L[index], layers)
                x_BTD, new = block.apply({"params": params}, x_BTD, old, layer, context)
                if new is not None:
                    keys.append(new[0])
                    values.append(new[1])
        if cache is not None:
            cache = Cache(tuple(keys), tuple(values), cache.write_index + x_BTD.shape[1])
        return x_BTD, cache


class Layer(NamedTuple):
    """What tells one layer of a stack from the next; [L] where there are several."""

    number: jax.Array  # int32, in the model
    window: jax.Array | None  # int32, keys that a query sees; None where layers do not differ: the mask says it


class Stack(NamedTuple):
    """Layers low to high - 1 of the model, alike, and the name of their parameters."""

    name: str
    low: int
    high: int
    experts: bool


def stacks(model: ModelConfig) -> list[Stack]:
    """The layers in order: all alike, or dense ones before those with experts."""
    dense = model.moe.first_dense_layers if model.moe else 0
    first = [Stack(DENSE_LAYERS, 0, dense, False)] if dense else []
    return [*first, Stack(LAYERS, dense, model.num_layers, model.moe is not None)]


def router_sums(state: Any) -> RouterSums:
    """Of the layers with experts, [L, ...]; state: what `apply(..., mutable=[ROUTERS])` returns beside the output."""
    sums: RouterSums = state[ROUTERS][LAYERS]["sums"]
    return sums


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
    return {name: split(part) if name in (LAYERS, DENSE_LAYERS) else part for name, part in tree.items()}


def init_cache(model: ModelConfig, batch: int, length: int, dtype: Any) -> Cache:
    """Empty cache for `length` positions of `batch` rows."""
    keys, values = (jnp.zeros((model.num_layers, batch, length, *heads), dtype) for heads in cache_heads(model))
    return Cache(keys, values, jnp.zeros((), jnp.int32))


def init_params(decoder: Decoder, seed: int) -> Any:
    """Fresh parameters in Linen's boxes, which carry the logical axes (see `training.state`)."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return decoder.init(jax.random.key(seed), tokens, tokens, tokens)["params"]


def _part(cache: Cache | None, stack: Stack) -> tuple[jax.Array, jax.Array] | None:
    """The keys and values of a stack's layers."""
    if cache is None:
        return None
    return cache.k_LBSGK[stack.low : stack.high], cache.v_LBSGK[stack.low : stack.high]


def _numbered(model: ModelConfig, stack: Stack) -> Layer:
    """The layers of a stack, each field [L]."""
    number_L = jnp.arange(stack.low, stack.high)
    if not (model.sliding_window and model.full_attention_layers):
        return Layer(number_L, None)
    full_L = number_L < model.full_attention_layers
    return Layer(number_L, jnp.where(full_L, jnp.iinfo(jnp.int32).max, model.sliding_window))


def _remat(compute: ComputeConfig) -> Any:
    """Which of a layer's values the backward pass finds saved; None for all of them."""
    policies = jax.checkpoint_policies
    return {
        "none": None,
        "names": policies.save_only_these_names(OUTPUT_NAME, LSE_NAME),
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(PRODUCT_NAME, OUTPUT_NAME, LSE_NAME)),
        "full": policies.nothing_saveable,
    }[compute.remat]


def _unroll(compute: ComputeConfig, layers: int) -> int:
    """Layers in one iteration of the scan.

    With remat one, unless another number is asked for: in a loop no compiler can find that the backward pass computes
    what the forward pass did, and keep it after all. XLA:CPU does so across unrolled layers, whatever barriers say.
    """
    usual = layers if compute.remat == "none" else 1
    return min(compute.scan_unroll or usual, layers)


def _scanned(model: ModelConfig, compute: ComputeConfig, lora: LoraConfig | None, stack: Stack) -> Any:
    """`Block`, rematerialised as asked, scanned over the layers of a stack with stacked parameters."""
    block: Any = Block
    length = stack.high - stack.low
    remat, unroll = _remat(compute), _unroll(compute, length)
    if remat is not None:
        block = nn.remat(Block, prevent_cse=unroll > 1, policy=remat)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, ROUTERS: 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),
        length=length,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(model=model, compute=compute, experts=stack.experts, lora=lora, name=stack.name)
