"""Checkpoints that stages begin with: a public one, or the stand-in that `stage=bootstrap` makes in its place."""

from __future__ import annotations

from pathlib import Path

from elmd.config import BOOTSTRAP
from elmd.engine.stage import Inputs, Job


def checkpoint(kind: str, path: str | None, key: str | None = None) -> Inputs:
    """
    Args:
        kind: "llm", "vision" or "retriever".
        path: where it lies; see `elmd.config.BOOTSTRAP`.
        key: of the configuration that says so; None: `<kind>.path`.
    """
    keys = (key or f"{kind}.path",)
    if path == BOOTSTRAP:
        return Inputs(keys=keys, upstream=(f"bootstrap/{kind}",))
    return Inputs(keys=keys, files={kind: Path(path or "")})


def checkpoint_path(kind: str, path: str | None, job: Job) -> Path:
    """Where it lies."""
    return job.upstream[f"bootstrap/{kind}"] if path == BOOTSTRAP else Path(path or "")
