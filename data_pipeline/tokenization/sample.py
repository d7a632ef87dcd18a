"""Which text a tokenizer is trained on: a stated rule, in one or two passes, never holding the corpus.

Owns the quotas per source and per language, and the pieces that documents are cut into. Knows nothing of
SentencePiece.

The rule: each source has the part of the budget that its mix_ratio says, each language of a source the part that
its bytes to the power of `language_alpha` say; what is smaller than its part is taken whole, and what it leaves goes
to the others. Inside a source and language pieces of at most 4 kB are drawn by the hash of their document's text and
their number, so that a few long documents are sampled as evenly as many short ones, the same way on every run.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.curation.corpus_format import read_shard
from data_pipeline.text.documents import hash_fraction, language_of, text_digest

CHUNK_BYTES = 4_000  # SentencePiece skips longer "sentences"; documents are cut at line ends


@dataclasses.dataclass(frozen=True)
class Sample:
    """The share of each source's (and language's) pieces that is drawn."""

    seed: int
    rates: dict[str, float]  # of a source
    language_rates: dict[str, dict[str, float]]  # source -> language -> share; {}: languages as they come
    holdout: float = 0.0  # share of the documents that is never trained on, to measure on

    def rate(self, row: Mapping[str, Any], source: str) -> float:
        """The share of this document's pieces to take."""
        if not self.language_rates:
            return self.rates[source]
        return self.language_rates[source][language_of(row["meta"])]

    def pieces(self, row: Mapping[str, Any], source: str) -> Iterator[str]:
        """The drawn pieces of one document."""
        digest = text_digest(row["text"].encode())
        if held_out(digest, self.seed, self.holdout):
            return
        rate = self.rate(row, source)
        for number, piece in enumerate(chunks(row["text"])):
            if rate >= 1 or hash_fraction(digest + number.to_bytes(8, "big"), self.seed, "tokenizer") < rate:
                yield piece

    def described(self) -> dict[str, Any]:
        """For manifests and cards."""
        return {"rule": f"pieces of at most {CHUNK_BYTES} bytes whose hash of text, number and seed {self.seed} falls "
                "under the rate of their source" + (" and language" if self.language_rates else ""),
                "rates": self.rates, "language_rates": self.language_rates, "holdout": self.holdout}


def plan_sample(corpus: str | os.PathLike[str], manifest: dict[str, Any], budget: int, *, seed: int = 0,
                language_alpha: float = 1.0, holdout: float = 0.0) -> Sample:
    """The sample of about `budget` bytes. Reads the corpus once if `language_alpha` is not 1."""
    rates = sample_rates(manifest, budget)
    if language_alpha == 1:
        return Sample(seed, rates, {}, holdout)
    sizes = language_sizes(corpus, manifest)
    totals = {row["name"]: row["bytes"] for row in manifest["datasets"]}
    parts = {source: rates[source] * totals[source] for source in sizes}
    return Sample(seed, rates, {
        source: fill(own, {name: size**language_alpha for name, size in own.items()}, parts[source])
        for source, own in sizes.items()}, holdout)


def sample_rates(manifest: dict[str, Any], budget: int) -> dict[str, float]:
    """{source: share of its text to sample}: together about `budget` bytes, in the ratio of the mixture."""
    return fill({row["name"]: row["bytes"] for row in manifest["datasets"] if row["bytes"]},
                {row["name"]: row["mix_ratio"] for row in manifest["datasets"]}, budget)


def fill(sizes: Mapping[str, int], weights: Mapping[str, float], budget: float) -> dict[str, float]:
    """{name: share to take}: together about `budget`, in the ratio of the weights.

    What is smaller than its part is taken whole, and what it leaves goes to the others.
    """
    rates: dict[str, float] = {}
    while open_names := [name for name in sizes if name not in rates]:
        total = sum(weights[name] for name in open_names)
        part = {name: budget * weights[name] / total for name in open_names}
        whole = [name for name in open_names if sizes[name] <= part[name]]
        if not whole:
            rates.update({name: part[name] / sizes[name] for name in open_names})
        for name in whole:
            rates[name] = 1.0
            budget -= sizes[name]
    return {name: rates[name] for name in sizes}


def language_sizes(corpus: str | os.PathLike[str], manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    """{source: {language: bytes of text}}, by one pass."""
    sizes: dict[str, dict[str, int]] = {}
    for shard in manifest["shards"]:
        own = sizes.setdefault(shard["dataset"], {})
        for row in read_shard(corpus, shard):
            language = language_of(row["meta"])
            own[language] = own.get(language, 0) + len(row["text"].encode())
    return sizes


def held_out(digest: bytes, seed: int, holdout: float) -> bool:
    """Whether a document is kept back for measuring."""
    return holdout > 0 and hash_fraction(digest, seed, "tokenizer holdout") < holdout


def chunks(text: str, limit: int = CHUNK_BYTES) -> Iterator[str]:
    """`text` cut at line ends into pieces of at most `limit` bytes, newlines kept; longer lines are torn."""
    held: list[str] = []
    size = 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        length = len(line.encode())
        if size + length > limit and held:
            yield "".join(held)
            held, size = [], 0
        if length > limit:
            step = limit // 4  # characters of up to four bytes
            yield from (line[at:at + step] for at in range(0, len(line), step))
        else:
            held.append(line)
            size += length
    if held:
        yield "".join(held)
