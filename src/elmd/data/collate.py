"""Ragged samples to padded tensors: always padded on the left, always with mask and positions.

    before        slots   after  target           ids      slots    labels
    [5 6]         2       [7]    [8 9]            5 6 . . 7 8 9     . . . . . 8 9
    [5]           0       [7]    [9]        ->    - - - - 5 7 9     . . . . . . 9

On the left, the targets of all rows end in the last column, so the logits of the last columns are all that a loss
needs (`Batch.keep`). With `split`, what lies before the slots and the rest are padded apart, so that one column parts
them in all rows (`Batch.free`); mask and positions make the hole harmless:

                                                  5 6 . . 7 8 9
                                                  - 5 - - - 7 9    free = 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elmd.data.encode import Encoded

IGNORED = -100


@dataclass
class Batch:
    """B rows of L tokens.

    Attributes:
        ids: [B, L] long; 0 at slots and padding.
        slots: [B, L] bool, where visual tokens go.
        mask: [B, L] bool, what is no padding.
        positions: [B, L] long, from 0 at each row's first real token.
        labels: [B, L] long, `IGNORED` but at target tokens.
        visual: [number of slots, q] features in row order, or None where no row has slots.
        keep: how many of the last columns carry targets.
        free: no visual token stands in so many first columns.
    """

    ids: Tensor
    slots: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    visual: Tensor | None
    keep: int
    free: int = 0

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def collate(rows: Sequence[Encoded], visual: Sequence[Tensor | None], *, split: bool = False) -> Batch:
    """Pad rows to one length.

    Args:
        visual: each row's features [V, q], None for a row without slots.
        split: part the columns before the slots from the others.
    """
    # The token before a target predicts its first one, so it is never parted from it.
    cuts = [min(len(row.before), row.length - len(row.target) - 1) if split else 0 for row in rows]
    free = max(cuts)
    length = free + max(row.length - cut for row, cut in zip(rows, cuts, strict=True))
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
    features = [f for f in visual if f is not None]
    return Batch(
        ids=ids,
        slots=slots,
        mask=mask,
        positions=(mask.long().cumsum(-1) - 1).clamp(min=0),
        labels=labels,
        visual=torch.cat(features) if features else None,
        keep=max(len(row.target) for row in rows),
        free=free,
    )


def pack(
    lengths: Sequence[int], order: Sequence[int], budget: int, *, before: Sequence[int] | None = None
) -> list[list[int]]:
    """Cut `order` (positions, sorted by length) into groups of at most `budget` tokens, padding included.

    A row longer than the budget gets a group of its own.

    Args:
        before: of each row's tokens, how many lie before its slots, where batches are to be split there: both sides
            are then padded apart.
    """
    groups: list[list[int]] = []
    left = right = 0  # columns of the last group, before and from the slots on
    for i in order:
        head = before[i] if before else 0
        wider = max(left, head), max(right, lengths[i] - head)
        if groups and sum(wider) * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(i)
            left, right = wider
        else:
            groups.append([i])
            left, right = head, lengths[i] - head
    return groups
