"""A training step of EERG against peft with the stock loss, HF `Trainer`, TRL's `SFTTrainer` and p-tuning's defaults.

A run takes a few global batches of random ids, text alone, as TRL splices no visual tokens in; what a run computes and
what runs must agree in, `benchmarks.trainers` tells.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.gpu_parts import TRAIN
from benchmarks.harness import Case
from benchmarks.samples import CPED_LONGEST, drawn
from benchmarks.trainers import hf, loops, trl, trl_is_here
from benchmarks.ways import SCALES, Samples, Scale, Task, language_model, small_llm

TOKENS_PER_CHARACTER = 0.7
NOTE = (
    "p-tuning runs on ELMD's forward, as the original's code needs old versions. Trainers have "
    'train_sampling_strategy="group_by_length": in so few samples it sorts each global batch, as elmd does.'
)
TRL_NOTE = (
    " TRL scores only target positions on a GPU; on CPU it scores all of them, in tiles of 32 768 words whatever the "
    "vocabulary, which its peak shows. It runs with gradient_checkpointing=False, which is not its default: "
    "checkpointing loses the prefix."
)


def cases(small: bool) -> Iterator[Case]:
    """The step, an epoch, and the memory of a step's logits where the vocabulary is as large as ChatGLM2's."""
    scale = SCALES["smoke"] if small else replace(SCALES["cpu"], llm=small_llm(4, 1000, 8))
    note = TRL_NOTE if trl_is_here() else " TRL is not installed (pip install -e '.[bench]'), so it is left out."
    with tempfile.TemporaryDirectory() as folder:
        task, size = made_up(scale, 2)
        size += f" p-tuning pads to {task.longest}."
        ways = loops(task, "elmd", "peft", "p-tuning") + hf(task, folder)
        ways += trl(task, folder) if trl_is_here() else []
        yield Case("EERG, a training step", size, ways, note=NOTE + note, per=2 * scale.batch, unit="samples")
    steps = 2 if small else 20
    task, size = made_up(scale if small else replace(scale, llm=small_llm(2, 1000, 8)), steps)
    with tempfile.TemporaryDirectory() as folder:
        ways = loops(task, "elmd", peak=False) + hf(task, folder, peak=False)
        yield Case("EERG, an epoch", size, ways, note=grouped(task), per=steps * scale.batch, unit="samples")
    task, size = made_up(replace(scale, llm=small_llm(1, 2000, 2, 16) if small else small_llm(2, 65_024, 2)), 1)
    note = "Read the peak: beside so small a decoder, logits take more of the time and of the memory than at 6B."
    yield Case("EERG, the memory of logits", size, loops(task, "elmd", "peft"), note=note)


def made_up(scale: Scale, count: int) -> tuple[Task, str]:
    """A task with samples for `count` steps, and both in words."""
    llm = language_model(scale, torch.device("cpu"), torch.float32)
    shape = llm.config
    samples = Samples(drawn(count * scale.batch), shape.vocab_size, tokens_per_character=TOKENS_PER_CHARACTER, slots=0)
    longest = max(round(TOKENS_PER_CHARACTER * CPED_LONGEST), *samples.lengths)
    return Task("eerg", llm, scale, samples, longest), (
        f"GLM of {shape.hidden_size} × {shape.num_hidden_layers}, vocabulary {shape.vocab_size}, prefix "
        f"{scale.prefix}; {count} × {scale.batch} samples of {min(samples.lengths)} to {max(samples.lengths)} tokens, "
        f"{sum(samples.lengths)} in all."
    )


def grouped(task: Task) -> str:
    """What `group_by_length` makes of the task's samples, and of a whole data set's."""
    rows, many = task.scale.batch, [round(TOKENS_PER_CHARACTER * sum(one)) for one in drawn(TRAIN)]

    def spread(lengths: Sequence[int]) -> float:
        order = get_length_grouped_indices(lengths, rows)
        starts = range(0, len(order) - rows + 1, rows)
        return statistics.mean(statistics.pstdev(lengths[i] for i in order[at : at + rows]) for at in starts)

    return (
        "An epoch's summed gradient is the same in any order; its steps are not: Trainer's global batches are of like "
        f"samples, elmd's are drawn at random. Lengths differ by {spread(task.samples.lengths):.0f} tokens (standard "
        f"deviation) within a global batch of Trainer's, in a set of {TRAIN} samples by {spread(many):.0f}; by "
        f"{statistics.pstdev(many):.0f} among all."
    )
