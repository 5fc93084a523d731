"""Write replies: ELMD's generation loop, nucleus sampling with random numbers of each row's own, emotions by name.

Shapes: B rows of a batch, R rows that still run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from elmd.data.collate import Batch
from elmd.data.examples import Examples
from elmd.models.batched import map_samples
from elmd.models.elmd import Elmd
from elmd.models.prefill import read_prompt
from elmd.models.sharding import anywhere

#: Chooses the next token of the rows that still run: (logits [R, vocabulary], step, their places in the batch [R])
#: -> ids [R].
Choose = Callable[[Tensor, int, Tensor], Tensor]

#: So many tokens nearly always hold the nucleus: sorting them instead of a vocabulary of 65 024 is what makes it fast.
LIKELY = 1024


def generate_all(
    model: Elmd,
    examples: Examples,
    budget: int,
    accelerator: Accelerator,
    *,
    eos: int,
    max_new_tokens: int,
    top_p: float,
    temperature: float,
    seeds: Sequence[int],
) -> list[list[list[int]]]:
    """New ids for each sample and decode seed, by nucleus sampling (§4.3), or greedily at temperature 0.

    A prompt is read once for all seeds.

    Args:
        budget: prompt tokens per batch, padding and the copies for each seed included.
    """
    model.eval()
    copies = len(seeds) if temperature else 1  # greedy replies do not differ

    def run(batch: Batch, positions: list[int]) -> list[list[list[int]]]:
        streams = [stream(seed, examples.samples[i].id) for i in positions for seed in seeds]
        choose = nucleus(streams, top_p, temperature, max_new_tokens) if temperature else greedy
        new = generate_batch(model, batch, choose, eos=eos, max_new_tokens=max_new_tokens, copies=copies)
        return [new[i : i + copies] * (len(seeds) // copies) for i in range(0, len(new), copies)]

    what = f"generate (seeds {', '.join(map(str, seeds))})"
    return map_samples(examples, budget // copies, accelerator, what, run, passes=max_new_tokens)


@torch.no_grad()
def generate_batch(
    model: Elmd, batch: Batch, choose: Choose, *, eos: int, max_new_tokens: int, copies: int = 1
) -> list[list[int]]:
    """New ids of each row, without EOS.

    Our own loop, because transformers' `generate` with `inputs_embeds` and a prefix cache returns silently wrong
    tokens unless dummy rows stand before the embeddings, and because rows are to draw independently of the batch
    they are in (see `nucleus`). The prompt is read once for all copies of a row, and rows that have ended leave.

    Args:
        copies: how many replies to each row; row i's are i * copies and those after it.
    """
    logits, (past, mask) = read_prompt(model, batch, model.embed(batch), model.opening)  # [B, vocabulary]
    position = batch.positions[:, -1:]  # [B, 1]
    if copies > 1:
        past.batch_repeat_interleave(copies)
        logits, mask, position = (x.repeat_interleave(copies, 0) for x in (logits, mask, position))
    rows = torch.arange(len(logits), device=logits.device)  # [R], places of those that still run
    new = torch.full((len(rows), max_new_tokens), eos, device=logits.device)
    running = torch.ones_like(rows, dtype=torch.bool)  # [R]
    for step in range(max_new_tokens):
        chosen = torch.where(running, choose(logits, step, rows), eos)  # [R]
        new[rows, step] = chosen
        running = chosen != eos
        left = int(running.sum())
        if step + 1 == max_new_tokens or not anywhere(left, model.llm):
            break
        # Leaving costs a copy of the cache, so the ended rows leave when they are half of all.
        if 2 * left <= len(rows):
            stay = running.nonzero().squeeze(1) if left else running.new_zeros(1, dtype=torch.long)
            past.batch_select_indices(stay)
            rows, mask, position, chosen, running = (x[stay] for x in (rows, mask, position, chosen, running))
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
        logits = model.run(chosen.unsqueeze(1), mask, position, past).logits[:, -1].float()  # [R, vocabulary]
    return [row[: row.index(eos)] if eos in row else row for row in new.tolist()]


def predict_emotions(
    model: Elmd, examples: Examples, words: Sequence[Sequence[int]], budget: int, accelerator: Accelerator, what: str
) -> list[int]:
    """Position in `words` (ids with EOS) of the likeliest emotion word of each sample, by summed log-probability."""
    model.eval()

    def run(batch: Batch, _: list[int]) -> list[int]:
        return model.log_probs(batch, words).argmax(-1).tolist()

    return map_samples(examples, budget, accelerator, what, run)


def stream(seed: int, name: str) -> str:
    """The name of the random numbers that a sample's reply is drawn with."""
    return f"{seed}:{name}"


def greedy(logits: Tensor, step: int, rows: Tensor) -> Tensor:
    return logits.argmax(-1)


def nucleus(streams: Sequence[str], top_p: float, temperature: float, steps: int, *, likely: int = LIKELY) -> Choose:
    """Top-p sampling where each row draws from its own stream of random numbers.

    So a sample's response does not depend on the batch it is in, nor on the number of ranks. The smallest set of
    tokens whose probability reaches `top_p` is kept, as in transformers; of equally likely ones at its edge, those of
    the lower ids.

    Args:
        streams: of each row of the batch, the name (see `stream`).
        likely: sort only so many tokens, and all of them in rows where the set does not end among these. The result
            is the same whatever the number.
    """
    draws = torch.from_numpy(
        np.stack(
            [
                np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])).random(steps)
                for name in streams
            ]
        )
    )

    def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        nonlocal draws
        draws = draws.to(logits.device)
        probabilities, drawn = (logits / temperature).softmax(-1), draws[rows, step]
        if likely >= probabilities.shape[-1]:
            return _draw(probabilities, drawn, top_p)[0]
        least, some = probabilities.topk(likely, sorted=True)
        some = some.sort(-1).values  # equally likely tokens by id, as in the sort of all
        chosen, edge = _draw(probabilities.gather(-1, some), drawn, top_p)
        chosen = some.gather(-1, chosen[:, None])[:, 0]
        unsure = (edge <= least[:, -1]).nonzero()[:, 0]
        if len(unsure):
            chosen[unsure] = _draw(probabilities[unsure], drawn[unsure], top_p)[0]
        return chosen

    return choose


def _draw(probabilities: Tensor, drawn: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """From the nucleus of each row [R, n], by a number in [0, 1) [R]: the place chosen, and the least probability kept.

    Where the n tokens together do not reach `top_p`, that least is the least of all n.
    """
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass = probabilities.double().cumsum(-1)
    last = (mass - probabilities < top_p).sum(-1, keepdim=True) - 1
    total = mass.gather(-1, last)
    place = torch.searchsorted(mass, drawn[:, None] * total, right=True).minimum(last)
    return order.gather(-1, place)[:, 0], probabilities.gather(-1, last)[:, 0]
