"""Stage `features`: each distinct clip once through the frozen encoder (eq. 5-8), kept for REP, EERG and the baselines.

The clips are divided among the ranks. Each writes its features into shards as they are made, so that a run that is
killed keeps them. A clip that cannot be used costs only that clip: its samples become text-only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from elmd.config import Config, VisionConfig, VisionKind
from elmd.data.samples import load_samples
from elmd.dtypes import pick_dtype
from elmd.engine.files import write_json
from elmd.engine.stage import Inputs, Job, Outcome
from elmd.errors import ClipError, ConfigError, DataError
from elmd.log import logger, table
from elmd.stages.checkpoints import checkpoint, checkpoint_path
from elmd.types import Sample
from elmd.vision.arrays import ArrayReader
from elmd.vision.clips import ClipEncoder, FeatureMaker, Plan
from elmd.vision.encoder import VisionEncoder
from elmd.vision.resnet import ResNetEncoder
from elmd.vision.store import INDEX, ShardWriter, index_of, read_shards

FAILED = "failed.json"


def reads(cfg: Config) -> Inputs:
    if cfg.vision.kind is VisionKind.precomputed:
        return Inputs(("vision.kind", "vision.shape"), ("prepare",))
    # dtype changes the numbers; what `auto` becomes depends on the device, which is no part of a fingerprint
    keys = ("vision.kind", "vision.frames", "vision.sampling", "vision.decoder", "vision.dtype")
    key = "baseline.resnet" if cfg.vision.kind is VisionKind.resnet else "vision.path"
    return Inputs(keys, ("prepare",)) | checkpoint("vision", weights(cfg), key)


def weights(cfg: Config) -> str | None:
    """Where the encoder lies. Not `vision.path` for a ResNet: in a sweep that is the other systems' encoder."""
    return cfg.baseline.resnet if cfg.vision.kind is VisionKind.resnet else cfg.vision.path


def run(cfg: Config, job: Job) -> Outcome:
    """Writes `shards/`, `index.json` (see `elmd.vision.store`) and `failed.json` (the clips that were given up).

    Raises:
        DataError: no sample has a clip, more than half of the clips cannot be decoded, or (precomputed) an array is
            missing or has another shape than the others.
        CheckpointError: the encoder cannot be loaded, or its output is not finite.
    """
    if cfg.vision.kind is VisionKind.none:
        raise ConfigError("vision=none has no features", where="stage", fix="leave the stage out, or choose a vision")
    source = job.upstream["prepare"] / "samples.jsonl"
    samples = load_samples(source)
    maker = feature_maker(cfg, job)
    plan = maker.plan(samples)
    if not plan.sources:
        what = "features" if cfg.vision.kind is VisionKind.precomputed else "a clip"
        raise DataError(f"no sample has {what}", where=source, fix="name them in the data, or set vision=none")

    kept = read_shards(job.folder).keys() & plan.sources.keys()
    job.accelerator.wait_for_everyone()  # no rank writes before every rank has read what is left to do
    todo = sorted(plan.sources.keys() - kept)
    begun = time.perf_counter()
    failed = make_shards(maker, plan, todo, job)
    seconds = time.perf_counter() - begun

    lost = lost_clips(plan, failed)
    if job.accelerator.is_main_process:
        write_json(job.folder / FAILED, lost)
    if len(failed) * 2 > len(plan.sources):
        raise DataError(
            f"{len(failed)} of {len(plan.sources)} clips cannot be used; the first: {lost[0]['error'].rstrip('.')}",
            where=job.folder / FAILED,
            fix="repair the clips, or set vision=none",
        )
    usable = {sample: None if key in failed else key for sample, key in plan.keys.items()}
    index = index_of(usable, read_shards(job.folder))
    if job.accelerator.is_main_process:
        write_json(job.folder / INDEX, index)
    return report(samples, plan, kept_before=len(kept), lost=lost, index=index, seconds=seconds)


def feature_maker(cfg: Config, job: Job) -> FeatureMaker:
    """What makes the features of `cfg.vision.kind`."""
    if cfg.vision.kind is VisionKind.precomputed:
        return ArrayReader(cfg.vision.shape)
    return clip_encoder(cfg.vision, checkpoint_path("vision", weights(cfg), job), job.accelerator.device)


def clip_encoder(vision: VisionConfig, weights: Path, device: torch.device) -> ClipEncoder:
    """The encoder in the folder (or hub id) `weights`, used on clips as `vision` says.

    Raises:
        CheckpointError: the encoder cannot be loaded.
    """
    kind = ResNetEncoder if vision.kind is VisionKind.resnet else VisionEncoder
    return ClipEncoder(
        encoder=kind.load(weights, pick_dtype(vision.dtype, device, "vision.dtype"), device), weights=weights,
        frames=vision.frames, sampling=vision.sampling.value, decoder=vision.decoder.value, workers=vision.workers,
        timeout_s=vision.timeout_s, batch_frames=vision.batch_frames,
    )  # fmt: skip


def make_shards(maker: FeatureMaker, plan: Plan, todo: list[str], job: Job) -> dict[str, str]:
    """Make the features of the keys `todo` on all ranks; returns once every rank is done.

    Returns:
        The error of each clip that cannot be used, by key, the same on every rank.
    """
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    shards, failed = ShardWriter(job.folder, rank), {}
    for key, result in maker.features(plan, todo[rank::world]):
        if isinstance(result, ClipError):
            failed[key] = str(result)
        else:
            shards.add(key, result)
    shards.flush()
    return dict(gather_object(list(failed.items())))  # an error where a rank died


def lost_clips(plan: Plan, failed: dict[str, str]) -> list[dict[str, Any]]:
    """The content of `failed.json`: each lost clip, why, and the samples that it leaves text-only."""
    users: dict[str, list[str]] = {key: [] for key in failed}
    for sample, key in plan.keys.items():
        if key in users:
            users[key].append(sample)
    clips = [(key, plan.sources[key]) for key in sorted(failed)]
    return [
        {"clip": clip.path, "start": clip.start, "end": clip.end, "error": failed[key], "samples": users[key]}
        for key, clip in clips
    ]


def report(
    samples: list[Sample], plan: Plan, *, kept_before: int, lost: list[dict[str, Any]], index: dict[str, Any],
    seconds: float,
) -> Outcome:  # fmt: skip
    """Print and return the stage's counts and metrics."""
    made = len(plan.sources) - kept_before
    counts = {
        "samples": len(samples),
        "samples_without_clip": sum(key is None for key in plan.keys.values()),
        "samples_lost": sum(len(clip["samples"]) for clip in lost),
        "clips": len(plan.sources),
        "clips_made": made - len(lost),
        "clips_kept_from_before": kept_before,
        "clips_failed": len(lost),
    }
    sizes = {"tokens": index["tokens"], "width": index["width"]}
    metrics = {**sizes, "seconds": seconds, "clips_per_second": made / seconds}
    table("Features", ("", "value"), [(k.replace("_", " "), v) for k, v in {**counts, **metrics}.items()])
    if lost:
        logger.warning(
            "%d clips failed, so %d samples have no video: see failed.json", len(lost), counts["samples_lost"]
        )
    return Outcome(metrics=metrics, counts=counts)
