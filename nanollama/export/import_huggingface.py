"""`python -m nanollama.export.import_huggingface --source=DIR --output=RUN`: a published model as a run folder.

DIR is what transformers writes: config.json, safetensors (one file or shards), tokenizer. Nothing is downloaded.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from nanollama.config import ConfigError, ModelConfig
from nanollama.data.files import DataError, read_json, sha256_file
from nanollama.data.hub_tokenizer import begins_with, freeze_tokenizer_json
from nanollama.data.sentencepiece_tokenizer import freeze_sentencepiece
from nanollama.data.tokenizer import CHAT_TEMPLATE_FILE, MODEL_FILE, Tokenizer
from nanollama.export.imported import write_run
from nanollama.export.safetensors_file import SafetensorsDirectory, metadata_of
from nanollama.export.sentencepiece_json import tokenizer_json_of_sentencepiece
from nanollama.export.weights import Tensor, published_tensors
from nanollama.models.families import family_of
from nanollama.models.families.published import Family, read_config

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def import_model(source: str | Path, output: str | Path, say: Callable[[str], None] = print) -> Path:
    """Read the published model in `source` into the run folder `output`, which must hold no run.

    Errors: DataError and ConfigError name the field or tensor, before anything is written.
    """
    source = Path(source)
    config_file = source / "config.json"
    if not config_file.is_file():
        raise DataError(f"{config_file}: no such file. --source is a folder that transformers wrote or downloaded.")
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise DataError(f"{config_file}: is no table of fields. Restore it.")
    if "model_type" not in config:
        raise ConfigError(f"{config_file}: model_type", "is missing", "Restore the config.json.")
    model, family, tensors = _architecture(config, str(config_file))
    weights = SafetensorsDirectory(source)
    lineage = {
        "source": source.name,
        "format": "huggingface",
        "architecture": family.architecture,
        "config_sha256": sha256_file(config_file),
        "dtype": metadata_of(weights.tensors),
    }
    has_tokenizer = (source / TOKENIZER_FILE).is_file() or (source / MODEL_FILE).is_file()
    if not has_tokenizer:
        say(f"{source}: no {TOKENIZER_FILE} and no {MODEL_FILE}: imported without a tokenizer")
    make = (lambda folder: freeze_published(source, folder)) if has_tokenizer else None
    return write_run(output, model, weights, tensors, lineage=lineage, make_tokenizer=make, say=say,
                     left_out=family.left_out(model))  # fmt: skip


def _architecture(config: dict[str, Any], where: str) -> tuple[ModelConfig, Family, list[Tensor]]:
    """The model that a config.json describes, and its tensors. Errors: ConfigError and DataError."""
    try:
        name, family = family_of(config["model_type"], where)
        model = read_config(config, name, family, where)
        return model, family, published_tensors(model, family)
    except ConfigError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{where}: a field has a value it cannot have ({error}). Restore the config.json.") from error


def freeze_published(source: Path, folder: Path) -> Tokenizer:
    """The tokenizer of `source`, frozen in `folder`.

    A SentencePiece model that has all that a frozen one needs is taken as it is; else tokenizer.json, or one made
    from the SentencePiece model. Errors: DataError.
    """
    settings = read_json(source / TOKENIZER_CONFIG) if (source / TOKENIZER_CONFIG).is_file() else {}
    if not isinstance(settings, dict):
        raise DataError(f"{source / TOKENIZER_CONFIG}: is no table of fields. Restore it.")
    corpus = {"published_with": source.name}
    model = (source / MODEL_FILE).read_bytes() if (source / MODEL_FILE).is_file() else b""
    file = (source / TOKENIZER_FILE).read_bytes() if (source / TOKENIZER_FILE).is_file() else b""
    if model and _is_sentencepiece(model):
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        complete = min(processor.bos_id(), processor.eos_id(), processor.pad_id(), processor.unk_id()) >= 0
        if complete and (not file or _size(file) == processor.vocab_size()):
            return freeze_sentencepiece(
                folder,
                model,
                algorithm=settings.get("algorithm", "published"),
                corpus=corpus,
                chat_template=_chat_template(source, settings),
                more={"stop_ids": _stop_ids(source)},
            )
        file = file or tokenizer_json_of_sentencepiece(model, add_bos=True)
    if not file:
        raise DataError(f"{source / MODEL_FILE}: not a SentencePiece model. Add the model's {TOKENIZER_FILE}.")
    stops = _stop_ids(source)
    eos = _token(settings.get("eos_token")) or (_piece(file, stops[0]) if stops else None)
    if eos is None:
        raise DataError(f"{source / TOKENIZER_CONFIG}: names no eos_token, so no answer would ever end. Add it.")
    return freeze_tokenizer_json(
        folder,
        file,
        bos=begins_with(file),
        eos=eos,
        pad=_token(settings.get("pad_token")),
        stop_ids=stops,
        chat_template=_chat_template(source, settings),
        corpus=corpus,
    )


def _is_sentencepiece(model: bytes) -> bool:
    try:
        sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:  # Llama 3 calls its tiktoken ranks tokenizer.model too
        return False
    return True


def _size(file: bytes) -> int:
    return len(json.loads(file)["model"]["vocab"])


def _piece(file: bytes, number: int) -> str | None:
    added = {token["id"]: token["content"] for token in json.loads(file)["added_tokens"]}
    return added.get(number)


def _token(value: Any) -> str | None:
    """A token's text: given so, or as a table with its content."""
    found = value.get("content") if isinstance(value, dict) else value
    if found is not None and not isinstance(found, str):
        raise DataError(f"{TOKENIZER_CONFIG}: {value!r} is no token. Restore the file.")
    return found


def _chat_template(source: Path, settings: dict[str, Any]) -> str | None:
    """Of a file of its own, or of tokenizer_config.json: a text, or a list of named ones."""
    if (source / CHAT_TEMPLATE_FILE).is_file():
        return (source / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise DataError(f"{source / TOKENIZER_CONFIG}: chat_template is no text. Restore the file.")
    return found


def _stop_ids(source: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        settings = read_json(source / name) if (source / name).is_file() else {}
        found = settings.get("eos_token_id") if isinstance(settings, dict) else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(number) is int and number >= 0 for number in ids):
                raise DataError(f"{source / name}: eos_token_id {found!r} is no id. Restore the file.")
            return ids
    return []


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 and a message on what the user can mend."""
    parser = argparse.ArgumentParser(prog="nanollama.export.import_huggingface", description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="folder with config.json, safetensors and tokenizer")
    parser.add_argument("--output", required=True, help="run folder to make")
    options = parser.parse_args(arguments)
    try:
        import_model(options.source, options.output)
    except (DataError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
