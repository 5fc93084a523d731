"""Training steps of REP and EERG at the true shapes, against how they are usually run: `python benchmarks/gpu_step.py`.

ChatGLM2-6B and VisualGLM's ViT-g with Q-Former stand on one GPU with random weights; samples are random ids as long as
CPED's. Where no GPU is, a small model goes through the same code (`--scale cpu`): compare its ratios only. Nothing is
downloaded, and neither an installation of ELMD nor Hydra is needed. Ways of a step, all with the gradient of the same
global batch, clipping and AdamW:

elmd                  length-sorted micro-batches under a token budget, logits at targets only, REP split at the slots
elmd, checkpointing   the same, each layer computed again in its backward pass
elmd, no split        REP with gradient through every token
peft                  peft's own prefix-tuning forward with the stock loss of transformers over all logits, one padded
                      batch (or as large a part of it as fits)
transformers          the same for REP, which has no prefix
p-tuning              ChatGLM2's own defaults: one sample at a time, 16 accumulated, padded to the longest sample of the
                      data, checkpointing, all logits. Emulated by ELMD's forward, as the original's code runs only
                      on old versions and transformers' own checkpointing loses the prefix

Vision features are cached by training, so steps take them as given, and frames per second stand apart; what a step of
p-tuning takes where it encodes its clips itself is reported as the sum of both. A way that does not fit into the
device's memory says so.

`--part` chooses what is measured: `steps` is this table; `grid` an EERG step at 256, 512 and 1024 tokens a sample, with
micro-batches of 2 048 to 16 384 tokens, with and without checkpointing, of 16 samples or as many as fill a micro-batch;
`decode` a token for 1, 16, 64 and 128 rows, held against reading weights, keys and values once from the device's
memory; `epochs` one epoch of REP and of EERG over 6 071 samples and replies to 758 (on a CPU a few), from the first
batch to the last, the features of all clips as reckoned from frames per second, and the sum; `profile` where the
device's time goes in ELMD's steps; `peers` EERG beside peft, p-tuning and HF's `Trainer` with `group_by_length`, with
visual tokens, and on text alone TRL's `SFTTrainer` beside all of these: it splices no visual tokens in, and runs with
gradient_checkpointing=False, not its default, as checkpointing loses the prefix. A trainer draws its own batches, so
`peers` times runs over all samples in turn, and compares sums over a run; of so few samples `group_by_length` sorts
all.

First all ways are shown to give one loss and one gradient: in float32 within 1e-4 (relative, each trained tensor), and
in the dtype that is timed. peft moves positions by P, the original does not; here it is handed positions minus P, so
that both compute the same, at the same cost (peft before 0.19 drops positions, and differs).

Model-FLOP utilisation is the useful work over what the device could do in the time:

    FLOPs = 4 N (tokens - free) + 2 N free + 4 V H targets;    utilisation = FLOPs / (seconds · peak)

N are the decoder layers' parameters. A frozen weight costs 2 per token forward and 2 backward, for the gradient of the
activations (6 where weights train as well). `free` are REP's tokens before the video slots, through which no gradient
must pass; V·H are the parameters of the output layer, which only targets need. So all ways of a task are held against
the same FLOPs: padding, logits that nobody needs and recomputation count as loss. Attention's own products (1 to 2 %
at these lengths) and what trains are left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: neither this package nor, without an installation, elmd is on the path
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "src")]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read as torch is loaded: its profiler tells of itself at length

import torch
from torch import Tensor

from benchmarks.gpu_parts import PROFILED, TEXT, TRAIN, decode, epochs, grid, in_turn, peers, profiled, slower
from benchmarks.samples import CPED_LONGEST, SLOTS, Lengths, drawn, read
from benchmarks.ways import (
    FRAMES_PER_CLIP,
    REP_TARGET,
    SCALES,
    Samples,
    Scale,
    Step,
    Task,
    difference,
    fits,
    language_model,
    peak_bytes,
    tried,
)
from elmd.engine.files import write_text
from elmd.errors import ElmdError
from elmd.models.llm import freeze, pick_dtype
from elmd.vision.encoder import VisionEncoder
from elmd.vision.pooling import pool

#: Dense bf16 TFLOP/s by the makers' data sheets, by a part of the device's name (SXM where there are several).
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}

#: Bytes/s of their memory, by the same sheets.
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "L40S": 0.864e12}
PARTS = ("steps", "peers", "profile", "grid", "decode", "epochs")

#: Largest relative differences of two ways: float32, and bfloat16, which rounds at 3 digits in every layer.
FP32, BF16 = 1e-4, 0.1

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "trl")


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of `work`, the device's own work included."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def attempt(task: Task, way: Step, batch: Sequence[int]) -> float | None:
    """Seconds of a training step; None where the device has not the memory for it."""
    return fits(lambda: timed(lambda: task.step(way, batch), task.llm.device), task)


def differences(task: Task, ways: Sequence[Step], batch: Sequence[int]) -> dict[str, float]:
    """Largest relative difference of loss and gradients from the first one's, of each way that fits."""
    found: dict[str, list[Tensor]] = {}
    for way in ways:
        tensors = fits(partial(_gradient, task, way, batch), task)
        if tensors is not None:
            found[way.name] = tensors
    return {name: difference(tensors, next(iter(found.values()))) for name, tensors in found.items()}


