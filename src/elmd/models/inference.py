"""Run a model over many samples: sorted by length, sharded over ranks, results gathered in the samples' own order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from elmd.data.collate import Batch, pack
from elmd.data.examples import Examples
from elmd.log import progress
from elmd.models.elmd import Choose, Elmd
from elmd.models.sharding import in_step, sharding

R = TypeVar("R")


class Movable(Protocol):
    """A batch of tensors."""

    def to(self, device: torch.device) -> Self: ...


M = TypeVar("M", bound=Movable, covariant=True)


class Packable(Protocol[M]):
    """Samples of known length that are batched on demand: ELMD's `Examples`, a baseline's `Rows`."""

    @property
    def lengths(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int]) -> M: ...


def over(
    examples: Packable[M],
    budget: int,
    accelerator: Accelerator,
    what: str,
    function: Callable[[M, list[int]], Sequence[R]],
) -> list[R]:
    """`function(batch, positions)` for every sample once; one result per sample, in order, on every rank.

    Args:
        budget: tokens per batch, padding included. The longest run first, so too large a budget shows at once.
    """
    order = sorted(range(len(examples)), key=lambda i: (-examples.lengths[i], i))
    groups, world = pack(examples.lengths, order, budget), accelerator.num_processes
    shares = [groups[rank::world] for rank in range(world)]
    todo = in_step(shares, accelerator.process_index, level=sharding(accelerator))
    found: list[tuple[int, R]] = []
    for positions, counts in progress(todo, what, unit="batch"):
        batch = examples.batch(positions).to(accelerator.device)
        results = function(batch, positions)
        if counts:
            found.extend(zip(positions, results, strict=True))
    if world > 1:
        found = gather_object(found)
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def predict_emotions(
    model: Elmd, examples: Examples, words: Sequence[Sequence[int]], budget: int, accelerator: Accelerator, what: str
) -> list[int]:
    """Position in `words` (ids with EOS) of the likeliest emotion word of each sample, by summed log-probability."""
    model.eval()
    return over(examples, budget, accelerator, what, lambda batch, _: model.score(batch, words).argmax(-1).tolist())


def generate(
    model: Elmd,
    examples: Examples,
    budget: int,
    accelerator: Accelerator,
    *,
    eos: int,
    max_new_tokens: int,
    top_p: float,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """New ids for each sample by nucleus sampling (§4.3), or greedily at temperature 0."""
    model.eval()

    def run(batch: Batch, positions: list[int]) -> list[list[int]]:
        names = [examples.samples[i].id for i in positions]
        choose = greedy if temperature == 0 else nucleus(names, top_p, temperature, max_new_tokens, seed)
        return model.generate(batch, choose, eos=eos, max_new_tokens=max_new_tokens)

    return over(examples, budget, accelerator, f"generate (seed {seed})", run)


def greedy(logits: Tensor, step: int) -> Tensor:
    return logits.argmax(-1)


def nucleus(names: Sequence[str], top_p: float, temperature: float, steps: int, seed: int) -> Choose:
    """Top-p sampling where each row draws from its own stream of random numbers, named by its sample and the seed.

    So a sample's response does not depend on the batch it is in, nor on the number of ranks. The smallest set of
    tokens whose probability reaches `top_p` is kept, as in transformers.
    """
    draws = np.stack(
        [
            np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8])).random(steps)
            for name in names
        ]
    )

    def choose(logits: Tensor, step: int) -> Tensor:
        probabilities, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        mass = probabilities.double().cumsum(-1)
        kept = mass - probabilities < top_p
        mass = torch.where(kept, mass, mass.gather(-1, kept.sum(-1, keepdim=True) - 1))
        drawn = torch.from_numpy(draws[:, step : step + 1]).to(mass) * mass[:, -1:]
        return order.gather(-1, torch.searchsorted(mass, drawn, right=True).clamp(max=mass.shape[-1] - 1)).squeeze(-1)

    return choose
