"""From a sample to token ids: the function that training and generation share.

A sample becomes three runs of ids, with V video slots between the first two:

    before  [slots]  after  |  target EOS
    I B H u                    emotion (REP), emotion 。response (EERG)
                     R …答：

`before`, `after` and `target` are each encoded on their own, so the tokens of a prompt do not depend on what follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from elmd.data.prompts import SLOTS, Prompt, Task
from elmd.errors import CheckpointError, ConfigError
from elmd.types import Demonstration, Sample

#: The parts that lose text in a prompt that is too long, in this order; E_v and the instruction never lose any.
CUTS = ("history", "background", "demonstration", "utterance")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample in token ids. `slots`: V visual tokens, or 0. `target` ends in EOS; it is empty when generating."""

    before: list[int]
    slots: int
    after: list[int]
    target: list[int]

    @property
    def length(self) -> int:
        return len(self.before) + self.slots + len(self.after) + len(self.target)


class Encoder:
    """Renders the prompt, puts it into the tokenizer's chat template, encodes and truncates it.

    Attributes:
        cuts: how many samples have lost text so far, by part (`CUTS`, and `target`).

    Raises:
        CheckpointError: the tokenizer has no chat template or no end-of-text token.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt, max_prompt_tokens: int, max_target_tokens: int):
        for value, what in ((tokenizer.chat_template, "chat template"), (tokenizer.eos_token_id, "end-of-text token")):
            if value is None:
                raise CheckpointError(
                    f"the tokenizer has no {what}", where=tokenizer.name_or_path, fix="use a chat model's checkpoint"
                )
        self.tokenizer, self.prompt = tokenizer, prompt
        self.max_prompt_tokens, self.max_target_tokens = max_prompt_tokens, max_target_tokens
        self.cuts: Counter[str] = Counter()

    def __call__(
        self,
        sample: Sample,
        demonstrations: Sequence[Demonstration],
        task: Task,
        slots: int,
        *,
        with_target: bool,
    ) -> Encoded:
        """Encode one sample; a target is cut to `max_target_tokens`, EOS included.

        Raises:
            ConfigError: instruction and slots alone exceed `max_prompt_tokens`.
        """
        prompt = self._fit(sample, demonstrations, task, slots)
        if not with_target:
            return prompt
        target = self.text(self.prompt.target(sample.response.emotion, sample.response.text, task))
        if len(target) > self.max_target_tokens - 1:
            self.cuts["target"] += 1
            target = target[: self.max_target_tokens - 1]
        return replace(prompt, target=[*target, self.tokenizer.eos_token_id])

    def text(self, text: str) -> list[int]:
        """Ids of a text without the tokens that begin a sequence."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def wrap(self, content: str) -> tuple[list[int], list[int]]:
        """Ids before and after the slots of a user's message in the chat template."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = rendered.partition(SLOTS)
        # A template may write the tokens that begin a sequence (Llama, GLM-4), or leave them to `encode` (ChatGLM2).
        begin, ids = self.tokenizer.encode(""), self.text(before)
        written = ids[: len(begin)] == begin
        return ids if written else [*begin, *ids], self.text(after) if after else []

    def _fit(self, sample: Sample, demonstrations: Sequence[Demonstration], task: Task, slots: int) -> Encoded:
        def encode(s: Sample, d: Sequence[Demonstration]) -> Encoded:
            before, after = self.wrap("".join(self.prompt.parts(s, d, task, video=slots > 0).values()))
            return Encoded(before, slots, after, [])

        def fits(encoded: Encoded) -> bool:
            return encoded.length <= self.max_prompt_tokens

        encoded = encode(sample, demonstrations)
        if fits(encoded):
            return encoded
        for part in CUTS:
            size = _size(part, sample, demonstrations)
            if size == 0:
                continue
            self.cuts[part] += 1
            if fits(encode(*_cut(part, 0, sample, demonstrations))):
                # The most that fits lies in [low, high).
                low, high = 0, size
                while high - low > 1:
                    middle = (low + high) // 2
                    if fits(encode(*_cut(part, middle, sample, demonstrations))):
                        low = middle
                    else:
                        high = middle
                return encode(*_cut(part, low, sample, demonstrations))
            sample, demonstrations = _cut(part, 0, sample, demonstrations)
        raise ConfigError(
            f"the instruction and {slots} video slots alone exceed {self.max_prompt_tokens} tokens",
            where="llm.max_prompt_tokens",
            fix="raise it",
        )


def _size(part: str, sample: Sample, demonstrations: Sequence[Demonstration]) -> int:
    """How much a part can lose: turns of the history, characters of the others."""
    if part == "history":
        return len(sample.history)
    if part == "background":
        return len(sample.background or "")
    if part == "demonstration":
        return max((len(d.response) for d in demonstrations), default=0)
    return len(sample.utterance.text)


def _cut(
    part: str, size: int, sample: Sample, demonstrations: Sequence[Demonstration]
) -> tuple[Sample, Sequence[Demonstration]]:
    """Cut one part to `size`: the latest turns, the end of a text, or the beginning of a demonstration's response."""
    if part == "history":
        return replace(sample, history=sample.history[len(sample.history) - size :]), demonstrations
    if part == "background":
        text = sample.background or ""
        return replace(sample, background=text[len(text) - size :] or None), demonstrations
    if part == "demonstration":
        return sample, [replace(d, response=d.response[:size]) for d in demonstrations] if size else []
    text = sample.utterance.text
    return replace(sample, utterance=replace(sample.utterance, text=text[len(text) - size :])), []
