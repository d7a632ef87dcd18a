"""What a tokenizer does to the corpus, measured: the tables of TOKENIZER_CARD.md.

Owns the measures and their sampling rule. A tokenizer that does not give a text back exactly is an error
here, before it is frozen anywhere.
"""

import dataclasses
import os
import time
from typing import Any

import numpy as np

from data_pipeline.curation import cards
from data_pipeline.curation.corpus_format import read_shard
from data_pipeline.engine.progress import Progress
from data_pipeline.text.documents import UNKNOWN_LANGUAGE, hash_fraction, language_of, text_digest
from data_pipeline.tokenization.sample import held_out
from nanollama.data.files import DataError
from nanollama.data.tokenizer import Tokenizer

HEADER = ["documents", "characters/token", "bytes/token", "unknown", "byte pieces",
          "exact round trip", "encode, one core"]
MEASURED_BYTES = 2_000_000  # per source; enough for three digits
# What breaks tokenizers: each must come back exactly.
PROBES = {
    "tabs": "\tif x:\n\t\treturn\t1\n",
    "newlines": "\n\n\na\n\nb\n",
    "carriage returns": "a\r\nb\rc\r\n",
    "runs of spaces": "def f():\n        return  1   +    2\n                x",
    "space at both ends": "  a b  ",
    "emoji": "naïve 👩‍👩‍👧‍👦 🇫🇮 café",
    "line separators": "a\u2028b\u2029c\u0085d\x0be\x0cf",
    "space mark": "a\u2581b \u2581\u2581c",
    "special names": "<s> </s> <unk> <|pad|> <0x0A>",
    "scripts": "汉字かな한글 العربية עברית ไทย Ελληνικά",
    "combining": "e\u0301 \u200b\ufeff\u00ad",
    "rare": "\U0001f9ff\U0010ffff\ue000",
    "control": "\x01\x02\x7f\x1b[0m",
}


@dataclasses.dataclass
class Measures:
    """Sums over the measured documents of one source."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    byte_pieces: int = 0
    exact: int = 0
    seconds: float = 0.0

    def add(self, other: "Measures") -> None:
        """Add the sums of `other`."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass
class Report:
    """The same documents, summed by source, by language and, where a filter named it, by domain."""

    sources: dict[str, Measures]
    languages: dict[str, Measures] = dataclasses.field(default_factory=dict)
    domains: dict[str, Measures] = dataclasses.field(default_factory=dict)


def measure(tokenizer: Tokenizer, corpus: str | os.PathLike[str], manifest: dict[str, Any], progress: Progress, *,
            seed: int = 0, holdout: float = 0.0, exact: bool = True) -> Report:
    """Measures on documents drawn by hash, about 2 MB of each source; of those held out of training, if any were.

    Errors: with `exact`, DataError when a text does not come back exactly.
    """
    for name, text in PROBES.items() if exact else ():
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise DataError(f"tokenizer: the probe {name!r} ({text!r}) does not come back exactly: "
                            f"{tokenizer.decode(tokenizer.encode(text))!r}. This is a bug; please report it.")
    is_byte = np.array([_is_byte(tokenizer.piece(token)) for token in range(tokenizer.vocab_size)])
    report = Report({row["name"]: Measures() for row in manifest["datasets"] if row["kept"]})
    rates = {row["name"]: min(1.0, MEASURED_BYTES / max(row["bytes"] * (holdout or 1.0), 1))
             for row in manifest["datasets"]}
    for shard in manifest["shards"]:
        for row in read_shard(corpus, shard):
            encoded = row["text"].encode()
            digest = text_digest(encoded)
            if holdout and not held_out(digest, seed, holdout):
                continue
            if hash_fraction(digest, 0, "measure") >= rates[shard["dataset"]]:
                continue
            one = _measured(tokenizer, row, len(encoded), is_byte, exact)
            report.sources[shard["dataset"]].add(one)
            report.languages.setdefault(language_of(row["meta"]), Measures()).add(one)
            if isinstance(domain := row["meta"].get("attributes", {}).get("domain"), str):
                report.domains.setdefault(domain, Measures()).add(one)
            progress.update(f"measuring {shard['dataset']}", None,
                            f"{report.sources[shard['dataset']].bytes / 1e6:.1f} MB")
    return report


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _measured(tokenizer: Tokenizer, row: dict[str, Any], size: int, is_byte: np.ndarray, exact: bool) -> Measures:
    start = time.process_time()
    ids = tokenizer.encode(row["text"])
    seconds = time.process_time() - start
    same = tokenizer.decode(ids) == row["text"]
    if exact and not same:
        raise DataError(
            f"tokenizer: document {row['id']} does not come back exactly from its tokens. This is a bug; "
            "please report it.")
    tokens = np.asarray(ids, np.int64)
    return Measures(1, len(row["text"]), size, len(tokens), int((tokens == tokenizer.unk_id).sum()),
                    int(is_byte[tokens].sum()), int(same), seconds)


