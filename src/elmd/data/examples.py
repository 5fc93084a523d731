"""Samples for the model: encoded once, batched on demand."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from elmd.data.collate import Batch, Shape, collate, shape_of
from elmd.data.encode import Encoder
from elmd.data.prompts import Task
from elmd.log import logger
from elmd.types import Demonstration, Sample

#: Visual features [V, q] of a sample by its id; None where it has no clip.
Features = Callable[[str], Tensor | None]


def no_features(sample_id: str) -> None:
    """The features of a run without video (vision=none, w/o V)."""


class Examples:
    """A list of samples with their encodings.

    Args:
        demonstrations: by sample id; a sample without an entry gets a prompt without R (w/o ERM).
        with_target: True for training and validation loss, False for scoring and generation.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        demonstrations: Mapping[str, Sequence[Demonstration]],
        features: Features,
        task: Task,
        *,
        with_target: bool,
    ):
        self.samples, self.features = samples, features
        before = encoder.cuts.copy()
        self.rows = []
        for sample in samples:
            visual = features(sample.id)
            slots = 0 if visual is None else len(visual)
            self.rows.append(encoder(sample, demonstrations.get(sample.id, ()), task, slots, with_target=with_target))
        if cuts := encoder.cuts - before:
            shown = ", ".join(f"{part} of {count}" for part, count in cuts.items())
            logger.warning("%d samples for %s: cut because too long: %s", len(samples), task, shown)
        self.lengths = [row.length for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Sequence[int], *, split: bool = False) -> Batch:
        rows = [self.rows[i] for i in positions]
        return collate(rows, [self.features(self.samples[i].id) for i in positions], split=split)

    def shape(self, positions: Sequence[int], *, split: bool = False) -> Shape:
        """The shape of `batch(positions, split=split)`, without making it."""
        return shape_of([self.rows[i] for i in positions], split=split)

    def targets(self, positions: Sequence[int]) -> int:
        """Number of target tokens, EOS included, of the samples at `positions`."""
        return sum(len(self.rows[i].target) for i in positions)


def shuffled(features: Features, samples: Sequence[Sample], seed: int) -> Features:
    """The same features, permuted among those samples of each split that have some: a control without information."""
    partner: dict[str, str] = {}
    for split in sorted({sample.split for sample in samples}):
        ids = [sample.id for sample in samples if sample.split == split and features(sample.id) is not None]
        permuted = ids.copy()
        random.Random(f"{seed}-{split}").shuffle(permuted)
        partner.update(zip(ids, permuted, strict=True))
    return lambda sample_id: features(partner[sample_id]) if sample_id in partner else None
