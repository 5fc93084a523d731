"""What `benchmarks.gpu_step` measures beside steps: a grid of lengths and budgets, decoding, whole epochs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.samples import Lengths
from benchmarks.ways import REP_TARGET, Samples, Scale, Task
from elmd.data.collate import Batch
from elmd.models.elmd import Elmd
from elmd.models.inference import over

#: Seconds of a piece of work, the device's own included.
Clock = Callable[[Callable[[], Any]], float]

GRID_LENGTHS, GRID_BUDGETS = (256, 512, 1024), (2048, 4096, 8192, 16384)
DECODE_ROWS = (1, 16, 64, 128)
TRAIN, TEST = 6071, 758  # samples of an epoch, and of its test split: M3ED in the paper's Table 1
NEW_TOKENS = 64
END = 2


def grid(
    llm: Any, scale: Scale, clock: Clock, peak_of: Callable[..., dict[str, Any]], peak: float | None, *, slots: int
) -> Iterator[dict[str, Any]]:
    """EERG's step at every length S, budget of a micro-batch and with or without checkpointing.

    Args:
        peak_of: the memory of a step (`gpu_step.memory`).
        peak: FLOP/s of the device.
        slots: visual tokens of a sample.
    """
    for length in GRID_LENGTHS if scale.batch == 16 else (96, 128):
        room = length - slots
        one = Lengths(before=room // 2, after=room // 4, target=room - room // 2 - room // 4 - 1)
        for budget in GRID_BUDGETS:
            if budget < length:
                continue
            samples = Samples([one] * scale.batch, llm.config.vocab_size, slots=slots)
            task = Task("eerg", llm, replace(scale, micro_tokens=budget), samples, length)
            batch = range(scale.batch)
            for way in (task.steps["elmd"], task.steps["elmd, checkpointing"]):
                cell: dict[str, Any] = {
                    "length": length, "micro_tokens": budget, "checkpointing": way.checkpointing, "fits": True
                }  # fmt: skip
                try:
                    cell |= peak_of(task, way, batch)
                    seconds = [clock(lambda task=task, way=way, batch=batch: task.step(way, batch)) for _ in range(4)]
                    middle = statistics.median(seconds[1:])
                    cell |= {
                        "seconds": middle, "tokens_per_s": task.tokens(batch) / middle,
                        "samples_per_s": scale.batch / middle,
                        "mfu_percent": 100 * task.flops(batch) / middle / peak if peak else None,
                    }  # fmt: skip
                except torch.OutOfMemoryError:
                    cell["fits"] = False
                if not cell["fits"]:
                    task.optimizer.zero_grad(set_to_none=True)
                    torch.cuda.empty_cache()
                yield cell


def decode(llm: Any, scale: Scale, clock: Clock, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """A token for each of B rows, against reading the weights and the rows' keys and values once.

    Args:
        bandwidth: bytes/s of the device's memory.
    """
    model, prompt = Elmd(llm).eval(), 256
    weights = sum(p.nbytes for name, p in llm.named_parameters() if p is not llm.get_input_embeddings().weight)
    shape = llm.config
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * llm.dtype.itemsize
    for rows in DECODE_ROWS:
        samples = Samples([Lengths(prompt - 1, 1, 1)] * rows, shape.vocab_size, slots=0, target=1)
        batch = prompts(samples, range(rows)).to(llm.device)

        def write(count: int, batch: Batch = batch) -> None:
            model.generate(batch, unending, eos=END, max_new_tokens=count)

        write(4)
        seconds = [clock(lambda: write(NEW_TOKENS)) - clock(lambda: write(1)) for _ in range(3)]
        step = statistics.median(seconds) / (NEW_TOKENS - 1)
        read = weights + rows * (prompt + NEW_TOKENS / 2) * per_token
        yield {
            "rows": rows, "seconds_per_token": step, "tokens_per_s": rows / step, "bytes_read": read,
            "share_of_bandwidth_percent": 100 * read / step / bandwidth if bandwidth else None,
        }  # fmt: skip


def epochs(
    llm: Any, scale: Scale, clock: Clock, lengths: Sequence[Lengths], tokens_per_character: float
) -> Iterator[dict[str, Any]]:
    """One epoch of REP, one of EERG, and the replies to a test split, each from its first to its last batch.

    Args:
        lengths: of the training samples; an eighth of them, as in Table 1, is answered.
    """
    for kind in ("rep", "eerg"):
        samples = Samples(
            lengths, llm.config.vocab_size, tokens_per_character=tokens_per_character,
            target=REP_TARGET if kind == "rep" else None,
        )  # fmt: skip
        task = Task(kind, llm, scale, samples, max(samples.lengths))
        batches = [range(i, min(i + scale.batch, len(lengths))) for i in range(0, len(lengths), scale.batch)]
        way = task.steps["elmd"]
        task.step(way, batches[0])  # warm

        def epoch(task: Task = task, way: Any = way, batches: Any = batches) -> None:
            for batch in batches:
                task.step(way, batch)

        seconds = clock(epoch)
        useful = sum(task.flops(batch) for batch in batches)
        yield {"part": f"{kind}, one epoch", "samples": len(lengths), "seconds": seconds,
               "tokens": sum(samples.lengths), "flops": useful}  # fmt: skip
        del task
    asked = Samples(
        lengths[: max(2, len(lengths) * TEST // TRAIN)], llm.config.vocab_size, slots=0,
        tokens_per_character=tokens_per_character,
    )  # fmt: skip
    ends = torch.tensor([len(row.target) for row in asked.rows])
    for row in asked.rows:
        row.target.clear()
    asked.lengths = [row.length for row in asked.rows]
    model, most = Elmd(llm).eval(), int(ends.max()) + 1
    accelerator = Accelerator(cpu=llm.device.type == "cpu")

    def run(batch: Batch, positions: list[int]) -> list[list[int]]:
        ending = ends[positions].to(llm.device)

        def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
            return torch.where(ending[rows] <= step, END, unending(logits, step, rows))

        return model.generate(batch, choose, eos=END, max_new_tokens=most)

    new: list[list[int]] = []
    seconds = clock(lambda: new.extend(over(asked, 16384, accelerator, "", run, passes=most)))
    yield {"part": "replies", "samples": len(asked), "seconds": seconds, "tokens": sum(map(len, new)), "flops": None}


def unending(logits: Tensor, step: int, rows: Tensor) -> Tensor:
    """The likeliest token but the end of text: random weights end at random."""
    logits[:, END] = -torch.inf
    return logits.argmax(-1)


def prompts(samples: Samples, positions: Sequence[int]) -> Batch:
    """Samples without their targets."""
    for row in samples.rows:
        row.target.clear()
    return samples.batch(positions)
