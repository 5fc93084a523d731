"""Clips to frames and to features, against one after another with PyAV; features from shards, against a file for each.

The peer decodes with PyAV from the first frame on, as the examples of transformers' video models do. Clips are made
here: soft shapes that move, with noise, so that they have to be decoded like film.
"""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness import Case, Way
from benchmarks.ways import SCALES
from elmd.errors import ClipError
from elmd.labels import EMOTIONS
from elmd.types import Clip, Sample, Utterance
from elmd.vision.clips import ClipEncoder
from elmd.vision.decode import decode_clips
from elmd.vision.encoder import VisionEncoder, VisionShape
from elmd.vision.pooling import pool
from elmd.vision.store import INDEX, SHARDS, FeatureStore, ShardWriter, index_of, read_shards, write_shard
from elmd.vision.video import frame_indices, read_clip, squash

FRAMES, FPS = 8, 25
#: An encoder that takes about as long for a frame as one process takes to decode it.
SLOW = VisionShape(
    {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 6,
        "image_size": 224, "patch_size": 16,
    },
    {"vocab_size": 2, "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 768},
)  # fmt: skip


def write_clip(path: Path, seconds: float, size: tuple[int, int], *, apart: float, seed: int) -> Clip:
    """An H.264 file of `size` (width, height) whose key frames are so many seconds apart."""
    width, height = size
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
    waves = draw.uniform(2, 12, (3, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": f"{apart * FPS:.0f}"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(round(seconds * FPS)):
            shapes = [np.sin(a * (x + i / 60) + b * y + i / 25) for a, b in waves]
            noise = draw.normal(0, 3, (height, width, 1))
            image = np.clip(np.stack(shapes, -1) * 100 + 128 + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return Clip(str(path))


def wanted_frames(container: Any, wanted: Sequence[int]) -> list[np.ndarray]:
    """Frames [h, w, 3] at these places: decode from the start up to the last of them."""
    last, places = wanted[-1], set(wanted)
    decoded = itertools.islice(container.decode(video=0), last + 1)
    return [frame.to_ndarray(format="rgb24") for place, frame in enumerate(decoded) if place in places]


def one_by_one(clips: Sequence[Clip], size: int) -> Tensor:
    """Frames [n, m, size, size, 3] as a script would read them."""
    frames = []
    for clip in clips:
        with av.open(clip.path) as container:
            stream = container.streams.video[0]
            assert stream.average_rate is not None
            count, rate = stream.frames, float(stream.average_rate)
            wanted = frame_indices(np.arange(count) / rate, clip.start or 0.0, clip.end or count / rate, FRAMES)
            frames.append(np.stack([squash(frame, size) for frame in wanted_frames(container, wanted.tolist())]))
    return torch.from_numpy(np.stack(frames))


def here(clips: Sequence[Clip], size: int) -> Tensor:
    """The same by ELMD's reader, in this process."""
    return torch.from_numpy(np.stack([read_clip(clip, FRAMES, size, "decord") for clip in clips]))


def in_workers(clips: Sequence[Clip], size: int) -> Tensor:
    """The same as stage `features` reads them."""
    requests = [(str(i), clip) for i, clip in enumerate(clips)]
    frames = {}
    for key, result in decode_clips(requests, frames=FRAMES, size=size, decoder="decord", workers=2):
        if isinstance(result, ClipError):
            raise result
        frames[key] = result
    return torch.from_numpy(np.stack([frames[key] for key, _ in requests]))


def cost(work: Callable[[], Any], frames: int) -> Callable[[], dict[str, float]]:
    """Frames per second of CPU time, the workers' included."""

    def facts() -> dict[str, float]:
        before = time.process_time() + _children()
        work()
        return {"frames per CPU second": frames / (time.process_time() + _children() - before)}

    return facts


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cases(small: bool) -> Iterator[Case]:
    for apart in (10.0,) if small else (10.0, 1.0):
        with TemporaryDirectory() as folder:
            yield decoding(Path(folder), small, apart)
    for shape in (SCALES["smoke"].vision,) if small else (SCALES["cpu"].vision, SLOW):
        with TemporaryDirectory() as folder:
            yield encoding(Path(folder), small, shape)
    with TemporaryDirectory() as folder:
        yield cached(Path(folder), small)


def decoding(folder: Path, small: bool, apart: float) -> Case:
    shape, seconds, size, files, times = ((64, 48), 0.8, 32, 2, 1) if small else ((640, 360), 3.0, 224, 4, 4)
    made = [write_clip(folder / f"{i}.mp4", seconds, shape, apart=apart, seed=i) for i in range(files)]
    clips = made * times
    works: dict[str, Callable[[], Tensor]] = {
        "elmd, 2 workers": lambda: in_workers(clips, size),
        "elmd, in this process": lambda: here(clips, size),
        "PyAV, one by one": lambda: one_by_one(clips, size),
    }
    frames = len(clips) * FRAMES
    return Case(
        f"Clips to frames, a key frame every {apart:g} s",
        f"{len(clips)} clips of {seconds:g} s, {shape[0]} × {shape[1]}, H.264, {FPS} fps; {FRAMES} frames of each as "
        f"{size} × {size}",
        [Way(name, work, cost(work, frames)) for name, work in works.items()],
        note="Pixels are equal. Workers are started and ended in each round, as for a stage.",
        per=frames,
        unit="frames",
    )


def encoding(folder: Path, small: bool, shape: VisionShape) -> Case:
    """Clips to features by the stage's own code, and how long its encoder has nothing to do."""
    size, seconds, files, spans = ((64, 48), 0.8, 2, 1) if small else ((640, 360), 3.0, 4, 8)
    made = [write_clip(folder / f"{i}.mp4", seconds, size, apart=1.0, seed=i) for i in range(files)]
    clips = [Clip(clip.path, 0.0, seconds - i / FPS) for i in range(spans) for clip in made]
    turns = [Utterance(str(i), "A", "", EMOTIONS[0], clip=clip) for i, clip in enumerate(clips)]
    samples = [Sample(turn.id, "d", "s", "train", (), turn, turn) for turn in turns]
    torch.manual_seed(0)
    encoder = VisionEncoder(shape).requires_grad_(False).eval()
    maker = ClipEncoder(
        encoder=encoder, weights=folder, frames=FRAMES, sampling="uniform", decoder="decord", workers=1, timeout_s=60.0,
        batch_frames=64,
    )  # fmt: skip
    plan = maker.plan(samples)
    frames = len(clips) * FRAMES

    def way(name: str, work: Callable[[], dict[str, Tensor]]) -> Way:
        began = busy = whole = 0.0

        def begin(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def end(*_: Any) -> None:
            nonlocal busy
            busy += time.perf_counter() - began

        def run() -> dict[str, Tensor]:
            nonlocal busy, whole
            hooks = [encoder.register_forward_pre_hook(begin), encoder.register_forward_hook(end)]
            busy, started = 0.0, time.perf_counter()
            features = work()
            whole = time.perf_counter() - started
            for hook in hooks:
                hook.remove()
            return features

        def facts() -> dict[str, float]:
            """Of the last run."""
            return {"encoder waits, %": 100 * (1 - busy / whole), "encoder alone, frames/s": frames / busy}

        return Way(name, run, facts)

    def ours(workers: int) -> dict[str, Tensor]:
        with TemporaryDirectory(dir=folder) as new:
            writer = ShardWriter(Path(new), 0)
            for key, result in replace(maker, workers=workers).features(plan, sorted(plan.sources)):
                assert isinstance(result, Tensor)
                writer.add(key, result)
            writer.flush()
            shards = {path.name: load_file(path)["features"].float() for path in Path(new, SHARDS).iterdir()}
            return {key: shards[place.shard][place.row] for key, place in read_shards(Path(new)).items()}

    @torch.inference_mode()
    def in_turn() -> dict[str, Tensor]:
        features = {}
        for key, clip in plan.sources.items():
            x = encoder(encoder.pixels(one_by_one([clip], encoder.image_size)[0]))  # [m, o, q]
            features[key] = pool(x).half().float()
        return features

    pixels, vit = encoder.image_size, shape.vision_config
    return Case(
        "Clips to features (eq. 5-8)",
        f"{len(clips)} clips of about {seconds:g} s, {size[0]} × {size[1]}, a key frame every second; {FRAMES} frames "
        f"of each as {pixels} × {pixels}; ViT of {vit['hidden_size']} × {vit['num_hidden_layers']}, and Q-Former",
        [
            way("elmd, 2 workers", lambda: ours(2)),
            way("elmd, 1 worker", lambda: ours(1)),
            way("PyAV and the encoder in turn", in_turn),
        ],
        tolerance=1e-3,
        per=frames,
        unit="frames",
        note=f"Features are kept in half precision. In turn the encoder takes the {FRAMES} frames of a clip a call, "
        f"elmd's up to {maker.batch_frames}. It waits while it is not called: for frames, for workers to start, for "
        "shards to be written. It shares the cores with the workers.",
    )


def cached(folder: Path, small: bool) -> Case:
    count, tokens, width = (8, 4, 6) if small else (1024, 40, 768)
    made = torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(0)).half()
    names = [f"s{i}" for i in range(count)]
    rows = dict(zip(names, made, strict=True))
    for at in range(0, count, 256):  # as many as stage `features` puts into one
        write_shard(folder / "shards" / f"000-{at:05d}.safetensors", {n: rows[n] for n in names[at : at + 256]})
    (folder / INDEX).write_text(json.dumps(index_of({n: n for n in names}, read_shards(folder))), encoding="utf-8")
    for name, row in rows.items():
        np.save(folder / f"{name}.npy", row.numpy())
        torch.save(row.clone(), folder / f"{name}.pt")
    order = [names[i] for i in torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    store = FeatureStore(folder)
    return Case(
        "Features of one sample after another, in random order",
        f"{count} samples of [{tokens}, {width}] in half precision, handed out in float32; in the page cache",
        [
            Way("elmd, mapped shards", lambda: [store.get(name) for name in order]),
            Way(".npy for each", lambda: [torch.from_numpy(np.load(folder / f"{n}.npy")).float() for n in order]),
            Way(".pt for each", lambda: [torch.load(folder / f"{n}.pt", weights_only=True).float() for n in order]),
        ],
        tolerance=0.0,
        per=count,
        unit="samples",
    )
