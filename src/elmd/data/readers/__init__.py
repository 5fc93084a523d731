"""Readers of data sets: file or folder -> `Source`. A new one is a file here and an entry in `DATASETS`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmd.data.readers import cped, jsonl, m3ed, tiny
from elmd.data.readers.source import ClipTemplate, Source, emotion_table, suggest
from elmd.engine.files import digest
from elmd.errors import ConfigError
from elmd.labels import BY_NAME, Emotion


@dataclass(frozen=True)
class Dataset:
    """How one kind of data set is read, and what its samples depend on.

    Attributes:
        read: from `data.path`, the emotion of each label, and where the clips lie (None: no clips) to a `Source`.
        labels: the emotion of each of its labels; `data.emotion_map` can replace some.
        files: what is read inside of a folder; the contents of these count. Empty: `data.path` itself is read.
        media: the clips and features that the data names, where it names them itself. None: they lie below
            `data.video_root`, where `data.video_template` says.
        upstream: the stage whose folder is read, for a data set that is made. None: `data.path` is read.
    """

    read: Callable[[Path, Mapping[str, Emotion], ClipTemplate | None], Source]
    labels: Mapping[str, Emotion]
    files: tuple[str, ...] = ()
    media: Callable[[Path], list[Path]] | None = None
    upstream: str | None = None

    def source(self, path: Path, emotion_map: Path | None, video_root: Path | None, video_template: str) -> Source:
        """The dialogues at `path`.

        Raises:
            DataError: the data are broken; with the file and the line.
            ConfigError: `video_root` or `video_template` cannot be used.
        """
        clips = ClipTemplate(video_root, video_template) if video_root and self.media is None else None
        return self.read(path, emotion_table(self.labels, emotion_map), clips)

    def contents(self, path: Path) -> dict[str, Path]:
        """The files whose contents count, by name: a folder of M3ED or CPED may hold the videos as well."""
        inside = {name: path / name for name in self.files if (path / name).exists()}
        return inside or {"data": path}

    def listing(self, path: Path, video_root: Path | None, video_template: str) -> dict[str, Any] | None:
        """Where the clips lie and which exist, by name and size, JSON-ready: samples.jsonl holds both.

        What is *in* a clip counts in `stage=features`. None: the data set names no clip of its own.
        """
        if self.media is not None:
            folder, template, files = path.parent, None, self.media(path)
            if not files:
                return None
        elif video_root is not None:
            folder, template = video_root, video_template
            files = sorted(Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
        else:
            return None
        sizes = [(os.path.relpath(file, folder), _size(file)) for file in files]
        return {"folder": str(folder.resolve()), "template": template, "files": digest(sizes)}


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


#: Every data set by its name in `data.reader`.
DATASETS: dict[str, Dataset] = {
    "tiny": Dataset(tiny.read_tiny, BY_NAME, media=tiny.media_files, upstream="bootstrap/world"),
    "m3ed": Dataset(m3ed.read_m3ed, BY_NAME, files=("annotation.json", "splitInfo")),
    "cped": Dataset(cped.read_cped, cped.EMOTION_MAP, files=tuple(cped.FILES.values())),
    "jsonl": Dataset(jsonl.read_jsonl, BY_NAME, media=jsonl.media_files),
}


def dataset(name: str) -> Dataset:
    """The entry of a data set.

    Raises:
        ConfigError: there is none of this name; the choices are listed.
    """
    if name not in DATASETS:
        raise ConfigError(f"there is no reader {name!r}", where="data.reader", fix=suggest(name, DATASETS, "choices"))
    return DATASETS[name]
