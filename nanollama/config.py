"""What a run is: frozen dataclasses, and the only way from plain values to them.

Owns every field's name, type, default and every check that needs no data and no devices. Where the values come from
is `nanollama.config_files`' business. Imports only the standard library, so that models and train steps can be used
where ml_collections is absent.
"""

import dataclasses
from typing import Any, Literal

from nanollama.data.strict import from_mapping, to_mapping
from nanollama.model_config import ConfigError as ConfigError
from nanollama.model_config import LatentConfig as LatentConfig
from nanollama.model_config import ModelConfig as ModelConfig
from nanollama.model_config import MoeConfig as MoeConfig
from nanollama.model_config import RopeScaling as RopeScaling
from nanollama.model_config import check_model as check_model
from nanollama.model_config import check_positive


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the same function is computed: changes speed and memory, never the checkpoint's format."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matmuls; see optimizer.parameter_dtype
    fp8: bool = False  # products of the layers in 8 bits, current scaling (`ops.fp8`); GPUs from Hopper on gain by it
    # what the backward pass computes again per layer: nothing; all but matrix products and attention; all but attention
    # (least memory that never runs its forward pass twice); everything
    remat: Literal["none", "dots", "names", "full"] = "none"
    # layers per scan iteration; 0: all (fastest on CPU and GPU, slower to compile), with remat one
    scan_unroll: int = 0
    # who computes attention (`ops.attention`); "auto" takes the fastest that can, a name refuses what it cannot do
    attention: Literal[
        "auto", "xla_chunked", "pallas", "mosaic", "cudnn", "splash", "reference", "pallas_interpret",
        "splash_interpret",
    ] = "auto"  # fmt: skip
    loss_chunk_tokens: int = 1024  # tokens whose logits exist at one time
    moe: Literal["auto", "dropless", "blocked", "grouped", "grouped_interpret", "capacity", "dense"] = "auto"  # ops.moe
    moe_capacity: float = 2.0  # capacity only: slots of an expert, relative to even loads; tokens beyond are dropped,
    # which changes what is computed (the count is in the metrics)


