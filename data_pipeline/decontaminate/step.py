"""The whole-corpus step: documents that hold an evaluation item or a canary string are dropped, every hit listed.

Owns what is a reason to drop, and the account of which sets were really there. The index is made once, in files that
every process opens; without them each process makes the same.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.decontaminate.evaluation_sets import LIST, Found, choose, find, read_items
from data_pipeline.decontaminate.index import WHOLE, Index
from data_pipeline.filters.base import Batch
from data_pipeline.filters.corpus_step import FeatureFile, judgement
from data_pipeline.text import words
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError

_HIT = pa.struct([("kind", pa.string()), ("set", pa.string()), ("items", pa.list_(pa.string())),
                  ("field", pa.string()), ("position", pa.int32()), ("words", pa.int32()),
                  ("jaccard", pa.float64()), ("text", pa.string())])
# what sets that must not be trained on write into their files
_CANARY = r"(?i)canary guid [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|benchmark data should never appear in training"
_LISTED_ITEMS = 20


@dataclasses.dataclass(frozen=True)
class Decontamination:
    """Drops documents that share `ngram` words in a row with an evaluation item, or hold one nearly word by word; of
    items with fewer words, those that hold one to the last word."""

    type: Literal["decontaminate"] = "decontaminate"
    sets: tuple[str, ...] = ()  # names in the list; none: all of it
    benchmarks: str = ""  # the list; empty: data_pipeline/decontaminate/benchmarks.yaml
    ngram: int = 13
    seed: int = 6  # words in a row that make a window worth comparing
    threshold: float = 0.8  # likeness of window and item from which they are the same
    whole: int = WHOLE  # words, not just numbers, from which a text below `ngram` is looked for; ngram: none is
    # what drops: a shared n-gram or a like window; or only a like window, as quotations in the news are no leak
    drop: Literal["ngram", "window"] = "ngram"
    canaries: tuple[str, ...] = ()  # further strings that condemn a document
    missing: Literal["stop", "record"] = "stop"  # a set that is not on this machine
    version: ClassVar[int] = 3

    def check(self, where: str) -> None:
        """Raises FieldError on a parameter that cannot be used."""
        if not 1 <= self.seed <= self.ngram:
            raise FieldError(f"{where}.seed", f"{self.seed} is not in 1 to ngram ({self.ngram})", "Try 6.")
        if not 0 < self.threshold <= 1:
            raise FieldError(f"{where}.threshold", f"{self.threshold} is not in (0, 1]", "Try 0.8.")
        if not 1 <= self.whole <= self.ngram:
            raise FieldError(f"{where}.whole", f"{self.whole} is not in 1 to ngram ({self.ngram})",
                             f"Try {WHOLE}; ngram itself looks for no shorter text.")
        if "" in self.canaries:
            raise FieldError(f"{where}.canaries", "has an empty string, which every document holds", "Leave it out.")

    def prepare(self, directory: Path) -> None:
        """The index, made once in `directory` or opened there, for this process."""
        found = self._there()
        if not directory.exists():
            _built(found, *self._sizes).save(directory)
        _opened[found, self._sizes] = Index.load(directory, *self._sizes)

    def features(self, batch: Batch) -> pa.Table:
        """One row per hit: row and the hit. Errors: DataError when a set is missing and `missing` is stop."""
        index = self._index()
        rows: list[int] = []
        hits: list[dict[str, Any]] = []
        for row, text in self._canaries(batch):
            rows.append(row)
            hits.append({"kind": "canary", "set": None, "items": [], "field": None, "position": None,
                         "words": None, "jaccard": None, "text": text})
        for hit in index.search(batch.words):
            items = index.items[hit.text]
            rows.append(hit.row)
            hits.append({"kind": hit.kind, "set": items[0][0].partition("/")[0],
                         "items": [id for id, _ in items[:_LISTED_ITEMS]], "field": items[0][1],
                         "position": hit.position, "words": hit.words, "jaccard": hit.jaccard, "text": hit.shown})
        table = pa.table({"row": pa.array(rows, pa.int32()), "hit": pa.array(hits, _HIT)})
        return table.take(pa.array(sorted(range(len(rows)), key=rows.__getitem__), pa.int64()))

    def resolve(self, shards: Sequence[FeatureFile], work: Path) -> Iterator[pa.Table]:
        """row, reason, hits (all of the document's, also those that do not drop it)."""
        for shard in shards:
            found: dict[int, list[dict[str, Any]]] = {}
            table = pq.read_table(shard.path)
            for row, hit in zip(table["row"].to_pylist(), table["hit"].to_pylist(), strict=True):
                found.setdefault(row, []).append(hit)
            reasons = {}
            for row, hits in found.items():
                why = next((self._reason(hit) for hit in hits if self._drops(hit)), None)
                if why is not None:
                    reasons[row] = why
            yield judgement(shard.rows, reasons, {"hits": (pa.list_(_HIT), dict(found))})

    def resources(self) -> dict[str, str]:
        """The content of every set, or that it is missing."""
        return {"words": str(words.VERSION), **{found.set.name: found.sha256 for found in self._found()}}

    def summary(self) -> dict[str, Any]:
        """For manifest and report: each set's state, its texts, those of them that only count as a whole, those too
        short to look for, and the items of which nothing is looked for: how many, and the first of them."""
        index, result = self._index(), {}
        texts, whole, too_short = index.items.per_set(), index.short().per_set(), index.too_short.per_set()
        unseen = index.unseen()
        for found in self._found():
            name = found.set.name
            result[name] = ({"status": "missing", "reason": found.reason} if found.status == "missing" else
                            {"status": "used", "texts": texts.get(name, 0), "whole": whole.get(name, 0),
                             "too_short": too_short.get(name, 0), "unseen_items": len(unseen.get(name, [])),
                             "unseen": unseen.get(name, [])[:_LISTED_ITEMS], "sha256": found.sha256})
        return {"ngram": self.ngram, "threshold": self.threshold, "whole": self.whole, "sets": result}

    def _drops(self, hit: dict[str, Any]) -> bool:
        return hit["kind"] != "exact" or self.drop == "ngram" or hit["jaccard"] >= self.threshold

    @staticmethod
    def _reason(hit: dict[str, Any]) -> str:
        return "canary string" if hit["kind"] == "canary" else f"contaminated by {hit['set']}"

    def _canaries(self, batch: Batch) -> Iterator[tuple[int, str]]:
        marked = batch.text.str.contains(_CANARY).fill_null(False)
        for own in self.canaries:
            marked |= batch.text.str.contains(own, literal=True).fill_null(False)
        for row in marked.arg_true().to_list():
            text = batch.text[row]
            match = batch.text.slice(row, 1).str.extract(f"({_CANARY})")[0]
            yield row, match or next(own for own in self.canaries if own in text)

    def _found(self) -> tuple[Found, ...]:
        return tuple(find(one) for one in choose(self.sets, self.benchmarks or LIST))

    def _there(self) -> tuple[Found, ...]:
        found = self._found()
        gone = [one for one in found if one.status == "missing"]
        if gone and (self.missing == "stop" or len(gone) == len(found)):
            raise DataError(
                f"decontamination: {len(gone)} of {len(found)} evaluation sets are missing: "
                f"{', '.join(f'{one.set.name} ({one.reason})' for one in gone[:5])}. Put them there, name the sets you "
                "have with sets: [...]" + (", or set missing: record." if len(gone) < len(found) else "."))
        return found

    @property
    def _sizes(self) -> tuple[int, int, float, int]:
        return self.ngram, self.seed, self.threshold, self.whole

    def _index(self) -> Index:
        found = self._there()
        opened = _opened.get((found, self._sizes))
        return _built(found, *self._sizes) if opened is None else opened


_opened: dict[tuple[tuple[Found, ...], tuple[int, int, float, int]], Index] = {}  # by `prepare`, in this process


@functools.lru_cache(maxsize=2)
def _built(found: tuple[Found, ...], ngram: int, seed: int, threshold: float, whole: int) -> Index:
    items = [item for one in found if one.status == "used" for item in read_items(one)]
    return Index(items, ngram, seed, threshold, whole)
