"""Read the beginnings of rows into a KV cache, each token as seldom as can be.

All of this gives what running every token of every row gives:

- What rows of a batch begin with in common (`Batch.shared`) is run once and its keys and values are copied.
- What all prompts of a training begin with, the opening, is run once for all its batches (`run_opening`). Only without
  an adapter: behind one, keys and values change with each step.
- REP's causal split (`read_text`): the language model is frozen and looks back only, so no gradient of the projector
  passes through the text before the first visual token; it is read without gradient, for its keys and values.

Shapes: B rows, L columns, H hidden width, g KV heads, d head width, U beginnings that differ, c tokens of a beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from elmd.data.collate import Batch, Beginning
from elmd.models.adapted import AdaptedModel
from elmd.models.adapter import prefix_shape
from elmd.models.sharding import is_sharded


class Prefill(NamedTuple):
    """A batch's first columns, read: their KV cache, and the mask [B, columns] of what it holds."""

    past: DynamicCache
    mask: Tensor


class Opening(NamedTuple):
    """What prompts begin with: c ids, and of each layer keys and values [1, g, c, d]."""

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]

    def cache(self, rows: int) -> DynamicCache:
        """A KV cache as if so many rows had begun with it."""
        past = DynamicCache()
        for number, layer in enumerate(self.layers):
            keys, values = (x.expand(rows, -1, -1, -1) for x in layer)  # [rows, g, c, d]
            past.update(keys, values, number)
        return past


@torch.no_grad()
def run_opening(model: AdaptedModel, ids: Sequence[int]) -> Opening | None:
    """Run what all prompts begin with; None where it cannot be shared, or is nothing.

    It is asked for, and not taken from the first batch, so that a training that resumes computes the same.

    Args:
        model: without an adapter.
    """
    if not ids or not _shares(model):
        return None
    past, row = DynamicCache(), torch.tensor([list(ids)], device=model.llm.device)  # [1, c]
    positions = torch.arange(len(ids), device=row.device)[None]
    _fill(model, model.llm.get_input_embeddings()(row), torch.ones_like(row, dtype=torch.bool), positions, past)
    layers: Any = past.layers
    return Opening(tuple(ids), [(layer.keys, layer.values) for layer in layers])


@torch.no_grad()
def read_text(model: AdaptedModel, batch: Batch, opening: Opening | None = None) -> Prefill:
    """The columns before the first visual token (`batch.free`), of a model without adapter (REP's causal split)."""
    end = batch.free
    embeddings = model.llm.get_input_embeddings()(batch.ids[:, :end])  # [B, free, H]
    start, read = _begin(model, batch, embeddings, opening)
    _fill(model, embeddings[:, start:], read.mask, batch.positions[:, start:end], read.past)
    return read


def read_prompt(
    model: AdaptedModel, batch: Batch, embeddings: Tensor, opening: Opening | None = None
) -> tuple[Tensor, Prefill]:
    """All columns of `embeddings` [B, L, H], and the float32 logits [B, vocabulary] after them."""
    start, read = _begin(model, batch, embeddings, opening)
    output = model.run(embeddings[:, start:], read.mask, batch.positions[:, start:], read.past, keep=1)
    return output.logits[:, -1].float(), read


def _shares(model: AdaptedModel) -> bool:
    """Whether rows may share what they begin with.

    Sharing leaves gaps in rows, and FSDP-sharded ranks, which must run the model equally often, share nothing.
    """
    return model.allows_gaps and not is_sharded(model.llm)


def _begin(model: AdaptedModel, batch: Batch, embeddings: Tensor, opening: Opening | None) -> tuple[int, Prefill]:
    """Run what rows begin with in common, once.

    Args:
        embeddings: of the first columns, those to be read [B, columns, H].

    Returns:
        How many first columns are done, since the cache holds their tokens; and the cache with the mask [B, columns]
        for the rest, where each row's own copy of the shared tokens has become padding.
    """
    rows, end = embeddings.shape[:2]
    mask, shared = batch.mask[:, :end], batch.shared
    if shared is None or not _shares(model):
        return 0, Prefill(model.prefix_cache(rows) or DynamicCache(), mask)
    start, past = _shared_cache(model, batch, embeddings, shared, opening)
    mask = mask & (batch.positions[:, :end] >= start)
    mask[:, :start] = True
    return start, Prefill(past, mask)


def _shared_cache(
    model: AdaptedModel, batch: Batch, embeddings: Tensor, shared: Beginning, opening: Opening | None
) -> tuple[int, DynamicCache]:
    """c, the number of tokens in the cache of what rows begin with, and the cache [B, g, P + c, d]."""
    rows = len(embeddings)
    if (
        opening is not None
        and len(shared.firsts) == 1
        and shared.ids[: len(opening.ids)] == opening.ids
        # What a batch shares beyond the opening is run in each row, where that is less than to run all of it once.
        and rows * (shared.length - len(opening.ids)) <= shared.length
    ):
        return len(opening.ids), opening.cache(rows)
    past = model.prefix_cache(len(shared.firsts)) or DynamicCache()
    positions = torch.arange(shared.length, device=embeddings.device).expand(len(shared.firsts), -1)  # [U, c]
    columns = batch.mask[shared.firsts].int().argmax(1, keepdim=True) + positions  # [U, c], from the first real one
    begin = embeddings[shared.firsts[:, None], columns]  # [U, c, H]
    _fill(model, begin, torch.ones_like(positions, dtype=torch.bool), positions, past)
    past.batch_select_indices(shared.which)  # U rows -> B rows
    return shared.length, past


class _LastLayerCached(Exception):
    """The last layer has written its keys and values; no error."""


def _fill(model: AdaptedModel, embeddings: Tensor, mask: Tensor, positions: Tensor, past: DynamicCache) -> None:
    """Run columns [B, columns, H] for their keys and values alone; `past` gets them.

    The forward pass is left by an exception as soon as the last layer has cached its keys and values: nobody reads its
    output. All that decoders of different families have in common is that each layer calls the cache's `update`, so
    that is where it is left. An FSDP-sharded model runs to its end, since hooks at the end of each layer free its
    weights.
    """
    if is_sharded(model.llm):
        model.run(embeddings, mask, positions, past, keep=1)
        return
    write, last = past.update, prefix_shape(model.llm.config)[0] - 1

    def update(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        cached = write(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == last:
            raise _LastLayerCached
        return cached

    vars(past)["update"] = update
    try:
        model.run(embeddings, mask, positions, past, keep=1)
    except _LastLayerCached:
        pass
    finally:
        del vars(past)["update"]  # the class's own again
