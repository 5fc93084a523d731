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

from elmd.data.collate import Batch, bin_pack
from elmd.data.examples import Examples
from elmd.log import progress
from elmd.models.elmd import Choose, Elmd
from elmd.models.sharding import in_step, pass_cost, sharding

R = TypeVar("R")

#: So many tokens nearly always hold the nucleus: sorting them instead of a vocabulary of 65 024 is what makes it fast.
LIKELY = 1024


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
    *,
    passes: int = 1,
) -> list[R]:
    """`function(batch, positions)` for every sample once; one result per sample, in order, on every rank.

    Args:
        budget: tokens per batch, padding included, new ones not. The longest run first.
        passes: of the language model that a batch takes: one and, when generating, another for each new token.
    """
    order = sorted(range(len(examples)), key=lambda i: (-examples.lengths[i], i))
    groups = bin_pack(examples.lengths, order, budget, cost=passes * pass_cost(accelerator))
    world = accelerator.num_processes
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
    seeds: Sequence[int],
) -> list[list[list[int]]]:
    """New ids for each sample and decode seed, by nucleus sampling (§4.3), or greedily at temperature 0.

    A prompt is read once for all seeds.

    Args:
        budget: prompt tokens per batch, padding and the copies for each seed included.
    """
    model.eval()
    copies = len(seeds) if temperature else 1  # greedy replies do not differ

    def run(batch: Batch, positions: list[int]) -> list[list[list[int]]]:
        streams = [stream(seed, examples.samples[i].id) for i in positions for seed in seeds]
        choose = nucleus(streams, top_p, temperature, max_new_tokens) if temperature else greedy
        new = model.generate(batch, choose, eos=eos, max_new_tokens=max_new_tokens, copies=copies)
        return [new[i : i + copies] * (len(seeds) // copies) for i in range(0, len(new), copies)]

    return over(
        examples,
        budget // copies,
        accelerator,
        f"generate (seeds {', '.join(map(str, seeds))})",
        run,
        passes=max_new_tokens,
    )


def stream(seed: int, name: str) -> str:
    """The name of the random numbers that a sample's reply is drawn with."""
    return f"{seed}:{name}"


def greedy(logits: Tensor, step: int, rows: Tensor) -> Tensor:
    return logits.argmax(-1)


def nucleus(streams: Sequence[str], top_p: float, temperature: float, steps: int, *, likely: int = LIKELY) -> Choose:
    """Top-p sampling where each row draws from its own stream of random numbers.

    So a sample's response does not depend on the batch it is in, nor on the number of ranks. The smallest set of
    tokens whose probability reaches `top_p` is kept, as in transformers; of equally likely ones at its edge, those of
    the lower ids.

    Args:
        streams: of each row of the batch, the name (see `stream`).
        likely: sort only so many tokens, and all of them in rows where the set does not end among these. The result
            is the same whatever the number.
    """
    draws = torch.from_numpy(
        np.stack(
            [
                np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])).random(steps)
                for name in streams
            ]
        )
    )

    def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        nonlocal draws
        draws = draws.to(logits.device)
        probabilities, drawn = (logits / temperature).softmax(-1), draws[rows, step]
        if likely >= probabilities.shape[-1]:
            return _draw(probabilities, drawn, top_p)[0]
        least, some = probabilities.topk(likely, sorted=True)
        some = some.sort(-1).values  # equally likely tokens by id, as in the sort of all
        chosen, edge = _draw(probabilities.gather(-1, some), drawn, top_p)
        chosen = some.gather(-1, chosen[:, None])[:, 0]
        unsure = (edge <= least[:, -1]).nonzero()[:, 0]
        if len(unsure):
            chosen[unsure] = _draw(probabilities[unsure], drawn[unsure], top_p)[0]
        return chosen

    return choose


def _draw(probabilities: Tensor, drawn: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """From the nucleus of each row [R, n], by a number in [0, 1) [R]: the place chosen, and the least probability kept.

    Where the n tokens together do not reach `top_p`, that least is the least of all n.
    """
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass = probabilities.double().cumsum(-1)
    last = (mass - probabilities < top_p).sum(-1, keepdim=True) - 1
    total = mass.gather(-1, last)
    place = torch.searchsorted(mass, drawn[:, None] * total, right=True).minimum(last)
    return order.gather(-1, place)[:, 0], probabilities.gather(-1, last)[:, 0]
