"""Livebot's unified Transformer (Ma et al., AAAI 2019; [20] of the paper, §4.2): frames, text and reply.

    video encoder   frames:           self-attention
    text encoder    history and u:    self-attention, attention to the video
    decoder         reply so far:     causal self-attention, attention to the video, attention to the text

As in the authors' code: pre-norm blocks with a last norm per stack, one embedding for both texts with sinusoidal
positions, none for the frames, and an output layer of its own. Ours: a linear layer from the frame features to the
model's width (theirs are as wide as the model), and masks for padding, which theirs attends to.

Without video (vision=none) there is no video encoder, and no attention to the video in the other two; a row without a
clip among others that have one goes around that attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from elmd.baselines.base import CONFIG, WEIGHTS, Baseline, NextLogits, TextBatch
from elmd.data.collate import IGNORED
from elmd.engine.files import read_json, write_json
from elmd.training.checkpoint import save_tensors


@dataclass(frozen=True)
class Sizes:
    """`config.json`. `video` is q, the width of the frame features, 0 for a text model; `start` is [CLS]'s id."""

    vocabulary: int
    video: int
    layers: int
    width: int
    heads: int
    ff: int
    dropout: float
    start: int


@dataclass(frozen=True)
class Memory:
    """What is attended to: `values` [B, K, width], and which of them are `real` [B, K] bool and no padding."""

    values: Tensor
    real: Tensor

    @property
    def hidden(self) -> Tensor:
        """[B, K] bool, the padding; but a row of nothing else hides nothing: a softmax over nothing is no number."""
        return ~self.real & self.real.any(-1, keepdim=True)

    @property
    def present(self) -> Tensor:
        """[B, 1, 1] bool: what such a row reads does not count."""
        return self.real.any(-1)[:, None, None]

    def of(self, rows: Tensor) -> Memory:
        return Memory(self.values[rows], self.real[rows])


class Block(nn.Module):
    """Self-attention, attention to each memory in turn, feed-forward; each on normed input and added to it."""

    def __init__(self, width: int, heads: int, ff: int, dropout: float, memories: int):
        super().__init__()
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True) for _ in range(1 + memories)
        )
        self.feed_forward = nn.Sequential(nn.Linear(width, ff), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ff, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 + memories))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor, later: Tensor | None, memories: Sequence[Memory]) -> Tensor:
        """
        Args:
            x: [B, L, width].
            hidden: [B, L] bool, its padding.
            later: [L, L] bool, what a position must not see; None: it sees all.
        """
        own, *others = self.attentions
        first, *norms, last = self.norms
        seen = first(x)
        x = x + self.dropout(own(seen, seen, seen, key_padding_mask=hidden, attn_mask=later, need_weights=False)[0])
        for attention, norm, memory in zip(others, norms, memories, strict=True):
            read = attention(norm(x), memory.values, memory.values, key_padding_mask=memory.hidden, need_weights=False)[
                0
            ]
            x = x + self.dropout(read) * memory.present
        return x + self.dropout(self.feed_forward(last(x)))


class Stack(nn.Module):
    """Blocks and a last norm."""

    def __init__(self, sizes: Sizes, memories: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(sizes.width, sizes.heads, sizes.ff, sizes.dropout, memories) for _ in range(sizes.layers)
        )
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, x: Tensor, hidden: Tensor, memories: Sequence[Memory] = (), *, causal: bool = False) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1) if causal else None
        for block in self.blocks:
            x = block(x, hidden, later, memories)
        return self.norm(x)


class Livebot(Baseline):
    """The three stacks."""

    loss_on_context = False

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes, seen = sizes, int(sizes.video > 0)
        if seen:
            self.project = nn.Linear(sizes.video, sizes.width)
            self.video_encoder = Stack(sizes, 0)
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.text_encoder = Stack(sizes, seen)
        self.decoder = Stack(sizes, seen + 1)
        self.output = nn.Linear(sizes.width, sizes.vocabulary)
        self.dropout = nn.Dropout(sizes.dropout)

    def read(self, batch: TextBatch) -> list[Memory]:
        """The encoded video, if any, and the encoded context."""
        memories = []
        if self.sizes.video:
            assert batch.video is not None
            assert batch.frames is not None
            frames = Memory(self.project(batch.video), batch.frames)
            memories.append(Memory(self.video_encoder(frames.values, frames.hidden), batch.frames))
        text = self.text_encoder(self.embed(batch.context, batch.positions), ~batch.context_mask, memories)
        return [*memories, Memory(text, batch.context_mask)]

    def decode(self, ids: Tensor, real: Tensor, memories: Sequence[Memory]) -> Tensor:
        """Logits [B, R, vocabulary] after each of `ids` [B, R]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.output(self.decoder(self.embed(ids, positions), ~real, memories, causal=True))

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[B, L] -> [B, L, width]."""
        half = torch.arange(0, self.sizes.width, 2, device=ids.device)
        angles = positions.unsqueeze(-1) * torch.exp(half * (-math.log(10000.0) / self.sizes.width))
        waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
        return self.dropout(self.embedding(ids) + waves)

    def loss(self, batch: TextBatch) -> Tensor:
        starts = torch.full_like(batch.reply[:, :1], self.sizes.start)
        ids = torch.cat([starts, batch.reply[:, :-1]], 1)
        real = torch.cat([torch.ones_like(batch.reply_mask[:, :1]), batch.reply_mask[:, :-1]], 1)
        logits = self.decode(ids, real, self.read(batch)).float()
        labels = batch.reply.masked_fill(~batch.reply_mask, IGNORED)
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(-1)

    def begin(self, batch: TextBatch) -> NextLogits:
        memories = self.read(batch)
        starts = torch.full_like(batch.context[:, :1], self.sizes.start)

        def next_logits(new: Tensor, running: Tensor) -> Tensor:
            # The decoder runs again over all that is new: replies are short, and it keeps no cache.
            ids = torch.cat([starts, new], 1)[running]
            left = [memory.of(running) for memory in memories]
            return self.decode(ids, torch.ones_like(ids, dtype=torch.bool), left)[:, -1]

        return next_logits

    def save(self, folder: Path) -> None:
        save_tensors(folder / WEIGHTS, dict(self.state_dict()))
        write_json(folder / CONFIG, asdict(self.sizes))

    @classmethod
    def load(cls, folder: Path) -> Livebot:
        model = cls(Sizes(**read_json(folder / CONFIG)))
        model.load_state_dict(load_file(folder / WEIGHTS))
        return model.eval()
