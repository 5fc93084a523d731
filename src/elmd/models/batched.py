"""Run a model over many samples: sorted by length, divided among ranks, results gathered in the samples' own order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from elmd.data.collate import bin_pack
from elmd.log import progress
from elmd.models.sharding import in_step, pass_cost, sharding

R = TypeVar("R")


class Movable(Protocol):
    """A batch of tensors."""

    def to(self, device: torch.device) -> Self: ...


M = TypeVar("M", bound=Movable, covariant=True)


class Batchable(Protocol[M]):
    """Samples of given lengths that are batched on demand: ELMD's `Examples`, a baseline's `Rows`."""

    @property
    def lengths(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int]) -> M: ...


def map_samples(
    examples: Batchable[M],
    budget: int,
    accelerator: Accelerator,
    what: str,
    function: Callable[[M, list[int]], Sequence[R]],
    *,
    passes: int = 1,
) -> list[R]:
    """`function(batch, positions)` for every sample once; one result per sample, in order, on every rank.

    Args:
        budget: tokens per batch, padding included, new ones not. The longest batch runs first.
        passes: forward passes that a batch takes: one and, when generating, another for each new token.
    """
    order = sorted(range(len(examples)), key=lambda i: (-examples.lengths[i], i))
    batches = bin_pack(examples.lengths, order, budget, cost=passes * pass_cost(accelerator))
    world = accelerator.num_processes
    shares = [batches[rank::world] for rank in range(world)]
    todo = in_step(shares, accelerator.process_index, level=sharding(accelerator))
    results: list[tuple[int, R]] = []
    for positions, counts in progress(todo, what, unit="batch"):
        batch = examples.batch(positions).to(accelerator.device)
        values = function(batch, positions)
        if counts:
            results.extend(zip(positions, values, strict=True))
    if world > 1:
        results = gather_object(results)
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]