def _gradient(task: Task, way: Step, batch: Sequence[int]) -> list[Tensor]:
    found = [tensor.clone() for tensor in task.gradient(way, batch)]
    task.optimizer.zero_grad(set_to_none=True)
    return found


def agree(name: str, off: dict[str, float], dtype: torch.dtype) -> None:
    """
    Raises:
        AssertionError: one of a task's ways differs too much from the first.
    """
    most = FP32 if dtype == torch.float32 else BF16
    for way, one in off.items():
        assert one < most, f"{name}: {way} differs from {next(iter(off))} by {one:.1e}"


def memory(task: Task, way: Step, batch: Sequence[int]) -> dict[str, Any]:
    """Bytes at the peak of a step's gradient: in all (GPU), and above what stands before and after it."""
    device = task.llm.device
    task.samples.shapes.clear()
    step = peak_bytes(lambda: task.gradient(way, batch), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    task.optimizer.zero_grad(set_to_none=True)
    predicted = task.predicted(way, task.samples.shapes)
    return {
        "peak_bytes": peak, "step_bytes": step, "predicted_step_bytes": predicted,
        "deviation_percent": 100 * (predicted / step - 1), "micro_batches": sorted(task.samples.shapes),
    }  # fmt: skip


def compare(task: Task, rounds: int, peak: float | None, save: Callable[[dict[str, Any]], None]) -> None:
    """Compare, then measure a task's ways in turn, each round on another batch; `save` is handed what is known so far.

    Args:
        peak: FLOP/s of the device.

    Raises:
        AssertionError: ways do not agree: at once in float32, and where numbers round, after what is measured is saved.
    """
    size, tokens = task.scale.batch, task.samples.lengths
    batches = [list(range(i, i + size)) for i in range(0, len(tokens), size)]
    heaviest = max(batches, key=lambda batch: (max(tokens[i] for i in batch), task.tokens(batch)))
    ways: list[Step] = []
    result: dict[str, Any] = {}

    def first(way: Step) -> dict[str, Any]:
        task.step(way, heaviest)  # also warms up
        return memory(task, way, heaviest)

    for candidates in task.ways:
        for way in candidates:
            result[way.name] = tried({"rows": way.rows}, partial(first, way), task)
            if result[way.name]["fits"]:
                ways.append(way)
                save(result)
                break
    off = differences(task, ways, batches[0])
    for way in ways:
        result[way.name] |= {"fits": way.name in off, "largest_relative_difference": off.get(way.name)}
    if task.llm.dtype == torch.float32:
        agree(task.name, off, torch.float32)
    fitting = [way for way in ways if way.name in off]
    for seconds in in_turn(fitting, rounds, lambda way, i: attempt(task, way, batches[i])):
        for way in fitting:
            if way.name in seconds:
                result[way.name] |= _figures(task, batches, seconds[way.name], next(iter(seconds.values())), peak)
            else:
                result[way.name] = {"fits": False}
        save(result)
    agree(task.name, off, task.llm.dtype)


def _figures(
    task: Task, batches: Sequence[Sequence[int]], seconds: list[float], first: list[float], peak: float | None
) -> dict[str, Any]:
    """Medians over rounds; `slower` is the ratio to the first way's time on the same batch."""
    pairs = list(zip(batches, seconds, strict=False))
    return {
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "samples_per_s": statistics.median(len(batch) / s for batch, s in pairs),
        "tokens_per_s": statistics.median(task.tokens(batch) / s for batch, s in pairs),
        "mfu_percent": statistics.median(100 * task.flops(batch) / s / peak for batch, s in pairs) if peak else None,
        **slower(seconds, first),
    }


@torch.inference_mode()
def features(scale: Scale, device: torch.device, dtype: torch.dtype, rounds: int, peak: float | None) -> dict[str, Any]:
    """Frames per second of what stage `features` does after decoding: one batch of frames to V_c."""
    torch.manual_seed(0)
    with torch.device(device):
        encoder = freeze(VisionEncoder(scale.vision))
    encoder.vision_model.to(dtype)
    frames = torch.randint(0, 256, (scale.frames, encoder.image_size, encoder.image_size, 3), dtype=torch.uint8)

    def encode() -> list[Tensor]:
        clips = encoder(encoder.pixels(frames)).split(FRAMES_PER_CLIP)
        return [pool(x).half().cpu() for x in clips]

    encode()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timed(encode, device) for _ in range(rounds)]
    layers = sum(p.numel() for p in encoder.vision_model.encoder.parameters())
    tokens = (encoder.image_size // encoder.vision_model.config.patch_size) ** 2 + 1
    rate = scale.frames / statistics.median(seconds)
    return {
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "frames": scale.frames,
        "seconds": seconds,
        "frames_per_s": rate,
        "mfu_percent": 100 * 2 * layers * tokens * rate / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def lengths(count: int, data: Path | None) -> tuple[list[Lengths], int]:
    """Lengths of so many samples, and characters of the longest one of the data."""
    if data is None:
        return drawn(count), CPED_LONGEST
    real = read(data)
    return random.Random(0).choices(real, k=count), max(map(sum, real))


def version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def gib(value: int | None) -> str:
    return number(None if value is None else value / 2**30, 2)


def _of(key: str, digits: int = 0) -> Callable[[dict[str, Any]], str]:
    return lambda cell: number(cell.get(key), digits)


def _seconds(cell: dict[str, Any], digits: int = 3) -> str:
    return number(cell["seconds"], digits) if cell["fits"] else cell.get("reason", "does not fit")


def _ratio(cell: dict[str, Any]) -> str:
    low, high = cell["slower_range"]
    return f"{cell['slower']:.2f} ({low:.2f}–{high:.2f})"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [titles, ["---:"] * len(titles), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


#: Of each part but `steps` and `profile`: titles of the columns, and what stands in them.
COLUMNS: dict[str, list[tuple[str, Callable[[dict[str, Any]], str]]]] = {
    "peers": [
        ("EERG, samples of", lambda cell: cell["samples"]), ("way", lambda cell: cell["way"]),
        ("s/step", _seconds), ("× elmd (range)", lambda cell: _ratio(cell) if cell["fits"] else "–"),
        ("samples/s", _of("samples_per_s", 2)), ("tokens/s", _of("tokens_per_s")),
        ("utilisation, %", _of("mfu_percent", 1)), ("tokens a step, padding included", _of("tokens_run")),
        ("the step, GiB", lambda cell: gib(cell.get("step_bytes"))),
        ("differs by", lambda cell: f"{cell['largest_relative_difference']:.0e}" if cell["fits"] else "–"),
    ],
    "grid": [
        ("tokens a sample", _of("length")), ("a micro-batch", _of("micro_tokens")),
        ("a global batch, samples", _of("batch")),
        ("checkpointing", lambda cell: "yes" if cell["checkpointing"] else "no"), ("s/step", _seconds),
        ("samples/s", _of("samples_per_s", 2)), ("tokens/s", _of("tokens_per_s")),
        ("utilisation, %", _of("mfu_percent", 1)), ("peak, GiB", lambda cell: gib(cell.get("peak_bytes"))),
        ("of it the step, GiB", lambda cell: gib(cell.get("step_bytes"))),
        ("predicted, GiB", lambda cell: gib(cell.get("predicted_step_bytes"))),
    ],
    "decode": [
        ("rows", _of("rows")),
        ("ms a token", lambda cell: number(cell["ms_per_token"], 2) if cell["fits"] else "does not fit"),
        ("tokens/s", _of("tokens_per_s")), ("GB read", _of("gb_read", 2)),
        ("of the bandwidth, %", _of("share_of_bandwidth_percent", 1)),
    ],
    "epochs": [
        ("part", lambda cell: cell["part"]), ("samples", _of("samples")), ("tokens", _of("tokens")),
        ("s", lambda cell: _seconds(cell, 1)), ("utilisation, %", _of("mfu_percent", 1)),
    ],
    "in_the_loop": [
        ("p-tuning, its clips encoded in each step: a sum of two measurements", lambda cell: f"EERG, {cell['part']}"),
        ("on cached features, s/step", _of("cached_s", 3)), ("encoding, s/step", _of("encoding_s", 3)),
        ("sum, s/step", _of("seconds", 3)), ("× elmd, on cached features", _of("slower", 2)),
    ],
}  # fmt: skip


def in_the_loop(report: dict[str, Any]) -> list[dict[str, Any]]:
    """p-tuning's steps of EERG and, beside them, their clips' frames at the measured frames per second."""
    seconds = {
        "steps": {way: one.get("median_s") for way, one in report["tasks"].get("eerg", {"ways": {}})["ways"].items()},
        "peers": {one["way"]: one.get("seconds") for one in report.get("peers", ()) if one["samples"] != TEXT},
    }
    rate, found = report.get("features", {}).get("frames_per_s"), []
    for part, of in seconds.items():
        cached = next((one for way, one in of.items() if way.startswith("p-tuning")), None)
        if rate and cached and of.get("elmd"):
            encoding = report["sizes"]["batch"] * FRAMES_PER_CLIP / rate
            found.append({
                "part": part, "cached_s": cached, "encoding_s": encoding, "seconds": cached + encoding,
                "slower": (cached + encoding) / of["elmd"],
            })  # fmt: skip
    return found


def tables(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [f"{report['device']}; {', '.join(f'{k} {v}' for k, v in report['versions'].items())}; {report['dtype']}"]
    lines += [f"`{report['command']}`", ""]
    for part, columns in COLUMNS.items():
        if found := in_the_loop(report) if part == "in_the_loop" else report.get(part):
            lines += _table([title for title, _ in columns], [[show(cell) for _, show in columns] for cell in found])
    for seen in report.get("profile", ()):
        if not seen["fits"]:
            lines += [f"{seen['task'].upper()}: does not fit", ""]
            continue
        lines += [f"{seen['task'].upper()}: {1000 * seen['seconds']:,.1f} ms a step. {seen['largest']}", ""]

        def spent(one: dict[str, Any]) -> list[str]:
            return [number(1000 * one["seconds"], 2), number(100 * one["share"], 1)]

        lines += _table(["of", "ms a step", "%"], [[one["group"], *spent(one)] for one in seen["groups"]])
        lines += _table(
            ["operator", "of", "calls a step", "ms a step", "%"],
            [[one["operator"], one["group"], number(one["calls"], 1), *spent(one)] for one in seen["operators"]],
        )
    if seen := report.get("features"):
        lines += ["| features | parameters | frames/s | utilisation, % | peak, GiB |", "|---|---:|---:|---:|---:|"]
        rate = number(seen["frames_per_s"]) if seen["fits"] else "does not fit"
        cells = [number(seen.get("parameters")), rate, number(seen.get("mfu_percent"), 1), gib(seen.get("peak_bytes"))]
        lines += [f"| ViT and Q-Former | {' | '.join(cells)} |", ""]
    for name, task in report["tasks"].items():
        about = task["about"]
        lines += [
            f"{name.upper()}: {about['samples']} samples of {about['shortest']} to {about['longest']} tokens, mean "
            f"{about['mean']:.0f}",
            "",
            "| way | s/step | × the first way (range) | samples/s | tokens/s | utilisation, % | peak, GiB "
            "| of it the step, GiB | predicted, GiB (off) | differs by |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for way, one in task["ways"].items():
            if not one["fits"]:
                lines.append(f"| {way} | does not fit |||||||||")
            elif "median_s" in one:
                cells = [
                    number(one["median_s"], 3), _ratio(one),
                    number(one["samples_per_s"], 2), number(one["tokens_per_s"]), number(one["mfu_percent"], 1),
                    gib(one["peak_bytes"]), gib(one["step_bytes"]),
                    f"{gib(one['predicted_step_bytes'])} ({one['deviation_percent']:+.0f} %)",
                    f"{one['largest_relative_difference']:.0e}",
                ]  # fmt: skip
                rows = f", batch of {one['rows']}" if one["rows"] else ""
                lines.append(f"| {way}{rows} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All of it; returns the report, which also stands in `args.out` after each part."""
    device = torch.device(args.device)
    dtype, scale = pick_dtype("auto", device), SCALES[args.scale]
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    tflops = args.peak_tflops or next((value for part, value in PEAKS.items() if part in name), None)
    peak = tflops * 1e12 if tflops else None
    report: dict[str, Any] = {
        "device": name, "dtype": str(dtype).removeprefix("torch."), "scale": args.scale, "peak_tflops": tflops,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "versions": {library: version(library) for library in LIBRARIES},
        "command": f"python benchmarks/gpu_step.py {' '.join(sys.argv[1:])}".strip(),
        "tokens_per_character": args.tokens_per_character, "sizes": asdict(scale), "tasks": {},
    }  # fmt: skip

    def save() -> None:
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            figures = report | {"in_the_loop": in_the_loop(report)}
            for file, text in (("gpu_step.json", json.dumps(figures, indent=1)), ("gpu_step.md", tables(report))):
                write_text(args.out / file, text + "\n")

    def task_of(kind: str, llm: Any, scale: Scale, rounds: int, slots: int = SLOTS) -> Task:
        found, longest = lengths(rounds * scale.batch, args.data)
        samples = Samples(
            found, llm.config.vocab_size, tokens_per_character=args.tokens_per_character, slots=slots,
            target=REP_TARGET if kind == "rep" else None,
        )  # fmt: skip
        fixed = max(slots + round(args.tokens_per_character * longest), *samples.lengths)
        return Task(kind, llm, scale, samples, fixed)

    def clock(work: Callable[[], Any]) -> float:
        return timed(work, device)

    def peers_of(llm: Any, scale: Scale, rounds: int) -> Iterator[dict[str, Any]]:
        off: dict[str, dict[str, float]] = {}
        for cell in peers(lambda slots: task_of("eerg", llm, scale, rounds, slots), clock):
            if cell["fits"]:
                off.setdefault(cell["samples"], {})[cell["way"]] = cell["largest_relative_difference"]
            yield cell
        for samples, one in off.items():
            agree(samples, one, llm.dtype)

    if dtype != torch.float32:  # exactly, before what rounds
        small = SCALES["cpu"]
        llm = language_model(small, device, torch.float32)
        for kind in ("rep", "eerg"):
            task = task_of(kind, llm, small, 1)
            off = differences(task, [candidates[0] for candidates in task.ways], range(small.batch))
            report.setdefault("float32_differences", {})[kind] = off
            agree(kind, off, torch.float32)
        if "peers" in args.part:
            report["float32_peers"] = list(peers_of(llm, small, 1))
        del llm, task
    if {"steps", "peers", "epochs"} & set(args.part):
        report["features"] = tried({}, partial(features, scale, device, dtype, args.rounds, peak))
        save()
        gc.collect()
    llm = language_model(scale, device, dtype)
    report["parameters"] = sum(p.numel() for p in llm.parameters())

    bandwidth = next((value for part, value in BANDWIDTHS.items() if part in name), None)
    train, _ = lengths(TRAIN if on_gpu else 4 * scale.batch, args.data)
    others: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "peers": lambda: peers_of(llm, scale, args.rounds),
        "profile": lambda: (profiled(task_of(kind, llm, scale, PROFILED), clock) for kind in ("rep", "eerg")),
        "grid": lambda: grid(llm, scale, clock, memory, slots=SLOTS),
        "decode": lambda: decode(llm, scale, clock, bandwidth),
        "epochs": lambda: epochs(
            llm, scale, clock, train, args.tokens_per_character, report["features"].get("frames_per_s")
        ),
    }
    for part, cells in others.items():
        if part in args.part:
            report[part] = []
            for cell in cells():
                if peak and cell.get("flops"):
                    cell["mfu_percent"] = 100 * cell["flops"] / cell["seconds"] / peak
                report[part].append(cell)
                save()
    for kind in ("rep", "eerg") if "steps" in args.part else ():
        task = task_of(kind, llm, scale, args.rounds)
        tokens = task.samples.lengths
        about = {
            "samples": len(tokens), "shortest": min(tokens), "longest": max(tokens), "mean": statistics.mean(tokens),
            "padded_to": task.longest,
            "share_before_slots": sum(len(row.before) for row in task.samples.rows) / sum(tokens),
        }  # fmt: skip

        def keep(ways: dict[str, Any], kind: str = kind, about: dict[str, Any] = about) -> None:
            report["tasks"][kind] = {"about": about, "ways": ways}
            save()

        compare(task, args.rounds, peak, keep)
    return report


def refused(args: argparse.Namespace) -> str | None:
    """Why these arguments cannot be run here."""
    try:
        device = torch.device(args.device)
    except RuntimeError:
        return f"--device: there is no {args.device!r}; use cpu or cuda"
    if device.type not in ("cpu", "cuda"):
        return f"--device: {args.device} is not measured; use cpu or cuda"
    seen = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        return f"--device: {args.device} is not here, torch sees {seen} GPUs; use --device cpu"
    if device.type == "cuda" and seen > 1:  # accelerate takes the first, and `Trainer` all of them
        return f"--device: torch sees {seen} GPUs, and one is measured; set CUDA_VISIBLE_DEVICES to its number"
    if args.scale == "6b" and device.type == "cpu":
        return "--scale: 6b takes a GPU of 40 GB or more; use --scale cpu on this device"
    if args.rounds < 1:
        return f"--rounds: {args.rounds} is too few; use 1 or more"
    return None


def main() -> None:
    # peft still asks transformers under the old name; nothing a user could do about it.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing`", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events", category=UserWarning)  # torch < 2.13
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python benchmarks/gpu_step.py --scale 6b --device cuda --rounds 9 --out runs/gpu_step",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=SCALES, default="6b" if gpu else "cpu", help="sizes (6b on a GPU, else cpu)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["steps"], help="what to measure (steps)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each way, each on its own batch (9)")
    parser.add_argument("--out", type=Path, help="folder for gpu_step.json and gpu_step.md, written as it goes")
    parser.add_argument("--data", type=Path, help="a CPED csv to take lengths from, instead of its recorded quantiles")
    parser.add_argument(
        "--tokens-per-character", type=float, default=0.7,
        help="0.7, an assumption for ChatGLM2's vocabulary on colloquial Chinese",
    )  # fmt: skip
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense, where its name is not known")
    args = parser.parse_args()
    if reason := refused(args):
        parser.error(reason)
    try:
        print(tables(run(args)))
    except ElmdError as error:
        if os.environ.get("ELMD_DEBUG"):
            raise
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
