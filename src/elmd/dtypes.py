"""Names of dtypes, as configurations have them."""

from __future__ import annotations

import torch

from elmd.errors import CheckpointError


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; `auto` is bfloat16 on a GPU and float32 on CPU.

    Raises:
        CheckpointError: no floating dtype has that name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(
            f"{name!r} is no floating dtype",
            where="llm.dtype or vision.dtype",
            fix="use auto, float32, bfloat16 or float16",
        )
    return dtype
