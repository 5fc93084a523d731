"""The case gallery (after Fig. 5): test samples with all that the systems saw and what each of them answered."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from random import Random
from typing import ClassVar

from elmd.evaluation.predictions import Prediction
from elmd.evaluation.runs import Experiment
from elmd.labels import EMOTIONS
from elmd.retrieval.demonstrations import DEMONSTRATIONS, load_demonstrations
from elmd.types import Demonstration, Sample
from elmd.vision.thumbnails import thumbnails

#: Pixels of a frame's height; the page shows it a little smaller, so that it is sharp on a phone.
HEIGHT = 96


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system answered. `demonstration`: its r', where that is not the one that the case shows."""

    system: str
    text: str
    emotion: str | None
    wrong: bool  # names another emotion than the gold one
    demonstration: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One sample; `history` and the fields after it are empty where only a predictions file is known.

    Attributes:
        turns: (speaker, text, emotion) of H, then of u; of a bare predictions file whatever its prompt says.
        frames: data URIs of u's clip; `frames_note` says why there are none.
        demonstration: (text, emotion) of r' of the system that the report is about.
        differ: systems that name an emotion do not agree on it.
    """

    id: str
    gold: str
    gold_emotion: str | None
    replies: tuple[Answer, ...]
    tags: tuple[str, ...] = ()
    background: str | None = None
    turns: tuple[tuple[str, str, str], ...] = ()
    responder: str = ""
    prompt: str = ""
    frames: tuple[str, ...] = ()
    frames_note: str = ""
    demonstration: tuple[str, str | None] | None = None

    @property
    def differ(self) -> bool:
        return len({reply.emotion for reply in self.replies if reply.emotion is not None}) > 1

    @property
    def wrong(self) -> list[int]:
        """Positions of the systems whose emotion is not the gold one."""
        return [i for i, reply in enumerate(self.replies) if reply.wrong]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Cases, and in words which of how many they are."""

    cases: Sequence[Case]
    systems: Sequence[str]
    emotions: Sequence[str]
    chosen: str
    kind: ClassVar[str] = "gallery"

    @property
    def naming(self) -> dict[int, str]:
        """The systems that name an emotion in any case, by position: only they can be filtered by what they named."""
        named = {i for case in self.cases for i, reply in enumerate(case.replies) if reply.emotion is not None}
        return {i: name for i, name in enumerate(self.systems) if i in named}


def pick(emotions: Mapping[str, str], count: int, seed: int = 0) -> list[str]:
    """Ids of up to `count` samples, as many of each emotion as there are, drawn with a seed; in the given order.

    Args:
        emotions: emotion by sample id.
    """
    draw = Random(f"gallery {seed}")
    strata: dict[str, list[str]] = {}
    for id_, emotion in emotions.items():
        strata.setdefault(emotion, []).append(id_)
    for members in strata.values():
        draw.shuffle(members)
    dealt = [id_ for turn in zip_longest(*strata.values()) for id_ in turn if id_ is not None]
    chosen = set(dealt[:count])
    return [id_ for id_ in emotions if id_ in chosen]


def gallery(experiment: Experiment, main: str, count: int, *, frames: int = 4, seed: int = 0) -> Gallery:
    """Up to `count` cases of an experiment, of every system its first training seed and first decode seed.

    Raises:
        DataError, ArtifactError: samples or demonstrations that a run points at cannot be read.
    """
    runs = {name: of_system[0] for name, of_system in experiment.systems.items()}
    answers = {name: first_draw(run.predictions) for name, run in runs.items()}
    gold = answers[main]
    chosen = pick({id_: p.gold_emotion or "" for id_, p in gold.items()}, count, seed)
    samples: dict[str, Sample] = {}
    demonstrations: dict[str, list[Demonstration]] = {}
    source = next((run for run in [runs[main], *runs.values()] if run.artifact("samples")), None)
    if source is not None:
        samples = {sample.id: sample for sample in source.samples()}
    if index := runs[main].artifact("demonstrations"):
        demonstrations = load_demonstrations(index / DEMONSTRATIONS)
    clips = {id_: samples[id_].utterance.clip for id_ in chosen if id_ in samples}
    filmed = {id_: clip for id_, clip in clips.items() if clip is not None}
    pictures = thumbnails(filmed, frames=frames, height=HEIGHT) if filmed else {}
    cases = [
        case(
            {name: predictions[id_] for name, predictions in answers.items()},
            main,
            sample=samples.get(id_),
            demonstration=next(iter(demonstrations.get(id_, ())), None),
            frames=pictures.get(id_, ()),
            frames_note="The clip of u cannot be shown." if id_ in filmed and not pictures[id_] else "",
        )
        for id_ in chosen
    ]
    note = (
        f"{len(cases)} of {len(gold)} samples, as many of each gold emotion as there are, drawn with seed {seed}: none "
        "is chosen for what a system answered. Of each system: the first training seed and the first decode seed"
    )
    seeds = dict.fromkeys((run.seed, next(iter(answers[name].values())).seed) for name, run in runs.items())
    own = " and ".join(f"{a}, {b}" for a, b in seeds if a is not None)
    note += f" ({own})." if own else "."
    if filmed:
        note += f" The {frames} frames are spread evenly over the clip of u."
    emotions = [emotion.value for emotion in EMOTIONS if any(case.gold_emotion == emotion for case in cases)]
    return Gallery(cases, list(runs), emotions, note)


def first_draw(predictions: Sequence[Prediction]) -> dict[str, Prediction]:
    """One prediction per sample: that of the first decode seed."""
    return {p.id: p for p in predictions if p.seed == predictions[0].seed}


def case(
    replies: Mapping[str, Prediction],
    main: str,
    *,
    sample: Sample | None = None,
    demonstration: Demonstration | None = None,
    frames: Sequence[bytes] = (),
    frames_note: str = "",
) -> Case:
    """One sample's case.

    Args:
        replies: each system's prediction of this sample.
        main: the system whose demonstration is shown first.
        demonstration: its r' with the emotion; without it, the text that the prediction holds.
        frames: JPEG bytes.
    """
    first = replies[main]
    shown = demonstration.response if demonstration is not None else first.demonstration
    turns = () if sample is None else (*sample.history, sample.utterance)
    return Case(
        id=first.id,
        gold=first.reference,
        gold_emotion=first.gold_emotion,
        replies=tuple(
            Answer(
                system=name,
                text=p.hypothesis,
                emotion=p.predicted_emotion,
                wrong=None not in (p.predicted_emotion, p.gold_emotion) and p.predicted_emotion != p.gold_emotion,
                demonstration=p.demonstration if p.demonstration != shown else None,
            )
            for name, p in replies.items()
        ),
        tags=first.tags,
        background=None if sample is None else sample.background,
        turns=tuple((turn.speaker, turn.text, turn.emotion.value) for turn in turns),
        responder="" if sample is None else sample.response.speaker,
        prompt="" if sample is not None else _prompt(first),
        frames=tuple(f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in frames),
        frames_note=frames_note,
        demonstration=None if shown is None else (shown, demonstration.emotion.value if demonstration else None),
    )


def _prompt(prediction: Prediction) -> str:
    """What a predictions file without a data set says of the dialogue: its prompt's parts, if it keeps any."""
    parts = prediction.extra.get("prompt")
    if not isinstance(parts, Mapping):
        return parts if isinstance(parts, str) else ""
    return "".join(str(parts[name]) for name in ("background", "history", "utterance") if name in parts)
