"""From a sample to token ids: the one function that training and generation share.

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

#: Order in which a prompt that is too long loses text; E_v and the instruction never do.
CUTS = ("history", "background", "demonstration", "utterance")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample in ids. `target` ends in EOS and is empty when generating; `slots` = V visual tokens, or 0."""

    before: list[int]
    slots: int
    after: list[int]
    target: list[int]

    @property
    def length(self) -> int:
        return len(self.before) + self.slots + len(self.after) + len(self.target)


class Encoder:
    """Renders, wraps in the tokenizer's chat template, encodes and truncates.

    Attributes:
        cuts: how many samples have lost text so far, by part (`CUTS`, and `target`).

    Raises:
        CheckpointError: the tokenizer has no chat template or no end-of-text token.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt, max_prompt_tokens: int, max_target_tokens: int):
        for need, what in ((tokenizer.chat_template, "chat template"), (tokenizer.eos_token_id, "end-of-text token")):
            if need is None:
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
        """Encode one sample; the target is cut only here in training, at `max_target_tokens`.

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
        """Ids of a piece of text without the tokens that open a sequence."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def wrap(self, content: str) -> tuple[list[int], list[int]]:
        """Ids before and after the slots of a user's message in the chat template."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = rendered.partition(SLOTS)
        # A template may write the tokens that open a sequence (Llama, GLM-4), or leave them to the encoding (ChatGLM2).
        opening, ids = self.tokenizer.encode(""), self.text(before)
        written = ids[: len(opening)] == opening
        return ids if written else [*opening, *ids], self.text(after) if after else []

    def _fit(self, sample: Sample, demonstrations: Sequence[Demonstration], task: Task, slots: int) -> Encoded:
        def encode(s: Sample, d: Sequence[Demonstration]) -> Encoded:
            before, after = self.wrap("".join(self.prompt.parts(s, d, task, video=slots > 0).values()))
            return Encoded(before, slots, after, [])

        def fits(encoded: Encoded) -> bool:
            return encoded.length <= self.max_prompt_tokens

        encoded = encode(sample, demonstrations)
        if fits(encoded):
            return encoded
        turns, background, text = sample.history, sample.background or "", sample.utterance.text
        shorter = {
            "history": lambda n: (replace(sample, history=turns[len(turns) - n :]), demonstrations),
            "background": lambda n: (
                replace(sample, history=(), background=background[len(background) - n :] or None),
                demonstrations,
            ),
            "demonstration": lambda n: (
                replace(sample, history=(), background=None),
                [replace(d, response=d.response[:n]) for d in demonstrations] if n else [],
            ),
            "utterance": lambda n: (
                replace(
                    sample,
                    history=(),
                    background=None,
                    utterance=replace(sample.utterance, text=text[len(text) - n :]),
                ),
                [],
            ),
        }
        sizes = {
            "history": len(turns),
            "background": len(background),
            "demonstration": max((len(d.response) for d in demonstrations), default=0),
            "utterance": len(text),
        }
        for part in CUTS:
            if sizes[part] == 0:
                continue
            self.cuts[part] += 1
            if not fits(encode(*shorter[part](0))):
                continue
            low, high = 0, sizes[part]  # the most that fits lies in [low, high)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(encode(*shorter[part](middle))) else (low, middle)
            return encode(*shorter[part](low))
        raise ConfigError(
            f"the instruction and {slots} video slots alone exceed {self.max_prompt_tokens} tokens",
            where="prompt.max_prompt_tokens",
            fix="raise it",
        )
