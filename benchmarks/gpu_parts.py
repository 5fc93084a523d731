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
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Way
from benchmarks.samples import SLOTS, Lengths
from benchmarks.trainers import hf, loop, trl, trl_is_here
from benchmarks.ways import (
    FRAMES_PER_CLIP,
    OPTIMISER,
    REP_TARGET,
    Samples,
    Scale,
    Step,
    Task,
    difference,
    fits,
    tried,
)
from elmd.data.collate import Batch
from elmd.models.batched import map_samples
from elmd.models.decode import generate_batch, nucleus, stream
from elmd.models.elmd import Elmd

#: Seconds of a piece of work, the device's own included.
Clock = Callable[[Callable[[], Any]], float]

GRID_LENGTHS, GRID_BUDGETS = (256, 512, 1024), (2048, 4096, 8192, 16384)
SMOKE_LENGTHS, SMOKE_BUDGETS = (96, 128), (128, 256, 512, 1024)
DECODE_ROWS = (1, 16, 64, 128)
TRAIN, TEST = 6071, 758  # samples of an epoch, and of its test split: M3ED in the paper's Table 1
NEW_TOKENS = 64
END = 2
#: Of a reply by default: nucleus, longest, and prompt tokens of a batch.
TOP_P, TEMPERATURE, LONGEST_REPLY, BATCH_TOKENS = 0.7, 0.95, 128, 8192
TEXT = "text alone"
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


def peers(task_of: Callable[[int], Task], clock: Clock) -> Iterator[dict[str, Any]]:
    """Steps of EERG over the same samples: ELMD's, peft's with the stock loss, p-tuning's, HF's and TRL's trainers'.

    A trainer draws its own batches, so runs over all samples are timed, in turn, and sums over a run are compared.

    Args:
        task_of: EERG with so many visual tokens in each sample.
    """
    with tempfile.TemporaryDirectory() as folder:
        for slots in (SLOTS, 0):
            kind = {"samples": f"{slots} visual tokens" if slots else TEXT}
            yield from _peers(task_of(slots), kind, folder, clock)
        if not trl_is_here():
            yield {**kind, "way": "TRL", "fits": False, "reason": "not installed (pip install trl)"}


def _peers(task: Task, kind: dict[str, str], folder: str, clock: Clock) -> Iterator[dict[str, Any]]:
    choices = [[_titled(loop(task, step), step) for step in steps] for steps in (task.ways[0], *task.ways[2:])]
    choices += [[way] for way in hf(task, folder)]
    if not task.samples.slots and trl_is_here():
        choices += [[way] for way in trl(task, folder)]

    def seconds_of(way: Way, _: int) -> float | None:
        return fits(lambda: clock(_ready(way)), task)

    sums: dict[str, Any] = {}
    ways: dict[str, Way] = {}
    for candidates in choices:
        for way in candidates:
            sums[way.name] = fits(partial(_sums, way), task)  # also warms up
            if sums[way.name] is not None:
                ways[way.name] = way
                break
    *_, seconds = in_turn(list(ways.values()), PASSES, seconds_of)
    size, count = task.scale.batch, len(task.samples)
    steps = count // size
    for name in sums:
        if name not in seconds:
            yield {**kind, "way": name, "fits": False}
            continue
        first = next(iter(seconds))
        facts, median = ways[name].facts(), statistics.median(seconds[name])
        yield {
            **kind, "way": name, "fits": True, "seconds": median / steps,
            **slower(seconds[name], seconds[first]), "samples_per_s": count / median,
            "tokens_per_s": task.tokens(range(count)) / median, "flops": task.flops(range(count)) // steps,
            "tokens_run": facts["tokens, padding included"] / steps, "step_bytes": int(facts["peak, MiB"] * 2**20),
            "largest_relative_difference": difference(_tensors(sums[name]), _tensors(sums[first])),
        }  # fmt: skip


def _ready(way: Way) -> Callable[[], Any]:
    way.before()
    gc.collect()
    return way.run


def _sums(way: Way) -> Any:
    return _ready(way)()


def _titled(way: Way, step: Step) -> Way:
    return replace(way, name=f"{way.name}, batch of {step.rows}") if step.rows else way


W = TypeVar("W", Way, Step)


