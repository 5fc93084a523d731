"""The folder of a pack: what lies in it, and what is checked before any of it is opened.

Imports no library that takes seconds, so that a wrong folder is refused at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from elmd.engine.files import read_json, sha256
from elmd.engine.hub import is_hub_id, snapshot
from elmd.errors import ArtifactError, CheckpointError, ConfigError, ElmdError
from elmd.models import ADAPTER, PROJECTOR

#: Raised when a folder that this version writes could not be read by an earlier one.
#: 2: limits of prompts in tokens are the language model's.
FORMAT = 2
FACTS, CARD, PROMPT, RETRIEVER, INDEX = "elmd.json", "README.md", "prompt.json", "retriever", "index"
TEXTS = f"{INDEX}/samples.jsonl"

#: Endings of all that a pack may hold: none of them can carry code.
ENDINGS = (".json", ".jsonl", ".safetensors", ".txt", ".model", ".md")


def fetch(source: str) -> Path:
    """The folder of a pack; of a hub repository only data files are downloaded, once.

    Raises:
        CheckpointError: there is no such folder, and nothing at the hub.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise CheckpointError("no such folder", where=source, fix="check the path")
    places = (f"{ADAPTER}/", f"{RETRIEVER}/", f"{INDEX}/")
    patterns = [FACTS, CARD, PROMPT, PROJECTOR, *(f"{place}*{ending}" for place in places for ending in ENDINGS)]
    return snapshot(
        source, patterns, "check the name and the connection, or download the repository and give its folder"
    )


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Raises:
        CheckpointError: a file leads out of the folder, is of a kind that no pack has, or is not as it was packed.
    """
    for name, packed in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix not in ENDINGS:
            raise CheckpointError(f"lists {name!r}, which no pack has", where=folder / FACTS, fix="do not use it")
        if not (folder / path).is_file():
            raise CheckpointError(f"{name} is missing", where=folder, fix="get the pack again, whole")
        if file_facts(folder / path) != packed:
            raise CheckpointError(f"{name} is not as it was packed", where=folder, fix="get the pack again")
    if unlisted := sorted(set(packed_files(folder)) - files.keys()):
        raise CheckpointError(
            f"holds {unlisted[0]}, which {FACTS} does not list", where=folder, fix="get the pack again"
        )
    if (modules := folder / RETRIEVER / "modules.json").is_file():
        for entry in read_json(modules):
            if not re.fullmatch(r"\w*", entry["path"]):
                raise CheckpointError(f"leads to {entry['path']!r}", where=modules, fix="do not use this pack")


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of `elmd.json`.

    Raises:
        CheckpointError: the folder is no pack.
        ConfigError: it was written by another version.
    """
    try:
        facts = read_json(folder / FACTS)
        version, whole = facts["format"], {"name", "config", "llm", "vision", "index", "files"} <= facts.keys()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"is no packed model ({FACTS} is missing or damaged)",
            where=folder,
            fix="make one: python -m elmd.export JOB_FOLDER --out DIR",
        ) from error
    if version != FORMAT or not whole:
        what = f"format {version!r} is not {FORMAT}, which this version reads"
        raise ConfigError(what, where=folder / FACTS, fix="update ELMD, or export the model again")
    return facts


def earlier_export(out: Path) -> dict[str, Any]:
    """The facts of the earlier export that an export to `out` will replace; empty where there is none.

    Raises:
        ArtifactError: the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    fix = "choose a new folder for --out"
    try:
        facts = read_facts(out)
    except ElmdError as error:
        raise ArtifactError("exists and is no earlier export", where=out, fix=fix) from error
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if others := sorted(files - {*facts["files"], FACTS, CARD}):
        raise ArtifactError(f"also holds {others[0]}, which is no part of an export", where=out, fix=fix)
    return facts


def packed_files(folder: Path) -> list[str]:
    """Names of the files of a pack that replies are made with: all that may be opened, and no other."""
    inside = [path for part in (ADAPTER, RETRIEVER, INDEX) for path in sorted((folder / part).rglob("*"))]
    files = [path for path in (folder / PROMPT, folder / PROJECTOR, *inside) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in files if not path.name.startswith(".")]


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
