"""What the loop trains of the ERM: encoder and self-separation, by contrast within batches (§3.3, eq. 2-4)."""

from __future__ import annotations

import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from elmd.errors import ConfigError
from elmd.labels import INDEX
from elmd.losses import retriever_loss
from elmd.retrieval.emotion_match import EmotionMatch
from elmd.retrieval.retriever import embed, separation_of
from elmd.training.loop import Positions
from elmd.types import Sample


class Erm:
    """The ERM as an objective of the training loop: eq. 4 on batches in which each emotion occurs at least twice.

    Contrast within a batch is not additive, so each global batch is one loss: every rank encodes its share, the
    vectors are gathered with gradient, and every rank computes 1/world of the whole loss.

    Args:
        model: the retriever; without self-separation where `separation_weight` is 0.
        splits: samples by split; batches are positions in `train`.
        select_on: the split whose utterances are the queries of `evaluate`.
        batch_size, temperature, emotion_weight (λ), separation_weight, one_positive: see `losses.retriever_loss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        splits: Mapping[str, Sequence[Sample]],
        select_on: str,
        *,
        batch_size: int,
        seed: int,
        temperature: float,
        emotion_weight: float = 1.0,
        separation_weight: float = 1.0,
        one_positive: bool = False,
    ):
        self.model, self.select_on = model, select_on
        self.match = EmotionMatch(model, splits)
        self.texts = [sample.utterance.text for sample in splits["train"]]
        self.labels = [INDEX[sample.utterance.emotion] for sample in splits["train"]]
        self.batch_size, self.seed = batch_size, seed
        self.temperature, self.one_positive = temperature, one_positive
        self.emotion_weight, self.separation_weight = emotion_weight, separation_weight
        # BERT's pooler sees no gradient under mean pooling; left to train, weight decay alone would move it.
        for name, parameter in model[0].named_parameters():
            if ".pooler." in name:
                parameter.requires_grad_(False)
        self.separation = separation_of(model)
        trained: dict[str, nn.Module | None] = {"encoder": model[0], "separation": self.separation}
        self.modules: Mapping[str, nn.Module] = {name: module for name, module in trained.items() if module is not None}

    def batches(self, epoch: int) -> list[Positions]:
        return emotion_batches(self.labels, self.batch_size, self.seed, epoch)

    def weight(self, batch: Positions) -> float:
        return 1.0

    def losses(self, batch: Positions, rank: int, world: int) -> Iterator[tuple[Tensor, int]]:
        self.model.train()
        sizes = [len(batch) // world + (r < len(batch) % world) for r in range(world)]
        start = sum(sizes[:rank])
        # A rank without a share still encodes a text: it must take part in the gathering.
        share = batch[start : start + sizes[rank]] or batch[:1]
        e_u, tokens = embed(self.model, self.match.tokens, [self.texts[i] for i in share])
        yield self.loss(gather_rows(e_u[: sizes[rank]], sizes, rank), batch) / world, tokens

    def loss(self, e_u: Tensor, batch: Positions) -> Tensor:
        """Eq. 4 of a whole batch from its e_u [B, d]."""
        generator = None
        if self.one_positive:  # the same draw on every rank, and again after a resume
            generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, *batch)).encode()))
        return retriever_loss(
            e_u,
            None if self.separation is None else self.separation.separate(e_u),
            torch.tensor([self.labels[i] for i in batch], device=e_u.device),
            self.temperature,
            emotion_weight=self.emotion_weight,
            separation_weight=self.separation_weight,
            one_positive=generator,
        ).total

    def evaluate(self) -> dict[str, float]:
        scores = self.match.scores(self.select_on)["all"]
        return {
            f"emotion_{name}/{key}": values[name]
            for key, values in scores.items()
            for name in ("match@1", "match@5", "mrr")
        }

    def without_positive(self, batches: Sequence[Positions]) -> int:
        """Anchors that have no other sample of their emotion in their batch; eq. 2 leaves them out."""
        counts = [Counter(self.labels[i] for i in batch) for batch in batches]
        return sum(count == 1 for counted in counts for count in counted.values())


def emotion_batches(labels: Sequence[int], size: int, seed: int, epoch: int) -> list[Positions]:
    """An epoch's batches: each sample once, no batch over `size`, each emotion of a batch at least twice in it.

    Samples of one emotion are paired at random (an odd one makes a triple), and pairs are dealt to the batches so that
    these are as even as can be: a last batch of a few samples would have few negatives. Only a sample whose emotion no
    other sample has stays alone. A function of its arguments, so that every rank and every resume agree.

    Raises:
        ConfigError: `size` is under 4, too small for two emotions.
    """
    if size < 4:
        raise ConfigError(
            f"a batch of {size} has no room for a positive and negatives", where="erm.batch_size", fix="use 4 or more"
        )
    draw = random.Random(f"erm {seed} {epoch}")
    by_label: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        by_label[label].append(position)
    groups: list[list[int]] = []
    for label in sorted(by_label):
        members = draw.sample(by_label[label], len(by_label[label]))
        pairs = [members[i : i + 2] for i in range(0, len(members), 2)]
        if len(pairs) > 1 and len(pairs[-1]) == 1:
            odd = pairs.pop()
            pairs[-1] += odd
        groups += pairs
    draw.shuffle(groups)
    groups.sort(key=len, reverse=True)  # the few triples first, so that pairs even them out
    number = -(-len(labels) // size)
    while (dealt := _deal(groups, number, size)) is None:
        number += 1
    for batch in dealt:
        draw.shuffle(batch)
    draw.shuffle(dealt)
    return list(dealt)


def _deal(groups: Sequence[Sequence[int]], number: int, size: int) -> list[list[int]] | None:
    """Each group to the emptiest of `number` batches; None where a batch would exceed `size`."""
    batches: list[list[int]] = [[] for _ in range(number)]
    for group in groups:
        emptiest = min(batches, key=len)
        if len(emptiest) + len(group) > size:
            return None
        emptiest += group
    return batches


def gather_rows(rows: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    """Rows of all ranks in rank order [sum(sizes), d]; the gradient of every rank's loss reaches `rows`.

    Args:
        rows: this rank's [sizes[rank], d].
        sizes: rows of each rank; they may differ.
    """
    return rows if len(sizes) == 1 else _GatherRows.apply(rows, tuple(sizes), rank)


class _GatherRows(torch.autograd.Function):
    """Forward: concatenation over ranks. Backward: the sum over ranks of the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
        ctx.rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # collectives want equal shapes: [largest, d]
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()  # [sum(sizes), d]
        dist.all_reduce(total)
        return total[ctx.rows], None, None
