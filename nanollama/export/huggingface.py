"""`python -m nanollama.export.huggingface --checkpoint=RUN --output=DIR`: a folder that transformers loads.

Owns what is in that folder: weights as safetensors, config.json, tokenizer, generation_config.json, model card.
The folder appears whole or not at all.
"""

import argparse
import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanollama.config import ConfigError, ModelConfig
from nanollama.data.files import DataError, read_json, write_atomic, write_json
from nanollama.data.strict import from_mapping, nearest
from nanollama.data.tokenizer import CHAT_TEMPLATE_FILE, MODEL_FILE, MODEL_FILES, Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer
from nanollama.export.model_card import model_card
from nanollama.export.peft import require_adapter, write_adapter
from nanollama.export.safetensors_file import write_safetensors
from nanollama.export.sentencepiece_json import tokenizer_json_of_sentencepiece
from nanollama.export.weights import FLOATS, Tensor, TensorInfo, parameter_shapes, publish, published_tensors
from nanollama.models.families import FAMILIES
from nanollama.models.families.published import Exported, write_config
from nanollama.training.checkpoint import find_step_folder, read_metadata
from nanollama.training.initial import lora_of, merged_reader, whole_parameter_infos
from nanollama.training.stored_parameters import Read

_DEFAULT_LENGTH = 2048  # where neither the model nor the run says how long a text may be


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str = "",
    shard_bytes: int = 5 << 30,
    adapter: bool = False,
) -> Path:
    """Write the published form of a run's newest good checkpoint to `output`, which must not exist.

    dtype: of the weights; "" keeps that of the weights it was imported from, else float32 (the same logits).
    adapter: of a run of adapters, these alone, as the peft package stores them; else they are merged.
    One tensor at a time is in memory, or one chunk of the checkpoint (`training.stored_parameters`).
    Errors: DataError and ConfigError, before `output` exists.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output}: is there already. Choose another --output, or delete it.")
    folder = find_step_folder(checkpoint)
    metadata = read_metadata(folder)
    model, factors = _exported(metadata)
    family = FAMILIES[model.family]
    config = write_config(model, family)
    dtype = dtype or metadata.get("lineage", {}).get("dtype", "float32")
    if dtype not in FLOATS:
        raise DataError(f"--dtype={dtype}: not a float type. {nearest(dtype, list(FLOATS))}")
    run = folder.parent.parent
    tokenizer = load_tokenizer(run / "tokenizer") if (run / "tokenizer").is_dir() else None
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise DataError(f"{run}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}: damaged.")
    tensors = published_tensors(model, family)
    _check_parameters(folder, tensors, factors)
    lora, parent, reader = lora_of(metadata), metadata.get("parent") or {}, _plain_reader(folder, model)
    staged = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        if adapter:
            lora, base_name = require_adapter(lora, folder), parent.get("path", "")
            write_adapter(folder, staged, model, family, lora, base_name, lambda path: reader(path, 0)(()), dtype)
        else:
            _write_weights(reader, tensors, factors, staged, dtype, shard_bytes)
        ids = _write_tokenizer(tokenizer, staged, model) if tokenizer is not None else {}
        if not adapter:
            write_json(staged / "config.json", {**config, "torch_dtype": dtype, **ids})
            write_json(staged / "generation_config.json", {"_from_model_config": True, **ids})
        results = read_json(run / "results.json") if (run / "results.json").is_file() else {}
        write_atomic(staged / "README.md", model_card(model, metadata, results, dtype, tokenizer))
        if output.exists():
            output.rmdir()
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return output


def _exported(metadata: dict[str, Any]) -> Exported:
    config = metadata["config"]
    model = from_mapping(ModelConfig, config["model"], "config.model")
    if model.family not in FAMILIES:
        raise ConfigError("config.model.family", f"{model.family!r}", nearest(model.family, list(FAMILIES)))
    if not model.max_position_embeddings:
        length = config.get("data", {}).get("sequence_length", _DEFAULT_LENGTH)
        model = dataclasses.replace(model, max_position_embeddings=length)
    model = dataclasses.replace(model, vocab_padding=0)  # what pads the vocabulary is ours alone
    rewrite = FAMILIES[model.family].exported
    return Exported(model) if rewrite is None else rewrite(model)


def _check_parameters(folder: Path, tensors: list[Tensor], factors: Mapping[str, float]) -> None:
    saved = set(whole_parameter_infos(folder))
    needed = {tensor.map.ours for tensor in tensors if factors.get(tensor.map.ours, 1.0)}
    if saved != needed:
        raise DataError(
            f"{folder}: its parameters are not those that its configuration says: {sorted(saved ^ needed)}. "
            "Export with the version that trained it."
        )


Reader = Callable[[str, int], Read]  # of a parameter by its path, and how many of its axes are stacked


def _plain_reader(folder: Path, model: ModelConfig) -> Reader:
    """Reads parameters part by part, adapters merged, without the rows that pad the vocabulary."""
    reader, shapes = merged_reader(folder), parameter_shapes(model)

    def plain(path: str, stacked: int) -> Read:
        read, own = reader(path, stacked), tuple(slice(size) for size in shapes[path][stacked:])
        return lambda index: read(index)[own]

    return plain


def _write_weights(
    reader: Reader,
    tensors: list[Tensor],
    factors: Mapping[str, float],
    output: Path,
    dtype: str,
    shard_bytes: int,
) -> None:
    by_name = {tensor.name: tensor for tensor in tensors}

    @functools.lru_cache(maxsize=1)  # tensors of one parameter come one after the other, and share its chunks
    def load(path: str, stacked: int) -> Read | None:
        return reader(path, stacked) if factors.get(path, 1.0) else None

    def cut(part: Read | None, name: str) -> np.ndarray:
        tensor = by_name[name]
        if part is None:
            return np.zeros(tensor.shape, FLOATS[dtype])
        return publish(part(tensor.at), tensor, dtype, factors.get(tensor.map.ours, 1.0))

    groups = [
        (functools.partial(load, t.map.ours, len(t.at)), [(t.name, TensorInfo(t.shape, dtype))]) for t in tensors
    ]
    write_safetensors(output, groups, cut, shard_bytes=shard_bytes)


def _write_tokenizer(tokenizer: Tokenizer, output: Path, model: ModelConfig) -> dict[str, Any]:
    """tokenizer.json, what goes with it, and the ids that config.json and generation_config.json name."""
    source = (tokenizer.directory / MODEL_FILES[tokenizer.manifest["kind"]]).read_bytes()
    if tokenizer.manifest["kind"] == "sentencepiece":
        write_atomic(output / MODEL_FILE, source)  # so that an import gives the same frozen tokenizer back
        source = tokenizer_json_of_sentencepiece(source, add_bos=True)
    write_atomic(output / "tokenizer.json", source)
    names = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "unk")}
    ids = {name: number for name, number in names.items() if number >= 0}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": "bos" in ids,
        **{f"{name}_token": tokenizer.piece(number) for name, number in ids.items()},
    }
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
        write_atomic(output / CHAT_TEMPLATE_FILE, tokenizer.chat_template)
    write_json(output / "tokenizer_config.json", config)
    stops = tokenizer.stop_ids
    published = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    return {**published, "eos_token_id": stops if len(stops) > 1 else stops[0]}


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 and a message on what the user can mend."""
    parser = argparse.ArgumentParser(prog="nanollama.export.huggingface", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoints folder or one step's folder")
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", default="", choices=["", *FLOATS], help="default: as imported, else float32")
    parser.add_argument("--adapter", action="store_true", help="of a LoRA run: the adapters alone, for peft")
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, help="weights are cut into files of this size")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    try:
        output = export(
            options.checkpoint,
            options.output,
            dtype=options.dtype,
            shard_bytes=int(options.shard_gigabytes * 1e9),
            adapter=options.adapter,
        )
    except (DataError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in output.iterdir())
    library, call = ("peft", "PeftModel.from_pretrained(base, ") if options.adapter else (
        "transformers", "AutoModelForCausalLM.from_pretrained(")  # fmt: skip
    print(f"{output}: {size / 1e6:,.1f} MB in {time.perf_counter() - begin:.1f} s. Load it with {library}:")
    print(f"  {call}{str(output)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
