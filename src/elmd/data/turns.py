"""From sentences to turns (§4.1): consecutive sentences of one speaker become one utterance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from elmd.data.readers.source import Notes, RawDialogue
from elmd.labels import Emotion
from elmd.types import Clip, Dialogue, Sentence, Utterance


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
    from the start of the first sentence to the end of the last where they lie in one file; otherwise it is the clip of
    the longest sentence, which is noted. The same holds for features.
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
    # None is the beginning or the end of the file: with one None, the turn reaches that far.
    starts, ends = [clip.start for clip in spans], [clip.end for clip in spans]
    start = None if None in starts else min(s for s in starts if s is not None)
    end = None if None in ends else max(e for e in ends if e is not None)
    return Clip(spans[0].path, start, end)


def _merged_features(turn: Sequence[Sentence], where: str, notes: Notes) -> str | None:
    files = [(sentence.features, len(sentence.text)) for sentence in turn if sentence.features]
    if len({path for path, _ in files}) > 1:
        notes.add("turn over several feature files, that of its longest sentence taken", where)
    return max(files, key=lambda item: item[1])[0] if files else None
