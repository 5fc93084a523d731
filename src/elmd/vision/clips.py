"""Clips to features: each distinct clip is decoded and encoded once (eq. 5-8).

Stage `features` writes what `ClipEncoder` yields into shards; a loaded pack keeps it in memory.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from elmd.engine.files import digest, sha256
from elmd.errors import CheckpointError, ClipError
from elmd.log import logger, progress
from elmd.types import Clip, Sample
from elmd.vision.decode import decode_clips, spare_cores
from elmd.vision.encoder import VisionEncoder
from elmd.vision.pooling import pool
from elmd.vision.resnet import ResNetEncoder
from elmd.vision.video import frame_files

#: Evenly spread frames of a clip, one of which `sampling="random"` draws. Ours: two seconds of film have about 50
#: frames, and neighbours hardly differ.
CANDIDATES = 16


@dataclass(frozen=True)
class Plan:
    """Which features a list of samples needs.

    Attributes:
        keys: the key of each sample's features, by sample id; None where the sample has no clip.
        sources: what to make each key's features from. The file of a user's own array is a Clip without times.
    """

    keys: dict[str, str | None]
    sources: dict[str, Clip]


class FeatureMaker(Protocol):
    """What can make features: `ClipEncoder`, and `ArrayReader` for a user's own arrays."""

    def plan(self, samples: Iterable[Sample]) -> Plan:
        """Which features these samples need."""

    def features(self, plan: Plan, keys: Sequence[str]) -> Iterator[tuple[str, Tensor | ClipError]]:
        """The features [V, q] (float16, on the CPU) of these keys of a plan, or why a clip has none, in any order."""


@dataclass(frozen=True, kw_only=True)
class ClipEncoder:
    """Makes features from clips; a key stands for content, span, encoder, frames, sampling and decoder.

    The features are V_c [o + m, q] (eq. 5-8); with `sampling="random"` the visual tokens [o, q] of one frame per sample
    (VisualGLM, §4.2), drawn by the sample's id, so that a key also stands for the sample; with a ResNet a vector per
    frame [m, q] (Livebot). The last two are not pooled.

    Attributes:
        weights: where `encoder` was loaded from, for messages.
        frames: m.
        decoder: "decord" or "pyav".
        workers: processes that decode; 0: one for each core but one.
        timeout_s: seconds that decoding one clip may take.
        batch_frames: frames per call of the encoder, at most.
    """

    encoder: VisionEncoder | ResNetEncoder
    weights: Path
    frames: int
    sampling: Literal["uniform", "random"]
    decoder: str
    workers: int
    timeout_s: float
    batch_frames: int

    @cached_property
    def _made_by(self) -> list[Any]:
        """What a key stands for beside the clip."""
        encoder = self.encoder
        return [encoder.fingerprint(), encoder.image_size, self.frames, str(self.sampling), self.decoder]

    def plan(self, samples: Iterable[Sample]) -> Plan:
        """Which features these samples need; reads the content of every distinct clip."""

        def key(sample: Sample, clip: Clip, content: str) -> str:
            drawn_by = [sample.id] if self.sampling == "random" else []
            return digest([content, clip.start, clip.end, *self._made_by, *drawn_by])

        return make_plan(samples, lambda sample: sample.utterance.clip, key, "looking at clips")

    def features(self, plan: Plan, keys: Sequence[str]) -> Iterator[tuple[str, Tensor | ClipError]]:
        """(key, features or ClipError) of these keys of `plan`, as they are done. A lost clip is logged.

        Raises:
            CheckpointError: the encoder's output is not finite.
            ElmdError: the decoder cannot run at all.
        """
        one_frame = self.sampling == "random"
        sample_of = {key: sample for sample, key in plan.keys.items() if key is not None}
        clips_per_batch = max(1, self.batch_frames // self.frames)
        batch: dict[str, np.ndarray] = {}
        decoding = decode_clips(
            [(key, plan.sources[key]) for key in keys],
            frames=CANDIDATES if one_frame else self.frames,
            size=self.encoder.image_size,
            decoder=self.decoder,
            workers=self.workers or spare_cores(),
            timeout_s=self.timeout_s,
            ahead=2 * clips_per_batch,
        )
        with closing(decoding):
            for key, result in progress(decoding, "features", total=len(keys), unit="clip"):
                if isinstance(result, ClipError):
                    logger.warning("clip lost: %s", result)
                    yield key, result
                    continue
                if one_frame:
                    result = result[[random.Random(sample_of[key]).randrange(CANDIDATES)]]
                batch[key] = result
                if len(batch) == clips_per_batch:
                    yield from self._encode(batch, plan)
                    batch = {}
        if batch:
            yield from self._encode(batch, plan)

    @torch.inference_mode()
    def _encode(self, batch: Mapping[str, np.ndarray], plan: Plan) -> list[tuple[str, Tensor]]:
        """Frames [m, size, size, 3] by key to features by key."""
        frames = torch.from_numpy(np.concatenate(list(batch.values())))  # [clips · m, size, size, 3]
        x = torch.cat([self.encoder(self.encoder.pixels(part)) for part in frames.split(self.batch_frames)])
        features = [self._tokens(x_clip).half().cpu() for x_clip in x.split(self.frames)]
        for key, tensor in zip(batch, features, strict=True):
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"the vision encoder's output is not finite on {plan.sources[key].path}",
                    where=self.weights,
                    fix="set vision.dtype=float32, and check that the weights are whole",
                )
        return list(zip(batch, features, strict=True))

    def _tokens(self, x: Tensor) -> Tensor:
        """What is kept of a clip's X [m, o, q], or of a ResNet's [m, q]."""
        if x.dim() == 2:
            return x
        return x[0] if self.sampling == "random" else pool(x)


def make_plan(
    samples: Iterable[Sample],
    source: Callable[[Sample], Clip | None],
    key: Callable[[Sample, Clip, str], str],
    what: str,
) -> Plan:
    """A plan in which equal keys share the first sample's source.

    Args:
        source: a sample's clip or array.
        key: the key of a sample, its source and the SHA-256 of the source's content.
        what: label of the progress bar.
    """
    contents: dict[str, str] = {}
    keys: dict[str, str | None] = {}
    sources: dict[str, Clip] = {}
    for sample in progress(list(samples), what, unit="sample"):
        clip = source(sample)
        if clip is None:
            keys[sample.id] = None
            continue
        if clip.path not in contents:
            contents[clip.path] = _content(Path(clip.path))
        keys[sample.id] = name = key(sample, clip, contents[clip.path])
        sources.setdefault(name, clip)
    return Plan(keys, sources)


def _content(path: Path) -> str:
    """SHA-256 of a file, or of the frames in a folder; the path where it cannot be read (decoding names the cause)."""
    content = hashlib.sha256()
    try:
        for file in frame_files(path) if path.is_dir() else [path]:
            content.update(f"{file.name if path.is_dir() else ''}\0".encode() + bytes.fromhex(sha256(file)))
    except OSError:
        return f"unreadable {path}"
    return content.hexdigest()
