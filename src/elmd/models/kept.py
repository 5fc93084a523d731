"""Keys and values of the text before each sample's video slots, kept from one epoch to the next (rep.keep_prompts).

In REP the language model is frozen and has no prefix, so they are the same in every epoch: after the first, that text
is not run any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from elmd.data.collate import Batch
from elmd.models.adapter import prefix_shape
from elmd.models.elmd import Elmd, Read


def kept_bytes(llm: PreTrainedModel, tokens: int) -> int:
    """What keeping so many tokens takes."""
    layers, _, numbers = prefix_shape(llm.config)
    return 2 * layers * numbers * tokens * llm.dtype.itemsize


class KeptPrompts:
    """What was read of samples before, in main memory: [layers, 2, KV heads g, T, head width d] for T tokens."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def __call__(self, model: Elmd, batch: Batch, positions: Sequence[int]) -> Read:
        """What `model.read(batch)` gives, from memory if it has all rows.

        Args:
            batch: of the samples at `positions`, split at the slots.
        """
        if all(i in self.rows for i in positions):
            return self._recall(batch, [self.rows[i] for i in positions])
        read = model.read(batch)
        held: Any = read.past.layers
        # [layers, 2, B, g, columns, d]
        whole = torch.stack([torch.stack([layer.keys, layer.values]) for layer in held])
        for row, i in enumerate(positions):
            self.rows[i] = whole[:, :, row, :, read.mask[row]].cpu()
        return read

    def _recall(self, batch: Batch, rows: Sequence[Tensor]) -> Read:
        layers, _, heads, _, width = rows[0].shape
        past, mask = DynamicCache(), batch.mask[:, : batch.free]
        whole = rows[0].new_zeros(layers, 2, len(rows), heads, batch.free, width)
        for i, row in enumerate(rows):
            whole[:, :, i, :, batch.free - row.shape[-2] :] = row
        for number, (keys, values) in enumerate(whole.to(mask.device)):
            past.update(keys, values, number)
        return Read(past, mask)
