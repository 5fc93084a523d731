"""Costs against sizes, drawn with the exponent of a fitted power: `python -m benchmarks.curves [--out DIR]`.

Each curve is written as NAME.png and NAME.csv. Steps are those of EERG on a small GLM with random weights. Times are of
this machine, so read the exponents: 1 is in proportion to the size, 0 does not depend on it. Where a part of the cost
is fixed (frames, prefix) the line bends, and the exponent is that of the sizes shown.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read as torch is loaded: its profiler tells of itself at length

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from benchmarks.samples import Lengths
from benchmarks.ways import Samples, Scale, Task, language_model, peak_bytes, small_llm
from elmd.labels import Emotion
from elmd.retrieval.index import Index, Queries
from elmd.retrieval.strategy import Settings, semantic
from elmd.types import Sample, Utterance

QUERY_TOKENS = 32  # o of VisualGLM's Q-Former
VOCABULARY = 2000
COLOURS = ("#1f5fa8", "#c4572b")


@dataclass(frozen=True)
class Curve:
    """A cost by size.

    Attributes:
        title: what is measured, and on what.
        size, cost: names of the axes, with units.
        values: the cost at each of `sizes`, by what it is a cost of.
    """

    title: str
    size: str
    cost: str
    sizes: Sequence[int]
    values: Mapping[str, Sequence[float]]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """b of the power a · size^b that fits best, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def medians(works: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of each, run in turn."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for work, found in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            if number:  # the first round warms up
                found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in seconds]


# ---------------------------------------------------------------------------------------------------- training steps
def model(small: bool) -> tuple[Any, Scale]:
    """The language model that all steps share, and the sizes of a step."""
    scale = Scale(
        small_llm(2, 100, 2, 16) if small else small_llm(4, VOCABULARY, 4), prefix=4 if small else 32, batch=4
    )
    return language_model(scale, torch.device("cpu"), torch.float32), replace(scale, micro_tokens=10**6)


def task_of(llm: Any, scale: Scale, *, before: int = 100, frames: int = 8, rows: int | None = None) -> Task:
    """A global batch of rows of one length: `before` tokens of I, H and u, the visual ones, R of 40, a target of 20."""
    rows = rows or scale.batch
    samples = Samples([Lengths(before, 40, 19)] * rows, llm.config.vocab_size, slots=QUERY_TOKENS + frames)
    return Task("eerg", llm, replace(scale, batch=rows), samples, longest=0)


def steps(
    title: str, size: str, few: Sequence[int], many: Sequence[int], vary: Callable[[Any, Scale, int], Task]
) -> Callable[[bool, int], Curve]:
    """Milliseconds of a whole training step, by a size that `vary` makes a task of: `few` of them when small."""

    def curve(small: bool, rounds: int) -> Curve:
        llm, scale = model(small)
        sizes = few if small else many
        tasks = [vary(llm, scale, one) for one in sizes]
        works = [partial(task.step, task.steps["elmd"], range(task.scale.batch)) for task in tasks]
        return Curve(title, size, "ms", sizes, {"step": [1000 * one for one in medians(works, rounds)]})

    return curve


history = steps(
    "A step of EERG, batch of 4", "tokens of instruction, history, utterance", [16, 32], [64, 128, 256, 512, 1024],
    lambda llm, scale, size: task_of(llm, scale, before=size),
)  # fmt: skip
frames = steps(
    "A step of EERG, batch of 4, features cached", "frames m", [1, 4], [1, 4, 16, 64, 256],
    lambda llm, scale, size: task_of(llm, scale, frames=size),
)  # fmt: skip
prefix = steps(
    "A step of EERG, batch of 4", "prefix length P", [2, 4], [8, 32, 128, 512],
    lambda llm, scale, size: task_of(llm, replace(scale, prefix=size)),
)  # fmt: skip
batch = steps(
    "A step of EERG", "samples in a batch", [1, 2], [1, 2, 4, 8, 16],
    lambda llm, scale, size: task_of(llm, scale, rows=size),
)  # fmt: skip


