"""The prompt of six parts (§3.4, Fig. 4): an object that is saved with the checkpoint.

The order is that of eq. 10: instruction I, background B, history H, utterance u, video slots E_v, demonstration R.
The figure is not public, so the words are ours; they are in the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from elmd.engine.files import read_json, write_json
from elmd.errors import CheckpointError
from elmd.labels import WORDS, Emotion
from elmd.types import Demonstration, Sample

#: What the model is asked for: the emotion (eq. 10), emotion and response (eq. 11), the response alone (VisualGLM).
Task = Literal["rep", "eerg", "reply"]

#: Marks the place of the video slots while the chat template is rendered; users' texts lose it before.
SLOTS = "\ue000"


@dataclass(frozen=True)
class Prompt:
    """Texts of the parts, each with its fields in braces.

    Attributes:
        instruction: I; same for every sample. `{task}` is the sentence `rep`, `eerg` or `reply`.
        background: `{background}`; the part is left out where a sample has none.
        turn: one turn of H: `{speaker}`, `{text}`.
        utterance: u: `{speaker}`, `{text}`, and `{responder}`, the speaker of r.
        video: what surrounds the slots: `{video}`; left out where a sample has no visual tokens.
        demonstration: R, with a sentence that explains it: `{response}`, `{utterance}`.
        rep, eerg, reply: the sentence that asks for each task's target.
        emotion_end: ends the emotion word in EERG's target `<emotion>。<response>` (eq. 11).
    """

    instruction: str
    background: str
    turn: str
    utterance: str
    video: str
    demonstration: str
    rep: str
    eerg: str
    reply: str
    emotion_end: str = "。"

    def parts(
        self,
        sample: Sample,
        demonstrations: Sequence[Demonstration],
        task: Task,
        *,
        video: bool,
        history: int | None = None,
    ) -> dict[str, str]:
        """The text of each part, empty where it is left out; the video part holds `SLOTS`.

        Args:
            video: whether this sample has visual tokens (or a scene in words).
            history: how many of the latest turns of H to keep; None keeps all.
        """
        turns = sample.history if history is None else sample.history[len(sample.history) - history :]
        return {
            "instruction": self.instruction.format(task=getattr(self, task)),
            "background": self.background.format(background=clean(sample.background)) if sample.background else "",
            "history": "".join(self.turn.format(speaker=clean(t.speaker), text=clean(t.text)) for t in turns),
            "utterance": self.utterance.format(
                speaker=clean(sample.utterance.speaker),
                text=clean(sample.utterance.text),
                responder=clean(sample.response.speaker),
            ),
            "video": self.video.format(video=SLOTS) if video else "",
            "demonstration": "".join(
                self.demonstration.format(response=clean(d.response), utterance=clean(d.utterance))
                for d in demonstrations
            ),
        }

    def target(self, emotion: Emotion, response: str, task: Task) -> str:
        """What the model learns to write: the emotion word (eq. 10), and for EERG the response after it (eq. 11)."""
        if task == "reply":
            return clean(response)
        word = WORDS[emotion]
        return word if task == "rep" else f"{word}{self.emotion_end}{clean(response)}"

    def split_target(self, text: str, task: Task) -> tuple[Emotion | None, str]:
        """Undo `target` on generated text: (emotion, response). The emotion is None where the text begins with none."""
        text = text.strip()
        if task == "reply":
            return None, text
        for emotion, word in WORDS.items():
            if text.startswith(word):
                rest = text[len(word) :]
                return emotion, rest.removeprefix(self.emotion_end).strip()
        return None, text

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Prompt:
        try:
            return cls(**read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                "is no prompt that this version can read", where=path, fix="train the checkpoint again"
            ) from error


def clean(text: str) -> str:
    """A user's text without the character that marks the slots."""
    return text.replace(SLOTS, "")
