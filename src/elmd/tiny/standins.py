"""How a stand-in is trained: through the loop of all stages, so that a killed one resumes from its last checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from elmd.training.loop import Positions, fit
from elmd.training.plan import Plan

T = TypeVar("T")

HOLD_OUT = 20  # one in so many samples is kept for measuring
CHECKPOINT_EVERY = 100  # steps


def hold_out(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """(what is measured on, what is trained on)."""
    return list(items[::HOLD_OUT]), [item for i, item in enumerate(items) if i % HOLD_OUT]


@dataclass(frozen=True)
class Training:
    """How long and where a stand-in trains.

    Attributes:
        folder: where checkpoints and `metrics.jsonl` go.
    """

    steps: int
    lr: float
    seed: int
    folder: Path
    accelerator: Accelerator


class Standin(ABC):
    """What the loop trains. Rank 0 computes alone: the models are so small that messages would cost more."""

    modules: Mapping[str, nn.Module]
    #: What `evaluate` returns that sums the stand-in up.
    metric: str
    higher_is_better = True

    @abstractmethod
    def batches(self, epoch: int) -> list[Positions]:
        """See `elmd.training.loop.Objective`."""

    def weight(self, batch: Positions) -> float:
        return 1.0

    def losses(self, batch: Positions, rank: int, world: int) -> Iterator[tuple[Tensor, int]]:
        if rank == 0:
            yield self.loss(batch)

    @abstractmethod
    def loss(self, batch: Positions) -> tuple[Tensor, int]:
        """(mean loss, tokens run) of a whole batch."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on what is held out."""

    def train(self, training: Training, what: str) -> dict[str, float]:
        """Train and return the last metrics; the modules are left ready for use."""
        plan = Plan(
            rates=dict.fromkeys(self.modules, training.lr),
            steps=training.steps,
            seed=training.seed,
            select=self.metric,
            higher_is_better=self.higher_is_better,
            evaluate_every=max(1, training.steps),  # at the start and at the end
            checkpoint_every=CHECKPOINT_EVERY,
            warmup=0.05,
            weight_decay=0.01,
            beta2=0.98,
        )
        progress = fit(self, plan, training.folder, training.accelerator, what)
        for module in self.modules.values():
            module.eval()
        return {key: value for key, value in progress.history[-1].items() if key != "step"}


def shuffled(count: int, size: int, draw: Random) -> list[Positions]:
    """Positions up to `count` in drawn order, in batches of `size`; a last one that is not full is left out."""
    order = draw.sample(range(count), count)
    return [order[i : i + size] for i in range(0, max(1, count - size + 1), size)]
