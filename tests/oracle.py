"""Slow answers that the model must equal: one sample at a time, without padding, cache or split."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from elmd.data.encode import Encoded
from elmd.models.adapter import Prefix
from elmd.models.elmd import Elmd


def slow_logits(model: Elmd, row: Encoded, visual: Tensor | None) -> Tensor:
    """Logits [L, vocabulary] of one sample, from the definition: embed piece by piece, run it all."""
    embed = model.llm.get_input_embeddings()
    pieces = [embed(torch.tensor(row.before, dtype=torch.long))]
    if visual is not None:
        pieces.append(model.projector.linear(visual).to(pieces[0].dtype))
    pieces += [embed(torch.tensor(ids, dtype=torch.long)) for ids in (row.after, row.target)]
    embeddings = torch.cat(pieces)[None]
    length = embeddings.shape[1]
    cache = None
    if isinstance(model.adapter, Prefix):
        p, config = model.adapter.length, model.llm.config
        shape = (p, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
        table = model.adapter.table.embedding.weight.view(shape).to(embeddings.dtype)
        cache = DynamicCache([(table[None, :, i, 0].transpose(1, 2), table[None, :, i, 1].transpose(1, 2))
                              for i in range(config.num_hidden_layers)])  # fmt: skip
    return model.llm(
        inputs_embeds=embeddings, position_ids=torch.arange(length)[None], past_key_values=cache,
        use_cache=cache is not None,
    ).logits[0]  # fmt: skip


def slow_loss(model: Elmd, row: Encoded, visual: Tensor | None) -> Tensor:
    """Summed negative log-likelihood of the sample's target."""
    logits, n = slow_logits(model, row, visual), len(row.target)
    return F.cross_entropy(logits[-n - 1 : -1].float(), torch.tensor(row.target), reduction="sum")


def slow_reply(model: Elmd, row: Encoded, visual: Tensor | None, eos: int, most: int) -> list[int]:
    """Greedy ids, everything run again for every token."""
    ids: list[int] = []
    while len(ids) < most:
        token = slow_logits(model, Encoded(row.before, row.slots, [*row.after, *ids], []), visual)[-1].argmax().item()
        if token == eos:
            break
        ids.append(int(token))
    return ids
