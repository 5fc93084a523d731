"""Names of dtypes, as configurations have them. torch is loaded only where a dtype is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elmd.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: What `llm.dtype` and `vision.dtype` may be; `auto` is bfloat16 on a GPU and float32 on a CPU.
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def check_dtype(name: str, key: str) -> None:
    """
    Args:
        key: of the configuration, for the error.

    Raises:
        ConfigError: there is no such choice.
    """
    if name not in DTYPES:
        raise ConfigError(f"{name!r} is no floating dtype", where=key, fix=f"choose from {', '.join(DTYPES)}")


def pick_dtype(name: str, device: torch.device, key: str = "llm.dtype") -> torch.dtype:
    """The torch dtype of a name in `DTYPES`.

    Raises:
        ConfigError: see `check_dtype`.
    """
    import torch

    check_dtype(name, key)
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
