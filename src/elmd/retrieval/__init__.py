"""The retriever of demonstrations (§3.3): sentence encoder, self-separation, index."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`load_retriever`, imported when first asked for: sentence-transformers takes seconds to import."""
    if name == "load_retriever":
        from elmd.retrieval.retriever import load_retriever

        return load_retriever
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
