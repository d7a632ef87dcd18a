"""The plan of records: every token once, nothing that fits is cut, little padding."""

import random
from collections.abc import Callable, Sequence

import pytest

from data_pipeline.packing import bestfit
from data_pipeline.packing.bestfit import Piece, min_piece, plan

Plan = Callable[[Sequence[int], int], list[list[Piece]]]


def check_plan(make: Plan, lengths: list[int], capacity: int) -> int:
    """Every token once, in order, pieces of an item adjacent, nothing that fits cut; returns the padding."""
    records = make(lengths, capacity)
    reached, last_record = [0] * len(lengths), {}
    for number, record in enumerate(records):
        assert record, "an empty record"
        assert sum(piece.stop - piece.start for piece in record) <= capacity, "a record over its length"
        for place, piece in enumerate(record):
            whole = lengths[piece.item]
            assert piece.start == reached[piece.item] and piece.stop > piece.start, "tokens lost or repeated"
            assert piece.stop - piece.start == whole or whole > capacity, "a document that fits is cut"
            assert whole <= capacity or piece.stop - piece.start >= min_piece(capacity), "a piece too short"
            if piece.start:
                assert (last_record[piece.item], place) == (number - 1, 0), "pieces are not adjacent"
            assert piece.stop == whole or place == len(record) - 1, "pieces are not adjacent"
            reached[piece.item], last_record[piece.item] = piece.stop, number
    assert reached == lengths, "tokens lost or repeated"
    return len(records) * capacity - sum(lengths)


def some_lengths(rng: random.Random, capacity: int) -> list[int]:
    longest = rng.choice([capacity // 2, capacity, 2 * capacity, 10 * capacity])
    return [rng.randrange(3, longest + 1) for _ in range(rng.randrange(1, 60))]


def test_plans_hold_every_token_once() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        capacity = rng.choice([8, 16, 64, 512])
        lengths = some_lengths(rng, capacity)
        check_plan(plan, lengths, capacity)
        assert plan(lengths, capacity) == plan(lengths, capacity)
    for length in range(9, 60):
        check_plan(plan, [length], 8)
    with pytest.raises(ValueError, match="8 or more"):
        plan([3], 7)


def test_a_wrong_plan_is_caught() -> None:
    def loses_the_last(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
        return plan(lengths, capacity)[:-1]

    def repeats_one(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
        return plan(lengths, capacity) + [[Piece(0, 0, min(lengths[0], capacity))]]

    def loses_a_token(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
        return [[piece._replace(stop=piece.stop - (piece.item == 0)) for piece in record]
                for record in plan(lengths, capacity)]

    def concatenates(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
        records: list[list[Piece]] = [[]]
        room = capacity
        for item, length in enumerate(lengths):
            at = 0
            while at < length:
                if not room:
                    records.append([])
                    room = capacity
                take = min(room, length - at)
                records[-1].append(Piece(item, at, at + take))
                at, room = at + take, room - take
        return records

    def shuffles(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
        records = plan(lengths, capacity)
        random.Random(0).shuffle(records)
        return records

    lengths = [300, 40, 41, 90, 7, 200, 33, 100, 100]
    check_plan(plan, lengths, 128)
    for mutant in (loses_the_last, repeats_one, loses_a_token, concatenates, shuffles):
        with pytest.raises(AssertionError):
            check_plan(mutant, lengths, 128)


def test_best_fit_equals_the_slow_twin() -> None:
    def slow(items: list[tuple[int, int]], capacity: int) -> list[int]:
        rooms: list[int] = []
        for _, length in sorted(items, key=lambda item: (-item[1], item[0])):
            enough = [room for room in rooms if room >= length]
            if enough:
                rooms.remove(min(enough))
                rooms.append(min(enough) - length)
            else:
                rooms.append(capacity - length)
        return sorted(rooms)

    rng = random.Random(0)
    for _ in range(200):
        items = [(number, rng.randrange(1, 65)) for number in range(rng.randrange(1, 80))]
        bins = bestfit.best_fit_decreasing(items, 64)
        assert sorted(64 - sum(items[number][1] for number in members) for members in bins) == slow(items, 64)


def test_padding_is_a_tenth_of_a_per_cent_on_lengths_like_real_ones() -> None:
    rng = random.Random(0)
    for mean, capacity in [(5, 512), (6, 512), (6, 2048), (7, 4096)]:
        lengths = [max(3, int(rng.lognormvariate(mean, 1.2))) for _ in range(10_000)]
        assert check_plan(plan, lengths, capacity) / sum(lengths) < 0.001
    # every second record of middling documents, which fit no second one: long documents fill them up
    lengths = [rng.randrange(300, 505) for _ in range(3000)] + [rng.randrange(600, 9000) for _ in range(7000)]
    rng.shuffle(lengths)
    assert check_plan(plan, lengths, 512) / sum(lengths) < 0.001
