"""ELMD itself: frozen language model, visual projector and adapter (Fig. 3).

Shapes: B rows, L columns, V visual tokens of all rows, q vision width, H hidden width, T longest target, N target
tokens, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from elmd.data.collate import IGNORED, Batch
from elmd.errors import CheckpointError
from elmd.models import ADAPTER, PROJECTOR
from elmd.models.adapted import AdaptedModel
from elmd.models.adapter import Adapter, fixed, load_adapter
from elmd.models.prefill import Opening, read_prompt, read_text
from elmd.models.projector import Projector


class Elmd(AdaptedModel):
    """Puts visual tokens into the prompt's embeddings and runs the language model behind its adapter.

    Without a projector it is a text model (w/o V); without an adapter it is REP's model.

    Args:
        checkpointing: activation checkpointing, see `AdaptedModel`.

    Attributes:
        opening: what all prompts to come begin with, run already (see `prefill.run_opening`).

    Raises:
        CheckpointError: the projector is another language model's.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        projector: Projector | None = None,
        adapter: Adapter | None = None,
        *,
        checkpointing: bool = False,
    ):
        super().__init__(llm, adapter, checkpointing=checkpointing)
        self.projector = projector
        self.opening: Opening | None = None
        hidden = llm.get_input_embeddings().embedding_dim
        if projector is not None and projector.linear.out_features != hidden:
            raise CheckpointError(
                f"the projector writes {projector.linear.out_features} numbers, the language model reads {hidden}",
                fix="train the projector with this language model (stage=rep)",
            )

    def save(self, folder: Path) -> None:
        """Write what trains and nothing else: `projector.safetensors`, and the adapter in `adapter/`."""
        if self.projector is not None:
            self.projector.save(folder / PROJECTOR)
        if self.adapter is not None:
            self.adapter.save(folder / ADAPTER)

    @classmethod
    def load(cls, folder: Path, llm: PreTrainedModel) -> Elmd:
        """A saved model around the language model that it was trained with; each part only where it was saved.

        Raises:
            CheckpointError: the folder holds no part, or parts of another language model.
        """
        projector = Projector.load(folder / PROJECTOR) if (folder / PROJECTOR).is_file() else None
        adapter = load_adapter(llm, folder / ADAPTER) if (folder / ADAPTER).is_dir() else None
        if projector is None and adapter is None:
            raise CheckpointError(
                "holds neither a projector nor an adapter", where=folder, fix="give the folder of a trained model"
            )
        return cls(llm, projector, adapter).to(llm.device)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings [B, L, H]: words, with E_v (eq. 9) in the slots."""
        words = self.llm.get_input_embeddings()(batch.ids)
        if batch.visual is None:
            return words
        assert self.projector is not None, "a batch with visual tokens needs a projector"
        visual = self.projector(batch.visual).to(words.dtype)  # [V, q] -> [V, H]
        return words.masked_scatter(batch.slots.unsqueeze(-1), visual)

    def forward(self, batch: Batch, *, keep: int, at: Tensor | None = None) -> Any:
        """The language model's output for a batch, with logits [B, keep, vocabulary] of the last `keep` columns only.

        Args:
            at: logits [N, vocabulary] of these places [N] among the flattened [B, keep] alone.
        """
        start, mask, past = 0, batch.mask, self.prefix_cache(len(batch.mask))
        if batch.free and self.adapter is None:  # REP's causal split
            start, (past, read) = batch.free, read_text(self, batch, self.opening)
            mask = torch.cat([read, mask[:, start:]], 1)  # [B, L]
        embeddings = self.embed(batch)[:, start:]  # [B, L - start, H]
        with self.checkpointed_layers(), self.logits_at(at):
            return self.run(
                embeddings, mask, batch.positions[:, start:], None if past is None else fixed(past), keep=keep
            )

    def loss(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each row's target tokens, *summed* (eq. 10, 11); [B] float32."""
        keep, rows = batch.keep, batch.at // batch.keep  # T; the row of each target token [N]
        # The column before a target predicts it, so of keep + 1 columns the last predicts none.
        logits = self(batch, keep=keep + 1, at=batch.at + rows).logits  # [N, vocabulary]
        labels = batch.labels[:, -keep:].flatten()[batch.at]  # [N]
        losses = F.cross_entropy(logits.float(), labels, reduction="none")  # [N]
        return losses.new_zeros(len(batch.ids)).index_add(0, rows, losses)

    @torch.no_grad()
    def log_probs(self, batch: Batch, candidates: Sequence[Sequence[int]]) -> Tensor:
        """Log-probability [B, C] of each candidate continuation (ids, EOS included) after each prompt.

        The prompt runs once; the C candidates then share its cache. Words of different token counts compare fairly
        because each ends in EOS.
        """
        rows, count, longest = len(batch.ids), len(candidates), max(map(len, candidates))
        logits, (past, mask) = read_prompt(self, batch, self.embed(batch), self.opening)
        first = logits.log_softmax(-1)[:, [ids[0] for ids in candidates]]  # [B, C]
        if longest == 1:
            return first
        # Continuations, padded on the right: what is behind a candidate's end is never looked back at.
        inputs = torch.zeros(count, longest - 1, dtype=torch.long, device=batch.ids.device)  # [C, longest - 1]
        targets = torch.full_like(inputs, IGNORED)
        for i, ids in enumerate(candidates):
            inputs[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[i, : len(ids) - 1] = torch.tensor(ids[1:])
        past.batch_repeat_interleave(count)  # B rows -> B · C rows, as the three below
        mask = torch.cat([mask, mask.new_ones(rows, longest - 1)], 1).repeat_interleave(count, 0)
        steps = torch.arange(1, longest, device=batch.ids.device)
        positions = batch.positions[:, -1:].repeat_interleave(count, 0) + steps
        logits = self.run(inputs.repeat(rows, 1), mask, positions, past).logits.float()  # [B · C, longest - 1, vocab.]
        rest = -F.cross_entropy(
            logits.flatten(0, 1), targets.repeat(rows, 1).flatten(), ignore_index=IGNORED, reduction="none"
        )
        return first + rest.view(rows, count, -1).sum(-1)
