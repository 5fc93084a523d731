"""Attention on a CPU without writing out grouped keys and values for every head.

transformers' `sdpa` repeats them wherever there is a mask, since torch's kernels for GPUs that take a mask want it. The
one for CPUs does not, so less is computed and less kept for the backward pass; the results are the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

#: What transformers' function does besides, in the families that ask for it.
_OWN = ("position_bias", "softcap", "cache")


def group_on_cpu() -> None:
    """Let `sdpa` in this process keep keys and values grouped on a CPU, in models made before and after.

    It stays under its own name: families ask for it by name, and a name of ours would get into saved configurations.
    """
    AttentionInterface.register("sdpa", sdpa)


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of queries [B, h, L, d] to keys and values [B, g, P + L, d], h a multiple of g: [B, L, h, d].

    Where there is nothing to gain it is transformers' own; so it is for a single query, whose heads that folds.
    """
    rows = query.shape[2]
    grouped = attention_mask is not None and rows > 1 and key.shape[1] < query.shape[1]
    if not grouped or query.device.type != "cpu" or any(others.get(name) is not None for name in _OWN):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None
