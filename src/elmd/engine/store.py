"""Where a stage's result lives: a folder addressed by a fingerprint of exactly what the result depends on.

`runs/<stage>/<fingerprint>/` is finished and never changes; its `manifest.json` is written last.
`runs/<stage>/<fingerprint>.partial/` is work in progress, resumed after a kill. A lock keeps two jobs apart.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elmd.engine.files import read_json, sha256, write_json
from elmd.engine.hub import is_hub_id
from elmd.errors import ArtifactError, CheckpointError
from elmd.log import logger

MANIFEST = "manifest.json"

#: What a training keeps in its work-in-progress folder to resume from.
CHECKPOINTS, BEST = "checkpoints", "best.safetensors"

#: Files from this size on (bytes) have their hash remembered by modification time; smaller ones are just read.
_REMEMBER = 64 * 2**20


#: What converters put beside a checkpoint: used where its own path is given, and no part of the checkpoint.
BESIDE = ("adapter/", "glm_proj.safetensors")


class Store:
    """The folder of all results (`runs/`)."""

    def __init__(self, root: Path):
        self.root = root

    def folder(self, stage: str, fingerprint: str) -> Path:
        return self.root / stage / fingerprint

    def finished(self, stage: str, fingerprint: str) -> bool:
        return (self.folder(stage, fingerprint) / MANIFEST).is_file()

    def partial(self, stage: str, fingerprint: str) -> Path:
        return self.root / stage / f"{fingerprint}.partial"

    def finish(self, stage: str, fingerprint: str, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest and give the work in progress its final name."""
        partial, folder = self.partial(stage, fingerprint), self.folder(stage, fingerprint)
        write_json(partial / MANIFEST, manifest)
        partial.rename(folder)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # nothing is left to resume
        (folder / BEST).unlink(missing_ok=True)
        return folder

    def set_aside(self, stage: str, fingerprint: str) -> Path | None:
        """Move a finished result out of the way (`force=true`); returns where to, None if there was none."""
        folder = self.folder(stage, fingerprint)
        if not folder.exists():
            return None
        number = 1
        while (aside := folder.with_name(f"{fingerprint}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
        return aside

    def discard_if_empty(self, stage: str, fingerprint: str) -> None:
        """Remove a work-in-progress folder that holds nothing worth resuming, and its parents if they are empty."""
        folder = self.partial(stage, fingerprint)
        while folder != self.root.parent and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    @contextmanager
    def lock(self, stage: str, fingerprint: str) -> Iterator[None]:
        """Hold the right to make this result; a second job waits here. The system frees it when a job is killed."""
        path = self.root / ".locks" / f"{stage.replace(chr(47), chr(45))}-{fingerprint}"
        waiting = False
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            except FileNotFoundError:  # the holder before us removed the emptied folder in between
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
            except BlockingIOError:
                logger.info("%s %s is being made by another job; waiting for it", stage, fingerprint)
                waiting = True
                os.close(handle)
                continue
            # The holder before us removes the file on leaving: a lock on a removed file protects nothing.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
            os.close(handle)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)
            with suppress(OSError):  # in use by another job, or removed by it
                path.parent.rmdir()
                self.root.rmdir()

    def content(self, path: Path) -> Any:
        """What a file or folder holds, as a JSON-ready value: sizes and SHA-256 by name; a hub id stands for itself.

        Raises:
            CheckpointError: nothing is there, and the name is no hub id either.
        """
        if path.is_file():
            return self._file(path)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            names = {p.relative_to(path).as_posix(): p for p in files}
            return {name: self._file(p) for name, p in names.items() if not name.startswith(BESIDE)}
        if is_hub_id(path):
            return {"hub": str(path)}
        raise CheckpointError("no such file or folder", where=path, fix="check the path in the configuration")

    def _file(self, path: Path) -> dict[str, Any]:
        stat = path.stat()
        if stat.st_size < _REMEMBER:
            return {"bytes": stat.st_size, "sha256": sha256(path)}
        memory = self.root / ".hashes.json"
        hashes: dict[str, Any] = read_json(memory) if memory.is_file() else {}
        key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        if hashes.get(key, {}).get("stamp") != stamp:
            logger.info("hashing %s (%.1f GB, once)", path, stat.st_size / 1e9)
            hashes[key] = {"stamp": stamp, "sha256": sha256(path)}
            write_json(memory, hashes)
        return {"bytes": stat.st_size, "sha256": hashes[key]["sha256"]}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished result.

    Raises:
        ArtifactError: the folder is no finished result.
    """
    try:
        return read_json(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise ArtifactError("is not a finished result", where=folder, fix="run its stage again") from error