def in_turn(
    ways: Sequence[W], rounds: int, seconds_of: Callable[[W, int], float | None]
) -> Iterator[dict[str, list[float]]]:
    """Seconds of each way by name, after each of the rounds; a way is left out from where it does not fit."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for i in range(rounds):
        for way in ways[:: 1 if i % 2 else -1]:
            if way.name in seconds:
                took = seconds_of(way, i)
                if took is None:
                    del seconds[way.name]
                else:
                    seconds[way.name].append(took)
        yield seconds


def slower(seconds: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """The ratio to the first way's seconds in the same round."""
    ratios = [a / b for a, b in zip(seconds, first, strict=True)]
    return {"slower": statistics.median(ratios), "slower_range": [min(ratios), max(ratios)]}


def _tensors(sums: Any) -> list[Tensor]:
    return [sums["loss"].to(sums["gradients"][0].device), *sums["gradients"]]


def profiled(task: Task, clock: Clock) -> dict[str, Any]:
    """Where the device's time goes in a few of ELMD's steps: by operator, and by `GROUPS`.

    On a GPU what is none of the operators' (`idle`) is the time of the same steps unprofiled minus that of their
    kernels: the device waits for Python. On a CPU it is Python's and autograd's own work, and the profiler's.
    """
    return tried({"task": task.name}, lambda: _profiled(task, clock), task)


