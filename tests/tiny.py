"""A model small enough to compile in seconds, and batches for it. Shared by the tests of training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nanollama.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PackedSetConfig,
)
from nanollama.models.decoder import Decoder
from nanollama.parallel.mesh import batch_sharding, make_mesh
from nanollama.training import elastic, step
from nanollama.training.optim import make_optimizer
from nanollama.training.state import TrainState, init_state, state_shardings
from nanollama.training.validation import make_token_nll

LENGTH = 32
MODEL = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
# One layer per scan iteration compiles in half the time; chunks smaller than a row, so that chunking is exercised.
COMPUTE = ComputeConfig(scan_unroll=1, loss_chunk_tokens=128)

# Compiler options for programs that run once or twice: half the time to compile. Of a gradient with experts jaxlib 0.10
# compiles 3.6 processor seconds with the first, 1.2 with both; later ones no longer know the second.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False


def quickly(function: Callable[..., Any], *arguments: Any) -> Any:
    """The jitted function's value; compiled for a short compilation, not for a short run."""
    return jax.jit(function).lower(*arguments).compile(compiler_options=QUICK)(*arguments)


def tiny_config(rows: int = 8, micro_batches: int = 1, **changes: Any) -> Config:
    """Constant learning rate, AdamW, one device, unless `changes` says otherwise."""
    config = Config(
        name="tiny",
        steps=1000,
        model=MODEL,
        data=DataConfig((PackedSetConfig("absent"),), "absent", LENGTH),
        batch=BatchConfig(rows, micro_batches),
        compute=COMPUTE,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    return dataclasses.replace(config, **changes)


def random_batch(
    seed: int, rows: int = 8, length: int = LENGTH, vocab: int = MODEL.vocab_size
) -> dict[str, np.ndarray]:
    """Random tokens in two segments a row; between 10 % and 100 % of a row's targets have a weight."""
    random = np.random.default_rng(seed)
    cut = random.integers(1, length, (rows, 1))
    index = np.arange(length, dtype=np.int32)[None]
    start = np.where(index < cut, 0, cut).astype(np.int32)
    share = random.uniform(0.1, 1.0, (rows, 1))
    weights = (random.random((rows, length)) < share).astype(np.float32)
    weights[:, 0] = 1.0  # every row has a loss token
    return {
        "tokens": random.integers(0, vocab, (rows, length), dtype=np.int32),
        "targets": random.integers(0, vocab, (rows, length), dtype=np.int32),
        "weights": weights,
        "positions": (index - start).astype(np.int32),
        "first_key": start,
    }


@functools.cache
def host_state(config: Config) -> TrainState:
    """The fresh state of `config` as NumPy arrays; made once, put where a test wants it."""
    optimizer = make_optimizer(config)
    state, _ = init_state(
        dataclasses.replace(config, determinism="same_mesh"), optimizer, make_mesh(MeshConfig(1, 1, 1))
    )
    return jax.device_get(state)


class Training:
    """A tiny run on a mesh: its state, and its compiled steps."""

    def __init__(self, config: Config, mesh: MeshConfig | None = None):
        program = elastic if config.determinism == "elastic" else step
        self.config, self.mesh = config, make_mesh(mesh or MeshConfig(1, 1, 1))
        self.optimizer = make_optimizer(config)
        self.decoder = Decoder(config.model, config.compute, config.lora)
        self.shardings = state_shardings(config, self.optimizer, self.mesh)
        self.step = program.make_train_step(config, self.decoder, self.optimizer, self.mesh, self.shardings)
        self.put = functools.partial(program.put_batch, config=config, mesh=self.mesh)
        self._compiled: Any = None  # the step, once it was taken

    @functools.cached_property
    def token_nll(self) -> Any:
        """(parameters, batch on the device) -> [B, T], as held-out loss is made."""
        return make_token_nll(self.decoder, self.mesh, self.config.batch.micro_batches)

    @functools.cached_property
    def state(self) -> TrainState:
        """Fresh, until a step or a test puts another in its place."""
        return jax.device_put(host_state(self.config), self.shardings)

    def train(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """One step, as the loop does it; returns the metrics on the device."""
        on_device = self.put(batch)
        if self._compiled is None:
            plain = self.config.determinism == "same_mesh"  # the elastic step is several programs
            self._compiled = self.step.lower(self.state, on_device).compile(QUICK) if plain else self.step
        with jax.transfer_guard("disallow"):
            self.state, metrics = self._compiled(self.state, on_device)
        return metrics

    def gradient_program(self, params: Any, batch: Any) -> tuple[Any, Any]:
        """(gradients of the summed loss, sums), to be jitted."""
        return step.make_gradient(self.config, self.decoder, self.mesh, self.shardings)(params, batch)

    def gradient(self, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
        """(gradients of the summed loss, sums), on the host."""
        return jax.device_get(self._gradient(self.state.params, self.put(batch)))

    @functools.cached_property
    def _gradient(self) -> Any:
        return jax.jit(
            self.gradient_program,
            in_shardings=(self.shardings.params, batch_sharding(self.mesh)),
            compiler_options=QUICK,
        )
