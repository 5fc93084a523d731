"""From sentences to samples (§3.1, §4.1): merging, pairs, filters, clips, splits; and the file that holds them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from elmd.data.readers.source import Notes, RawDialogue, Source
from elmd.engine.files import read_lines, write_lines
from elmd.errors import ConfigError, DataError
from elmd.labels import EMOTIONS, Emotion
from elmd.types import SPLITS, Clip, Dialogue, Sample, Sentence, Split, Utterance

SplitBy = Literal["paper", "dialogue", "official"]
MissingClip = Literal["error", "text_only", "drop"]

#: Splits that hold a tenth of the samples each, in the order in which they are filled.
TENTHS: tuple[Split, ...] = ("test", "valid")


# --- merging -------------------------------------------------------------------------------------------------------


def main_emotion(sentences: Sequence[Sentence]) -> Emotion:
    """The majority emotion of a turn (§4.1); tie: longest total text; then the one that occurs last (ours)."""
    count = Counter(sentence.emotion for sentence in sentences)
    length: Counter[Emotion] = Counter()
    last: dict[Emotion, int] = {}
    for i, sentence in enumerate(sentences):
        length[sentence.emotion] += len(sentence.text)
        last[sentence.emotion] = i
    return max(count, key=lambda emotion: (count[emotion], length[emotion], last[emotion]))


def merge(dialogue: RawDialogue, background: str | None, notes: Notes) -> Dialogue:
    """Consecutive sentences of one speaker become one utterance (§4.1); its id is that of its first sentence.

    Texts are joined by a space: it keeps the pause, and character metrics remove white space anyway. The clip runs
    from the first sentence's start to the last's end where they lie in one file; over several files it is that of
    the longest sentence, which is noted. So are features.
    """
    turns: list[list[Sentence]] = []
    for sentence in dialogue.sentences:
        if turns and turns[-1][0].speaker == sentence.speaker:
            turns[-1].append(sentence)
        else:
            turns.append([sentence])
    utterances = tuple(
        Utterance(
            id=turn[0].id,
            speaker=turn[0].speaker,
            text=" ".join(sentence.text for sentence in turn),
            emotion=main_emotion(turn),
            clip=_merged_clip(turn, f"{dialogue.id}/{turn[0].id}", notes),
            features=_merged_features(turn, f"{dialogue.id}/{turn[0].id}", notes),
            tags=tuple(dict.fromkeys(tag for sentence in turn for tag in sentence.tags)),
        )
        for turn in turns
    )
    if len(utterances) == 1:
        notes.add("dialogue of one speaker, which gives no sample", dialogue.id)
    return Dialogue(dialogue.id, dialogue.show, utterances, background, dialogue.split)


def _merged_clip(turn: Sequence[Sentence], where: str, notes: Notes) -> Clip | None:
    clips = [(sentence.clip, len(sentence.text)) for sentence in turn if sentence.clip]
    if not clips:
        return None
    if len({clip.path for clip, _ in clips}) > 1:
        notes.add("turn over several clips, that of its longest sentence taken", where)
        return max(clips, key=lambda item: item[1])[0]
    spans = [clip for clip, _ in clips]
    # None is the file's own beginning or end, so one None opens the whole turn on that side.
    starts, ends = [clip.start for clip in spans], [clip.end for clip in spans]
    start = None if None in starts else min(s for s in starts if s is not None)
    end = None if None in ends else max(e for e in ends if e is not None)
    return Clip(spans[0].path, start, end)


def _merged_features(turn: Sequence[Sentence], where: str, notes: Notes) -> str | None:
    found = [(sentence.features, len(sentence.text)) for sentence in turn if sentence.features]
    if len({path for path, _ in found}) > 1:
        notes.add("turn over several feature files, that of its longest sentence taken", where)
    return max(found, key=lambda item: item[1])[0] if found else None


# --- pairs and filters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """The adjacent pair of a dialogue whose response is utterance number `at` (from 0)."""

    dialogue: Dialogue
    at: int

    @property
    def id(self) -> str:
        return f"{self.dialogue.id}#{self.at}"

    @property
    def utterance(self) -> Utterance:
        return self.dialogue.utterances[self.at - 1]

    @property
    def response(self) -> Utterance:
        return self.dialogue.utterances[self.at]

    def sample(self, split: Split, *, text_only: bool) -> Sample:
        """As a sample of a split; `text_only` leaves out the clip and features of u."""
        u = self.utterance
        return Sample(
            id=self.id,
            dialogue=self.dialogue.id,
            show=self.dialogue.show,
            split=split,
            history=self.dialogue.utterances[: self.at - 1],
            utterance=replace(u, clip=None, features=None) if text_only else u,
            response=self.response,
            background=self.dialogue.background,
        )


def pairs(dialogues: Iterable[Dialogue]) -> list[Pair]:
    """All adjacent pairs (u, r), in order."""
    return [Pair(dialogue, at) for dialogue in dialogues for at in range(1, len(dialogue.utterances))]


def has_vision(utterance: Utterance) -> bool:
    """Whether the utterance names a clip or a feature array that exists (what is in it shows when it is decoded)."""
    named = (utterance.clip.path if utterance.clip else None, utterance.features)
    return any(path is not None and _exists(path) for path in named)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that no file system takes
        return False


#: Optional filters by name: what a pair must fulfil to be kept. The paper does not say which it used (Table 1).
FILTERS: dict[str, Callable[[Pair], bool]] = {
    "two_speakers": lambda pair: len({u.speaker for u in pair.dialogue.utterances}) == 2,
    "clip_of_u": lambda pair: has_vision(pair.utterance),
    "with_history": lambda pair: pair.at >= 2,
    "response_of_two_characters": lambda pair: len(re.findall(r"\w", pair.response.text)) >= 2,
}


# --- splits --------------------------------------------------------------------------------------------------------


def assign(kept: Sequence[Pair], by: SplitBy, seed: int) -> list[Split]:
    """The split of each pair.

    `paper` (Table 1): over samples, so that pairs of one dialogue fall on both sides; valid = test = floor(N / 10).
    `dialogue` (ours): whole dialogues, drawn until test and then valid hold a tenth of the samples.
    `official`: what the data set says. Both draws depend on the seed and the ids, not on the order of the file.

    Raises:
        DataError: `official`, and a dialogue has no split; or a split stays empty.
    """
    splits: list[Split]
    if by == "official":
        splits = []
        for pair in kept:
            if pair.dialogue.split is None:
                show = f"show {pair.dialogue.show!r}" if pair.dialogue.show else f"dialogue {pair.dialogue.id!r}"
                raise DataError(
                    f"{show} is in no official split",
                    where=f"dialogue {pair.dialogue.id}",
                    fix="name it in one of the split lists (data/README.md), or set data.split=dialogue",
                )
            splits.append(pair.dialogue.split)
    elif by == "paper":
        drawn = _shuffled((pair.id for pair in kept), seed)
        tenth = len(drawn) // 10
        test, valid = set(drawn[:tenth]), set(drawn[tenth : 2 * tenth])
        splits = ["test" if pair.id in test else "valid" if pair.id in valid else "train" for pair in kept]
    else:
        size = Counter(pair.dialogue.id for pair in kept)
        held: Counter[Split] = Counter()
        home: dict[str, Split] = {}
        for dialogue in _shuffled(size, seed):
            wanting: list[Split] = [split for split in TENTHS if held[split] * 10 < len(kept)]
            home[dialogue] = (*wanting, "train")[0]
            held[home[dialogue]] += size[dialogue]
        splits = [home[pair.dialogue.id] for pair in kept]
    empty = [split for split in SPLITS if split not in splits]
    if empty:
        raise DataError(
            f"the {by} split leaves {' and '.join(empty)} empty ({len(kept)} samples)",
            where="data.split",
            fix="give more dialogues, another data.split or fewer data.filters",
        )
    return splits


def _shuffled(ids: Iterable[str], seed: int) -> list[str]:
    drawn = sorted(ids)
    random.Random(seed).shuffle(drawn)
    return drawn


# --- the whole way -------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """Samples in the data's order, and what happened on the way, JSON-ready.

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
    background: dict[str, str] | None = None,
) -> Prepared:
    """Samples of a source.

    Args:
        source: what a reader returned.
        split: see `assign`.
        seed: of the draw of the splits.
        filters: names in `FILTERS`, applied in this order.
        on_missing_clip: what to do with a sample whose u has no clip, if any of the source's utterances has one (a
            data set without any is text only, and nothing is missing).
        background: text by dialogue or show id. A dialogue's own text comes before that of its show.

    Raises:
        ConfigError: an unknown filter.
        DataError: clips are missing and `on_missing_clip` is `error`; no pair is left; see also `assign`.
    """
    for name in filters:
        if name not in FILTERS:
            raise ConfigError(f"unknown filter {name!r}", where="data.filters", fix=f"known: {', '.join(FILTERS)}")
    texts = background or {}
    for key in sorted(set(texts) - {d.id for d in source.dialogues} - {d.show for d in source.dialogues}):
        source.notes.add("background text of no known show or dialogue, passed over", key)
    dialogues = [
        merge(raw, texts.get(raw.id) or raw.background or texts.get(raw.show), source.notes) for raw in source.dialogues
    ]
    every = pairs(dialogues)
    kept, dropped = every, {}
    for name in filters:
        passed = [pair for pair in kept if FILTERS[name](pair)]
        dropped[f"filter {name}"] = len(kept) - len(passed)
        kept = passed
    visual = any(u.clip or u.features for dialogue in dialogues for u in dialogue.utterances)
    missing = [pair for pair in kept if not has_vision(pair.utterance)] if visual else []
    if missing and on_missing_clip == "error":
        first = ", ".join(_wanted(pair) for pair in missing[:3])
        raise DataError(
            f"the clip of u is missing for {len(missing)} of {len(kept)} samples, first: {first}",
            where="data.on_missing_clip",
            fix="check data.video_root and data.video_template, or set data.on_missing_clip=text_only or drop",
        )
    if on_missing_clip == "drop":
        dropped["clip missing"] = len(missing)
        gone = {pair.id for pair in missing}
        kept, missing = [pair for pair in kept if pair.id not in gone], []
    if not kept:
        raise DataError(
            "no adjacent pair of two speakers is left",
            where="data.filters",
            fix="choose fewer filters, or give dialogues of two speakers",
        )
    bare = {pair.id for pair in missing}
    samples = [
        pair.sample(part, text_only=pair.id in bare) for pair, part in zip(kept, assign(kept, split, seed), strict=True)
    ]
    parts = {part: [sample for sample in samples if sample.split == part] for part in SPLITS}
    return Prepared(
        samples,
        {
            "dialogues": len(dialogues),
            "sentences": sum(len(raw.sentences) for raw in source.dialogues),
            "turns": sum(len(dialogue.utterances) for dialogue in dialogues),
            "pairs": len(every),
            "samples": {part: len(found) for part, found in parts.items()},
            "emotions": {
                part: {
                    "utterance": _emotions(sample.utterance for sample in found),
                    "response": _emotions(sample.response for sample in found),
                }
                for part, found in parts.items()
            },
            "dropped": dropped,
            "text_only": len(missing),
            "text_only_first": [_wanted(pair) for pair in missing[:3]],
            "filters": {
                name: {"chosen": name in filters, "drops_alone": sum(not keep(pair) for pair in every)}
                for name, keep in FILTERS.items()
            },
            "notes": source.notes.as_dict(),
        },
    )


def _wanted(pair: Pair) -> str:
    """The name of what a pair lacks."""
    u = pair.utterance
    return f"{pair.id} ({u.clip.path if u.clip else u.features or 'names none'})"


def _emotions(utterances: Iterable[Utterance]) -> dict[str, int]:
    count = Counter(utterance.emotion for utterance in utterances)
    return {emotion.value: count[emotion] for emotion in EMOTIONS}


# --- samples.jsonl -------------------------------------------------------------------------------------------------


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


def _utterance_record(utterance: Utterance) -> dict[str, Any]:
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
    return Sample(
        **{
            **record,
            "history": tuple(_utterance(utterance) for utterance in record["history"]),
            "utterance": _utterance(record["utterance"]),
            "response": _utterance(record["response"]),
        }
    )


def _utterance(record: dict[str, Any]) -> Utterance:
    return Utterance(
        **{
            **record,
            "emotion": Emotion(record["emotion"]),
            "clip": Clip(**record["clip"]) if record["clip"] else None,
            "tags": tuple(record["tags"]),
        }
    )
