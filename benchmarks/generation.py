"""Replies: ELMD's generation against transformers' own `generate`.

Weights and prompts are random. Prompts and replies are as long as CPED's (see `samples`), a token a character: each
prompt begins with the same instruction, and where there is a background, with that of its dialogue. A reply ends where
the sample's own would, which both sides get alike: random weights never say that they are done. Text alone and no
prefix, as transformers' `generate` gives wrong tokens with a prefix and embeddings.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, TopPLogitsWarper

from benchmarks.harness import Case, Way
from benchmarks.samples import INSTRUCTION, MadeUp, drawn
from benchmarks.ways import small_llm
from elmd.convert.chatglm2 import CHATGLM2_6B, native_config
from elmd.data.collate import Batch
from elmd.data.encode import Encoded
from elmd.models.batched import map_samples
from elmd.models.decode import generate_batch, greedy, nucleus, stream
from elmd.models.elmd import Elmd
from elmd.models.llm import freeze

EOS, PAD = 2, 0
TOP_P, TEMPERATURE = 0.7, 0.95


def cases(small: bool) -> Iterator[Case]:
    if small:
        shape, count, background, budget, longest = small_llm(1, 50, 2, 16), 5, 20, 400, 4
    else:
        shape, count, background, budget, longest = small_llm(8, 2000, 8), 48, 200, 4096, 64
    torch.manual_seed(0)
    config = native_config({**CHATGLM2_6B, **shape})
    llm = freeze(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))
    size = f"GLM of {config.hidden_size} × {config.num_hidden_layers}, {count} prompts"
    for characters in (0, background):
        asked = Asked(count, config.vocab_size, characters, longest)
        where = f"{size} of mean {statistics.mean(asked.lengths):.0f} tokens, replies of {asked.written:.0f}"
        alike = f", of which {INSTRUCTION + characters} are another prompt's too" if characters else ""
        yield Case(
            "Greedy replies" + (", dialogues with a background" if characters else ""), where + alike,
            [
                Way("elmd", partial(ours, llm, asked, budget)),
                Way("generate, padded batches of 16", partial(theirs, llm, asked, 16)),
                Way("generate, the same sorted by length", partial(theirs, llm, asked, 16, by_length=True)),
                Way("generate, one by one", partial(theirs, llm, asked, 1)),
            ],
            per=count, unit="replies",
        )  # fmt: skip
    asked, seeds = Asked(count // 3, config.vocab_size, 0, longest), range(5)
    yield Case(
        "Five sampled replies to each prompt",
        f"{size.replace(str(count), str(count // 3))}, top-p {TOP_P}, temperature {TEMPERATURE}",
        [
            Way("elmd", partial(ours, llm, asked, budget, seeds)),
            Way("elmd, seed by seed", partial(each, llm, asked, budget, seeds)),
            Way("generate, num_return_sequences=5, 16 at a time", partial(theirs, llm, asked, 16, seeds), same=False),
        ],
        note="transformers draws other random numbers; its replies are as long.", per=5 * len(asked), unit="replies",
    )  # fmt: skip
    yield top_p(small)


class Asked(MadeUp):
    """Prompts without video, in random order; four samples in a row are of one dialogue.

    Args:
        background: characters of each dialogue's background.
        longest: a reply has no more tokens.

    Attributes:
        ends: tokens of each reply.
    """

    def __init__(self, count: int, vocabulary: int, background: int, longest: int):
        lengths = drawn(count)
        super().__init__(lengths, vocabulary, slots=0)
        draw = random.Random(1)

        def ids(some: int) -> list[int]:
            return [draw.randrange(3, vocabulary) for _ in range(some)]

        stories = [ids(background) for _ in range(count)]
        self.rows = [
            Encoded([*row.before[:INSTRUCTION], *stories[i // 4], *row.before[INSTRUCTION:]], 0, row.after, [])
            for i, row in enumerate(self.rows)
        ]
        order = draw.sample(range(count), count)
        self.rows = [self.rows[i] for i in order]
        self.lengths = [row.length for row in self.rows]
        self.ends = torch.tensor([min(longest, lengths[i].target) for i in order])

    @property
    def written(self) -> float:
        return self.ends.float().mean().item()


def ended(logits: Tensor, ends: Tensor, step: int) -> Tensor:
    """The end of text for rows [R] that have `ends` [R] tokens now, and for no others."""
    logits[:, EOS] = -torch.inf
    logits[ends <= step] = -torch.inf
    logits[ends <= step, EOS] = 0
    return logits


def ours(llm: Any, asked: Asked, budget: int, seeds: Sequence[int] = ()) -> list[list[int]]:
    model, most, copies = Elmd(llm).eval(), int(asked.ends.max()) + 1, max(1, len(seeds))

    def run(batch: Batch, positions: list[int]) -> list[list[list[int]]]:
        streams = [stream(seed, asked.samples[i].id) for i in positions for seed in seeds]
        choose = nucleus(streams, TOP_P, TEMPERATURE, most) if seeds else greedy
        ends = asked.ends[positions].repeat_interleave(copies)
        new = generate_batch(
            model, batch, lambda logits, step, rows: choose(ended(logits, ends[rows], step), step, rows),
            eos=EOS, max_new_tokens=most, copies=copies,
        )  # fmt: skip
        return [new[i : i + copies] for i in range(0, len(new), copies)]

    found = map_samples(
        asked, budget // copies, Accelerator(cpu=True), "", run, passes=most
    )  # as the product's `generate`
    return [ids for several in found for ids in several]


def each(llm: Any, asked: Asked, budget: int, seeds: Sequence[int]) -> list[list[int]]:
    by_seed = [ours(llm, asked, budget, [seed]) for seed in seeds]
    return [ids for several in zip(*by_seed, strict=True) for ids in several]


class Ends(LogitsProcessor):
    def __init__(self, ends: Tensor, prompt: int):
        self.ends, self.prompt = ends, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return ended(scores.clone(), self.ends, input_ids.shape[1] - self.prompt)


@torch.no_grad()
def theirs(llm: Any, asked: Asked, size: int, seeds: Sequence[int] = (), *, by_length: bool = False) -> list[list[int]]:
    """`generate` as its documentation says: padded on the left, with a mask, KV cache on."""
    order = sorted(range(len(asked)), key=lambda i: asked.lengths[i] if by_length else 0)
    copies, found = max(1, len(seeds)), {}
    chosen: dict[str, Any] = {"do_sample": False}
    if seeds:
        chosen = {"do_sample": True, "top_p": TOP_P, "top_k": 0, "temperature": TEMPERATURE,
                  "num_return_sequences": copies}  # fmt: skip
    for start in range(0, len(order), size):
        positions = order[start : start + size]
        batch = asked.batch(positions)
        ends, prompt = asked.ends[positions].repeat_interleave(copies), batch.ids.shape[1]
        new = llm.generate(
            input_ids=batch.ids, attention_mask=batch.mask.long(), max_new_tokens=int(asked.ends.max()) + 1,
            eos_token_id=EOS, pad_token_id=PAD, logits_processor=[Ends(ends, prompt)], **chosen,
        )[:, prompt:].tolist()  # fmt: skip
        for row, position in enumerate(positions):
            several = new[row * copies : (row + 1) * copies]
            found[position] = [ids[: ids.index(EOS)] if EOS in ids else ids for ids in several]
    return [ids for position in range(len(asked)) for ids in found[position]]


def top_p(small: bool) -> Case:
    """Choosing the next token of 16 rows over ChatGLM2's vocabulary."""
    rows, vocabulary = (2, 3000) if small else (16, 65_024)
    # As peaked as a trained model's: the likeliest token has about 0.3, and the nucleus a few dozen.
    logits = 2.6 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    every, streams = torch.arange(rows), [stream(0, str(i)) for i in range(rows)]

    def draw(choose: Callable[[Tensor, int, Tensor], Tensor]) -> Tensor:
        return torch.stack([choose(logits, step, every) for step in range(4)])

    warp = TopPLogitsWarper(TOP_P)

    def stock() -> Tensor:
        return torch.stack([torch.multinomial(warp(every, logits / TEMPERATURE).softmax(-1), 1) for _ in range(4)])

    return Case(
        "Nucleus sampling of 4 tokens", f"{rows} rows, vocabulary {vocabulary}",
        [
            Way("elmd", partial(draw, nucleus(streams, TOP_P, TEMPERATURE, 4))),
            Way("elmd, all sorted", partial(draw, nucleus(streams, TOP_P, TEMPERATURE, 4, likely=vocabulary))),
            Way("transformers' TopPLogitsWarper", stock, same=False),
        ],
        note="transformers draws other random numbers from the same nucleus.",
    )  # fmt: skip
