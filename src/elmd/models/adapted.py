"""The frozen language model behind its adapter: the one way in which ELMD runs it.

Shapes: B rows, L columns, H hidden width, P virtual tokens of a prefix, N places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from elmd.errors import CheckpointError
from elmd.models.adapter import Adapter
from elmd.models.llm import allows_gaps


class AdaptedModel(nn.Module):
    """A language model and its adapter, if any.

    Args:
        checkpointing: activation checkpointing: keep only each layer's input for the backward pass and run the layer
            again there. About a third more work for a fraction of the memory; losses and gradients are the same.

    Attributes:
        allows_gaps: whether padding may stand in the middle of a row (see `elmd.models.llm.allows_gaps`).
    """

    def __init__(self, llm: PreTrainedModel, adapter: Adapter | None = None, *, checkpointing: bool = False):
        super().__init__()
        self.llm, self.adapter, self.checkpointing = llm, adapter, checkpointing
        self.allows_gaps = allows_gaps(llm)

    def train(self, mode: bool = True) -> Self:
        """The language model stays in eval mode: it is frozen, and its own dropout is no part of the method."""
        super().train(mode)
        self.llm.eval()
        if self.adapter is not None:
            self.adapter.train(mode)  # LoRA's dropout lies inside the language model
        return self

    def prefix_cache(self, rows: int) -> DynamicCache | None:
        """A KV cache of the prefix for so many rows, with gradient; None without a prefix."""
        return None if self.adapter is None else self.adapter.cache(rows)

    def run(
        self,
        inputs: Tensor,
        mask: Tensor,
        positions: Tensor,
        past: DynamicCache | None,
        *,
        keep: int = 0,
    ) -> Any:
        """The language model's output for L new columns after those that the cache holds.

        Args:
            inputs: ids [B, L], or embeddings [B, L, H].
            mask: of all columns, cached and new [B, cached + L], without the prefix's.
            positions: [B, L], from 0 whatever the prefix, as in the original P-Tuning v2 of ChatGLM2.
            past: it gets the keys and values of the new columns; None: nothing is cached.
            keep: logits of so many last columns [B, keep, vocabulary]; 0: of all.
        """
        if self.adapter is not None and self.adapter.length:  # every row sees the whole prefix
            mask = torch.cat([mask.new_ones(len(mask), self.adapter.length), mask], 1)  # [B, P + cached + L]
        return self.llm(
            **{"input_ids" if inputs.dim() == 2 else "inputs_embeds": inputs},
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=keep,
        )

    @contextmanager
    def checkpointed_layers(self) -> Iterator[None]:
        """Within it, decoder layers keep their inputs alone and run again in the backward pass, if `checkpointing`.

        transformers' own checkpointing drops the cache, and with it the prefix, and is off in eval mode.
        """
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            yield
            return
        layers = getattr(self.llm.get_decoder(), "layers", None)
        if layers is None:
            raise CheckpointError(
                f"{type(self.llm).__name__} does not name its decoder layers, so they cannot be checkpointed",
                fix="set llm.checkpointing=never",
            )
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # the class's own again

    @contextmanager
    def logits_at(self, places: Tensor | None) -> Iterator[None]:
        """Within it, the output layer sees only the places [N] of the flattened [B, keep] columns; None: all columns.

        At a vocabulary of 65 024, logits of padding and of the tokens before shorter targets would be most of what a
        loss takes.
        """
        if places is None:
            yield
            return

        def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (inputs[0].flatten(0, 1)[places],)  # [B, keep, H] -> [N, H]

        hook = self.llm.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            yield
        finally:
            hook.remove()
