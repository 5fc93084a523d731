"""Load a causal language model with its tokenizer, frozen; any decoder of transformers will do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from elmd.dtypes import check_dtype, pick_dtype
from elmd.errors import CheckpointError, reason
from elmd.log import logger


def load_llm(path: str | Path, *, attention: str = "sdpa", **how: Any) -> tuple[PreTrainedModel, Any]:
    """A language model, frozen and in eval mode, and its tokenizer.

    Args:
        path: a folder, or a hub id.
        attention, how: see `load_weights`.

    Raises:
        CheckpointError: the folder is missing, incomplete or not one that transformers knows without remote code.
        ConfigError: there is no such dtype.
    """
    check_dtype(how.get("dtype", "auto"), "llm.dtype")
    _, tokenizer = open_llm(path, attention=attention)
    return load_weights(path, attention=attention, **how), tokenizer


def load_weights(
    path: str | Path,
    *,
    dtype: str = "auto",
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
    onto: torch.device | str | None = None,
) -> PreTrainedModel:
    """A language model, frozen and in eval mode. Weights are read from safetensors, straight to the device.

    Args:
        path: a folder, or a hub id; `open_llm` has looked at it.
        dtype: one of `elmd.dtypes.DTYPES`.
        device: where the model will run.
        onto: where its weights are put now, if not there.

    Raises:
        CheckpointError, ConfigError: as `load_llm`.
    """
    device = torch.device(device)
    kind = pick_dtype(dtype, device)
    if (size := sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))) > 10**9:
        logger.info("reading the language model, %.1f GB (%s)", size / 1e9, path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=kind, attn_implementation=attention, use_safetensors=True,
            device_map={"": device if onto is None else onto},
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unusable(path, error) from error
    return freeze(model)


def open_llm(path: str | Path, *, attention: str = "sdpa") -> tuple[PreTrainedConfig, Any]:
    """A language model's configuration and tokenizer: all that can be wrong but the weights, in about a second.

    Raises:
        CheckpointError: as `load_llm`.
    """
    config = open_config(path)
    check_attention(config, attention, path)
    return config, open_tokenizer(path)


def open_config(path: str | Path) -> PreTrainedConfig:
    """A language model's configuration.

    Raises:
        CheckpointError: transformers cannot read it without remote code.
    """
    published = Path(path) / "config.json"
    if published.is_file() and '"chatglm"' in published.read_text(encoding="utf-8", errors="replace"):
        raise CheckpointError(
            "is ChatGLM as published, whose own code transformers 5 cannot run",
            where=path,
            fix="convert it once: python scripts/convert_chatglm2.py SRC DST, and set llm.path=DST",
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(path, error) from error


def check_attention(config: PreTrainedConfig, attention: str, path: str | Path | None) -> None:
    """Whether this model can run with this attention on this machine; nothing is allocated.

    Args:
        path: of the model, for the error.

    Raises:
        CheckpointError: it cannot, or is no causal language model.
    """
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ImportError as error:
        raise CheckpointError(
            f"attention {attention!r} cannot be used here ({reason(error)})",
            where=path,
            fix="install its package, or set llm.attention=sdpa",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(path, error) from error


def open_tokenizer(path: str | Path) -> Any:
    """A language model's tokenizer.

    Raises:
        CheckpointError: AutoTokenizer cannot read it.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            "has no tokenizer that AutoTokenizer loads",
            where=path,
            fix="fetch its tokenizer's files; a converted ChatGLM2 has one if tokenizer.model lay beside the original, "
            "so convert it again with that",
        ) from error


def _unusable(path: str | Path | None, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot be loaded as a language model ({reason(error)})",
        where=path,
        fix="give llm.path a folder that AutoModelForCausalLM loads without remote code, in whole safetensors files",
    )


def freeze(model: Any) -> Any:
    """Stop gradients to a model's parameters and put it in eval mode."""
    return model.requires_grad_(False).eval()


def allows_gaps(llm: PreTrainedModel) -> bool:
    """Whether padding may stand in the middle of a row.

    Not where the model counts columns instead of positions: it takes no positions, a layer looks back at a fixed number
    of columns only, among which a gap would be counted, or a layer is no attention at all.
    """
    if "position_ids" not in inspect.signature(type(llm).forward).parameters:
        return False
    text = llm.config.get_text_config(decoder=True)
    if kinds := getattr(text, "layer_types", None):
        return all(kind == "full_attention" for kind in kinds)
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
    return not (any(windows) and getattr(text, "use_sliding_window", True))
