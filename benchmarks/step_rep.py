"""A training step of REP with its causal split, against the same without it and against a padded stock batch.

The language model is frozen and looks back only, so the tokens before the video slots run without gradient, and nothing
of them is kept for the backward pass but their keys and values.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, Way
from benchmarks.samples import Lengths, drawn
from benchmarks.ways import (
    REP_TARGET,
    SCALES,
    Samples,
    Scale,
    Step,
    Task,
    language_model,
    peak_bytes,
    saved_bytes,
)  # fmt: skip

TOKENS_PER_CHARACTER = 0.7
WAYS = ("elmd", "elmd, no split", "transformers")


def cases(small: bool) -> Iterator[Case]:
    """Samples as long as CPED's, whose dialogues have 1.4 turns before the utterance, and with twice as much before."""
    scale = SCALES["smoke" if small else "cpu"]
    lengths = drawn(scale.batch)
    longer = [one._replace(before=2 * one.before) for one in lengths]
    yield _case("REP, a training step", scale, lengths)
    yield _case("REP, twice as much before the slots", scale, longer)


def _case(title: str, scale: Scale, lengths: list[Lengths]) -> Case:
    llm = language_model(scale, torch.device("cpu"), torch.float32)
    samples = Samples(lengths, llm.config.vocab_size, tokens_per_character=TOKENS_PER_CHARACTER, target=REP_TARGET)
    task = Task("rep", llm, scale, samples, max(samples.lengths))
    share = sum(len(row.before) for row in samples.rows) / sum(samples.lengths)
    size = (
        f"GLM of {llm.config.hidden_size} × {llm.config.num_hidden_layers}, vocabulary {llm.config.vocab_size}; "
        f"{len(samples)} samples of {min(samples.lengths)} to {max(samples.lengths)} tokens, mean "
        f"{statistics.mean(samples.lengths):.0f}, {share:.0%} of them before the slots."
    )
    ways = [_way(task, task.steps[name]) for name in WAYS]
    note = (
        f"By the number of tokens the split is worth at most {4 / (4 - 2 * share):.2f}. Beside that, reading ends at "
        "the last layer's keys and values, and what all samples begin with is read once for all steps."
    )
    return Case(title, size, ways, note=note, per=len(samples), unit="samples")


def _way(task: Task, step: Step) -> Way:
    batch = range(len(task.samples))

    def run() -> list[Tensor]:
        found = [tensor.clone() for tensor in task.gradient(step, batch)]
        torch.nn.utils.clip_grad_norm_(task.trained, 1.0)
        task.optimizer.step()
        task.optimizer.zero_grad(set_to_none=True)
        return found

    return Way(step.name, run, partial(_facts, task, step, run))


def _facts(task: Task, step: Step, run: Callable[[], list[Tensor]]) -> dict[str, float]:
    saved = saved_bytes(task, step, range(len(task.samples)))
    return {"saved for backward, MiB": saved / 2**20, "peak, MiB": peak_bytes(run) / 2**20}
