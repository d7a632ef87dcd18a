"""What a published checkpoint's config.json and tensor names are in ours, and back.

Owns the form in which a family file states its mapping, and the reading and writing of a config.json by it.
A field that is not in the mapping is refused by name: it might change the function. Knows nothing of files.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from flax.traverse_util import unflatten_dict

from nanollama.config import ConfigError, ModelConfig, check_model
from nanollama.data.strict import from_mapping, nearest


class TensorMap(NamedTuple):
    """One of our stacked parameters, and the published tensors it is made of."""

    ours: str  # "layers/query"
    theirs: str  # "model.layers.{layer}.self_attn.q_proj.weight"; each placeholder is one leading axis of ours
    inputs: int = 0  # axes of ours that a matrix multiplies; theirs is [outputs, inputs]. 0: the same layout
    first_layer: int = 0  # the {layer} that index 0 of ours is


class Exported(NamedTuple):
    """What a model is written as where its own format needs code that transformers does not have."""

    model: ModelConfig  # of another family, computing the same
    factors: Mapping[str, float] = {}  # of our parameters, by path; 0: ours has none, zeros are written


@dataclasses.dataclass(frozen=True)
class Family:
    """A published architecture. `fields` maps theirs to ours; `required` are fields that have one value here."""

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    tensors: Callable[[ModelConfig], list[TensorMap]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # theirs, where config.json has none
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ours: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # our fields that the architecture fixes
    windows: Literal["none", "never", "last_layers", "all_layers"] = "none"  # which layers may have a sliding window;
    # never: config.json has the fields, but they must be off
    ignored: frozenset[str] = frozenset()  # fields without effect while the required ones hold
    special: frozenset[str] = frozenset()  # fields that `read` looks at
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # another spelling of a field -> the field
    read: Callable[[Mapping[str, Any], str], dict[str, Any]] = lambda values, where: {}  # more of our fields
    write: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}  # more of theirs
    left_out: Callable[[ModelConfig], str] = lambda model: ""  # pattern of tensors without a part in the next token
    exported: Callable[[ModelConfig], Exported] | None = None  # None: written in the family's own format


DENSE_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
DENSE_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
DENSE_REQUIRED = {"hidden_act": "silu", "attention_dropout": 0.0}

# Say nothing about the function: names, training leftovers, what to return, ids that the tokenizer has too.
_WITHOUT_EFFECT = {
    "_name_or_path", "_from_model_config", "architectures", "model_type", "transformers_version", "torch_dtype",
    "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
    "problem_type", "return_dict",
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "auto_map",
}  # fmt: skip
_REQUIRED_EVERYWHERE = {"is_encoder_decoder": False, "partial_rotary_factor": 1.0}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
_WINDOWS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}

_ROPE_TYPES = {"linear": "linear", "dynamic": "dynamic_ntk", "yarn": "yarn", "llama3": "llama3"}
_ROPE_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
    "mscale_all_dim": "mscale_all_dim",
}
_ROPE_FIELDS_OF = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
        "mscale_all_dim",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def read_config(config: Mapping[str, Any], name: str, family: Family, where: str) -> ModelConfig:
    """The ModelConfig of a published config.json. `name` is our name of the family, `where` the file.

    Errors: ConfigError names the field that is unknown, missing, or has a value that we do not support.
    """
    config = {family.aliases.get(field, field): value for field, value in config.items()}
    required = {**_REQUIRED_EVERYWHERE, **family.required}
    known = set(family.fields) | set(required) | family.ignored | family.special | _WITHOUT_EFFECT | _ROPE
    known |= _WINDOWS if family.windows != "none" else set()
    for field, value in config.items():
        if field not in known:
            raise ConfigError(f"{where}: {field}", f"{value!r}: not supported", nearest(field, sorted(known)))
        if field in required and value != required[field]:
            fix = "The model would compute something else; there is no way to import it."
            raise ConfigError(f"{where}: {field}", f"{value!r}: only {required[field]!r} is supported", fix)
    values = {field: value for field, value in {**family.defaults, **config}.items() if value is not None}
    for field in ("num_attention_heads", "hidden_size"):
        if not isinstance(values.get(field), int):
            raise ConfigError(
                f"{where}: {field}", "is missing or not a whole number", "Restore the config.json."
            )
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if "head_dim" in family.fields:
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    fields = {ours: values[theirs] for theirs, ours in family.fields.items() if theirs in values}
    fields |= dict(family.ours) | family.read(values, where)
    fields |= _read_rope(values, "latent.kv_lora_rank" in fields, where) | _read_windows(values, family, where)
    model = from_mapping(ModelConfig, unflatten_dict({"family": name, **fields}, sep="."), where)
    check_model(model, where)
    return model


def write_config(model: ModelConfig, family: Family) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read; `read_config` gives back a model of the same function.

    Errors: ConfigError when the model has a feature that this family's config.json cannot say.
    """
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {theirs: _field(model, ours) for theirs, ours in family.fields.items()}
    config |= family.required
    config |= family.write(model)
    if family.windows != "none":
        config |= _write_windows(model, family)
    config |= {**_write_rope(model), "use_cache": True}
    back = read_config(config, model.family, family, "config.json")
    for field in dataclasses.fields(ModelConfig):
        said, meant = getattr(back, field.name), getattr(model, field.name)
        is_ntk = model.rope_scaling is not None and model.rope_scaling.type == "ntk"
        if said != meant and not (is_ntk and field.name in ("rope_theta", "rope_scaling")):
            raise ConfigError(
                f"config.model.{field.name}",
                f"{meant!r} cannot be said in a {family.model_type} config.json (it would be read as {said!r})",
                "Choose the family that has this feature.",
            )
    return config


