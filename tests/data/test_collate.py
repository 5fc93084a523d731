"""Ragged rows to padded tensors, shared beginnings, bin packing."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from elmd.data.collate import IGNORED, WORTHWHILE, bin_pack, collate, shared_beginning
from elmd.data.encode import Encoded


def test_labels_are_exactly_the_target_and_eos(encoder) -> None:
    draw = random.Random(0)
    for trial in range(200):
        rows = [
            Encoded(
                before=[draw.randrange(3, 90) for _ in range(draw.randrange(1, 9))],
                slots=draw.choice([0, 3]),
                after=[draw.randrange(3, 90) for _ in range(draw.randrange(0, 6))],
                target=[*(draw.randrange(3, 90) for _ in range(draw.randrange(0, 6))), 2],
            )
            for _ in range(draw.randrange(1, 5))
        ]
        visual = [torch.full((row.slots, 2), float(i)) if row.slots else None for i, row in enumerate(rows)]
        split = draw.random() < 0.5
        batch = collate(rows, visual, split=split)
        assert not batch.slots[:, : batch.free].any()
        assert (batch.free > 0) <= split
        for i, row in enumerate(rows):
            real = batch.mask[i]
            assert real.sum() == row.length, trial
            for part in (real[: batch.free], real[batch.free :]):
                assert part.tolist() == sorted(part.tolist()), "padding is on the left of each part"
            assert batch.labels[i][batch.labels[i] != IGNORED].tolist() == row.target
            assert batch.labels[i, len(real) - len(row.target) :].tolist() == row.target
            words = [*row.before, *[0] * row.slots, *row.after, *row.target]
            assert batch.ids[i][real].tolist() == words
            assert batch.positions[i][real].tolist() == list(range(row.length))
            assert batch.slots[i][real].tolist() == [
                len(row.before) <= j < len(row.before) + row.slots for j in range(row.length)
            ]
        if batch.visual is not None:
            owners = batch.slots.nonzero()[:, 0].float()
            assert torch.equal(batch.visual[:, 0], owners), "features stand in row order"
        assert batch.keep == max(len(row.target) for row in rows)


def test_shared_beginning_leaves_the_fewest_tokens() -> None:
    draw, found = random.Random(0), 0
    for trial in range(200):
        rows = []
        for _ in range(draw.randrange(1, 7)):
            before = [draw.randrange(1 + trial % 3) for _ in range(draw.randrange(9))]
            rows.append(Encoded([5, 6] * draw.randrange(2) + before, draw.randrange(3), [7], []))
        batch = collate(rows, [torch.zeros(row.slots, 2) if row.slots else None for row in rows])
        length, full = batch.ids.shape[1], batch.ids.numel()
        text = [row.before if row.slots else [*row.before, *row.after][:-1] for row in rows]
        costs = {
            c: len({tuple(one[:c]) for one in text}) * c + len(rows) * (length - c)
            for c in range(1, min(map(len, text)) + 1)
        }
        best = min(costs.values(), default=full)
        shared = shared_beginning(batch.ids, batch.slots, batch.mask)
        if shared is None:
            assert best > (1 - WORTHWHILE) * full or len(rows) == 1
            continue
        found += 1
        assert costs[shared.length] == best
        assert len(shared.firsts) == len({tuple(one[: shared.length]) for one in text})
        for one, which in zip(text, shared.which.tolist(), strict=True):
            assert one[: shared.length] == text[shared.firsts[which]][: shared.length]
    assert found > 50


def test_pack_keeps_the_budget_and_every_row() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(1, 50) for _ in range(40)]
    order = sorted(range(40), key=lengths.__getitem__)
    groups = bin_pack(lengths, order, 100)
    assert [i for group in groups for i in group] == order
    assert all(max(lengths[i] for i in g) * len(g) <= 100 for g in groups)
    assert len(groups) < 40
    assert bin_pack([500], [0], 100) == [[0]], "a row longer than the budget"
    assert bin_pack([], [], 100) == []


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("cost", [0, 30, 1000])
def test_pack_finds_the_cheapest_cut(split: bool, cost: int) -> None:
    draw = random.Random(2)
    for _ in range(20):
        before = [draw.randrange(30) for _ in range(8)]
        lengths = [head + draw.randrange(1, 40) for head in before]
        order = sorted(range(8), key=lengths.__getitem__, reverse=draw.random() < 0.5)

        def tokens(group: list[int]) -> int:
            heads = [before[i] if split else 0 for i in group]  # noqa: B023
            tails = [lengths[i] - head for i, head in zip(group, heads, strict=True)]  # noqa: B023
            return len(group) * (max(heads) + max(tails))

        cheapest = math.inf
        for cuts in itertools.product([False, True], repeat=7):
            groups = [[order[0]]]
            for i, cut in zip(order[1:], cuts, strict=True):
                groups += [[i]] if cut else []
                groups[-1] += [] if cut else [i]
            if all(tokens(group) <= 200 or len(group) == 1 for group in groups):
                cheapest = min(cheapest, sum(tokens(group) + cost for group in groups))
        found = bin_pack(lengths, order, 200, before=before if split else None, cost=cost)
        assert [i for group in found for i in group] == order
        assert sum(tokens(group) + cost for group in found) == cheapest


def test_pack_keeps_the_budget_of_split_batches() -> None:
    draw = random.Random(1)
    rows = [Encoded([5] * draw.randrange(1, 40), 3, [7] * draw.randrange(5), [8, 2]) for _ in range(60)]
    lengths = [row.length for row in rows]
    order = sorted(range(60), key=lengths.__getitem__)
    groups = bin_pack(lengths, order, 100, before=[len(row.before) for row in rows])
    assert [i for group in groups for i in group] == order
    sizes = [collate([rows[i] for i in g], [torch.zeros(3, 2)] * len(g), split=True).ids.numel() for g in groups]
    assert max(sizes) <= 100
