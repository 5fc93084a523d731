"""Load a causal language model with its tokenizer, frozen; any decoder of transformers will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from elmd.errors import CheckpointError


def load_llm(
    path: str | Path,
    *,
    dtype: str = "auto",
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
    onto: torch.device | str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """The model, frozen and in eval mode, and its tokenizer. Weights are read from safetensors, straight to the device.

    Args:
        path: a folder, or a hub id.
        device: where the model will run.
        onto: where its weights are put now, if not there.
        dtype: `auto` is bfloat16 on a GPU and float32 on CPU; else a torch name (`float16`, …).

    Raises:
        CheckpointError: the folder is missing, incomplete or not one that transformers knows without remote code.
    """
    device = torch.device(device)
    config = Path(path) / "config.json"
    if config.is_file() and '"chatglm"' in config.read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(
            "is ChatGLM as published, whose own code transformers 5 cannot run",
            where=path,
            fix="convert it once: python scripts/convert_chatglm2.py SRC DST, and set llm.path=DST",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=pick_dtype(dtype, device), attn_implementation=attention, use_safetensors=True,
            device_map={"": device if onto is None else onto},
        )  # fmt: skip
    except ImportError as error:
        raise CheckpointError(
            f"attention {attention!r} cannot be used here ({str(error).strip().splitlines()[0].rstrip('.')})",
            where=path,
            fix="install its package, or set llm.attention=sdpa",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"cannot be loaded as a language model ({reason})",
            where=path,
            fix="give llm.path a folder that AutoModelForCausalLM loads without remote code, with safetensors weights",
        ) from error
    return freeze(model), tokenizer


def freeze(model: Any) -> Any:
    """Stop gradients to a model's parameters and put it in eval mode."""
    return model.requires_grad_(False).eval()


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
            f"{name!r} is no floating dtype", where="dtype", fix="use auto, float32, bfloat16 or float16"
        )
    return dtype
