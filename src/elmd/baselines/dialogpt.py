"""DialoGPT (Chinese): GPT-2 on the dialogue's text alone (§4.2), as the project GPT2-chitchat makes it.

`[CLS]u1[SEP]u2[SEP]…r[SEP]` is one text; every token but the first is a target, and a reply ends at [SEP].
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from elmd.baselines.base import Baseline, NextLogits, TextBatch
from elmd.baselines.vocabulary import Vocabulary
from elmd.data.collate import IGNORED


class DialoGPT(Baseline):
    """transformers' GPT-2 with a BERT vocabulary.

    Args:
        gpt: its configuration's bos, eos and pad are ids of the vocabulary's control tokens.
    """

    loss_on_context = True

    def __init__(self, gpt: GPT2LMHeadModel):
        super().__init__()
        self.gpt = gpt

    @classmethod
    def create(
        cls,
        vocabulary: Vocabulary,
        *,
        layers: int,
        width: int,
        heads: int,
        ff: int,
        dropout: float,
        max_tokens: int,
    ) -> DialoGPT:
        """A random model for contexts and replies of up to `max_tokens` each."""
        config = GPT2Config(
            vocab_size=len(vocabulary),
            n_positions=2 * max_tokens,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_inner=ff,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=vocabulary.start,
            eos_token_id=vocabulary.end,
            pad_token_id=vocabulary.pad,
        )
        return cls(GPT2LMHeadModel(config))

    def loss(self, batch: TextBatch) -> Tensor:
        ids, real = torch.cat([batch.context, batch.reply], 1), torch.cat([batch.context_mask, batch.reply_mask], 1)
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        logits = self.gpt(
            input_ids=ids, attention_mask=real.long(), position_ids=positions, use_cache=False
        ).logits.float()
        # Padding lies at both ends, so a real token is predicted by a real one where the token before it is real.
        labels = ids[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(-1)

    def begin(self, batch: TextBatch) -> NextLogits:
        cache, mask = DynamicCache(), batch.context_mask
        kept = torch.arange(len(mask), device=mask.device)

        def next_logits(new: Tensor, running: Tensor) -> Tensor:
            nonlocal mask, kept
            ids, positions = batch.context, batch.positions
            if new.shape[1]:
                if len(running) < len(kept):
                    left = torch.isin(kept, running).nonzero().squeeze(1)
                    cache.batch_select_indices(left)
                    mask, kept = mask[left], running
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                ids, positions = new[running, -1:], mask.sum(-1, keepdim=True) - 1
            return self.gpt(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

        return next_logits

    def save(self, folder: Path) -> None:
        self.gpt.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> DialoGPT:
        return cls(GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)).eval()
