"""What the baselines share: samples as ids, batches, and the contract `fit` / `generate` / `save` / `load`.

They read the same samples as ELMD, train through the same loop and decode with the same random numbers.

    history, u                      reply                context (left)      reply (right)
    [CLS] 早 [SEP] 你 好 [SEP]       好 啊 [SEP]    ->     C 早 S 你 好 S       好 啊 S
    [CLS] 喂 [SEP]                   谁 [SEP]             - - - C 喂 S        谁 S -

Padded on these sides, a row's real tokens stay next to each other where a model reads context and reply as one text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from elmd.baselines.vocabulary import Vocabulary
from elmd.data.examples import Features, no_features
from elmd.log import logger
from elmd.models.batched import map_samples
from elmd.models.decode import Choose, greedy, nucleus, stream
from elmd.training import loop
from elmd.training.loop import Progress
from elmd.training.plan import Plan
from elmd.training.tokens import TokenObjective, token_loss
from elmd.types import Sample

CONFIG, WEIGHTS = "config.json", "model.safetensors"

#: The logits [n, vocabulary] of the next token of the rows `running` [n], after what is new in all rows [B, t].
NextLogits = Callable[[Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------------------------------------ samples, batch
@dataclass(frozen=True, slots=True)
class Row:
    """A sample in ids: `[CLS]h1[SEP]…u[SEP]`, and `r[SEP]` (empty when generating)."""

    context: list[int]
    reply: list[int]


@dataclass
class TextBatch:
    """B rows, with L columns of context and R of reply.

    Attributes:
        context: [B, L] long, padded on the left; `context_mask` [B, L] bool, what is no padding.
        reply: [B, R] long, padded on the right; `reply_mask` [B, R] bool, what is no padding.
        video: [B, F, q] frame features, zeros where there are none, or None in a text model.
        frames: [B, F] bool, what is no padding; all False in a row without a clip.
    """

    context: Tensor
    context_mask: Tensor
    reply: Tensor
    reply_mask: Tensor
    video: Tensor | None = None
    frames: Tensor | None = None

    def to(self, device: torch.device) -> TextBatch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @property
    def positions(self) -> Tensor:
        """[B, L] long, from 0 at each row's [CLS]."""
        return (self.context_mask.long().cumsum(-1) - 1).clamp(min=0)


