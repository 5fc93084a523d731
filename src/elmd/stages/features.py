"""Stage `features`: each distinct clip once through the frozen encoder -> V_c (eq. 5-8), kept for REP and EERG.

`vision.sampling=random` keeps the visual tokens of one frame per sample instead, drawn by the sample's id (VisualGLM,
§4.2), and a ResNet gives one vector per frame (Livebot): both as they are, without the pooling.

Ranks share the clips out and meet through files: shards of features as they are made (kept when a run is killed), and
one note per rank when it is done. A clip that cannot be used costs that clip: its samples become text-only.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elmd.config import Config, Sampling, VisionConfig, VisionKind
from elmd.data.samples import load_samples
from elmd.dtypes import pick_dtype
from elmd.engine.files import digest, read_json, write_json
from elmd.errors import CheckpointError, ClipError, ConfigError, DataError
from elmd.log import logger, progress, table
from elmd.stages.base import Job, Outcome, checkpoint_path
from elmd.stages.depends import vision_weights
from elmd.types import Clip, Sample
from elmd.vision.decode import decode_clips
from elmd.vision.encoder import VisionEncoder
from elmd.vision.pooling import pool
from elmd.vision.resnet import ResNetEncoder
from elmd.vision.store import INDEX, SHARDS, index_of, read_shards, write_shard
from elmd.vision.video import frame_files

FAILED = "failed.json"
#: Clips per shard: what a kill costs at most, on each rank. A shard of VisualGLM's features (m = 8) is then 15 MiB.
CLIPS_PER_SHARD = 256
#: The evenly spread frames of a clip among which `sampling=random` draws. Ours: two seconds of film hold about 50, and
#: neighbours hardly differ.
CANDIDATES = 16


def run(cfg: Config, job: Job) -> Outcome:
    """Writes `shards/`, `index.json` (see `elmd.vision.store`) and `failed.json` (the clips that were given up).

    Raises:
        DataError: no sample has a clip, more than half of the clips cannot be decoded, or (precomputed) an array is
            missing or has another shape than the others.
        CheckpointError: the encoder cannot be loaded, or its output is not finite.
    """
    if cfg.vision.kind is VisionKind.none:
        raise ConfigError("vision=none has no features", where="stage", fix="leave the stage out, or choose a vision")
    samples = load_samples(job.upstream["prepare"] / "samples.jsonl")
    work = Precomputed(cfg, samples) if cfg.vision.kind is VisionKind.precomputed else Encoded(cfg, job, samples)
    if not work.sources:
        raise DataError(
            "no sample has " + ("features" if isinstance(work, Precomputed) else "a clip"),
            where=job.upstream["prepare"] / "samples.jsonl",
            fix="name them in the data, or set vision=none",
        )
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    if rank == 0:
        for note in job.folder.glob("rank-*.json"):
            note.unlink()  # of an earlier, killed attempt
    kept = read_shards(job.folder).keys() & work.sources.keys()
    job.accelerator.wait_for_everyone()  # nobody writes before everybody has seen what is left to do

    begun = time.perf_counter()
    todo = [key for key in sorted(work.sources) if key not in kept]
    failed = work.make(todo[rank::world], Shards(job.folder, rank))
    write_json(job.folder / f"rank-{rank}.json", failed)
    for lost_there in _notes(job.folder, world):
        failed |= lost_there
    job.accelerator.wait_for_everyone()
    if rank == 0:
        for note in job.folder.glob("rank-*.json"):
            note.unlink()
    seconds = time.perf_counter() - begun

    users: dict[str, list[str]] = {key: [] for key in work.sources}
    for sample, key in work.keys.items():
        if key is not None:
            users[key].append(sample)
    lost = [{**work.describe(key), "error": failed[key], "samples": users[key]} for key in sorted(failed)]
    if rank == 0:
        write_json(job.folder / FAILED, lost)
    if len(failed) * 2 > len(work.sources):
        raise DataError(
            f"{len(failed)} of {len(work.sources)} clips cannot be used; the first: {lost[0]['error'].rstrip('.')}",
            where=job.folder / FAILED,
            fix="mend the clips, or set vision=none",
        )
    owned = {sample: key if key not in failed else None for sample, key in work.keys.items()}
    index = index_of(owned, read_shards(job.folder))
    if rank == 0:
        write_json(job.folder / INDEX, index)

    counts = {
        "samples": len(samples),
        "samples_without_clip": sum(key is None for key in work.keys.values()),
        "samples_lost": sum(len(users[key]) for key in failed),
        "clips": len(work.sources),
        "clips_made": len(todo) - len(failed),
        "clips_kept_from_before": len(kept),
        "clips_failed": len(failed),
    }
    metrics = {
        "tokens": index["tokens"],
        "width": index["width"],
        "seconds": seconds,
        "clips_per_second": len(todo) / seconds,
    }
    table("Features", ("", "value"), [(k.replace("_", " "), v) for k, v in {**counts, **metrics}.items()])
    if failed:
        logger.warning(
            "%d clips failed, so %d samples have no video: see failed.json", len(failed), counts["samples_lost"]
        )
    return Outcome(metrics=metrics, counts=counts)


def spare_cores() -> int:
    """Cores for each process of this machine but one, which feeds the encoder; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)


