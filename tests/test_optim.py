"""Optimizers against twins that treat one matrix at a time, in float64 NumPy, and against PyTorch's numbers."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import MODEL

from nanollama.config import OptimizerConfig
from nanollama.training import optim
from nanollama.training.optim import build_optimizer
from nanollama.training.state import logical_axes

CONFIG = OptimizerConfig(weight_decay=0.1, clip_norm=1.0)
MUON = OptimizerConfig(name="muon", weight_decay=0.1, clip_norm=1.0)
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "output": ("layers", "heads", "head_dim", "embed"),
        "up": ("layers", "embed", "ffn"),
        "norm": ("layers", "norm"),
    },
}
SIZES = {"vocab": 11, "embed": 8, "heads": 2, "head_dim": 3, "ffn": 12, "layers": 3, "norm": 8}
SHAPES = jax.tree.map(lambda axes: tuple(SIZES[a] for a in axes), AXES, is_leaf=lambda leaf: isinstance(leaf, tuple))


def rate(step):
    return 1e-2 * jnp.minimum((jnp.asarray(step, jnp.float32) + 1) / 5, 1.0)


def random_tree(seed: int, scale: float = 1.0) -> dict:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (random.normal(size=shape) * scale).astype(np.float32),
        SHAPES,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def train(optimizer: optax.GradientTransformation, params: dict, gradients: list[dict]) -> dict:
    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def adamw_twin(config: OptimizerConfig, params: dict, gradients: list[dict], decayed: dict) -> dict:
    """Decoupled weight decay (arXiv:1711.05101, algorithm 2), one number at a time as far as NumPy goes."""
    theta, structure = jax.tree.flatten(params)
    theta = [x.astype(np.float64) for x in theta]
    m, v = [0 * x for x in theta], [0 * x for x in theta]
    for t, gradient in enumerate(gradients, start=1):
        g = [x.astype(np.float64) for x in jax.tree.leaves(gradient)]
        norm = math.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1.0, config.clip_norm / norm) for x in g] if config.clip_norm else g
        for i, is_decayed in enumerate(jax.tree.leaves(decayed)):
            m[i] = config.b1 * m[i] + (1 - config.b1) * g[i]
            v[i] = config.b2 * v[i] + (1 - config.b2) * g[i] ** 2
            step = (m[i] / (1 - config.b1**t)) / (np.sqrt(v[i] / (1 - config.b2**t)) + config.eps)
            theta[i] -= float(rate(t - 1)) * (step + config.weight_decay * is_decayed * theta[i])
    return jax.tree.unflatten(structure, theta)


def orthogonalise(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps, https://kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_twin(config: OptimizerConfig, weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """arXiv:2502.16982, equation 4, on one [m, n] matrix; gradients are clipped already."""
    theta, momentum, beta = weight.astype(np.float64), np.zeros(weight.shape), config.muon_momentum
    for t, gradient in enumerate(gradients, start=1):
        momentum = beta * momentum + (1 - beta) * gradient
        # Nesterov with the bias corrections of optax; the scale does not matter, the proportion does.
        ahead = beta * momentum / (1 - beta ** (t + 1)) + (1 - beta) * gradient / (1 - beta**t)
        step = 0.2 * math.sqrt(max(weight.shape)) * orthogonalise(ahead)
        theta -= float(rate(t - 1)) * (step + config.weight_decay * theta)
    return theta


def assert_close(params: dict, expected: dict) -> None:
    # float32 against float64 over 20 steps of 1e-2: a few units in the last place of parameters of about 1.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=3e-6), params, expected)


DECAYED = {"embedding": True, "layers": {"query": True, "output": True, "up": True, "norm": False}}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e6])
def test_adamw_equals_twin(clip_norm):
    config = OptimizerConfig(weight_decay=0.1, clip_norm=clip_norm)
    params, gradients = random_tree(0), [random_tree(i + 1, scale=0.3) for i in range(20)]
    trained = train(build_optimizer(config, rate, AXES), params, gradients)
    assert_close(trained, adamw_twin(config, params, gradients, DECAYED))


def test_norm_scales_are_not_decayed_although_stacked():
    params, gradients = random_tree(0), [random_tree(1)]
    trained = train(build_optimizer(CONFIG, rate, AXES), params, gradients)
    by_dimensions = jax.tree.map(lambda x: x.ndim >= 2, params)  # the mutant: [L, D] looks like a matrix
    with pytest.raises(AssertionError):
        assert_close(trained, adamw_twin(CONFIG, params, gradients, by_dimensions))


def wave(shape: tuple[int, ...], seed: int, step: int) -> np.ndarray:
    """Gradients over four orders of magnitude, without a random generator that another library would need too."""
    i = np.arange(math.prod(shape))
    return (np.sin(0.7 * (i + 1) * (step + 1) + seed) * 10.0 ** -(i % 4)).astype(np.float32).reshape(shape)


def test_adamw_equals_torch():
    """Golden numbers of torch.optim.AdamW with clip_grad_norm_: 20 steps, warm-up, decay on the matrix only."""

    golden = json.loads((Path(__file__).parent / "golden" / "adamw_torch.json").read_text())
    axes = {"matrix": ("embed", "ffn"), "vector": ("norm",)}
    params = {
        "matrix": np.cos(1.3 * np.arange(12) + 1).astype(np.float32).reshape(4, 3),
        "vector": np.cos(1.3 * np.arange(5) + 2).astype(np.float32),
    }
    gradients = [{"matrix": wave((4, 3), 1, step), "vector": wave((5,), 2, step)} for step in range(20)]
    np.testing.assert_allclose([optax.tree.norm(g) for g in gradients], golden["norms"], rtol=1e-6)
    trained = train(build_optimizer(CONFIG, rate, axes), params, gradients)
    for name in params:
        np.testing.assert_allclose(trained[name], golden[name], rtol=1e-5, atol=1e-6)


def muon_twin_of_tree(config: OptimizerConfig, params: dict, gradients: list[dict]) -> dict:
    norms = [math.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(g))) for g in gradients]
    clipped = [
        jax.tree.map(lambda x, n=n: x * min(1.0, config.clip_norm / n), g)
        for g, n in zip(gradients, norms, strict=True)
    ]
    expected = adamw_twin(OptimizerConfig(weight_decay=config.weight_decay, clip_norm=0), params, clipped, DECAYED)
    flat = {"query": (8, 6), "output": (6, 8), "up": (8, 12)}
    for name, shape in flat.items():
        layers = [
            muon_twin(
                config,
                params["layers"][name][layer].reshape(shape),
                [g["layers"][name][layer].reshape(shape) for g in clipped],
            )
            for layer in range(SIZES["layers"])
        ]
        expected["layers"][name] = np.stack(layers).reshape(SHAPES["layers"][name])
    return expected


def test_muon_equals_a_twin_per_layer_and_matrix():
    params, gradients = random_tree(0), [random_tree(i + 1, scale=0.3) for i in range(8)]
    trained = train(build_optimizer(MUON, rate, AXES), params, gradients)
    assert_close(trained, muon_twin_of_tree(MUON, params, gradients))


@pytest.mark.parametrize("mutant", ["layers joined", "heads apart", "not matched to AdamW"])
def test_muon_mutants_are_caught(monkeypatch, mutant):
    if mutant == "layers joined":  # one matrix of all layers
        monkeypatch.setattr(optim, "_BATCH_AXES", ())
    elif mutant == "heads apart":  # one matrix per head
        monkeypatch.setattr(optim, "_BATCH_AXES", ("layers", "heads"))
    else:
        monkeypatch.setattr(optim, "MUON_UPDATE_RMS", 1.0)
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    trained = train(build_optimizer(MUON, rate, AXES), params, gradients)
    with pytest.raises(AssertionError):
        assert_close(trained, muon_twin_of_tree(MUON, params, gradients))


def test_one_learning_rate_serves_both():
    """The first update of each matrix has about the RMS of AdamW's in the middle of training, 0.2 to 0.4."""
    config = OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=0)
    params = random_tree(0)
    trained = train(build_optimizer(config, optax.constant_schedule(1.0), AXES), params, [random_tree(1)])
    for name in ("query", "output", "up"):
        rms = np.sqrt(np.mean((trained["layers"][name] - params["layers"][name]) ** 2))
        assert 0.1 < rms < 0.3, (name, rms)


def test_every_parameter_of_the_model_has_its_treatment():
    axes = logical_axes(MODEL)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): names
        for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    }
    matrices = {name for name, names in named.items() if optim.is_matrix(names)}
    assert matrices == {f"layers/{name}" for name in ("query", "key", "value", "output", "gate", "up", "down")}
    undecayed = {name for name, names in named.items() if "norm" in names}
    assert undecayed == {"final_norm", "layers/attention_norm", "layers/mlp_norm"}
    assert set(named) - matrices - undecayed == {"embedding", "head"}
