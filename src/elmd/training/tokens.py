"""Training on target tokens: what REP (eq. 10), EERG (eq. 11) and the baselines have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, islice, takewhile
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from elmd.data.collate import Shape, bin_pack
from elmd.data.examples import Examples
from elmd.models.batched import Batchable, map_samples
from elmd.models.elmd import Elmd
from elmd.models.prefill import run_opening
from elmd.models.sharding import in_step, pass_cost, sharding
from elmd.training.loop import Positions


class TokenModel(Protocol):
    """A model of target tokens."""

    def loss(self, batch: Any) -> Tensor:
        """Negative log-likelihood of each row's target tokens, *summed*; [B]."""
        ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...


class TokenSamples(Batchable[Any], Protocol):
    """Samples with target tokens."""

    def targets(self, positions: Positions) -> int:
        """Number of target tokens of the samples at `positions`."""
        ...


class TokenObjective:
    """Samples drawn at random into global batches, each run as length-sorted micro-batches under a token budget.

    Args:
        modules: what trains, by name.
        batch_size: samples of a global batch, whatever the number of GPUs.
        micro_tokens: tokens per micro-batch, padding included; changes memory and speed, not gradients.
        evaluate: metrics on the selection split.
        before: how many of each sample's tokens are padded apart from the others (see `bin_pack`).
        by: what of each sample is sorted by, so that micro-batches are of like samples; None: its length.
    """

    def __init__(
        self,
        model: TokenModel,
        modules: Mapping[str, nn.Module],
        examples: TokenSamples,
        accelerator: Accelerator,
        *,
        batch_size: int,
        micro_tokens: int,
        seed: int,
        evaluate: Callable[[], dict[str, float]],
        before: Sequence[int] | None = None,
        by: Sequence[int] | None = None,
    ):
        self.model, self.modules, self.examples, self.accelerator = model, modules, examples, accelerator
        self.batch_size, self.micro_tokens, self.seed, self.evaluate = batch_size, micro_tokens, seed, evaluate
        self.before, self.by = before, examples.lengths if by is None else by

    def batches(self, epoch: int) -> list[Positions]:
        order = list(range(len(self.examples)))
        random.Random(f"{self.seed}-{epoch}").shuffle(order)
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def weight(self, batch: Positions) -> float:
        return float(self.examples.targets(batch))

    def losses(self, batch: Positions, rank: int, world: int) -> Iterator[tuple[Tensor, int]]:
        self.model.train()
        lengths = self.examples.lengths
        for positions, counts in in_step(self.shares(batch, world), rank, level=sharding(self.accelerator)):
            micro = self.micro_batch(positions).to(self.accelerator.device)
            yield self.model.loss(micro).sum() * counts, sum(lengths[i] for i in positions) * counts

    def shares(self, batch: Positions, world: int) -> list[list[list[int]]]:
        """The micro-batches of each rank."""
        order, cost = sorted(batch, key=lambda i: (self.by[i], i)), pass_cost(self.accelerator)
        return [
            bin_pack(self.examples.lengths, order[rank::world], self.micro_tokens, before=self.before, cost=cost)
            for rank in range(world)
        ]

    def micro_batch(self, positions: Positions) -> Any:
        return self.examples.batch(positions)


class ElmdObjective(TokenObjective):
    """ELMD's: without an adapter only the projector trains, and the tokens before the slots run without gradient.

    Not in a language model that allows no gaps in a row: there all tokens run with gradient.
    """

    model: Elmd
    examples: Examples

    def __init__(
        self, model: Elmd, modules: Mapping[str, nn.Module], examples: Examples, accelerator: Accelerator, **how: Any
    ):
        before = after = None
        if model.adapter is None and model.allows_gaps:
            prompts = [row.before for row in examples.rows]
            before = [len(prompt) for prompt in prompts]
            # What runs with gradient costs twice as much as what does not.
            after = [length - head for length, head in zip(examples.lengths, before, strict=True)]
            pairs = zip(min(prompts), max(prompts), strict=False)  # what the first and the last share, all between do
            opening = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
            model.opening = run_opening(model, opening)
        super().__init__(model, modules, examples, accelerator, before=before, by=after, **how)

    def micro_batch(self, positions: Positions) -> Any:
        return self.examples.batch(positions, split=self.before is not None)

    def shapes(self, steps: int) -> set[Shape]:
        """Those of a training's micro-batches on all ranks; batches follow from the seed, so none has to be run."""
        batches = islice(chain.from_iterable(map(self.batches, count())), steps)
        return {
            self.examples.shape(positions, split=self.before is not None)
            for batch in batches
            for share in self.shares(batch, self.accelerator.num_processes)
            for positions in share
        }


@torch.no_grad()
def token_loss(model: TokenModel, examples: TokenSamples, budget: int, accelerator: Accelerator, what: str) -> float:
    """Mean negative log-likelihood per target token over all `examples`."""
    model.eval()
    losses = map_samples(examples, budget, accelerator, what, lambda batch, _: model.loss(batch).tolist())
    return sum(losses) / examples.targets(range(len(examples)))
