"""Ragged samples to padded tensors: always padded on the left, always with mask and positions.

    before        slots   after  target           ids      slots    labels
    [5 6]         2       [7]    [8 9]            5 6 . . 7 8 9     . . . . . 8 9
    [5]           0       [7]    [9]        ->    - - - - 5 7 9     . . . . . . 9

With padding on the left, the targets of all rows end in the last column, so a loss needs the logits of the last columns
only (`Batch.keep`). With `split`, the tokens before the slots and the rest are padded separately, so that in every row
the slots come after the first `Batch.free` columns. Mask and positions make the padding in between harmless:

                                                  5 6 . . 7 8 9
                                                  - 5 - - - 7 9    free = 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elmd.data.encode import Encoded

IGNORED = -100


#: A shared beginning is run on its own where that saves at least this share of a batch's tokens: it costs a pass more.
WORTHWHILE = 0.05


class Beginning(NamedTuple):
    """The first `length` tokens of B rows, of which U are different.

    Attributes:
        firsts: [U] long, one row for each different beginning.
        which: [B] long, for each row the position in `firsts` of the row with the same beginning.
        ids: the tokens of the first of `firsts`; they stay on the CPU.
    """

    length: int
    firsts: Tensor
    which: Tensor
    ids: tuple[int, ...]


class Shape(NamedTuple):
    """What the cost of a batch depends on.

    Attributes:
        rows: B.
        length: L, padding included.
        keep, free: see `Batch`.
        targets: target tokens of all rows.
    """

    rows: int
    length: int
    keep: int
    free: int
    targets: int


@dataclass
class Batch:
    """B rows of L tokens.

    Attributes:
        ids: [B, L] long; 0 at slots and padding.
        slots: [B, L] bool, where visual tokens go.
        mask: [B, L] bool, True where there is no padding.
        positions: [B, L] long, from 0 at each row's first real token.
        labels: [B, L] long, `IGNORED` except at target tokens.
        visual: [number of slots, q] features in row order, or None where no row has slots.
        keep: how many of the last columns carry targets.
        at: [N] long, where in these columns the targets are: positions in the flattened [B, keep].
        free: so many first columns hold no visual token.
        shared: the shared beginnings of rows, within the columns that are read without gradient: the `free` ones, or
            all where no row has a target.
    """

    ids: Tensor
    slots: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    visual: Tensor | None
    keep: int
    at: Tensor
    free: int = 0
    shared: Beginning | None = None

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.shared is not None:
            firsts, which = (x.to(device, non_blocking=True) for x in (self.shared.firsts, self.shared.which))
            moved["shared"] = self.shared._replace(firsts=firsts, which=which)
        return replace(self, **moved)


def collate(rows: Sequence[Encoded], visual: Sequence[Tensor | None], *, split: bool = False) -> Batch:
    """Pad rows to one length.

    Args:
        visual: each row's features [V, q], None for a row without slots.
        split: pad the tokens before the slots and the others separately.
    """
    cuts = _cuts(rows, split)
    _, length, keep, free, _ = _shape(rows, cuts)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    slots = torch.zeros(len(rows), length, dtype=torch.bool)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
    for i, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        columns = [*range(free - cut, free), *range(length - row.length + cut, length)]
        mask[i, columns] = True
        ids[i, columns] = torch.tensor([*row.before, *[0] * row.slots, *row.after, *row.target], dtype=torch.long)
        slots[i, columns[len(row.before) : len(row.before) + row.slots]] = True
        if row.target:
            labels[i, length - len(row.target) :] = torch.tensor(row.target, dtype=torch.long)
    assert not slots[:, :free].any(), "a visual token lies where no gradient goes"
    features = [tensor for tensor in visual if tensor is not None]
    return Batch(
        ids=ids,
        slots=slots,
        mask=mask,
        positions=(mask.long().cumsum(-1) - 1).clamp(min=0),
        labels=labels,
        visual=torch.cat(features) if features else None,
        keep=keep,
        at=places(labels, keep),
        free=free,
        shared=shared_beginning(*(x[:, : free or length] for x in (ids, slots, mask))) if free or not keep else None,
    )


def shape_of(rows: Sequence[Encoded], *, split: bool = False) -> Shape:
    """The shape of `collate(rows, …, split=split)`."""
    return _shape(rows, _cuts(rows, split))


def _shape(rows: Sequence[Encoded], cuts: Sequence[int]) -> Shape:
    return Shape(
        rows=len(rows),
        length=max(cuts) + max(row.length - cut for row, cut in zip(rows, cuts, strict=True)),
        keep=max(len(row.target) for row in rows),
        free=max(cuts),
        targets=sum(len(row.target) for row in rows),
    )


def _cuts(rows: Sequence[Encoded], split: bool) -> list[int]:
    """For each row, how many tokens go to the first `free` columns."""
    # The token before a target predicts its first token, so it stays with the target.
    return [min(len(row.before), row.length - len(row.target) - 1) if split else 0 for row in rows]


def places(labels: Tensor, keep: int) -> Tensor:
    """Where the targets are in the last `keep` columns: positions [N] in the flattened [B, keep]."""
    return (labels[:, labels.shape[1] - keep :] != IGNORED).flatten().nonzero()[:, 0]


def shared_beginning(ids: Tensor, slots: Tensor, mask: Tensor) -> Beginning | None:
    """The beginnings that rows share, so that the model can run each only once.

    All prompts begin with the same instruction, those of one dialogue also with the same background and often the same
    turns. The length c is chosen so that the fewest tokens are run: U different beginnings of c tokens, and B rows of
    L - c columns. A beginning ends before the first visual token and before the last token of every row.

    Args:
        ids, slots, mask: as in a `Batch`, all [B, L], padded on the left.

    Returns:
        None where that saves too little (see `WORTHWHILE`).
    """
    rows, columns = ids.shape
    first = torch.where(mask.any(1), mask.int().argmax(1), columns - 1)
    limit = int((torch.where(slots.any(1), slots.int().argmax(1), columns - 1) - first).min())
    if limit < 1 or rows == 1:
        return None
    begin = ids.gather(1, first[:, None] + torch.arange(limit))
    order = torch.tensor(sorted(range(rows), key=begin.tolist().__getitem__))
    # Sorted, rows that share c tokens are neighbours. `common`: how many tokens each row shares with the next.
    differ = begin[order][1:] != begin[order][:-1]
    common = torch.where(differ.any(1), differ.int().argmax(1), limit)
    # Between two of these lengths U stays the same, so no other length can be the best.
    costs = {c: (1 + int((common < c).sum())) * c + rows * (columns - c) for c in {*common.tolist(), limit} - {0}}
    length = min(costs, key=costs.__getitem__, default=0)
    if not length or costs[length] > (1 - WORTHWHILE) * rows * columns:
        return None
    new = torch.cat([torch.tensor([True]), common < length])
    which = torch.empty_like(order)
    which[order] = new.long().cumsum(0) - 1
    return Beginning(length, order[new], which, tuple(begin[order[0], :length].tolist()))


#: What a pass of the model costs besides its tokens, counted in tokens: its weights are read and its kernels launched.
#: Measured on a CPU, forward and backward (a GLM of 256 x 4): about 100.
PASS = 128


def bin_pack(
    lengths: Sequence[int], order: Sequence[int], budget: int, *, before: Sequence[int] | None = None, cost: int = PASS
) -> list[list[int]]:
    """Cut `order` (positions, sorted by length) into groups of at most `budget` tokens, padding included.

    The cut of the least cost is taken: the tokens of all groups, padding included, plus `cost` for each group. A row
    longer than the budget gets a group of its own.

    Args:
        before: for batches with `split`, how many of each row's tokens lie before its slots: both sides are padded
            separately.
        cost: of a group, in tokens: one more group has to save more than that.
    """
    # For each number of rows from the start: the least cost, and where its last group begins.
    least, begins = [0], [0]
    for end in range(1, len(order) + 1):
        left = right = 0  # columns of the group from `begin` to `end`: before the slots, and from the slots on
        options: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            head = before[order[begin]] if before else 0
            left, right = max(left, head), max(right, lengths[order[begin]] - head)
            size = (left + right) * (end - begin)
            if options and size > budget:
                break
            options.append((least[begin] + size + cost, begin))
        total, begin = min(options)
        least.append(total)
        begins.append(begin)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(list(order[begins[end] : end]))
        end = begins[end]
    return groups[::-1]
