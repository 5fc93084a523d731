"""What `benchmarks.gpu_step` measures beside steps: peers, a profile, a grid of lengths and budgets, decoding."""

from __future__ import annotations

import gc
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Case, Way, measure
from benchmarks.samples import SLOTS, Lengths
from benchmarks.trainers import hf, loops, trl, trl_is_here
from benchmarks.ways import OPTIMISER, REP_TARGET, Samples, Scale, Task, difference
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
PASSES = 3  # of each peer over all samples
PROFILED = 3  # steps
TOP = 20  # operators of a profile that are listed

MATRIX, ATTENTION, MOVES, ELEMENTWISE, IDLE = (
    "matrix products", "attention", "copies, cat, index", "elementwise, norms, sums", "idle",
)  # fmt: skip
#: Words in an operator's name that tell its group, the first that fits; all others are elementwise, norms, or sums. The
#: last group has what only names or allocates memory, too, which costs time on a CPU.
GROUPS = {
    ATTENTION: re.compile("attention"),
    MATRIX: re.compile("(^|_)(mm|addmm|bmm|baddbmm|matmul|linear|dot|mv|addmv)(_|$)"),
    MOVES: re.compile(
        "(^|_)(copy|cat|stack|index|gather|scatter|select|slice|narrow|split|embedding|fill|zero|zeros|ones|full|new"
        "|clone|contiguous|repeat|pad|arange|empty|view|reshape|resize|transpose|permute|t|expand|strided|squeeze"
        "|unsqueeze|flatten|detach|alias|nonzero|item|scalar|roll|to|lift|unbind|chunk|set|pinned|pin)(_|$)"
    ),
}


def peers(task_of: Callable[[int], Task]) -> Iterator[dict[str, Any]]:
    """Steps of EERG over the same samples: ELMD's, peft's with the stock loss, p-tuning's, HF's and TRL's trainers'.

    A trainer draws its own batches, so runs over all samples are timed, in turn, and sums over a run are compared.

    Args:
        task_of: EERG with so many visual tokens in each sample.
    """
    with tempfile.TemporaryDirectory() as folder:
        for slots in (SLOTS, 0):
            kind = {"samples": f"{slots} visual tokens" if slots else "text alone"}
            if not slots and not trl_is_here():
                yield {**kind, "way": "TRL", "fits": False, "reason": "not installed (pip install trl)"}
                continue
            task = task_of(slots)
            ways = (
                loops(task, "elmd", "peft", "p-tuning") + hf(task, folder) if slots
                else loops(task, "elmd") + trl(task, folder)
            )  # fmt: skip
            found = {way.name: _tried(task, way) for way in ways}
            for name in (name for name, sums in found.items() if sums is None):
                yield {**kind, "way": name, "fits": False, "reason": "does not fit"}
            fitting = [way for way in ways if found[way.name] is not None]
            size, count = task.scale.batch, len(task.samples)
            steps = count // size
            for timing in measure(Case("", "", fitting, tolerance=None), PASSES).timings:
                ratio, *span = timing.ratio
                yield {
                    **kind, "way": timing.way, "fits": True, "seconds": timing.median / steps,
                    "slower": ratio, "slower_range": span, "samples_per_s": count / timing.median,
                    "tokens_per_s": task.tokens(range(count)) / timing.median,
                    "flops": task.flops(range(count)) // steps,
                    "tokens_run": timing.facts["tokens, padding included"] / steps,
                    "step_bytes": int(timing.facts["peak, MiB"] * 2**20),
                    "largest_relative_difference": difference(
                        *(_tensors(found[name]) for name in (timing.way, fitting[0].name))
                    ),
                }  # fmt: skip
            del task, ways, fitting


def _tried(task: Task, way: Way) -> Mapping[str, Any] | None:
    """What a run gives; None where the device has not the memory for it."""
    try:
        way.before()
        return way.run()
    except torch.OutOfMemoryError:
        pass
    task.optimizer.zero_grad(set_to_none=True)  # outside of the handler, whose traceback holds the step's tensors
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _tensors(sums: Any) -> list[Tensor]:
    return [sums["loss"].to(sums["gradients"][0].device), *sums["gradients"]]


def profiled(task: Task, clock: Clock) -> dict[str, Any]:
    """Where the device's time goes in a few of ELMD's steps: by operator, and by `GROUPS`.

    On a GPU what is none of the operators' (`idle`) is the time of the same steps unprofiled minus that of their
    kernels: the device waits for Python. On a CPU it is Python's and autograd's own work, and the profiler's.
    """
    way, on_gpu = task.steps["elmd"], task.llm.device.type == "cuda"
    batches = [range(i, i + task.scale.batch) for i in range(0, len(task.samples), task.scale.batch)]

    def work() -> None:
        for batch in batches:
            task.step(way, batch)

    work()
    unprofiled = clock(work)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        started = time.perf_counter()
        work()
        wall = time.perf_counter() - started
        if on_gpu:
            torch.cuda.synchronize(task.llm.device)
            wall = unprofiled
    seconds, calls = spent(seen.events(), on_gpu)
    count = len(batches)
    return {
        "task": task.name, "steps": count, "unprofiled_seconds": unprofiled / count,
        "flops": task.flops(range(len(task.samples))) // count,
        **shares(
            {where: one / count for where, one in seconds.items()},
            {where: one / count for where, one in calls.items()},
            wall / count,
        ),
    }  # fmt: skip


#: Of an operator and its group.
PerOperator = Mapping[tuple[str, str], float]


def spent(events: Iterable[Any], on_gpu: bool) -> tuple[PerOperator, PerOperator]:
    """Seconds of a profile's operators, on a GPU those of the kernels that they start, and how often they ran."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        # Kernels are told with the innermost operator; annotations would count them again.
        if event.device_type != DeviceType.CPU or not event.name.startswith("aten::"):
            continue
        micros = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        if micros:
            where = event.name, _group(event)
            seconds[where] += micros / 1e6
            calls[where] += 1
    return seconds, calls


def shares(spent: PerOperator, calls: PerOperator, wall: float) -> dict[str, Any]:
    """What a step's seconds (`wall`) went into."""
    busy = sum(spent.values())
    whole = max(wall, busy)
    groups = dict.fromkeys([MATRIX, ATTENTION, ELEMENTWISE, MOVES, OPTIMISER], 0.0)
    for (_, group), seconds in spent.items():
        groups[group] += seconds
    groups[IDLE] = whole - busy
    operators: list[dict[str, Any]] = [
        {"operator": name, "group": group, "seconds": seconds, "share": seconds / whole, "calls": calls[name, group]}
        for (name, group), seconds in sorted(spent.items(), key=lambda one: -one[1])
    ]
    largest = max(set(groups) - {MATRIX}, key=lambda group: groups[group])
    one = next(one for one in operators if one["group"] != MATRIX)
    return {
        "seconds": whole,
        "groups": [{"group": group, "seconds": s, "share": s / whole} for group, s in groups.items()],
        "operators": operators[:TOP],
        "largest": f"The largest cost beside matrix products: {largest}, {100 * groups[largest] / whole:.0f} %; "
        f"the largest operator beside them: {one['operator']}, {100 * one['share']:.0f} %.",
    }


def _group(event: Any) -> str:
    above = event.cpu_parent
    while above is not None:
        if above.name == OPTIMISER:
            return OPTIMISER
        above = above.cpu_parent
    name = event.name.removeprefix("aten::")
    return next((group for group, words in GROUPS.items() if words.search(name)), ELEMENTWISE)


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
                    seconds = [clock(partial(task.step, way, batch)) for _ in range(4)]
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
                    gc.collect()
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
