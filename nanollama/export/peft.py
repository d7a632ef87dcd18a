"""Adapters in the format of the peft package: adapter_config.json and adapter_model.safetensors.

Owns that format. `python -m nanollama.export.huggingface --checkpoint=RUN --output=DIR --adapter` writes it.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanollama.config import ConfigError, LoraConfig, ModelConfig
from nanollama.data.files import DataError
from nanollama.export.safetensors_file import write_safetensors
from nanollama.export.weights import FLOATS, TensorInfo
from nanollama.models import lora as loras
from nanollama.models.families.published import Family, TensorMap
from nanollama.training.stored_parameters import parameter_infos, parameter_reader

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_TABLES = {"embedding": ("embed_tokens", "model.embed_tokens"), "head": ("lm_head", "lm_head")}
_PREFIX = "base_model.model."

Tensors = list[tuple[str, Callable[[], np.ndarray], tuple[int, ...]]]  # name, read, shape


def write_adapter(
    folder: Path,
    output: Path,
    model: ModelConfig,
    family: Family,
    lora: LoraConfig,
    base_name: str,
    read_whole: Callable[[str], np.ndarray],
    dtype: str,
) -> None:
    """Write both files for the adapters of a step folder. read_whole: a merged parameter of the model by its path.

    Errors: DataError when an adapter is on something that peft has no adapter for (stacked experts).
    """
    saved = parameter_infos(folder)
    maps = {map.ours: map for map in family.tensors(model)}
    tensors: Tensors = []
    modules: list[str] = []
    for path in sorted(path.removesuffix(loras.A) for path in saved if path.endswith(loras.A)):
        map = maps[path]
        if map.theirs.count("{") != 1 or not map.inputs:
            raise DataError(
                f"{folder}: the adapter of {path} is for stacked experts, which the format has no place for. Export "
                "the merged model: leave out --adapter."
            )
        modules.append(map.theirs.removesuffix(".weight").rsplit(".", 1)[1])
        tensors += _pair(folder, path, map, saved)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if lora.train_rows_from:
        config["trainable_token_indices"] = {}
        ids = list(range(lora.train_rows_from, model.vocab_size))
        for ours in ("embedding",) if model.tie_embeddings else ("embedding", "head"):
            name, published = _TABLES[ours]
            config["trainable_token_indices"][name] = ids
            read = functools.partial(_rows, read_whole, ours, ids)
            delta = f"{_PREFIX}{published}.token_adapter.trainable_tokens_delta"
            tensors.append((delta, read, (len(ids), model.hidden_size)))
    readers = {name: read for name, read, _ in tensors}
    groups = [(read, [(name, TensorInfo(shape, dtype))]) for name, read, shape in tensors]
    write_safetensors(
        output, groups, lambda array, _: array.astype(FLOATS[dtype]), shard_bytes=1 << 62, single=WEIGHTS_FILE
    )
    assert len(readers) == len(tensors), "two tensors of one name"
    (output / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _pair(folder: Path, path: str, map: TensorMap, saved: Any) -> Tensors:
    """A and B of each layer: [rank, inputs] and [outputs, rank] there."""
    (layers, *inputs, rank), (_, _, *outputs) = saved[path + loras.A][0], saved[path + loras.B][0]
    shapes = {loras.A: (rank, int(np.prod(inputs))), loras.B: (int(np.prod(outputs)), rank)}
    tensors: Tensors = []
    for layer in range(layers):
        module = _PREFIX + map.theirs.format(layer=layer).removesuffix(".weight")
        for ours, theirs in ((loras.A, "lora_A"), (loras.B, "lora_B")):
            read = functools.partial(_factor, folder, path + ours, layer, shapes[ours])
            tensors.append((f"{module}.{theirs}.weight", read, shapes[ours]))
    return tensors


def _factor(folder: Path, path: str, layer: int, shape: tuple[int, int]) -> np.ndarray:
    return np.ascontiguousarray(parameter_reader(folder, path, 1)((layer,)).reshape(shape[::-1]).T)


def _rows(read_whole: Callable[[str], np.ndarray], ours: str, ids: list[int]) -> np.ndarray:
    table = read_whole(ours)
    return table[ids] if ours == "embedding" else np.ascontiguousarray(table[:, ids].T)


def require_adapter(lora: LoraConfig | None, folder: Path) -> LoraConfig:
    """Errors: ConfigError when the run has no adapters to export apart."""
    if lora is None:
        raise ConfigError("--adapter", f"{folder} holds a whole model, no adapters", "Leave out --adapter.")
    return lora