def memory(small: bool, _: int) -> Curve:
    """The peak above what stands before and after a step, as torch's allocator tells, and its prediction."""
    llm, scale = model(small)
    befores = [16, 64] if small else [64, 128, 256, 512, 1024]
    sizes, measured, predicted = [], [], []
    for before in befores:
        task = task_of(llm, scale, before=before)
        step, whole = task.steps["elmd"], range(task.scale.batch)
        gradient = partial(task.gradient, step, whole)
        sizes.append(task.tokens(whole))
        task.step(step, whole)
        task.samples.shapes.clear()
        measured.append(peak_bytes(gradient) / 2**20)
        predicted.append(task.predicted(step, task.samples.shapes) / 2**20)
        task.optimizer.zero_grad(set_to_none=True)
    values = {"measured": measured, "predicted": predicted}
    return Curve("Peak of a step of EERG, one micro-batch of 4", "tokens in a micro-batch", "MiB", sizes, values)


# ---------------------------------------------------------------------------------------------------------- the index
def index(small: bool, rounds: int) -> Curve:
    """Exact search of 64 queries, k = 1, own dialogues excluded."""
    sizes = [100, 1000] if small else [1000, 4000, 16000, 64000]
    width, asked = (16, 4) if small else (256, 64)
    draw = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(sizes[-1] + asked, width, generator=draw), dim=-1)
    samples = [_sample(i) for i in range(len(vectors))]
    queries = Queries.of(vectors[:asked], samples[:asked])

    def search(size: int) -> Callable[[], Any]:
        made = Index.build(samples[asked : asked + size], {"E_s": vectors[asked : asked + size]})
        return lambda: semantic(made, queries, Settings("E_s"))

    found = [1000 * one for one in medians([search(size) for size in sizes], rounds)]
    return Curve(f"Exact search of {asked} queries, {width} wide", "candidates", "ms", sizes, {"search": found})


def _sample(number: int) -> Sample:
    turn = Utterance(f"{number}", "A", "…", Emotion.NEUTRAL)
    return Sample(f"{number}", f"d{number // 4}", "", "train", (), turn, turn)


CURVES: dict[str, Callable[[bool, int], Curve]] = {
    "history": history, "frames": frames, "prefix": prefix, "batch": batch, "index": index, "memory": memory,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- output
def draw(curve: Curve, path: Path) -> None:
    """Write the curve as a PNG."""
    figure = Figure(figsize=(5, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    fits = []
    for colour, marker, (name, costs) in zip(COLOURS, "ox", curve.values.items(), strict=False):
        axes.plot(curve.sizes, costs, color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
        fits.append(f"{name} ∝ size$^{{{exponent(curve.sizes, costs):.2f}}}$")
    axes.set(xscale="log", yscale="log", xlabel=curve.size, ylabel=curve.cost)
    axes.set_xticks(curve.sizes, [f"{size:,}".replace(",", " ") for size in curve.sizes])
    axes.minorticks_off()
    costs = [cost for one in curve.values.values() for cost in one]
    ticks = np.geomspace(min(costs), max(costs), 4)
    axes.set_yticks(ticks, [f"{tick:.3g}" if tick < 1000 else f"{tick:.0f}" for tick in ticks])
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{curve.title}\n{', '.join(fits)}", fontsize=10, loc="left")
    if len(curve.values) > 1:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curves", description=f"Draw costs against sizes: {', '.join(CURVES)}."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures and CSV files")
    parser.add_argument("--rounds", type=int, default=7, help="times that each size is measured, in turn (7)")
    parser.add_argument("--small", action="store_true", help="smallest sizes: shows that it runs, not how fast")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events", category=UserWarning)  # torch < 2.13
    args.out.mkdir(parents=True, exist_ok=True)
    for name, measured in CURVES.items():
        curve = measured(args.small, 1 if args.small else args.rounds)
        with (args.out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow([curve.size, *(f"{one}, {curve.cost}" for one in curve.values)])
            rows.writerows(zip(curve.sizes, *([f"{x:.6g}" for x in one] for one in curve.values.values()), strict=True))
        draw(curve, args.out / f"{name}.png")
        fits = ", ".join(f"{one} ∝ size^{exponent(curve.sizes, costs):.2f}" for one, costs in curve.values.items())
        print(f"{args.out / name}.png: {curve.title}, by {curve.size}: {fits}", flush=True)


if __name__ == "__main__":
    main()
