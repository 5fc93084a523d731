"""The reader of the tiny world (data=tiny): the dialogues that stage `bootstrap/world` made, in the form of jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from elmd.data.readers import jsonl
from elmd.data.readers.source import ClipTemplate, Source
from elmd.labels import BY_NAME, Emotion

#: Its name in the folder of the world.
DIALOGUES = "dialogues.jsonl"


def read_tiny(folder: Path, labels: Mapping[str, Emotion] = BY_NAME, clips: ClipTemplate | None = None) -> Source:
    """Dialogues of the world in `folder`. See `jsonl.read_jsonl`."""
    return jsonl.read_jsonl(folder / DIALOGUES, labels, clips)


def media_files(folder: Path) -> list[Path]:
    """The world's clips."""
    return jsonl.media_files(folder / DIALOGUES)
