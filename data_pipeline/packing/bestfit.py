"""Which documents share a record: best-fit-decreasing for those that fit, a chain for those that do not.

Pure: lengths in, a plan out. Knows no tokens and no files.

A document that fits in a record is never cut. Best-fit-decreasing places these so that little room is left
(Johnson 1974). A longer document must be cut anyway, so it is laid over consecutive records: its head closes
the record at hand exactly, its tail opens a later one. Long documents so form one chain without gaps, in an order
that leaves tails which fit the emptiest best-fit records: those are taken into the chain, between a tail and the
next head. Where rows are made of
several records, a document's pieces are adjacent and become one segment again.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens start to stop of one item, laid at the next free place of a record."""

    item: int
    start: int
    stop: int


def min_piece(capacity: int) -> int:
    """The shortest piece a long document is cut into, so that no segment has nothing to learn."""
    return max(2, min(8, capacity // 64))


def plan(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Records of at most `capacity` tokens that hold every token of items of `lengths` exactly once.

    Consecutive pieces of an item are in consecutive records: at the end of one, at the start of the next.
    Capacity is at least 8. Deterministic: equal lengths keep their order.
    """
    if capacity < 8:
        raise ValueError(f"capacity {capacity}: give 8 or more")
    fitting = [item for item, length in enumerate(lengths) if length <= capacity]
    longer = [item for item, length in enumerate(lengths) if length > capacity]
    bins = best_fit_decreasing([(item, lengths[item]) for item in fitting], capacity)
    filled = [sum(lengths[item] for item in members) for members in bins]
    emptiest = sorted(range(len(bins)), key=lambda index: (filled[index], index))
    chain, absorbed = _chain(longer, lengths, capacity, bins, filled, emptiest)
    rest = [[Piece(item, 0, lengths[item]) for item in members] for index, members in enumerate(bins)
            if index not in absorbed]
    return chain + rest


def best_fit_decreasing(items: Sequence[tuple[int, int]], capacity: int) -> list[list[int]]:
    """Bins of item numbers: the largest first, each into the fullest bin that still has room for it.

    `items` are (number, length <= capacity). Open bins are found by one bit per room left, so that a
    lookup is a few machine words.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0
    for number, length in sorted(items, key=lambda item: (-item[1], item[0])):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            index = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, index = capacity, len(bins)
            bins.append([])
        bins[index].append(number)
        left = room - length
        if left:
            with_room.setdefault(left, []).append(index)
            rooms |= 1 << left
    return bins


def _chain(longer: Sequence[int], lengths: Sequence[int], capacity: int, bins: list[list[int]],
           filled: list[int], emptiest: list[int]) -> tuple[list[list[Piece]], set[int]]:
    """(records of the chain, bins taken into it)."""
    shortest = min_piece(capacity)
    waiting = _Waiting(longer, lengths, capacity)
    records: list[list[Piece]] = []
    absorbed: set[int] = set()
    record: list[Piece] = []
    used = 0
    while waiting:
        used = _absorb(record, used, capacity, lengths, bins, filled, emptiest, absorbed)
        if capacity - used < shortest:
            records.append(record)
            record, used = [], 0
        room = capacity - used
        gap = capacity - filled[emptiest[len(absorbed)]] if len(absorbed) < len(emptiest) else 0
        item = waiting.take(room, shortest, gap)
        head = _head(lengths[item], room, capacity, shortest)
        if not head:
            records.append(record)
            record = []
            head = _head(lengths[item], capacity, capacity, shortest)
        record.append(Piece(item, 0, head))
        records.append(record)
        at = head
        while lengths[item] - at >= capacity:
            records.append([Piece(item, at, at + capacity)])
            at += capacity
        record, used = [], lengths[item] - at
        if used:
            record.append(Piece(item, at, lengths[item]))
    if record:
        _absorb(record, used, capacity, lengths, bins, filled, emptiest, absorbed)
        records.append(record)
    return records, absorbed


class _Waiting:
    """Long items not yet laid, found by the tail they would leave: one bit per length modulo the capacity."""

    def __init__(self, items: Sequence[int], lengths: Sequence[int], capacity: int):
        self._lengths, self._capacity = lengths, capacity
        self._order = list(reversed(items))
        self._taken: set[int] = set()
        self._by_rest: dict[int, list[int]] = {}
        self._rests = 0
        for item in self._order:
            rest = lengths[item] % capacity
            self._by_rest.setdefault(rest, []).append(item)
            self._rests |= 1 << rest

    def __bool__(self) -> bool:
        while self._order and self._order[-1] in self._taken:
            self._order.pop()
        return bool(self._order)

    def take(self, room: int, shortest: int, gap: int) -> int:
        """The item whose tail, after a head of `room`, best fills `gap`; the next one where none fits it."""
        capacity = self._capacity
        tails = (self._rests >> room | self._rests << (capacity - room)) & ((1 << (gap + 1)) - 1)
        tails = tails >> shortest << shortest
        if tails:
            item = self._remove((tails.bit_length() - 1 + room) % capacity)
            self._taken.add(item)
            return item
        return self._next()

    def _next(self) -> int:
        assert self  # leaves an item that is not taken at the end of the order
        item = self._order.pop()
        self._remove(self._lengths[item] % self._capacity)
        return item

    def _remove(self, rest: int) -> int:
        item = self._by_rest[rest].pop()  # the first in order: lists are as reversed as the order is
        if not self._by_rest[rest]:
            self._rests &= ~(1 << rest)
        return item


def _absorb(record: list[Piece], used: int, capacity: int, lengths: Sequence[int], bins: list[list[int]],
            filled: list[int], emptiest: list[int], absorbed: set[int]) -> int:
    """Move the emptiest bins into `record` while they fit; returns its new fill."""
    while len(absorbed) < len(emptiest):
        index = emptiest[len(absorbed)]
        if used + filled[index] > capacity:
            break
        record += [Piece(item, 0, lengths[item]) for item in bins[index]]
        used += filled[index]
        absorbed.add(index)
    return used


def _head(length: int, room: int, capacity: int, shortest: int) -> int:
    """Tokens of a long item to lay into `room`; 0 when the piece, or the tail it leaves, is too short."""
    tail = (length - room) % capacity
    head = room - (shortest - tail if 0 < tail < shortest else 0)
    return head if head >= shortest else 0
