"""The two compiled programs of generation, as pure functions: read the prompts, then write tokens.

Rows are padded on the left, so that all write the same cache slot. Knows nothing of buckets, streams or text.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanollama.generation.sampling import Rows, sample
from nanollama.models.decoder import Cache, Decoder, Params, head, init_cache, unstack
from nanollama.ops.device import device
from nanollama.parallel.mesh import constrain

CHUNK = 32  # most tokens of one call of `decode`
NOTHING = -1  # where a row wrote no token


class Program(NamedTuple):
    """What the compiled programs are made for."""

    decoder: Decoder
    vocabulary: int  # ids from here on only pad the model's vocabulary and are never chosen
    mesh: Mesh | None

    def layout(self) -> Any:
        """Context in which activations are laid out by `parallel.mesh.RULES`."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


class Plan(NamedTuple):
    """What each row is to do."""

    rows: Rows
    limit_B: jax.Array  # int32, most new tokens; 0: the row only fills the batch
    stop_S: jax.Array  # int32, tokens that end a row


class State(NamedTuple):
    """What is carried from token to token, on the device."""

    cache: Cache
    token_B: jax.Array  # int32, newest token, not yet in the cache
    position_B: jax.Array  # int32, its position
    first_key_B: jax.Array  # int32, where the row's prompt begins in the cache
    made: jax.Array  # int32 scalar, tokens made so far
    done_B: jax.Array  # bool


class News(NamedTuple):
    """Tokens made by one call, C at most; a row's come first, then NOTHING."""

    tokens_CB: jax.Array
    log_probs_CB: jax.Array


def prefill(
    program: Program, params: Params, tokens_BP: jax.Array, lengths_B: jax.Array, plan: Plan
) -> tuple[State, News]:
    """Read left-padded prompts of `lengths_B` tokens and write each row's first token (C = 1)."""
    with program.layout():
        B, P = tokens_BP.shape
        padding_B, index_P = P - lengths_B, jnp.arange(P)
        positions_BP = jnp.maximum(index_P - padding_B[:, None], 0)
        first_key_BP = jnp.minimum(index_P, padding_B[:, None])  # padding sees only itself
        cache = unstack(init_cache(program.decoder.model, B, P, program.decoder.compute.dtype))
        hidden_BPD, cache = program.decoder.apply(
            {"params": params}, tokens_BP, positions_BP, first_key_BP, cache
        )
        none = State(_laid_out(cache), lengths_B, lengths_B - 1, padding_B, jnp.int32(0), plan.limit_B == 0)
        state, token_B, log_prob_B = _write(program, params, hidden_BPD[:, -1], none, plan)
        return state, News(token_B[None], log_prob_B[None])


def decode(
    program: Program, params: Params, state: State, plan: Plan, count: jax.Array
) -> tuple[State, News]:
    """Write up to `count` <= CHUNK more tokens per row (C = CHUNK); ends early when all rows are done.

    The cache must have `count` free slots: past its end, writes would overwrite its last one.
    """
    B = state.token_B.shape[0]
    news = News(jnp.full((CHUNK, B), NOTHING, jnp.int32), jnp.zeros((CHUNK, B), jnp.float32))

    def unfinished(carry: tuple[jax.Array, State, News]) -> jax.Array:
        made, state, _ = carry
        return (made < count) & ~jnp.all(state.done_B)

    def step(carry: tuple[jax.Array, State, News]) -> tuple[jax.Array, State, News]:
        made, state, news = carry
        hidden_B1D, cache = program.decoder.apply(
            {"params": params},
            state.token_B[:, None],
            state.position_B[:, None],
            state.first_key_B[:, None],
            state.cache,
        )
        state, token_B, log_prob_B = _write(
            program, params, hidden_B1D[:, 0], state._replace(cache=_laid_out(cache)), plan
        )
        pairs = zip(news, (token_B, log_prob_B), strict=True)
        return made + 1, state, News(*(all_CB.at[made].set(new_B) for all_CB, new_B in pairs))

    with program.layout():
        _, state, news = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, news))
        return state, news


def cache_length(state: State) -> int:
    """Slots of the cache."""
    return state.cache.k_LBSGK[0].shape[1]


def grow(state: State, length: int) -> State:
    """The same state with room for `length` keys."""
    more = ((0, 0), (0, length - cache_length(state)), (0, 0), (0, 0))
    return state._replace(cache=_each(lambda x_BSGK: jnp.pad(x_BSGK, more), state.cache))


def ready(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters in the form that decodes fastest: layers unstacked, matrices cast to the compute dtype.

    The forward pass would cast them at every use; norm scales and routers stay float32, as they do there.
    """

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return leaf if "norm" in name or "router" in name else leaf.astype(dtype)

    return unstack(jax.tree_util.tree_map_with_path(cast, params))


def _write(
    program: Program, params: Params, hidden_BD: jax.Array, state: State, plan: Plan
) -> tuple[State, jax.Array, jax.Array]:
    """Choose the next token of each row; rows that were done before get NOTHING."""
    logits_BV = _logits(program, params, hidden_BD)[:, : program.decoder.model.vocab_size]  # the rest pads the head
    token_B, log_prob_B = sample(logits_BV, plan.rows, state.made, vocabulary=program.vocabulary)
    made = state.made + 1
    done_B = state.done_B | jnp.any(token_B[:, None] == plan.stop_S, axis=1) | (made >= plan.limit_B)
    shown_B = jnp.where(state.done_B, NOTHING, token_B)
    state = State(state.cache, token_B, state.position_B + 1, state.first_key_B, made, done_B)
    return state, shown_B, log_prob_B


def _logits(program: Program, params: Params, hidden_BD: jax.Array) -> jax.Array:
    """[B, V] float32.

    A head that is the embedding is [V, D] in memory, and XLA:CPU writes all of it transposed to multiply two or more
    rows by it: there the table comes first (8 rows by 16,384 x 512: 17 processor ms, 1.2 this way).
    """
    head_DV = head(params).astype(hidden_BD.dtype)
    if program.decoder.model.tie_embeddings and device()[0] == "cpu":
        hidden_DB = jax.lax.optimization_barrier(hidden_BD.T)  # else XLA turns the product around again
        return jnp.dot(head_DV.T, hidden_DB, preferred_element_type=jnp.float32).T
    return jnp.dot(hidden_BD, head_DV, preferred_element_type=jnp.float32)


def _laid_out(cache: Cache) -> Cache:
    return _each(lambda x_BSGK: constrain(x_BSGK, "batch", "length", "kv_heads", "head_dim"), cache)


def _each(change: Callable[[jax.Array], jax.Array], cache: Cache) -> Cache:
    keys, values = (tuple(map(change, layers)) for layers in (cache.k_LBSGK, cache.v_LBSGK))
    return Cache(keys, values, cache.write_index)
