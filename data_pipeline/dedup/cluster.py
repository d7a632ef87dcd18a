"""Which documents are dropped as near duplicates, given groups of candidates and a measure of likeness.

Owns the rule: from the oldest document to the youngest, a document is dropped if, and only if, an older one that is
KEPT is alike. No chains: that A is like B and B like C never drops C for A's sake. The rule has one answer, whatever
order groups are looked at in and however many partitions there are.

Groups may be large (a licence's thousand copies). Comparing all pairs of a group would be the square of that, so
each round compares its oldest members with the rest, drops what the rule drops, and goes on with what is left
until every two kept members of every group have been compared. Knows no kind of similarity.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup.spool import PARTITION_ROWS, Docs, Documents, Partitions, file_array
from data_pipeline.text.words import mix

Scores = npt.NDArray[np.float64]
_ENTRY = np.dtype([("key", "<u8"), ("doc", "<i8")])
_SETTLED = 100_000  # pairs turned into Python numbers at a time
_WIDTH = 2  # members of a group compared with all younger ones in the first round; doubled in each


class Groups:
    """Documents that share a key, oldest first: the candidates. Filled with `add`, then read many times."""

    def __init__(self, documents: Documents, work: Path, entries: int):
        self.documents, self._work = documents, work
        self._entries = Partitions(work / "entries", entries, _ENTRY)
        self._files: list[Path] | None = None

    def add(self, keys: npt.NDArray[np.uint64], docs: Docs) -> None:
        """Document docs[i] is in the group of keys[i]."""
        made = np.empty(len(keys), _ENTRY)
        made["key"], made["doc"] = keys, docs
        self._entries.add(made["key"], made)

    def members(self) -> Iterable[tuple[Docs, Docs]]:
        """(members of all groups of one partition, group after group; the bounds between the groups)."""
        if self._files is None:
            self._files = [self._sort(number, part) for number, part in enumerate(self._entries)]
        for path in self._files:
            with np.load(path) as saved:
                yield saved["members"], saved["bounds"]

    def candidates(self) -> npt.NDArray[np.bool_]:
        """For every document, whether it is in a group with another one."""
        marks = file_array(self._work / "candidates", len(self.documents), np.bool_)
        for members, _ in self.members():
            marks[members] = True
        return marks

    def _sort(self, number: int, part: npt.NDArray) -> Path:
        part = part[self.documents.oldest_first(part["doc"], part["key"])]
        fresh = np.ones(len(part), dtype=bool)
        fresh[1:] = part["key"][1:] != part["key"][:-1]
        sizes = np.diff(np.append(np.flatnonzero(fresh), len(part)))
        several = np.repeat(sizes > 1, sizes)
        path = self._work / f"groups-{number:05d}.npz"
        np.savez(path, members=part["doc"][several], bounds=np.append(0, np.cumsum(sizes[sizes > 1])))
        return path


def drop_duplicates(groups: Groups, compare: Callable[[Docs, Docs], Scores], threshold: float,
                    work: Path) -> tuple[Docs, Scores]:
    """(for every document the kept one it is dropped for, or -1; their likeness).

    `compare(older, younger)` gives the likeness of each pair; `threshold` and above are alike. In memory: the alike
    pairs that were found (about 80 bytes each) and one partition; all else is in files under `work`.
    """
    documents = groups.documents
    leader = file_array(work / "leader", len(documents), np.int64)
    scores = file_array(work / "scores", len(documents), np.float64)
    leader[:] = -1
    pairs = np.zeros(0, dtype=[("old", "<i8"), ("young", "<i8"), ("score", "<f8")])
    compared: dict[int, Path] = {}
    width, more = _WIDTH, True
    while more:
        fresh = []
        more = False
        for number, (keys, cut) in enumerate(_uncompared(groups, leader, width, work, compared)):
            more = more or cut or len(keys) > 0
            old, young = (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
            likeness = compare(old, young)
            alike = likeness >= threshold
            found = np.empty(int(alike.sum()), pairs.dtype)
            found["old"], found["young"], found["score"] = old[alike], young[alike], likeness[alike]
            fresh.append(found)
            _remember(compared, number, keys, work)
        pairs = np.concatenate([pairs, *fresh])
        _settle(documents, pairs, leader, scores)
        width *= 2
    return leader, scores


def _settle(documents: Documents, pairs: npt.NDArray, leader: Docs, scores: Scores) -> None:
    """Apply the rule to the alike pairs: from old to young, each dropped for its oldest kept partner."""
    leader[:] = -1
    order = np.lexsort((_rank_of(documents, pairs["old"]), _rank_of(documents, pairs["young"])))
    for start in range(0, len(order), _SETTLED):
        for old, young, score in pairs[order[start:start + _SETTLED]].tolist():
            if leader[old] < 0 and leader[young] < 0:
                leader[young], scores[young] = old, score


def _rank_of(documents: Documents, docs: Docs) -> Docs:
    """Place of each of `docs` among them, from old to young; equal for the same document."""
    unique, inverse = np.unique(docs, return_inverse=True)
    rank = np.empty(len(unique), dtype=np.int64)
    rank[documents.oldest_first(unique)] = np.arange(len(unique))
    return rank[inverse]


def _uncompared(groups: Groups, leader: Docs, width: int, work: Path,
                compared: dict[int, Path]) -> Iterable[tuple[npt.NDArray[np.uint64], bool]]:
    """Pairs of kept members that were not compared yet, each once, one partition after the other.

    The oldest `width` of each group's kept members with all that are younger. Whether pairs were left out.
    """
    expected = sum(len(members) for members, _ in groups.members()) * _WIDTH
    spread = Partitions(work / "pairs", expected, np.uint64)
    cut = False
    for members, bounds in groups.members():
        group = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        kept = leader[members] < 0
        members, group = members[kept], group[kept]
        places = np.arange(len(members))
        rest = np.searchsorted(group, group, side="right") - places - 1  # younger members of the same group
        first_ones = places - np.searchsorted(group, group) < width
        cut = cut or bool((rest[~first_ones] > 0).any())
        for part in _slices(np.where(first_ones, rest, 0)):
            count = rest[part] * first_ones[part]
            partner = np.repeat(places[part] + 1 - (np.cumsum(count) - count), count) + np.arange(count.sum())
            keys = np.repeat(members[part].astype(np.uint64) << np.uint64(32), count)
            keys |= members[partner].astype(np.uint64)
            spread.add(mix(keys), keys)
    for number, keys in enumerate(spread):
        keys = np.unique(keys)
        if number in compared:
            keys = np.setdiff1d(keys, np.load(compared[number]), assume_unique=True)
        yield keys, cut


def _remember(compared: dict[int, Path], number: int, keys: npt.NDArray[np.uint64], work: Path) -> None:
    path = work / f"compared-{number:05d}.npy"
    if number in compared:
        keys = np.union1d(np.load(path), keys)
    np.save(path, keys)
    compared[number] = path


def _slices(counts: Docs) -> Iterable[slice]:
    """Cuts of `counts` whose sums stay near PARTITION_ROWS."""
    edges = np.flatnonzero(np.diff(np.cumsum(counts) // PARTITION_ROWS)) + 1
    return [slice(start, end) for start, end in itertools.pairwise([0, *edges.tolist(), len(counts)])]