class Rows:
    """Samples made ready: encoded once, batched on demand.

    A context longer than `max_tokens` loses its oldest turns first, then the beginning of u; a reply loses its end.

    Args:
        max_tokens: of a context, and of a reply.
        with_reply: True for training and validation loss, False for generation.
        loss_on_context: whether the context's tokens are targets too (DialoGPT).
        video: frame features [F, q] by sample id, None where a sample has no clip.
        width: q; 0 for a text model.

    Attributes:
        lengths, before: tokens of each row, and how many of them are context.
        unknown: how many tokens became [UNK], of `tokens`.
        cuts: how many samples lost text, by part.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        vocabulary: Vocabulary,
        *,
        max_tokens: int,
        with_reply: bool,
        loss_on_context: bool,
        video: Features = no_features,
        width: int = 0,
    ):
        self.samples, self.vocabulary, self.max_tokens = samples, vocabulary, max_tokens
        self.loss_on_context, self.video, self.width = loss_on_context, video, width
        self.cuts: Counter[str] = Counter()
        self.rows = [Row(self._context(s), self._reply(s) if with_reply else []) for s in samples]
        self.lengths = [len(row.context) + len(row.reply) for row in self.rows]
        self.before = [len(row.context) for row in self.rows]
        self.tokens = sum(self.lengths)
        self.unknown = sum([*row.context, *row.reply].count(vocabulary.unknown) for row in self.rows)
        if self.cuts:
            shown = ", ".join(f"{part} of {count}" for part, count in self.cuts.items())
            logger.warning("%d samples: too long, so cut: %s", len(samples), shown)

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self, positions: Sequence[int]) -> int:
        """Number of tokens that the loss is summed over, in the samples at `positions`."""
        rows = [self.rows[i] for i in positions]
        # The first token, [CLS], is given and not predicted.
        return sum(len(row.reply) + (len(row.context) - 1 if self.loss_on_context else 0) for row in rows)

    def batch(self, positions: Sequence[int]) -> TextBatch:
        rows = [self.rows[i] for i in positions]
        context, context_mask = _pad([row.context for row in rows], self.vocabulary.pad, left=True)
        reply, reply_mask = _pad([row.reply for row in rows], self.vocabulary.pad, left=False)
        if not self.width:
            return TextBatch(context, context_mask, reply, reply_mask)
        features = [self.video(self.samples[i].id) for i in positions]
        most = max((len(f) for f in features if f is not None), default=1)
        video, frames = torch.zeros(len(rows), most, self.width), torch.zeros(len(rows), most, dtype=torch.bool)
        for i, rows_of_clip in enumerate(features):
            if rows_of_clip is not None:
                video[i, : len(rows_of_clip)], frames[i, : len(rows_of_clip)] = rows_of_clip, True
        return TextBatch(context, context_mask, reply, reply_mask, video, frames)

    def _context(self, sample: Sample) -> list[int]:
        turns = [self.vocabulary.encode(turn.text) for turn in (*sample.history, sample.utterance)]
        room = self.max_tokens - 2  # [CLS], and the [SEP] after u
        kept = turns[-1][-room:]
        if len(kept) < len(turns[-1]):
            self.cuts["utterance"] += 1
        context = [*kept, self.vocabulary.end]
        for turn in reversed(turns[:-1]):
            if len(context) + len(turn) + 2 > self.max_tokens:
                self.cuts["history"] += 1
                break
            context = [*turn, self.vocabulary.end, *context]
        return [self.vocabulary.start, *context]

    def _reply(self, sample: Sample) -> list[int]:
        ids = self.vocabulary.encode(sample.response.text)
        if len(ids) > self.max_tokens - 1:
            self.cuts["reply"] += 1
        return [*ids[: self.max_tokens - 1], self.vocabulary.end]


def _pad(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, longest] and which of them are real."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, columns], real[i, columns] = torch.tensor(row, dtype=torch.long), True
    return ids, real


# ---------------------------------------------------------------------------------------------------------- contract
class Baseline(nn.Module, ABC):
    """A network that answers. `fit` trains it and `generate` lets it write; both ask for nothing but this."""

    #: Whether the context's tokens are targets too.
    loss_on_context: bool

    @abstractmethod
    def loss(self, batch: TextBatch) -> Tensor:
        """Negative log-likelihood of each row's target tokens, *summed*; [B] float32."""

    @abstractmethod
    def begin(self, batch: TextBatch) -> NextLogits:
        """Read the contexts; the function returned gives the next token's logits, and is called token by token."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """The saved model, on the CPU, in eval()."""


def fit(
    model: Baseline,
    train: Rows,
    selection: Rows,
    plan: Plan,
    folder: Path,
    accelerator: Accelerator,
    what: str,
    *,
    batch_size: int,
    micro_tokens: int,
) -> Progress:
    """Train all of `model` by `plan`, and leave the weights of the smallest loss on `selection` in it.

    Args:
        plan: its only module is called `model`, its metric `loss`, per target token.
        batch_size: samples of a global batch, whatever the number of GPUs.
        micro_tokens: tokens of a micro-batch, padding included.
    """

    def evaluate() -> dict[str, float]:
        return {"loss": token_loss(model, selection, micro_tokens, accelerator, "validation loss")}

    objective = TokenObjective(
        model,
        {"model": model},
        train,
        accelerator,
        batch_size=batch_size,
        micro_tokens=micro_tokens,
        seed=plan.seed,
        evaluate=evaluate,
        before=train.before,
    )
    return loop.fit(objective, plan, folder, accelerator, what)


def generate_all(
    model: Baseline,
    rows: Rows,
    budget: int,
    accelerator: Accelerator,
    *,
    max_new_tokens: int,
    top_p: float,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """New ids for each sample, without [SEP], decoded as ELMD's are (see `elmd.models.decode.generate_all`).

    Args:
        budget: tokens of context per batch, padding included.
    """
    model.eval()

    def run(batch: TextBatch, positions: list[int]) -> list[list[int]]:
        streams = [stream(seed, rows.samples[i].id) for i in positions]
        choose = nucleus(streams, top_p, temperature, max_new_tokens) if temperature else greedy
        return generate_batch(model, batch, choose, rows.vocabulary, max_new_tokens=max_new_tokens)

    return map_samples(rows, budget, accelerator, f"generate (seed {seed})", run, passes=max_new_tokens)


@torch.no_grad()
def generate_batch(
    model: Baseline, batch: TextBatch, choose: Choose, vocabulary: Vocabulary, *, max_new_tokens: int
) -> list[list[int]]:
    """New ids of each row, without [SEP]; rows that have ended are not run any further."""
    next_logits, rows = model.begin(batch), len(batch.context)
    running = torch.arange(rows, device=batch.context.device)
    new = batch.context.new_zeros(rows, 0)
    for step in range(max_new_tokens):
        logits = next_logits(new, running).float()
        logits[:, vocabulary.never_written] = -torch.inf
        column = new.new_full((rows, 1), vocabulary.end)
        column[running, 0] = choose(logits, step, running)
        new = torch.cat([new, column], 1)
        running = running[column[running, 0] != vocabulary.end]
        if not len(running):
            break
    ids = new.tolist()
    return [row[: row.index(vocabulary.end)] if vocabulary.end in row else row for row in ids]
