"""Samples (§3.1, §4.1): made from what a reader returns, and the file `samples.jsonl` that holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from elmd.data.pairs import FILTERS, Pair, has_vision, pairs
from elmd.data.readers.source import Source
from elmd.data.splits import SplitBy, assign
from elmd.data.turns import merge
from elmd.engine.files import read_lines, write_lines
from elmd.errors import ConfigError, DataError
from elmd.labels import EMOTIONS, Emotion
from elmd.types import SPLITS, Clip, Dialogue, Sample, Utterance

MissingClip = Literal["error", "text_only", "drop"]


@dataclass
class Prepared:
    """Samples in the data's order, and counts, JSON-ready.

    `counts`: dialogues, sentences, turns, pairs, samples per split, emotions per split (of u and of r), dropped by
    cause, text_only, filters (how many pairs each would drop alone, and whether it was chosen), notes.
    """

    samples: list[Sample]
    counts: dict[str, Any] = field(default_factory=dict)


def prepare(
    source: Source,
    *,
    split: SplitBy,
    seed: int = 0,
    filters: Sequence[str] = (),
    on_missing_clip: MissingClip = "error",
    background: Mapping[str, str] | None = None,
) -> Prepared:
    """Samples of a source.

    Args:
        source: what a reader returned.
        split: see `assign`.
        seed: of the split.
        filters: names in `FILTERS`, applied in this order.
        on_missing_clip: what to do with a sample whose u has no clip, if any of the source's utterances has one (a
            data set without clips is text only, and nothing is missing).
        background: text by dialogue or show id. A dialogue's own text comes before that of its show.

    Raises:
        ConfigError: an unknown filter.
        DataError: clips are missing and `on_missing_clip` is `error`; no pair is left; see also `assign`.
    """
    for name in filters:
        if name not in FILTERS:
            raise ConfigError(f"unknown filter {name!r}", where="data.filters", fix=f"known: {', '.join(FILTERS)}")
    dialogues = _dialogues(source, background or {})
    candidates = pairs(dialogues)
    kept, dropped = candidates, {}
    for name in filters:
        passed = [pair for pair in kept if FILTERS[name](pair)]
        dropped[f"filter {name}"] = len(kept) - len(passed)
        kept = passed
    has_clips = any(u.clip or u.features for dialogue in dialogues for u in dialogue.utterances)
    missing = [pair for pair in kept if not has_vision(pair.utterance)] if has_clips else []
    if missing and on_missing_clip == "error":
        raise DataError(
            f"the clip of u is missing for {len(missing)} of {len(kept)} samples, first: {', '.join(_first(missing))}",
            where="data.on_missing_clip",
            fix="check data.video_root and data.video_template, or set data.on_missing_clip=text_only or drop",
        )
    if on_missing_clip == "drop":
        dropped["clip missing"] = len(missing)
        lost = {pair.id for pair in missing}
        kept, missing = [pair for pair in kept if pair.id not in lost], []
    if not kept:
        raise DataError(
            "no adjacent pair of two speakers is left",
            where="data.filters",
            fix="choose fewer filters, or give dialogues of two speakers",
        )
    text_only = {pair.id for pair in missing}
    samples = [
        pair.sample(part, text_only=pair.id in text_only)
        for pair, part in zip(kept, assign(kept, split, seed), strict=True)
    ]
    parts = {part: [sample for sample in samples if sample.split == part] for part in SPLITS}
    counts = {
        "dialogues": len(dialogues),
        "sentences": sum(len(raw.sentences) for raw in source.dialogues),
        "turns": sum(len(dialogue.utterances) for dialogue in dialogues),
        "pairs": len(candidates),
        "samples": {part: len(members) for part, members in parts.items()},
        "emotions": {
            part: {
                "utterance": _emotions(sample.utterance for sample in members),
                "response": _emotions(sample.response for sample in members),
            }
            for part, members in parts.items()
        },
        "dropped": dropped,
        "text_only": len(missing),
        "text_only_first": _first(missing),
        "filters": {
            name: {"chosen": name in filters, "drops_alone": sum(not keep(pair) for pair in candidates)}
            for name, keep in FILTERS.items()
        },
        "notes": source.notes.as_dict(),
    }
    return Prepared(samples, counts)


def _dialogues(source: Source, background: Mapping[str, str]) -> list[Dialogue]:
    """The source's dialogues with sentences merged into turns, and with their background."""
    ids = {raw.id for raw in source.dialogues} | {raw.show for raw in source.dialogues}
    for key in sorted(background.keys() - ids):
        source.notes.add("background text of no known show or dialogue, ignored", key)
    return [
        merge(raw, background.get(raw.id) or raw.background or background.get(raw.show), source.notes)
        for raw in source.dialogues
    ]


def _first(missing: Sequence[Pair]) -> list[str]:
    """The first pairs without a clip, and what each lacks."""
    clips = [pair.utterance.clip for pair in missing[:3]]
    return [
        f"{pair.id} ({clip.path if clip else pair.utterance.features or 'names none'})"
        for pair, clip in zip(missing, clips, strict=False)
    ]


def _emotions(utterances: Iterable[Utterance]) -> dict[str, int]:
    count = Counter(utterance.emotion for utterance in utterances)
    return {emotion.value: count[emotion] for emotion in EMOTIONS}


def save_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one sample a line, atomically."""
    write_lines(path, map(_sample_record, samples))


def load_samples(path: Path) -> list[Sample]:
    """The samples of a file written by `save_samples`, equal to what was saved.

    Raises:
        DataError: the file is missing or empty, or a line is not a sample.
    """
    samples = read_lines(path, _sample, "sample", fix="run stage=prepare")
    if not samples:
        raise DataError("the file holds no sample", where=path, fix="run stage=prepare again")
    return samples


def _sample_record(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.id,
        "dialogue": sample.dialogue,
        "show": sample.show,
        "split": sample.split,
        "background": sample.background,
        "history": [_utterance_record(utterance) for utterance in sample.history],
        "utterance": _utterance_record(sample.utterance),
        "response": _utterance_record(sample.response),
    }


def _utterance_record(utterance: Utterance) -> dict[str, Any]:  # dataclasses.asdict takes ten times as long
    clip = utterance.clip
    return {
        "id": utterance.id,
        "speaker": utterance.speaker,
        "text": utterance.text,
        "emotion": utterance.emotion.value,
        "clip": {"path": clip.path, "start": clip.start, "end": clip.end} if clip else None,
        "features": utterance.features,
        "tags": list(utterance.tags),
    }


def _sample(record: dict[str, Any]) -> Sample:
    if record["split"] not in SPLITS:
        raise ValueError(f"unknown split {record['split']!r}")
    history = tuple(_utterance(utterance) for utterance in record["history"])
    u, r = _utterance(record["utterance"]), _utterance(record["response"])
    return Sample(**{**record, "history": history, "utterance": u, "response": r})


def _utterance(record: dict[str, Any]) -> Utterance:
    clip = Clip(**record["clip"]) if record["clip"] else None
    return Utterance(**{**record, "emotion": Emotion(record["emotion"]), "clip": clip, "tags": tuple(record["tags"])})