def _field(model: ModelConfig, path: str) -> Any:
    """The value at "num_layers" or "moe.num_experts"; None below a part that the model has not."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _read_rope(values: Mapping[str, Any], latent: bool, where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling: transformers 5 has both in rope_parameters."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", values.get("rope_theta", 1e4)))
    if values.get("rope_parameters") and "rope_theta" in values and theta != float(values["rope_theta"]):
        raise ConfigError(
            f"{where}: rope_theta", f"{values['rope_theta']} and {theta} in rope_parameters", "Keep one."
        )
    kind, old = rope.pop("rope_type", None), rope.pop("type", None)
    kind = kind or old or "default"
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor", "is not 1", "Only whole heads are rotated here.")
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in _ROPE_TYPES:
        raise ConfigError(
            f"{where}: rope_type", f"{kind!r} is not supported", nearest(kind, list(_ROPE_TYPES))
        )
    scaling: dict[str, Any] = {"type": _ROPE_TYPES[kind]}
    if kind == "yarn":
        _read_mscale(rope, values, latent)
    if kind == "dynamic" and rope.get(
        "original_max_position_embeddings", values.get("max_position_embeddings")
    ) != (values.get("max_position_embeddings")):
        raise ConfigError(
            f"{where}: original_max_position_embeddings",
            "differs from max_position_embeddings",
            "Dynamic NTK grows from max_position_embeddings on: make them equal.",
        )
    for field, value in rope.items():
        if field not in _ROPE_FIELDS_OF[kind]:
            fix = nearest(field, list(_ROPE_FIELDS_OF[kind]))
            raise ConfigError(f"{where}: rope_scaling.{field}", f"not supported with rope_type {kind!r}", fix)
        if value is not None:
            scaling[_ROPE_FIELDS[field]] = value
    if kind != "linear":
        scaling.setdefault("original_length", values.get("max_position_embeddings", 0))
    return {"rope_theta": theta, "rope_scaling": scaling}


def _read_mscale(rope: dict[str, Any], values: Mapping[str, Any], latent: bool) -> None:
    """DeepSeek states YaRN's attention factor as a quotient of two, and the factor by the lengths.

    Its latent attention also scales the scores by the second one.
    """
    if rope.get("factor") is None:
        rope["factor"] = values["max_position_embeddings"] / rope["original_max_position_embeddings"]
    numerator, denominator = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if numerator and denominator and rope.get("attention_factor") is None:
        rope["attention_factor"] = (0.1 * numerator * math.log(rope["factor"]) + 1) / (
            0.1 * denominator * math.log(rope["factor"]) + 1
        )
    if latent and denominator:
        rope["mscale_all_dim"] = denominator


def _write_rope(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling is None or scaling.type == "ntk":  # NTK is nothing but another theta
        K = model.latent.qk_rope_head_dim if model.latent else model.head_dim
        theta = model.rope_theta * (scaling.factor ** (K / (K - 2)) if scaling else 1.0)
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    kind = next(theirs for theirs, ours in _ROPE_TYPES.items() if ours == scaling.type)
    rope = {theirs: getattr(scaling, _ROPE_FIELDS[theirs]) for theirs in _ROPE_FIELDS_OF[kind]}
    if not rope.get("attention_factor", True):
        del rope["attention_factor"]  # 0 is our word for the formula
    if not rope.get("mscale_all_dim", True):
        del rope["mscale_all_dim"]
    rope = {"rope_type": kind, **rope}
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": rope,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
    }


def _read_windows(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    if family.windows == "none":
        return {}
    if family.windows == "never":
        if values.get("use_sliding_window") or set(values.get("layer_types", [])) - {"full_attention"}:
            raise ConfigError(f"{where}: use_sliding_window", "is on", "This family has full attention only.")
        return {}
    window, layers = values.get("sliding_window", 0), values["num_hidden_layers"]
    used = values.get("use_sliding_window", False) if family.windows == "last_layers" else True
    full = min(values.get("max_window_layers", 28), layers) if family.windows == "last_layers" else 0
    if "layer_types" in values:
        types = list(values["layer_types"])
        full = types.count("full_attention")
        if types != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
            raise ConfigError(
                f"{where}: layer_types",
                f"{types}",
                "Supported: full_attention first, sliding_attention after.",
            )
    if not window or not used or full == layers:
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def _write_windows(model: ModelConfig, family: Family) -> dict[str, Any]:
    if family.windows == "never":
        return {"use_sliding_window": False}
    window = model.sliding_window or None
    if family.windows == "all_layers":
        return {"sliding_window": window}
    return {
        "use_sliding_window": bool(window),
        "sliding_window": window,
        "max_window_layers": model.full_attention_layers if window else model.num_layers,
    }
