"""ELMD itself: frozen language model + visual projector + adapter (Fig. 3).

Shapes: B batch, L tokens, V visual tokens, q vision width, H hidden, P virtual tokens of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from elmd.data.collate import IGNORED, Batch, Beginning
from elmd.errors import CheckpointError
from elmd.models import ADAPTER, PROJECTOR
from elmd.models.adapter import Adapter, fixed, load_adapter, prefix_shape
from elmd.models.llm import bears_holes
from elmd.models.projector import Projector
from elmd.models.sharding import anywhere, is_sharded

#: Chooses the next token of the rows that still run: (logits [R, vocabulary], step, their places in the batch [R])
#: -> ids [R].
Choose = Callable[[Tensor, int, Tensor], Tensor]


class _Written(Exception):
    """The last layer has written its keys and values; no error."""


class Read(NamedTuple):
    """What was read of a batch's first columns: the cache to go on from, and the mask [B, columns] of what it holds."""

    past: DynamicCache
    mask: Tensor


class Opening(NamedTuple):
    """What prompts begin with: ids of c tokens, and of each layer keys and values [1, KV heads, c, head width]."""

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]

    def cache(self, rows: int) -> DynamicCache:
        """As if so many rows had begun with it."""
        past = DynamicCache()
        for number, layer in enumerate(self.layers):
            keys, values = (x.expand(rows, -1, -1, -1) for x in layer)
            past.update(keys, values, number)
        return past