def cells(one: Measures) -> list[str]:
    """The figures under HEADER."""
    tokens = max(one.tokens, 1)
    return [f"{one.documents:,}", f"{one.characters / tokens:.3f}", f"{one.bytes / tokens:.3f}",
            f"{one.unknown / tokens:.3%}", f"{one.byte_pieces / tokens:.3%}",
            f"{one.exact / max(one.documents, 1):.2%}", f"{one.bytes / 1e6 / max(one.seconds, 1e-9):.1f} MB/s"]


def groups_table(title: str, groups: dict[str, Measures]) -> str:
    """One line for each source, language or domain."""
    return cards.table([title, *HEADER], [[name, *cells(one)] for name, one in groups.items() if one.documents])


def further_tables(report: Report) -> str:
    """The tables by language and by domain, where any document names one."""
    tables = ""
    for title, groups in (("language", report.languages), ("domain", report.domains)):
        if not set(groups) <= {UNKNOWN_LANGUAGE}:
            ordered = dict(sorted(groups.items(), key=lambda item: (-item[1].bytes, item[0])))
            tables += f"\n### By {title}\n\n{groups_table(title, ordered)}\n"
    return tables


def card(tokenizer: Tokenizer, report: Report) -> str:
    """TOKENIZER_CARD.md."""
    manifest = tokenizer.manifest
    corpus = manifest["corpus"]
    config, sample = corpus["config"], corpus["sample"]
    rates = ", ".join(f"{name} {rate:.1%}" for name, rate in sample["rates"].items())
    for source, own in sample["language_rates"].items():
        rates += f"; of {source}: " + ", ".join(f"{name} {rate:.1%}" for name, rate in own.items())
    drawn = (f"On documents held out of training ({sample['holdout']:.0%})" if sample["holdout"] else
             "On documents of the corpus drawn by hash")
    trained = "" if sample["holdout"] else ("; where the corpus is\nsmaller than the training sample, these were "
                                            "trained on too")
    return f"""# Tokenizer card

SentencePiece {config['algorithm'].upper()}, {tokenizer.vocab_size:,} pieces, frozen. Its identity, checked
wherever it is used, is the SHA-256 of `tokenizer.model`:

    {tokenizer.sha256}

## Measured

{groups_table("source", report.sources)}
{further_tables(report)}
{drawn}, about {MEASURED_BYTES / 1e6:.0f} MB a source{trained}. *Byte pieces*: tokens that are single bytes of a
character without a piece of its own. The round trip is also exact on {len(PROBES)} probes:
{', '.join(PROBES)}.

## How it was made

- Trained on {sample['documents']:,} documents, {cards.size(sample['bytes'])}, of mixture
  `{corpus['mixture']}` (corpus manifest `{corpus['manifest_sha256'][:16]}`). Sample: {sample['rule']};
  rates: {rates}.
- Identity normalization, no dummy prefix, spaces kept as they are, byte fallback, digits one by one,
  newlines and runs of spaces have pieces of their own.
- Special tokens: `<unk>` {tokenizer.unk_id}, `<s>` {tokenizer.bos_id} (begins a document), `</s>`
  {tokenizer.eos_id} (ends it), `<|pad|>` {tokenizer.pad_id}. Their names in a text are ordinary text.
- SentencePiece {corpus['sentencepiece']}; hash of the model without its trainer settings:
  `{tokenizer.normalized_sha256[:16]}`.
"""
