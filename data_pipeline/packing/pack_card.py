"""DATA_CARD.md of a packed set, made from its manifest and nothing else."""

from typing import Any

from data_pipeline.curation import cards


def splits_table(manifest: dict[str, Any]) -> str:
    """One line per split: records, tokens, padding, documents, text."""
    rows = []
    for name, split in manifest["splits"].items():
        slots = split["records"] * manifest["record_length"]
        rows.append([name, f"{split['documents']:,}", f"{split['tokens']:,}", f"{split['records']:,}",
                     f"{split['padding'] / max(slots, 1):.3%}", cards.size(split["bytes_of_text"]),
                     f"{split['bytes_of_text'] / max(split['tokens'], 1):.3f}"])
    return cards.table(["split", "documents", "tokens", "records", "padding", "text", "bytes/token"], rows)


def card(manifest: dict[str, Any]) -> str:
    """The whole card."""
    mixture = manifest["mixture"]["config"]["metadata"]
    total = sum(split["tokens"] for split in manifest["splits"].values()) or 1
    rows = []
    for source in manifest["sources"]:
        train, held_out = (manifest["source_counts"][split][source] for split in ("train", "validation"))
        tokens = train["tokens"] + held_out["tokens"]
        characters = train["characters"] + held_out["characters"]
        rows.append([source, f"{train['documents']:,}", f"{train['tokens']:,}", f"{held_out['documents']:,}",
                     f"{held_out['tokens']:,}", f"{characters / max(tokens, 1):.3f}",
                     f"{manifest['weights'][source]:.1%}", f"{tokens / total:.1%}"])
    sources = cards.table([
        "source", "train documents", "train tokens", "validation documents", "validation tokens",
        "characters/token", "weight", "share"
    ], rows)
    return f"""# Packed set: {mixture['phase']}

{mixture['description']}

{splits_table(manifest)}

Records of {manifest['record_length']:,} tokens. A document is `<s>` + its tokens + `</s>`. One that fits in a
record is never cut; a longer one is laid over consecutive records, so that sequences of several records hold
it in one piece. Every record was read back and every token compared with its document: none is lost, none is
repeated.

## Sources

{sources}

*weight* is the mixture's `mix_ratio`, *share* is what is here, by tokens.

## Validation

{manifest['validation_fraction']:.1%} of the documents, chosen by a hash of their text and seed
{manifest['seed']}: equal texts are in one split, and a text made from another document (docstrings) is
where that document is.

## Identity

- dataset `{manifest['dataset_id']}`
- tokenizer `{manifest['tokenizer']['sha256']}` ({manifest['tokenizer']['vocab_size']:,} pieces)
- corpus manifest `{manifest['corpus']['manifest_sha256']}`

Files with their SHA-256 are in `manifest.json`; `docs.parquet` leads from a record's segment to its document
(`python -m nanollama.data.packed why DIR --record R`). Made by {manifest['code']}.
"""