@dataclasses.dataclass(frozen=True)
class PackedSetConfig:
    """One packed set of the mixture."""

    path: str  # directory made by data_pipeline.pack
    weight: float = 1.0  # share of rows, relative to the other sets
    recipe: str = ""  # mixture YAML the set is made from; errors print the commands that make it


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which packed sets, in what proportion, at what context length."""

    sets: tuple[PackedSetConfig, ...]
    tokenizer: str  # directory made by data_pipeline.tokenizer
    sequence_length: int
    mask_documents: bool = True  # False lets attention and loss cross document boundaries
    threads: int = 4


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Rows per optimizer step and how they are cut."""

    global_rows: int
    # Gradient accumulation; in elastic mode the fixed unit of computation. 0: the fewest whose step fits the devices.
    micro_batches: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) or Muon (arXiv:2502.16982) with AdamW for vectors, embeddings and head."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only: norms are not decayed
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off
    muon_momentum: float = 0.95
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second stays float32
    # matrices kept in bfloat16, updated with stochastic rounding (`ops.rounding`); vectors stay float32
    parameter_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps: warm-up, then WSD's stable and decay parts, or cosine."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 0
    decay_steps: int = 0  # WSD: steps at the end over which the rate falls
    decay_shape: Literal["linear", "cosine", "one_minus_sqrt"] = "one_minus_sqrt"
    final_fraction: float = 0.0  # of the peak rate, at the last step


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross-entropy plus z-loss (arXiv:2204.02311, section 5)."""

    z_loss: float = 1e-4
    # The rest is for mixtures of experts; each is a sum over layers of a mean over real tokens (`ops.moe`).
    balance: Literal["sequence", "batch"] = "sequence"  # even loads in each row (DeepSeek), or in the batch (Switch)
    balance_loss: float = 0.0  # coefficient; DeepSeek V2 0.003, V3 0.0001, Switch 0.01 (batch, experts_per_token 1)
    router_z_loss: float = 0.0  # coefficient of the routers' logsumexp^2; ST-MoE 0.001
    bias_update_rate: float = 0.001  # step of each selection bias towards even loads; DeepSeek V3 0.001


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685) on a frozen model: what is trained instead of its weights."""

    rank: int = 16
    alpha: float = 32.0  # an adapter's output is scaled by alpha / rank
    dropout: float = 0.0  # of an adapter's input, in training only
    targets: tuple[str, ...] = ("*",)  # names of linear layers, e.g. "query"; * and ? match any
    rank_stabilised: bool = False  # scale by alpha / sqrt(rank) instead (arXiv:2312.03732)
    train_rows_from: int | None = None  # rows of embedding and head that learn too; 0: none; None: of new tokens


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on at most one axis takes all that are left."""

    data: int = -1  # replicas
    fsdp: int = 1  # batch and parameters sharded together
    tensor: int = 1  # heads, ffn and vocabulary
    expert: int = 1  # batch, and the experts of each layer; the other parameters are whole on each
    context: int = 1  # positions: each device has two pieces of every row, and gathers the keys and values of all
    stage: int = 1  # layers: micro-batches pass through the stages one behind the other


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 1000
    keep: int = 3
    milestone_every: int = 0  # steps whose checkpoints are never deleted; 0 = none
    asynchronous: bool = True


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training."""

    every: int = 1000  # 0 turns it off
    batches: int = 0  # of global_rows rows; 0 = the whole validation split


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 10
    tensorboard: bool = True
    wandb_project: str = ""  # empty = no Weights & Biases
    sample_every: int = 0  # 0 = only at the end
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole training run."""

    name: str
    steps: int
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    seed: int = 0
    initial_checkpoint: str = ""  # run whose parameters this one starts from, at step 0; empty = random ones
    lora: LoraConfig | None = None  # train adapters only
    determinism: Literal["same_mesh", "elastic"] = "same_mesh"
    compute: ComputeConfig = ComputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()


def resolve(values: Any) -> Config:
    """Build and check the Config of a ConfigDict or mapping; raises ConfigError before any work is done."""
    config = from_mapping(Config, to_mapping(values))
    check(config)
    return config


def as_dict(config: Config) -> dict[str, Any]:
    """JSON-able form; `resolve(as_dict(c)) == c`."""
    return to_mapping(config)


def check(config: Config) -> None:
    """Refuse impossible combinations. What needs devices is checked by `parallel.mesh`, data by the loader."""
    model, batch, data = config.model, config.batch, config.data
    positive = {
        "config.steps": config.steps,
        "config.batch.global_rows": batch.global_rows,
        "config.data.sequence_length": data.sequence_length,
        "config.data.threads": data.threads,
        "config.optimizer.learning_rate": config.optimizer.learning_rate,
        "config.checkpoint.every": config.checkpoint.every,
        "config.checkpoint.keep": config.checkpoint.keep,
        "config.logging.every": config.logging.every,
        "config.compute.loss_chunk_tokens": config.compute.loss_chunk_tokens,
        **{f"config.data.sets[{i}].weight": s.weight for i, s in enumerate(data.sets)},
    }
    check_positive(positive)
    check_model(model)
    if not data.sets:
        raise ConfigError("config.data.sets", "is empty", "Name at least one packed set.")
    micro, fixed = batch.micro_batches, config.determinism == "elastic" or config.mesh.stage != 1
    if micro == 0 and fixed:
        problem = "0 (as few as fit) in elastic mode or with stages, where the number is part of what is computed"
        raise ConfigError("config.batch.micro_batches", problem, "Give a number.")
    if micro < 0 or (micro and batch.global_rows % micro):
        problem = f"{micro} does not divide global_rows={batch.global_rows}"
        raise ConfigError("config.batch.micro_batches", problem, "Use a divisor.")
    _check_schedule(config)
    _check_experts(config)
    _check_mesh(config)
    _check_lora(config)


def _check_schedule(config: Config) -> None:
    schedule = config.schedule
    decay = schedule.decay_steps if schedule.name == "wsd" else 0
    if min(schedule.warmup_steps, schedule.decay_steps) < 0:
        raise ConfigError("config.schedule", "negative steps", "Use 0 or more.")
    if schedule.warmup_steps + decay > config.steps:
        raise ConfigError(
            "config.schedule",
            f"warmup_steps={schedule.warmup_steps} + decay_steps={decay} is more than steps={config.steps}",
            "Shorten them or train for more steps.",
        )
    if not 0 <= schedule.final_fraction <= 1:
        raise ConfigError(
            "config.schedule.final_fraction", f"{schedule.final_fraction} is not in [0, 1]", "Use a fraction."
        )


def _check_experts(config: Config) -> None:
    loss = config.loss
    for name in ("balance_loss", "router_z_loss", "bias_update_rate"):
        if getattr(loss, name) < 0:
            raise ConfigError(f"config.loss.{name}", f"{getattr(loss, name)} is negative", "Use 0 or more.")
    if config.model.moe is None:
        if loss.balance_loss or loss.router_z_loss:
            raise ConfigError("config.loss.balance_loss", "the model has no experts", "Set config.model.moe, or 0.")
        return
    if config.compute.moe == "capacity":
        check_positive({"config.compute.moe_capacity": config.compute.moe_capacity})
    if loss.balance == "batch" and loss.balance_loss and config.batch.micro_batches != 1:
        raise ConfigError(
            "config.loss.balance",
            f"'batch' with micro_batches={config.batch.micro_batches}",
            "A product of means over the batch is not the sum of its parts: use 'sequence', or one micro-batch.",
        )


def _check_mesh(config: Config) -> None:
    mesh = config.mesh
    sizes = dataclasses.astuple(mesh)
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ConfigError("config.mesh", f"{mesh}", "Use positive sizes, and -1 on at most one axis.")
    cut = {name: size for name, size in dataclasses.asdict(mesh).items() if name != "data" and size != 1}
    if config.determinism == "elastic" and cut:
        raise ConfigError(
            "config.mesh",
            f"{', '.join(f'{name}={size}' for name, size in cut.items())} with determinism='elastic'",
            "Elastic mode computes whole micro-batches on one device each: set all but data to 1.",
        )


def _check_lora(config: Config) -> None:
    lora, vocab_size = config.lora, config.model.vocab_size
    if lora is None:
        return
    check_positive({"config.lora.rank": lora.rank, "config.lora.alpha": lora.alpha})
    if not config.initial_checkpoint:
        raise ConfigError(
            "config.lora", "is set without an initial_checkpoint", "Name the run whose model the adapters are for."
        )
    if not 0 <= lora.dropout < 1:
        raise ConfigError("config.lora.dropout", f"{lora.dropout} is not in [0, 1)", "Use a fraction.")
    if not lora.targets and lora.train_rows_from == 0:
        raise ConfigError("config.lora.targets", "is empty, so nothing is trained", 'Name layers, e.g. ("query",).')
    if not 0 <= (lora.train_rows_from or 0) < vocab_size:
        raise ConfigError(
            "config.lora.train_rows_from",
            f"{lora.train_rows_from} is not an id below vocab_size={vocab_size}",
            "Give the first added token's id.",
        )
