"""Mixture of experts: three ways to one sum, routing against a hand-written loop, losses, balance by bias."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.config import MoeConfig
from nanollama.data.strict import FieldError
from nanollama.ops import moe as ops
from nanollama.ops.moe import Experts, Routing, route

MOE = MoeConfig(num_experts=8, experts_per_token=2, expert_size=32)
N, D = 40, 16
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.standard_normal(shape, np.float32))


X, LOGITS = normal(N, D), 2 * normal(N, 8)
EXPERTS = Experts(normal(8, D, 32), normal(8, D, 32), normal(8, 32, D))


def by_hand(logits: np.ndarray, moe: MoeConfig, bias: np.ndarray) -> list[dict[int, float]]:
    """Weights of the chosen experts, token by token, as the papers say it."""
    found = []
    for row in np.asarray(logits, np.float64):
        score = np.exp(row) / np.exp(row).sum() if moe.scoring == "softmax" else 1 / (1 + np.exp(-row))
        choice = score + bias
        size = moe.num_experts // moe.groups
        groups = [sorted(choice[i * size : (i + 1) * size])[::-1] for i in range(moe.groups)]
        judged = [sum(group[: 1 if moe.scoring == "softmax" else 2]) for group in groups]
        kept = sorted(range(moe.groups), key=lambda i: -judged[i])[: moe.groups_per_token if moe.groups > 1 else 1]
        open_to = [e for e in range(moe.num_experts) if e // size in kept]
        chosen = sorted(open_to, key=lambda e: -choice[e])[: moe.experts_per_token]
        total = sum(score[e] for e in chosen) if moe.normalize else 1.0
        found.append({e: float(moe.scale * score[e] / total) for e in chosen})
    return found


ROUTERS = {
    "mixtral": MOE,
    "qwen": dataclasses.replace(MOE, experts_per_token=3, normalize=False),
    "deepseek v2": dataclasses.replace(MOE, normalize=False, scale=16.0, groups=4, groups_per_token=2),
    "deepseek v3": dataclasses.replace(
        MOE, experts_per_token=3, scoring="sigmoid", scale=2.5, groups=4, groups_per_token=2, selection_bias=True
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_equals_a_loop_over_tokens(name: str) -> None:
    moe = ROUTERS[name]
    bias = 0.3 * np.asarray(normal(8)) if moe.selection_bias else np.zeros(8)
    routing = route(LOGITS, moe, jnp.asarray(bias, jnp.float32) if moe.selection_bias else None)
    for token, wanted in enumerate(by_hand(np.asarray(LOGITS), moe, bias)):
        got = dict(zip(routing.experts_NJ[token].tolist(), routing.weights_NJ[token].tolist(), strict=True))
        assert got == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(routing.scores_NE.sum(axis=1), 1.0, rtol=1e-5)


def test_bias_chooses_but_does_not_weigh() -> None:
    moe = ROUTERS["deepseek v3"]
    moved = route(LOGITS, dataclasses.replace(moe, groups=1, groups_per_token=1), jnp.zeros(8).at[5].set(100.0))
    assert np.all(np.any(np.asarray(moved.experts_NJ) == 5, axis=1))
    np.testing.assert_allclose(moved.weights_NJ.sum(axis=1), moe.scale, rtol=1e-5)


def experts_sum(path: str, x: jax.Array, experts: Experts, logits: jax.Array, factor: float = 8.0) -> jax.Array:
    routing = route(logits, MOE)
    if path == "capacity":
        return ops.capacity(x, routing, experts, factor=factor)[0]
    if path == "blocked":  # blocks of which some are full, some are filled up, and some are nobody's
        return ops.blocked(x, routing, experts, rows=8)
    return ops.PATHS[path](x, routing, experts)


@pytest.mark.parametrize("path", ["dropless", "blocked", "capacity", "grouped_interpret"])
def test_paths_equal_the_dense_loop(path: str) -> None:
    """Outputs, and gradients to tokens, experts and router."""

    def both(path: str) -> Any:
        def loss(x: jax.Array, experts: Experts, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = experts_sum(path, x, experts, logits)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(X, EXPERTS, LOGITS)

    ((_, y), gradients), ((_, wanted), wanted_gradients) = both(path), both("dense")
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_paths_are_chosen_by_device_and_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(kind: str, path: str = "auto", sides: tuple[int, int] = (64, 32)) -> str:
        monkeypatch.setattr(ops, "device", lambda: (kind, ""))
        return ops.resolve(path, 80, (8, *sides))

    assert [on("cpu"), on("gpu"), on("tpu")] == ["blocked", "grouped", "dropless"]
    assert on("gpu", sides=(64, 24)) == "dropless"
    with pytest.raises(FieldError, match="it is for a GPU, and this program is for a CPU"):
        on("cpu", "grouped")
    with pytest.raises(FieldError, match="sides of 24 are not multiples of 16"):
        on("gpu", "grouped", (64, 24))
    with pytest.raises(FieldError, match="beyond what Triton's programs can index"):
        ops.resolve("grouped", 10**6, (8, 4096, 1024))
    with pytest.raises(ValueError, match="unknown path 'fast'"):
        on("gpu", "fast")


def test_dense_equals_a_loop_over_tokens() -> None:
    wanted = np.zeros((N, D))
    gate, up, down = (np.asarray(w, np.float64) for w in EXPERTS)
    for token, chosen in enumerate(by_hand(np.asarray(LOGITS), MOE, np.zeros(8))):
        for e, weight in chosen.items():
            x = np.asarray(X[token], np.float64)
            hidden = x @ gate[e]
            wanted[token] += weight * ((hidden / (1 + np.exp(-hidden)) * (x @ up[e])) @ down[e])
    np.testing.assert_allclose(experts_sum("dense", X, EXPERTS, LOGITS), wanted, atol=1e-3)


def test_capacity_drops_last_choices_first_and_counts_them() -> None:
    """All tokens want expert 0 first and expert 1 second: only C of them get each; padding takes no slot."""
    routing = route(jnp.zeros((N, 8)).at[:, 0].set(2.0).at[:, 1].set(1.0), MOE)
    real = jnp.arange(N) >= 4
    assert ops.slots(N, 2, 8, 1.0) == 10
    y, dropped = ops.capacity(X, routing, EXPERTS, factor=1.0, real_N=real)
    assert not dropped[:14].any() and dropped[14:].all()
    np.testing.assert_allclose(y[4:14], ops.dense(X, routing, EXPERTS)[4:14], atol=1e-4)
    assert not np.any(y[:4]) and not np.any(y[14:])
    sums = ops.router_sums(routing, real.reshape(2, -1), dropped)
    assert sums.tokens_B.tolist() == [16, 20] and sums.dropped_B.tolist() == [12, 40]
    assert sums.load_BE[0].tolist() == [16, 16, 0, 0, 0, 0, 0, 0], "loads are what was asked for"

    # one expert that all tokens have as their second choice: first choices are served before
    logits = jnp.zeros((N, 8)).at[: N // 2, 3].set(1.0).at[:, 2].set(2.0).at[N // 2 :, 3].set(3.0)
    _, dropped = ops.capacity(X, route(logits, MOE), EXPERTS, factor=2.0)
    assert dropped[: N // 2, 1].all() and not dropped[N // 2 :, 0].any()


# --- balance


def test_even_loads_cost_one_and_gradients_push_towards_them() -> None:
    even = Routing(
        jnp.arange(N * 2).reshape(N, 2) % 8, jnp.full((N, 2), 0.5), jnp.full((N, 8), 1 / 8), jnp.zeros(N)
    )
    sums = ops.router_sums(even, jnp.ones((4, 10), bool))
    np.testing.assert_allclose(ops.uneven(sums.load_BE, sums.scores_BE, sums.tokens_B, 2), 1.0, rtol=1e-6)

    def loss(logits: jax.Array) -> jax.Array:
        sums = ops.router_sums(route(logits, MOE), jnp.ones((1, N), bool))
        return ops.uneven(sums.load_BE, sums.scores_BE, sums.tokens_B, 2)[0]

    tilted = LOGITS.at[:, 0].add(5.0)
    assert loss(tilted) > 1.5
    assert loss(tilted - 100.0 * jax.grad(loss)(tilted)) < loss(tilted)


def test_uneven_is_the_formula_of_transformers_per_row() -> None:
    """`load_balancing_loss_func`: num_experts * sum over experts of (assignments / tokens) * mean probability."""
    real = np.arange(N).reshape(4, 10) % 10 < np.array([[10], [7], [3], [0]])
    routing = route(LOGITS, MOE)
    sums = ops.router_sums(routing, jnp.asarray(real))
    got = ops.uneven(sums.load_BE, sums.scores_BE, sums.tokens_B, 2)
    probability = np.asarray(jax.nn.softmax(LOGITS)).reshape(4, 10, 8)
    chosen = np.asarray(routing.experts_NJ).reshape(4, 10, 2)
    for row in range(3):
        counts = np.bincount(chosen[row][real[row]].ravel(), minlength=8) / real[row].sum()
        wanted = 8 * np.sum(counts * probability[row][real[row]].mean(axis=0))
        assert float(got[row]) * MOE.experts_per_token == pytest.approx(wanted, rel=1e-5)
    assert got[3] == 0.0, "a row of padding has no balance"


def test_padding_is_found() -> None:
    first_key = jnp.array([[0, 0, 0, 3, 3, 5, 6], [0, 1, 2, 2, 4, 4, 4], [0, 0, 0, 0, 0, 0, 0]])
    real = ops.real_tokens(first_key)
    assert real.astype(int).tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1] * 7]


def test_bias_rule_evens_out_loads() -> None:
    """A router that sends all tokens to two experts, left alone; only the biases move."""
    moe = dataclasses.replace(MOE, scoring="sigmoid", selection_bias=True)
    logits = 0.3 * LOGITS + jnp.array([2.0, 1.0, 0, 0, 0, 0, 0, 0])

    def step(bias: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        load = jnp.sum(route(logits, moe, bias).experts_NJ[..., None] == jnp.arange(8), axis=(0, 1))
        return ops.updated_bias(bias[None], load[None].astype(jnp.float32), 0.01)[0], load

    _, loads = jax.lax.scan(step, jnp.zeros(8), None, length=200)
    assert loads[0].max() > 2 * loads[0].mean()
    assert loads[-20:].mean(axis=0).max() < 1.2 * loads[0].mean()
    even = jnp.full((1, 8), 7.0)
    assert not np.any(ops.updated_bias(jnp.zeros((1, 8)), even, 0.01)), "even loads move nothing"
