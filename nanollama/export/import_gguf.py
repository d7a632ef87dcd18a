"""`python -m nanollama.export.import_gguf --source=FILE --output=RUN`: a GGUF model as a run folder.

Weights are dequantised to float32; tokenizer and chat template come from the header. FILE may be `package:NAME`:
the one .gguf file that an installed Python package carries.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanollama.config import ConfigError, ModelConfig
from nanollama.data.files import DataError, sha256_file
from nanollama.data.hub_tokenizer import freeze_tokenizer_json
from nanollama.data.strict import nearest
from nanollama.data.tokenizer import Tokenizer
from nanollama.export.gguf_file import GgufFile
from nanollama.export.gguf_tokenizer import tokenizer_json_of_gguf
from nanollama.export.imported import write_run
from nanollama.export.weights import TensorInfo, published_tensors
from nanollama.models.families import family_of
from nanollama.models.families.published import read_config

# GGUF's names of what config.json and the published tensors call otherwise.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_ROPE = {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class PublishedGguf:
    """A GGUF's tensors under the names, and with the layout, that the same model has in safetensors."""

    def __init__(self, file: GgufFile, model: ModelConfig, interleaved: bool):
        self.where, self._file, self._model, self._interleaved = file.where, file, model, interleaved
        self._theirs = {_published_name(name): name for name in file.tensors}
        self.tensors: dict[str, TensorInfo] = {ours: file.tensors[name] for ours, name in self._theirs.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, float32. llama.cpp interleaves the rotary pairs of Llama's queries and keys; undone here."""
        values = self._file.read(self._theirs[name])
        if self._interleaved and (".q_proj." in name or ".k_proj." in name):
            pairs = values.reshape(-1, self._model.head_dim // 2, 2, *values.shape[1:])
            return pairs.swapaxes(1, 2).reshape(values.shape)
        return values


def import_gguf(source: str | Path, output: str | Path, say: Callable[[str], None] = print) -> Path:
    """Read a GGUF model into the run folder `output`, which must hold no run.

    Errors: DataError and ConfigError name the key or tensor, before anything is written.
    """
    path = find_source(source)
    file = GgufFile(path)
    architecture = file.metadata.get("general.architecture", "")
    name, family = family_of(architecture, f"{path}: general.architecture")
    config = _config(file, architecture)
    model = read_config(config, name, family, str(path))
    weights = PublishedGguf(file, model, interleaved=architecture == "llama")
    lineage = {
        "source": path.name,
        "format": "gguf",
        "sha256": sha256_file(path),
        "architecture": architecture,
        "name": file.metadata.get("general.name", ""),
        "license": file.metadata.get("general.license", ""),
        "quantisation": ", ".join(sorted({info.dtype for info in file.tensors.values()})),
    }
    make = (lambda folder: _freeze(file, folder)) if "tokenizer.ggml.model" in file.metadata else None
    return write_run(
        output, model, weights, published_tensors(model, family), lineage=lineage, make_tokenizer=make, say=say
    )


def find_source(source: str | Path) -> Path:
    """The file, or the one .gguf in the installed package of `package:NAME` (which is not run)."""
    kind, _, name = str(source).partition(":")
    if kind != "package":
        return Path(source)
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(f"--source={source}: no installed package {name!r}. Install it first.")
    found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if len(found) != 1:
        raise DataError(f"--source={source}: {len(found)} .gguf files in {name}: name the file itself.")
    return found[0]


def _config(file: GgufFile, architecture: str) -> dict[str, Any]:
    """What the same model's config.json would say."""
    given = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    config: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in file.tensors}
    for key, value in given.items():
        if key in _FIELDS:
            config[_FIELDS[key]] = _decimal(value)
        elif key not in _ROPE and key not in ("rope.dimension_count", "attention.value_length"):
            field = f"{file.where}: {architecture}.{key}"
            raise ConfigError(field, f"{value!r}: not supported", nearest(key, list(_FIELDS)))
    if "token_embd.weight" in file.tensors:
        config.setdefault("vocab_size", file.tensors["token_embd.weight"].shape[0])
    head_dim = config.get("head_dim", config.get("hidden_size", 0) // config.get("num_attention_heads", 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.get(key, head_dim) != head_dim:
            field = f"{file.where}: {architecture}.{key}"
            raise ConfigError(field, f"{given[key]} is not the head dim {head_dim}", "Not supported.")
    kind = given.get("rope.scaling.type", "none")
    if kind != "none":
        original = given.get("rope.scaling.original_context_length", config.get("max_position_embeddings"))
        scaling = {"rope_type": kind, "factor": given.get("rope.scaling.factor", 1.0)}
        config["rope_scaling"] = scaling | ({} if kind == "linear" else {"original_max_position_embeddings": original})
    return config


def _decimal(value: Any) -> Any:
    """0.00001 of a float32 that is written as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _published_name(name: str) -> str:
    parts = name.split(".")
    layer = f"model.layers.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
    stem = parts[-2] if len(parts) > 1 else name
    return f"{layer}{_NAMES[stem]}.{parts[-1]}" if stem in _NAMES else name


def _freeze(file: GgufFile, folder: Path) -> Tokenizer:
    metadata: Mapping[str, Any] = file.metadata
    tokens = metadata["tokenizer.ggml.tokens"]

    def token(key: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return None if number is None else tokens[number]

    eos = token("eos")
    if eos is None:
        raise DataError(f"{file.where}: tokenizer.ggml.eos_token_id is missing, so no answer would ever end.")
    return freeze_tokenizer_json(
        folder,
        tokenizer_json_of_gguf(metadata, file.where),
        bos=token("bos") if metadata.get("tokenizer.ggml.add_bos_token", False) else None,
        eos=eos,
        pad=token("padding"),
        stop_ids=[metadata[key] for key in ("tokenizer.ggml.eot_token_id",) if key in metadata],
        chat_template=metadata.get("tokenizer.chat_template"),
        corpus={"published_with": file.path.name},
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 and a message on what the user can mend."""
    parser = argparse.ArgumentParser(prog="nanollama.export.import_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="a .gguf file, or package:NAME of a package that carries one")
    parser.add_argument("--output", required=True, help="run folder to make")
    options = parser.parse_args(arguments)
    try:
        import_gguf(options.source, options.output)
    except (DataError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
