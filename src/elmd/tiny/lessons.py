"""What the stand-in for the language model reads: prompts of every kind with their targets, from text to ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from elmd.data.encode import Encoder
from elmd.data.prompts import SLOTS, Prompt, Task, clean
from elmd.tiny.faces import describe, geometry
from elmd.types import Demonstration, Sample

#: Share of lessons that only ask to repeat a sentence: copying is what a demonstration needs, and is learnt late.
REPEATED = 0.15
#: Share of each kind of prompt among the other lessons; the one that a baseline asks with is not to be strange either.
TASKS: dict[Task, float] = {"rep": 0.45, "eerg": 0.4, "reply": 0.15}


@dataclass(frozen=True)
class Lesson:
    """One text for the language model: a prompt with its target, in words.

    Attributes:
        content: the user's message; holds `SLOTS` where a scene is to stand.
        scene: phrases that say what the face does, repeated to fill the place of the slots; empty for none.
        target: what follows.
    """

    content: str
    scene: tuple[str, ...]
    target: str


def lessons(
    samples: Sequence[Sample],
    like: Callable[[Sample, Random], Sample | None],
    prompt: Prompt,
    seed: int,
    *,
    scenes: bool,
) -> Iterator[Lesson]:
    """Every sample as a prompt of a drawn kind: REP or EERG, with and without scene, demonstration and history.

    Args:
        like: draws the sample whose response is the demonstration.
        scenes: whether the text may describe the speaker's face.
    """
    for number, sample in enumerate(samples):
        draw = Random(f"lesson-{seed}-{number}")
        if draw.random() < REPEATED:
            sentence = clean(sample.response.text)
            yield Lesson(f"请重复：{sentence}", (), sentence)
            continue
        (task,) = draw.choices(tuple(TASKS), tuple(TASKS.values()))
        shown = scenes and draw.random() < 0.8
        other = like(sample, draw) if draw.random() < 0.6 else None
        kept = None if draw.random() < 0.7 else draw.randint(0, len(sample.history))
        demonstrations = (
            []
            if other is None
            else [
                Demonstration(
                    other.id, other.dialogue, other.utterance.text, other.response.text, other.response.emotion, 1.0
                )
            ]
        )
        parts = prompt.parts(sample, demonstrations, task, video=shown, history=kept)
        if draw.random() < 0.05:
            parts["background"] = ""
        scene = describe(geometry(sample.utterance.emotion, draw), draw) if shown else []
        yield Lesson(
            "".join(parts.values()), tuple(scene), prompt.target(sample.response.emotion, sample.response.text, task)
        )


def train_tokenizer(texts: Sequence[Lesson], vocab_size: int, *, coverage: float) -> Any:
    """ChatGLM2's tokenizer format on the text of the lessons, in the chat template's frame.

    Args:
        coverage: share of the characters that get pieces; the rarest others are written in bytes.
    """
    from elmd.convert.tokenizer import chatglm2_tokenizer, train_pieces

    lines = []
    for lesson in texts:
        for text in (f"[Round 1]\n问：{lesson.content}\n答：".replace(SLOTS, "\n"), *lesson.scene, lesson.target):
            lines += [line for line in text.split("\n") if line]
    return chatglm2_tokenizer(train_pieces(lines, vocab_size, coverage))


@dataclass(frozen=True)
class Line:
    """A lesson in ids; its target begins at `at`."""

    ids: list[int]
    at: int


def encode_lessons(lessons: Sequence[Lesson], encoder: Encoder, draw: Random) -> list[Line]:
    """Ids as `Encoder` makes them, with the scene's words, 4 to 18 tokens of them, where visual tokens will be.

    Too long a prompt loses its beginning. All texts go to the tokenizer at once: one by one they take three times as
    long.
    """
    tokenizer = encoder.tokenizer
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": lesson.content}], tokenize=False, add_generation_prompt=True
        ).partition(SLOTS)
        for lesson in lessons
    ]

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    before = tokenizer([text for text, _, _ in rendered])["input_ids"]  # with the tokens that open a sequence
    after = ids([text for _, _, text in rendered])
    scenes = ids([_scene(lesson.scene, draw) for lesson in lessons])
    targets = ids([lesson.target for lesson in lessons])
    lines = []
    for parts in zip(before, scenes, after, targets, strict=True):
        prompt = [*parts[0], *parts[1][: draw.randint(4, 18)], *parts[2]][-encoder.max_prompt_tokens :]
        target = parts[3][: encoder.max_target_tokens - 1]
        lines.append(Line([*prompt, *target, tokenizer.eos_token_id], len(prompt)))
    return lines


def _scene(phrases: Sequence[str], draw: Random) -> str:
    """The phrases again and again, each time in another order, for 18 tokens at least; none where there are none."""
    words: list[str] = []
    while phrases and len(words) < 18:
        words += draw.sample(phrases, len(phrases))
    return "".join(f"{word}，" for word in words)
