"""Checkpoints by hub id: what counts as one, and its files in the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from elmd.errors import CheckpointError, reason

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_name(path: str | PathLike[str]) -> bool:
    """Whether a path has the form of a hub id: `owner/name`."""
    return _ID.fullmatch(str(path)) is not None


def is_hub_id(path: str | PathLike[str]) -> bool:
    """Whether a checkpoint's path is that of a hub repository: it has the form, and nothing local is called so."""
    return is_hub_name(path) and not Path(path).exists()


def snapshot(name: str, patterns: Sequence[str], fix: str) -> Path:
    """The folder of the hub's cache with a repository's files, downloaded where they are not there yet.

    Args:
        name: hub id.
        patterns: only files that match one of these.
        fix: for the error, what the user should check.

    Raises:
        CheckpointError: the hub does not give the files.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # also those of the HTTP library that the hub's client happens to be built on
        raise unfetched(name, reason(error), fix) from error


def unfetched(name: str, why: str, fix: str) -> CheckpointError:
    """The error of a hub id whose files cannot be had."""
    return CheckpointError(f"is no folder, and as a hub id it cannot be had ({why})", where=name, fix=fix)