# ------------------------------------------------------------------------------------------------------ what to make
class Encoded:
    """Features from clips: `sources` are clips by key; a key stands for content, span, sampling and encoder.

    Where a frame is drawn at random a key stands for the sample as well.
    """

    def __init__(self, cfg: Config, job: Job, samples: Iterable[Sample] = ()):
        self.vision: VisionConfig = cfg.vision
        self.random = cfg.vision.sampling is Sampling.random
        device = job.accelerator.device
        self.path = checkpoint_path(vision_weights(cfg), "vision", job)
        kind = ResNetEncoder if cfg.vision.kind is VisionKind.resnet else VisionEncoder
        self.encoder = kind.load(self.path, pick_dtype(cfg.vision.dtype, device), device)
        self.made_by = [
            self.encoder.fingerprint(), self.encoder.image_size, cfg.vision.frames, cfg.vision.sampling.value,
            cfg.vision.decoder.value,
        ]  # fmt: skip
        self.look(samples)

    def look(self, samples: Iterable[Sample]) -> None:
        """Take these samples' clips as what is to be made, in place of any before."""
        contents: dict[str, str] = {}
        self.keys: dict[str, str | None] = {}
        self.sources: dict[str, Clip] = {}
        self.drawn: dict[str, int] = {}  # which of the candidates, by key
        for sample in progress(list(samples), "looking at clips", unit="sample"):
            clip = sample.utterance.clip
            if clip is None:
                self.keys[sample.id] = None
                continue
            if clip.path not in contents:
                contents[clip.path] = _content(Path(clip.path))
            own = [sample.id] if self.random else []
            key = digest([contents[clip.path], clip.start, clip.end, *self.made_by, *own])
            if self.random:
                self.drawn[key] = random.Random(sample.id).randrange(CANDIDATES)
            self.keys[sample.id] = key
            self.sources.setdefault(key, clip)

    def describe(self, key: str) -> dict[str, Any]:
        clip = self.sources[key]
        return {"clip": clip.path, "start": clip.start, "end": clip.end}

    def make(self, keys: list[str], shards: Shards) -> dict[str, str]:
        """Features of these clips into shards; returns {key: error} of those that cannot be decoded."""
        failed: dict[str, str] = {}
        waiting: dict[str, np.ndarray] = {}
        clips_at_once = max(1, self.vision.batch_frames // self.vision.frames)
        decoding = decode_clips(
            [(key, self.sources[key]) for key in keys],
            frames=CANDIDATES if self.random else self.vision.frames,
            size=self.encoder.image_size,
            decoder=self.vision.decoder.value,
            workers=self.vision.workers or spare_cores(),
            timeout_s=self.vision.timeout_s,
            ahead=2 * clips_at_once,
        )
        with closing(decoding):
            for key, result in progress(decoding, "features", total=len(keys), unit="clip"):
                if isinstance(result, ClipError):
                    logger.warning("clip lost: %s", result)
                    failed[key] = str(result)
                    continue
                waiting[key] = result[self.drawn[key]][None] if self.random else result
                if len(waiting) == clips_at_once:
                    shards.add(self._encode(waiting))
                    waiting = {}
        if waiting:
            shards.add(self._encode(waiting))
        shards.flush()
        return failed

    @torch.inference_mode()
    def _encode(self, clips: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """V_c [o + m, q] by key; of one random frame X[0] [o, q], and of a ResNet [m, q]."""
        frames = torch.from_numpy(np.concatenate(list(clips.values())))
        parts = [self.encoder(self.encoder.pixels(part)) for part in frames.split(self.vision.batch_frames)]
        each = torch.cat(parts).split(self.vision.frames)
        found = {key: self._tokens(x).half().cpu() for key, x in zip(clips, each, strict=True)}
        for key, features in found.items():
            if not features.isfinite().all():
                raise CheckpointError(
                    f"the vision encoder's output is not finite on {self.sources[key].path}",
                    where=self.path,
                    fix="set vision.dtype=float32, and check that the weights are whole",
                )
        return found

    def _tokens(self, x: Tensor) -> Tensor:
        """What is kept of a clip's frames: X [m, o, q], or [m, q] from a ResNet."""
        if x.dim() == 2:
            return x
        return x[0] if self.random else pool(x)


class Precomputed:
    """Features from a user's own arrays: `sources` are files by key; a key stands for a file's content."""

    def __init__(self, cfg: Config, samples: Iterable[Sample]):
        self.shape = list(cfg.vision.shape) if cfg.vision.shape is not None else None
        self.keys: dict[str, str | None] = {}
        self.sources: dict[str, Path] = {}
        self.first: tuple[Path, tuple[int, ...]] | None = None
        contents: dict[str, str] = {}
        for sample in progress(list(samples), "looking at features", unit="sample"):
            name = sample.utterance.features
            if name is None:
                self.keys[sample.id] = None
                continue
            if name not in contents:
                contents[name] = digest(["precomputed", _content(Path(name))])
            self.keys[sample.id] = contents[name]
            self.sources.setdefault(contents[name], Path(name))
            if self.first is None:  # the same on every rank: all arrays must have this one's shape
                self.first = (Path(name), self._read(Path(name)).shape)

    def describe(self, key: str) -> dict[str, Any]:
        return {"features": str(self.sources[key])}

    def make(self, keys: list[str], shards: Shards) -> dict[str, str]:
        """Visual tokens of these arrays into shards; a bad array stops the run, so none are ever lost."""
        assert self.first is not None, "there are keys, so there is a first array"
        for key in progress(keys, "features", unit="array"):
            array = self._read(self.sources[key])
            if array.shape != self.first[1]:
                raise DataError(
                    f"the array is {list(array.shape)}, but the first one ({self.first[0]}) is {list(self.first[1])}",
                    where=self.sources[key],
                    fix="give every utterance an array of the same shape",
                )
            tokens = torch.from_numpy(np.array(array, dtype=np.float32))
            tokens = (pool(tokens) if tokens.dim() == 3 else tokens).half()
            if not tokens.isfinite().all():
                raise DataError(
                    "the array has values that are not finite, or too large for half precision (65504)",
                    where=self.sources[key],
                    fix="check how it was made",
                )
            shards.add({key: tokens})
        shards.flush()
        return {}

    def _read(self, path: Path) -> np.ndarray:
        """An array [m, o, q] or [n, q], memory-mapped."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError("the array does not exist", where=path, fix="check the paths in the data") from error
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"is not a .npy array ({error})", where=path, fix="write it with numpy.save") from error
        if (
            not isinstance(array, np.ndarray)
            or array.dtype.kind not in "fiu"
            or array.ndim not in (2, 3)
            or not array.size
        ):
            raise DataError(
                "is not an array of numbers [m, o, q] or [n, q]", where=path, fix="write it with numpy.save"
            )
        if self.shape is not None and list(array.shape[-2:]) != self.shape:
            raise DataError(
                f"the array is {list(array.shape)}, but vision.shape is {self.shape}",
                where=path,
                fix="correct vision.shape, the last two sizes of the arrays, or leave it out",
            )
        return array


class Shards:
    """This rank's shards: collects features and writes a file every CLIPS_PER_SHARD clips."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder / SHARDS, rank
        self.waiting: dict[str, Tensor] = {}

    def add(self, features: Mapping[str, Tensor]) -> None:
        self.waiting |= features
        if len(self.waiting) >= CLIPS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        number = len(list(self.folder.glob(f"{self.rank:03d}-*.safetensors")))
        write_shard(self.folder / f"{self.rank:03d}-{number:05d}.safetensors", self.waiting)
        self.waiting = {}


# ----------------------------------------------------------------------------------------------------------- helpers
def _notes(folder: Path, world: int) -> list[dict[str, str]]:
    """What every rank lost, once all are done: a barrier that has no time limit, as clips are uneven work."""
    notes = [folder / f"rank-{rank}.json" for rank in range(world)]
    while not all(note.is_file() for note in notes):
        time.sleep(0.2)
    return [read_json(note) for note in notes]


def _content(path: Path) -> str:
    """SHA-256 of a file, or of the frames in a folder; of nothing where there is none (decoding then says so)."""
    found = hashlib.sha256()
    try:
        for file in frame_files(path) if path.is_dir() else [path]:
            with file.open("rb") as handle:
                found.update(f"{file.name if path.is_dir() else ''}\0".encode())
                found.update(hashlib.file_digest(handle, "sha256").digest())
    except OSError:
        return f"unreadable {path}"
    return found.hexdigest()
