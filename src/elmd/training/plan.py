"""How to train: rates, steps, and when to evaluate and save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        rates: learning rate of each of the objective's modules, by name.
        steps: optimizer steps in all; 0 only evaluates.
        warmup: share of the steps with a linearly rising rate; after it the rate falls linearly to 0 (`decay`) or
            stays.
        select, higher_is_better: the metric of `Objective.evaluate` that chooses the best checkpoint.
        evaluate_every, checkpoint_every: in steps.
        beta2: AdamW's memory of squared gradients; short trainings from nothing need a shorter one.
    """

    rates: Mapping[str, float]
    steps: int
    seed: int
    select: str
    higher_is_better: bool
    evaluate_every: int
    checkpoint_every: int
    warmup: float = 0.0
    decay: bool = True
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta2: float = 0.999

    @classmethod
    def of(cls, group: Any, **others: Any) -> Plan:
        """A plan with a configuration group's `warmup`, `weight_decay`, `max_grad_norm` and `checkpoint_every`.

        Args:
            group: of the configuration, such as `cfg.eerg`.
            others: the remaining attributes.
        """
        shared = ("warmup", "weight_decay", "max_grad_norm", "checkpoint_every")
        return cls(**{name: getattr(group, name) for name in shared}, **others)

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied with at a step, counted from 0."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        return (self.steps - step) / max(1, self.steps - warm) if self.decay else 1.0
