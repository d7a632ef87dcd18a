"""The tokenizer directory (the model, `manifest.json`, a chat template, a card): loaded with every check, and copied.

Knows every kind of tokenizer by name, and nothing of how one encodes.
"""

import os
import shutil
from pathlib import Path

from nanollama.data.files import DataError, read_json, sha256_file
from nanollama.data.hub_tokenizer import HubTokenizer
from nanollama.data.sentencepiece_tokenizer import SentencePieceTokenizer
from nanollama.data.tokenizer import (
    CARD_FILE,
    CHAT_TEMPLATE_FILE,
    MANIFEST_FILE,
    MEND,
    MODEL_FILES,
    SPECIALS,
    Tokenizer,
)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in `directory`. Errors: DataError when it is absent, damaged or changed, or needs a package."""
    directory = Path(directory)
    if not (directory / MANIFEST_FILE).is_file():
        raise DataError(f"{directory / MANIFEST_FILE}: no such file, so no frozen tokenizer there. {MEND}")
    manifest = read_json(directory / MANIFEST_FILE)
    missing = {"kind", "sha256", "normalized_sha256", "vocab_size", *SPECIALS} - set(manifest)
    if missing:
        raise DataError(f"{directory / MANIFEST_FILE}: lacks {', '.join(sorted(missing))}. {MEND}")
    if manifest["kind"] not in MODEL_FILES:
        raise DataError(f"{directory / MANIFEST_FILE}: kind {manifest['kind']!r}, known: "
                        f"{', '.join(MODEL_FILES)}. {MEND}")
    path = directory / MODEL_FILES[manifest["kind"]]
    if not path.is_file():
        raise DataError(f"{path}: no such file, so no frozen tokenizer there. {MEND}")
    found = sha256_file(path)
    if found != manifest["sha256"]:
        raise DataError(f"{path}: SHA-256 is {found}, but {MANIFEST_FILE} says "
                        f"{manifest['sha256']}: the tokenizer was changed after it was frozen. {MEND}")
    kind = SentencePieceTokenizer if manifest["kind"] == "sentencepiece" else HubTokenizer
    tokenizer: Tokenizer = kind(directory, path.read_bytes(), manifest)
    for name in ("vocab_size", *SPECIALS):
        if getattr(tokenizer, name) != manifest[name]:
            raise DataError(f"{directory / MANIFEST_FILE}: {name} is {manifest[name]}, the model has "
                            f"{getattr(tokenizer, name)}. {MEND}")
    return tokenizer


def copy_tokenizer(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Tokenizer:
    """Copy a frozen tokenizer (into a run folder); a no-op when it is there already. Returns the copy.

    Errors: DataError when `target` holds another tokenizer, or `source` is damaged.
    """
    original, target = load_tokenizer(source), Path(target)
    if (target / MANIFEST_FILE).exists():
        copy = load_tokenizer(target)
        original.require(copy.sha256, f"{target}", f"Use another run folder, or delete {target}.")
        return copy
    model = MODEL_FILES[original.manifest["kind"]]
    # the manifest last: without it there is no tokenizer
    for name in (model, CHAT_TEMPLATE_FILE, CARD_FILE, MANIFEST_FILE):
        if (original.directory / name).exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original.directory / name, target / f".{name}.tmp")
            os.replace(target / f".{name}.tmp", target / name)
    return load_tokenizer(target)
