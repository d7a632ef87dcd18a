"""The phases of a curriculum, as packing sees them: which documents of a corpus belong to which.

Owns reading what `selection: [{type: curriculum}]` wrote beside the documents. Knows nothing of tokens and records.
"""

import dataclasses
import os
from typing import Any

from data_pipeline.curation.corpus_format import read_manifest, read_shard
from nanollama.data.files import DataError


def phase_of(row: dict[str, Any]) -> int:
    """The phase that a document of a corpus with a curriculum belongs to."""
    phase: int = row["meta"]["attributes"]["phase"]
    return phase


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a curriculum, from easy to hard."""

    number: int
    documents: dict[str, int]  # of each dataset

    def part_of(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The corpus manifest as if the corpus were this phase alone."""
        return {**manifest, "datasets": [
            {**row, "kept": self.documents[row["name"]],
             "dropped": {**row["dropped"], "of another phase": row["kept"] - self.documents[row["name"]]}}
            for row in manifest["datasets"]]}


def phases_of(corpus: str | os.PathLike[str]) -> list[Phase]:
    """The phases that `selection: [{type: curriculum}]` gave the documents of `corpus`. Errors: DataError without."""
    manifest, _ = read_manifest(corpus)
    steps = [step for step in manifest["steps"] if step["type"] == "curriculum"]
    if not steps:
        raise DataError(f"{corpus}: its documents belong to no phases. Add to the mixture selection: [{{type: "
                        "curriculum}], and make the corpus again.")
    phases = [Phase(number, {row["name"]: 0 for row in manifest["datasets"]}) for number in range(steps[-1]["phases"])]
    for shard in manifest["shards"]:
        for row in read_shard(corpus, shard):
            phases[phase_of(row)].documents[shard["dataset"]] += 1
    return phases
