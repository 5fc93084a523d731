"""Samples of random ids that are as long and as uneven as real ones.

`python benchmarks/samples.py PATH` prints the numbers below for a CPED csv.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml

from elmd.data.encode import Encoded, Encoder
from elmd.data.examples import Examples, no_features
from elmd.data.prompts import Prompt
from elmd.data.readers.cped import read_cped
from elmd.data.samples import prepare
from elmd.types import Demonstration

SLOTS, WIDTH = 40, 768  # m + o and q of VisualGLM's features at 8 frames
LONGEST_TARGET = 128  # tokens, as in the configuration


class Lengths(NamedTuple):
    """Characters of an EERG sample before the video slots (I, H, u), behind them (R), and of its target."""

    before: int
    after: int
    target: int


#: Every fortieth quantile of CPED's valid split (2 699 samples) in the Chinese prompt and ChatGLM2's template.
#: Responses of other samples stand for the retrieved ones. The parts hardly depend on each other.
CPED: dict[str, list[int]] = {
    "before": [
        55, 58, 60, 62, 65, 67, 69, 71, 73, 75, 77, 80, 82, 85, 87, 90, 93, 95, 98, 101, 104, 108, 112, 116, 121,
        125, 129, 134, 140, 145, 150, 156, 164, 172, 180, 195, 205, 220, 237, 270, 396,
    ],
    "after": [
        18, 19, 20, 20, 21, 21, 22, 23, 23, 24, 25, 26, 26, 27, 28, 29, 30, 30, 31, 32, 33, 35, 36, 38, 39, 41, 43,
        44, 46, 48, 50, 53, 56, 61, 66, 72, 78, 89, 105, 129, 306,
    ],
    "target": [
        4, 5, 6, 6, 7, 7, 8, 9, 9, 10, 11, 12, 12, 13, 14, 15, 16, 16, 17, 18, 19, 21, 22, 24, 25, 27, 29, 30, 32,
        34, 36, 39, 42, 47, 52, 58, 64, 75, 91, 115, 292,
    ],
}  # fmt: skip
#: Characters of the longest of these samples.
CPED_LONGEST = 529


#: Characters that begin every sample: the template and the prompt's instruction. The shortest sample has hardly more.
INSTRUCTION = 55


class MadeUp(Examples):
    """Random ids and features; all samples begin with the same ids, as long as the instruction.

    Args:
        vocabulary: ids are below it; the first three are left to control tokens.
        tokens_per_character: what a character costs.
        target: tokens of every target; None: as many as the response has.
        slots: visual tokens of every sample; 0: samples of text alone.
    """

    def __init__(
        self,
        lengths: Sequence[Lengths],
        vocabulary: int,
        *,
        tokens_per_character: float = 1.0,
        target: int | None = None,
        slots: int = SLOTS,
        width: int = WIDTH,
    ):
        draw = random.Random(0)

        def ids(count: int) -> list[int]:
            return [draw.randrange(3, vocabulary) for _ in range(count)]

        def tokens(characters: int) -> int:
            return max(1, round(tokens_per_character * characters))

        def text(characters: int) -> list[int]:
            return instruction[:characters] + ids(characters - len(instruction))

        instruction, self.slots = ids(tokens(INSTRUCTION)), slots
        self.rows = [
            Encoded(
                text(tokens(one.before)),
                slots,
                ids(tokens(one.after)),
                ids(target or min(LONGEST_TARGET, 1 + tokens(one.target))),
            )
            for one in lengths
        ]
        self.lengths = [row.length for row in self.rows]
        self.samples: Any = [SimpleNamespace(id=str(i)) for i in range(len(lengths))]
        visual = torch.randn(len(lengths), slots, width, generator=torch.Generator().manual_seed(0))
        self.features = (lambda sample_id: visual[int(sample_id)]) if slots else no_features


def drawn(count: int) -> list[Lengths]:
    """Lengths drawn from `CPED`."""
    draw = random.Random(0)

    def one(quantiles: Sequence[int]) -> int:
        at, rest = divmod(draw.random() * (len(quantiles) - 1), 1)
        low, high = quantiles[int(at) : int(at) + 2]
        return round(low + rest * (high - low))

    return [Lengths(**{part: one(quantiles) for part, quantiles in CPED.items()}) for _ in range(count)]


def read(path: Path) -> list[Lengths]:
    """Lengths of the samples of a CPED csv, through ELMD's own reader, prompt and encoder; nothing is cut."""
    samples = prepare(read_cped(path), split="dialogue", on_missing_clip="text_only").samples
    config = Path(__file__).parents[1] / "configs" / "prompt" / "zh.yaml"
    texts = yaml.safe_load(config.read_text(encoding="utf-8"))
    prompt = Prompt(**{key: text for key, text in texts.items() if not key.startswith("max_")})
    encoder = Encoder(_Characters(), prompt, sys.maxsize, sys.maxsize)
    responses = [sample.response for sample in samples]
    random.Random(0).shuffle(responses)
    found = []
    for sample, other in zip(samples, responses, strict=True):
        shown = Demonstration(sample.id, other.id, "", other.text, other.emotion, 0.0)
        row = encoder(sample, [shown], "eerg", SLOTS, with_target=True)
        found.append(Lengths(len(row.before), len(row.after), len(row.target) - 1))
    return found


class _Characters:
    """A tokenizer with one id for each character, and ChatGLM2's template and two opening ids."""

    chat_template = "[Round 1]\n\n问：{}\n\n答："
    eos_token_id, bos_token, name_or_path = 2, None, ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [3, 4] * add_special_tokens + [5] * len(text)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: bool) -> str:
        return self.chat_template.format(messages[0]["content"])


def main(path: Path) -> None:
    lengths = read(path)
    for part, values in zip(Lengths._fields, zip(*lengths, strict=True), strict=True):
        quantiles = statistics.quantiles(values, n=40, method="inclusive")
        print(f"{part}: {[min(values), *map(round, quantiles), max(values)]}")
    print(f"longest: {max(map(sum, lengths))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