def _profiled(task: Task, clock: Clock) -> dict[str, Any]:
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
        "steps": count, "unprofiled_seconds": unprofiled / count,
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
    llm: Any, scale: Scale, clock: Clock, peak_of: Callable[..., dict[str, Any]], *, slots: int
) -> Iterator[dict[str, Any]]:
    """EERG's step at every length S, budget of a micro-batch and with or without checkpointing.

    A global batch is the scale's, or as many samples as one micro-batch holds where these are more.

    Args:
        peak_of: the memory of a step (`gpu_step.memory`).
        slots: visual tokens of a sample.
    """
    smoke = scale.batch < 16
    for length in SMOKE_LENGTHS if smoke else GRID_LENGTHS:
        room = length - slots
        one = Lengths(before=room // 2, after=room // 4, target=room - room // 2 - room // 4 - 1)
        for budget in SMOKE_BUDGETS if smoke else GRID_BUDGETS:
            size = max(scale.batch, budget // length)
            samples = Samples([one] * size, llm.config.vocab_size, slots=slots)
            task = Task("eerg", llm, replace(scale, batch=size, micro_tokens=budget), samples, length)
            for way in (task.steps["elmd"], task.steps["elmd, checkpointing"]):
                about = {
                    "length": length, "micro_tokens": budget, "batch": size, "checkpointing": way.checkpointing
                }  # fmt: skip
                yield tried(about, partial(_of_grid, task, way, clock, peak_of), task)


def _of_grid(task: Task, way: Step, clock: Clock, peak_of: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    batch = range(task.scale.batch)
    found = peak_of(task, way, batch)  # also warms up
    middle = statistics.median(clock(partial(task.step, way, batch)) for _ in range(3))
    return {
        **found, "seconds": middle, "tokens_per_s": task.tokens(batch) / middle,
        "samples_per_s": task.scale.batch / middle, "flops": task.flops(batch),
    }  # fmt: skip


def decode(llm: Any, scale: Scale, clock: Clock, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """A token for each of B rows, against reading the weights and the rows' keys and values once.

    Args:
        bandwidth: bytes/s of the device's memory.
    """
    model, prompt = Elmd(llm).eval(), 256
    weights = sum(p.nbytes for name, p in llm.named_parameters() if p is not llm.get_input_embeddings().weight)
    shape = llm.config
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * llm.dtype.itemsize

    def of(rows: int) -> dict[str, Any]:
        samples = Samples([Lengths(prompt - 1, 1, 1)] * rows, shape.vocab_size, slots=0, target=1)
        batch = prompts(samples, range(rows)).to(llm.device)

        def write(count: int) -> None:
            generate_batch(model, batch, unending, eos=END, max_new_tokens=count)

        write(4)
        seconds = [clock(lambda: write(NEW_TOKENS)) - clock(lambda: write(1)) for _ in range(3)]
        step = statistics.median(seconds) / (NEW_TOKENS - 1)
        read = weights + rows * (prompt + NEW_TOKENS / 2) * per_token
        return {
            "ms_per_token": 1000 * step, "tokens_per_s": rows / step, "gb_read": read / 1e9,
            "share_of_bandwidth_percent": 100 * read / step / bandwidth if bandwidth else None,
        }  # fmt: skip

    for rows in DECODE_ROWS:
        yield tried({"rows": rows}, partial(of, rows))


def epochs(
    llm: Any, scale: Scale, clock: Clock, lengths: Sequence[Lengths], tokens_per_character: float,
    frames_per_s: float | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Features, one epoch of REP, one of EERG, and the replies to a test split; the last row is the sum of all.

    Args:
        lengths: of the training samples; an eighth of them, as in Table 1, is answered.
        frames_per_s: of the encoder, as measured; None where it does not fit. All clips' frames are reckoned by it.
    """
    found = []
    for part in _parts(llm, scale, clock, lengths, tokens_per_character, frames_per_s):
        found.append(part)
        yield part
    most = len(lengths) + _asked(lengths)
    about = {"part": "end to end, the sum", "samples": most, "fits": all(part["fits"] for part in found)}
    yield {**about, "seconds": sum(part["seconds"] for part in found)} if about["fits"] else about


def _asked(lengths: Sequence[Lengths]) -> int:
    return max(2, len(lengths) * TEST // TRAIN)


def _parts(
    llm: Any, scale: Scale, clock: Clock, lengths: Sequence[Lengths], tokens_per_character: float,
    frames_per_s: float | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    def drawn(count: int, target: int | None) -> Samples:
        return Samples(
            lengths[:count], llm.config.vocab_size, tokens_per_character=tokens_per_character, target=target
        )  # fmt: skip

    clips = len(lengths) + _asked(lengths)
    about = {"part": "features, at the measured frames/s", "samples": clips, "fits": frames_per_s is not None}
    yield {**about, "seconds": FRAMES_PER_CLIP * clips / frames_per_s} if frames_per_s else about
    for kind in ("rep", "eerg"):
        samples = drawn(len(lengths), REP_TARGET if kind == "rep" else None)
        task = Task(kind, llm, scale, samples, max(samples.lengths))
        about = {"part": f"{kind}, one epoch", "samples": len(samples), "tokens": sum(samples.lengths)}
        yield tried(about, partial(_epoch, task, clock), task)
    asked = drawn(_asked(lengths), None)
    yield tried({"part": "replies", "samples": len(asked)}, partial(_replies, task.model, asked, clock))


def _epoch(task: Task, clock: Clock) -> dict[str, Any]:
    count, size = len(task.samples), task.scale.batch
    batches = [range(i, min(i + size, count)) for i in range(0, count, size)]
    way = task.steps["elmd"]
    task.step(way, batches[0])  # warm

    def epoch() -> None:
        for batch in batches:
            task.step(way, batch)

    return {"seconds": clock(epoch), "flops": task.flops(range(count))}


def _replies(model: Elmd, asked: Samples, clock: Clock) -> dict[str, Any]:
    """Replies by `generate`'s defaults, each as long as its target.

    The nucleus of random weights is wide: all tokens are sorted for it, which a trained model seldom needs.
    """
    device = model.llm.device
    ends = torch.tensor([len(row.target) - 1 for row in asked.rows])  # before the end of text
    for row in asked.rows:
        row.target.clear()
    asked.lengths = [row.length for row in asked.rows]
    model.eval()
    accelerator = Accelerator(cpu=device.type == "cpu")

    def run(batch: Batch, positions: list[int]) -> list[list[int]]:
        ending = ends[positions].to(device)
        streams = [stream(0, asked.samples[i].id) for i in positions]
        likely = nucleus(streams, TOP_P, TEMPERATURE, LONGEST_REPLY)

        def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
            logits[:, END] = -torch.inf  # random weights end at random
            return torch.where(ending[rows] <= step, END, likely(logits, step, rows))

        return generate_batch(model, batch, choose, eos=END, max_new_tokens=LONGEST_REPLY)

    new: list[list[int]] = []
    seconds = clock(lambda: new.extend(map_samples(asked, BATCH_TOKENS, accelerator, "", run, passes=LONGEST_REPLY)))
    return {"seconds": seconds, "tokens": sum(map(len, new))}


def unending(logits: Tensor, step: int, rows: Tensor) -> Tensor:
    """The likeliest token but the end of text: random weights end at random."""
    logits[:, END] = -torch.inf
    return logits.argmax(-1)


def prompts(samples: Samples, positions: Sequence[int]) -> Batch:
    """Samples without their targets."""
    for row in samples.rows:
        row.target.clear()
    return samples.batch(positions)
