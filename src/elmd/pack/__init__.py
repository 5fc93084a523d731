"""A trained model in a folder of its own: `load_pack` loads it, `python -m elmd.export` writes it."""

from __future__ import annotations

from typing import Any

from elmd.pack.dialogue import to_sample

__all__ = ["load_pack", "to_sample"]


def __getattr__(name: str) -> Any:
    """`load_pack`, imported when first asked for: the libraries of a model take seconds to import."""
    if name == "load_pack":
        from elmd.pack.model import load_pack

        return load_pack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