class Elmd(nn.Module):
    """Splices visual tokens into the prompt's embeddings and runs the language model behind an adapter.

    Without a projector it is a text model (w/o V); without an adapter it is REP's model.

    Args:
        checkpointing: keep only each layer's input for the backward pass and run the layer again there: about a third
            more work for a fraction of the memory. Losses and gradients are the same.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        projector: Projector | None = None,
        adapter: Adapter | None = None,
        *,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.llm, self.projector, self.adapter, self.checkpointing = llm, projector, adapter, checkpointing
        self.bears_holes = bears_holes(llm)
        self._opening: Opening | None = None
        hidden = llm.get_input_embeddings().embedding_dim
        if projector is not None and projector.linear.out_features != hidden:
            raise CheckpointError(
                f"the projector writes {projector.linear.out_features} numbers, the language model reads {hidden}",
                fix="train the projector with this language model (stage=rep)",
            )

    def train(self, mode: bool = True) -> Elmd:
        """The language model stays in eval mode: it is frozen, and its own dropout is no part of the method."""
        super().train(mode)
        self.llm.eval()
        if self.adapter is not None:
            self.adapter.train(mode)  # LoRA's dropout lies inside the language model
        return self

    def save(self, folder: Path) -> None:
        """Write what trains and nothing else: `projector.safetensors`, and the adapter in `adapter/`."""
        if self.projector is not None:
            self.projector.save(folder / PROJECTOR)
        if self.adapter is not None:
            self.adapter.save(folder / ADAPTER)

    @classmethod
    def load(cls, folder: Path, llm: PreTrainedModel) -> Elmd:
        """A saved model around the language model that it was trained with; each part only where it was saved."""
        projector = Projector.load(folder / PROJECTOR) if (folder / PROJECTOR).is_file() else None
        adapter = load_adapter(llm, folder / ADAPTER) if (folder / ADAPTER).is_dir() else None
        if projector is None and adapter is None:
            raise CheckpointError("holds neither a projector nor an adapter", where=folder, fix="train it (stage=eerg)")
        return cls(llm, projector, adapter).to(llm.device)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings [B, L, H]: words, with E_v (eq. 9) in the slots."""
        words = self.llm.get_input_embeddings()(batch.ids)
        if batch.visual is None:
            return words
        assert self.projector is not None, "a batch with visual tokens needs a projector"
        return words.masked_scatter(batch.slots.unsqueeze(-1), self.projector(batch.visual).to(words.dtype))

    def forward(self, batch: Batch, *, keep: int, at: Tensor | None = None) -> Any:
        """The language model's output for a batch, with logits [B, keep, vocabulary] of the last `keep` columns only.

        Real tokens have positions from 0 whatever the prefix, as in the original P-Tuning v2 of ChatGLM2.

        Args:
            at: logits [N, vocabulary] of these places among the flattened [B, keep] alone.
        """
        mask, start = batch.mask, 0
        past = self._virtual(len(mask))
        if batch.free and self.adapter is None:
            start, (past, before) = batch.free, self.read(batch)
            mask = torch.cat([before, mask[:, start:]], 1)
        embeddings = self.embed(batch)
        if past is not None:
            past = fixed(past)
        with self._layers(), self._head(at):
            return self._run(embeddings[:, start:], mask, batch.positions[:, start:], past, keep)

    def loss(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each row's target tokens, *summed* (eq. 10, 11); [B] float32."""
        keep, rows = batch.keep, batch.at // batch.keep
        # The column before a target predicts it, so of keep + 1 columns the last predicts none.
        logits = self(batch, keep=keep + 1, at=batch.at + rows).logits  # [N, vocabulary]
        labels = batch.labels[:, -keep:].flatten()[batch.at]
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return losses.new_zeros(len(batch.ids)).index_add(0, rows, losses)

    @torch.no_grad()
    def score(self, batch: Batch, candidates: Sequence[Sequence[int]]) -> Tensor:
        """Log-probability [B, C] of each candidate continuation (ids, EOS included) after each prompt.

        The prompt runs once; the C candidates then share its cache. Words of different token counts compare fairly
        because each ends in EOS.
        """
        rows, count = len(batch.ids), len(candidates)
        logits, (cache, mask) = self._read(batch, self.embed(batch))
        first = logits.log_softmax(-1)  # [B, vocabulary]
        total = first[:, [ids[0] for ids in candidates]]  # [B, C]
        longest = max(map(len, candidates))
        if longest == 1:
            return total
        # Continuations, padded on the right: what is behind a candidate's end is never looked back at.
        inputs = torch.zeros(count, longest - 1, dtype=torch.long, device=batch.ids.device)
        targets = torch.full_like(inputs, IGNORED)
        for i, ids in enumerate(candidates):
            inputs[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[i, : len(ids) - 1] = torch.tensor(ids[1:])
        cache.batch_repeat_interleave(count)
        mask = torch.cat([mask, mask.new_ones(rows, longest - 1)], 1).repeat_interleave(count, 0)
        positions = batch.positions[:, -1:].repeat_interleave(count, 0) + torch.arange(
            1, longest, device=batch.ids.device
        )
        logits = self.llm(
            input_ids=inputs.repeat(rows, 1),
            attention_mask=self._mask(mask),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits.float()
        rest = -F.cross_entropy(
            logits.flatten(0, 1), targets.repeat(rows, 1).flatten(), ignore_index=IGNORED, reduction="none"
        )
        return total + rest.view(rows, count, -1).sum(-1)

    @torch.no_grad()
    def generate(
        self, batch: Batch, choose: Choose, *, eos: int, max_new_tokens: int, copies: int = 1
    ) -> list[list[int]]:
        """New ids of each row, without EOS.

        Our own loop, because transformers' `generate` with `inputs_embeds` and a prefix cache returns silently wrong
        tokens unless dummy rows stand before the embeddings, and because rows are to draw independently of the batch
        they are in (see `choose`). The prompt is read once for all copies of a row, and rows that have ended leave.

        Args:
            copies: how many replies to each row; row i's are i * copies and those after it.
        """
        logits, (cache, mask) = self._read(batch, self.embed(batch))
        position = batch.positions[:, -1:]
        if copies > 1:
            cache.batch_repeat_interleave(copies)
            logits, mask, position = (x.repeat_interleave(copies, 0) for x in (logits, mask, position))
        rows = torch.arange(len(logits), device=logits.device)
        new = torch.full((len(rows), max_new_tokens), eos, device=logits.device)
        running = torch.ones_like(rows, dtype=torch.bool)
        for step in range(max_new_tokens):
            chosen = torch.where(running, choose(logits, step, rows), eos)
            new[rows, step] = chosen
            running = chosen != eos
            left = int(running.sum())
            if step + 1 == max_new_tokens or not anywhere(left, self.llm):
                break
            # Leaving costs a copy of the cache, so the ended rows leave when they are half of all.
            if 2 * left <= len(rows):
                stay = running.nonzero().squeeze(1) if left else running.new_zeros(1, dtype=torch.long)
                cache.batch_select_indices(stay)
                rows, mask, position, chosen, running = (x[stay] for x in (rows, mask, position, chosen, running))
            mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
            logits = (
                self.llm(
                    input_ids=chosen.unsqueeze(1),
                    attention_mask=self._mask(mask),
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                )
                .logits[:, -1]
                .float()
            )
        ids = new.tolist()
        return [row[: row.index(eos)] if eos in row else row for row in ids]

    @torch.no_grad()
    def open(self, ids: Sequence[int]) -> None:
        """Run what all prompts begin with once for all batches; of a model without adapter, where it stays the same.

        It is asked for, and not taken from the first batch, so that a training that was resumed computes the same.
        """
        if not ids or is_sharded(self.llm) or not self.bears_holes:
            return
        past, row = DynamicCache(), torch.tensor([list(ids)], device=self.llm.device)
        positions = torch.arange(len(ids), device=row.device)[None]
        self._fill(self.llm.get_input_embeddings()(row), torch.ones_like(row, dtype=torch.bool), positions, past)
        held: Any = past.layers
        self._opening = Opening(tuple(ids), [(layer.keys, layer.values) for layer in held])

    @torch.no_grad()
    def read(self, batch: Batch) -> Read:
        """The columns before the first visual token (`batch.free`), of a model without adapter.

        The language model is frozen and looks back only, so no gradient of the projector passes through them (REP's
        causal split): only their keys and values are needed, so what follows those of the last layer is not run.
        """
        embeddings = self.llm.get_input_embeddings()(batch.ids[:, : batch.free])
        start, read = self._begin(batch, embeddings)
        self._fill(embeddings[:, start:], read.mask, batch.positions[:, start : batch.free], read.past)
        return read

    def _read(self, batch: Batch, embeddings: Tensor) -> tuple[Tensor, Read]:
        """All columns of `embeddings` [B, L, H], and the logits [B, vocabulary] after them."""
        start, read = self._begin(batch, embeddings)
        output = self._run(embeddings[:, start:], read.mask, batch.positions[:, start:], read.past, keep=1)
        return output.logits[:, -1].float(), read

    def _begin(self, batch: Batch, embeddings: Tensor) -> tuple[int, Read]:
        """What several rows begin with is run once, where the model bears the holes that this leaves in them.

        Nothing is shared where ranks share the model out: those must run it equally often.

        Args:
            embeddings: of the first columns that are to be read [B, columns, H].

        Returns:
            How many of these columns the cache holds by now; the cache, and the mask [B, columns] for the rest.
        """
        rows, end = embeddings.shape[:2]
        mask, shared = batch.mask[:, :end], batch.shared
        if shared is None or is_sharded(self.llm) or not self.bears_holes:
            return 0, Read(self._virtual(rows) or DynamicCache(), mask)
        start, past = self._open(batch, embeddings, shared)
        # The cache's columns stand for what is shared; in the rest of each row it becomes padding.
        mask = mask & (batch.positions[:, :end] >= start)
        mask[:, :start] = True
        return start, Read(past, mask)

    def _open(self, batch: Batch, embeddings: Tensor, shared: Beginning) -> tuple[int, DynamicCache]:
        """How many tokens the cache holds of what rows begin with, and the cache, a row for each."""
        rows, known = len(embeddings), self._opening
        if (
            known is not None
            and len(shared.firsts) == 1
            and shared.ids[: len(known.ids)] == known.ids
            # What a batch has in common beyond it is run in each row, if that is less than to run all of it anew.
            and rows * (shared.length - len(known.ids)) <= shared.length
        ):
            return len(known.ids), known.cache(rows)
        past = self._virtual(len(shared.firsts)) or DynamicCache()
        positions = torch.arange(shared.length, device=embeddings.device).expand(len(shared.firsts), -1)
        columns = batch.mask[shared.firsts].int().argmax(1, keepdim=True) + positions
        begin = embeddings[shared.firsts[:, None], columns]
        self._fill(begin, torch.ones_like(positions, dtype=torch.bool), positions, past)
        past.batch_select_indices(shared.which)
        return shared.length, past

    def _fill(self, embeddings: Tensor, mask: Tensor, positions: Tensor, past: DynamicCache) -> None:
        """Run columns for their keys and values alone: the pass ends as soon as the last layer has written its own.

        An exception ends it, as all that decoders of different families have in common is that each layer gives its
        keys and values to the cache. Where ranks share the model out it runs to its end: hooks free each layer.
        """
        if is_sharded(self.llm):
            self._run(embeddings, mask, positions, past, keep=1)
            return
        write, last = past.update, prefix_shape(self.llm.config)[0] - 1

        def update(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            found = write(key_states, value_states, layer_idx, *args, **kwargs)
            if layer_idx == last:
                raise _Written
            return found

        vars(past)["update"] = update
        try:
            self._run(embeddings, mask, positions, past, keep=1)
        except _Written:
            pass
        finally:
            del vars(past)["update"]  # the class's own again

    def _run(self, embeddings: Tensor, mask: Tensor, positions: Tensor, past: DynamicCache | None, keep: int) -> Any:
        return self.llm(
            inputs_embeds=embeddings,
            attention_mask=self._mask(mask),
            position_ids=positions,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=keep,
        )

    def _virtual(self, rows: int) -> DynamicCache | None:
        return None if self.adapter is None else self.adapter.cache(rows)

    @contextmanager
    def _layers(self) -> Iterator[None]:
        """Within it, each decoder layer forgets what it computes and computes it again for the backward pass.

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
    def _head(self, at: Tensor | None) -> Iterator[None]:
        """Within it, the output layer sees the columns `at` only: at a vocabulary of 65 024, logits of padding and of
        the tokens before shorter targets would be most of what a loss takes.
        """
        if at is None:
            yield
            return

        def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (inputs[0].flatten(0, 1)[at],)

        hook = self.llm.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            yield
        finally:
            hook.remove()

    def _mask(self, mask: Tensor) -> Tensor:
        """[B, L] -> [B, P + L]: every row sees the whole prefix."""
        if self.adapter is not None and self.adapter.length:
            mask = torch.cat([mask.new_ones(len(mask), self.adapter.length), mask], 1)
        return mask.long()
