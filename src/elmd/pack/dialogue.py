"""A dialogue of one's own as a sample to be replied to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elmd.data.pairs import Pair
from elmd.data.readers.source import Notes, RawDialogue
from elmd.data.turns import merge
from elmd.errors import ClipError, DataError
from elmd.labels import Emotion
from elmd.types import Clip, Sample, Sentence


def to_sample(
    utterance: tuple[str, str],
    history: Sequence[tuple[str, str]] = (),
    *,
    clip: str | Path | None = None,
    background: str | None = None,
    responder: str | None = None,
    id: str = "reply",
) -> Sample:
    """A sample of a new dialogue, for `elmd.pack.Pack.reply_all`.

    Consecutive turns of one speaker are joined, as in training (§4.1).

    Args:
        utterance: u, as (speaker, text).
        history: H, oldest first.
        clip: a video of u, or a folder of frames.
        background: B.
        responder: who is to reply; None: who last spoke in the history apart from the speaker of u.
        id: of the dialogue, unlike all that were trained on; the draw of a sampled reply depends on it.

    Raises:
        DataError: u or a turn of H is no pair of texts, u has no text, or its speaker is to reply.
        ClipError: there is no such clip.
    """
    if not _is_turn(utterance):
        raise DataError("is no pair of texts", where="utterance", fix="give (speaker, text)")
    speaker, text = utterance
    history = turns(history, "history")
    if clip is not None:
        check_clip(Path(clip))
    if responder == speaker:
        raise DataError(f"{speaker} cannot reply to {speaker}", where="responder", fix="name another speaker")
    if not text.strip():
        raise DataError("there is nothing to reply to", where="utterance", fix="give its text")
    if responder is None:
        others = [name for name, _ in history if name != speaker]
        responder = others[-1] if others else next(name for name in ("A", "B") if name != speaker)
    video = Clip(str(Path(clip).absolute())) if clip is not None else None
    # No emotion of an earlier turn is read; the reply's own is what the model is to say.
    sentences = [Sentence(str(i), name, words, Emotion.NEUTRAL) for i, (name, words) in enumerate(history)]
    sentences.append(Sentence(str(len(history)), speaker, text, Emotion.NEUTRAL, video))
    sentences.append(Sentence(str(len(history) + 1), responder, "", Emotion.NEUTRAL))
    dialogue = merge(RawDialogue(id, "", tuple(sentences)), background, Notes())
    return Pair(dialogue, len(dialogue.utterances) - 1).sample("test", text_only=False)


def turns(given: object, where: str | Path) -> list[tuple[str, str]]:
    """What a user gave as turns of a dialogue, as (speaker, text).

    Raises:
        DataError: it is something else.
    """
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(map(_is_turn, given)):
        raise DataError(
            "is no list of turns, each a speaker and a text",
            where=where,
            fix='give [["A", "…"], ["B", "…"]], oldest first',
        )
    return [(speaker, text) for speaker, text in given]


def _is_turn(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def check_clip(path: Path) -> None:
    """
    Raises:
        ClipError: there is nothing at the path.
    """
    if not path.exists():
        raise ClipError("there is no such clip", where=path, fix="check the path")
