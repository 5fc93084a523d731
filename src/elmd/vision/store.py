"""Visual features on disk: those of each distinct clip once, in half precision, and which sample has which.

A folder holds `index.json` and `shards/*.safetensors`. A shard has one tensor `features` [n, V, q] (float16) and, in
its metadata, the keys of its n clips. So shards can be read before the index exists, and an interrupted run keeps them.
Shards are memory-mapped: a row is read from disk when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elmd.engine.files import atomic, read_json
from elmd.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
SHARDS = "shards"
#: Clips per shard: what a kill costs at most, on each rank. A shard of VisualGLM's features (m = 8) then has 15 MiB.
CLIPS_PER_SHARD = 256


class Place(NamedTuple):
    """Row `row` of a shard of [tokens, width] features."""

    shard: str
    row: int
    tokens: int
    width: int


class FeatureStore:
    """Reads a folder of features.

    Attributes:
        tokens: V, visual tokens per sample: o + m where they are pooled.
        width: q.

    Raises:
        ArtifactError: the folder holds no complete features.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            index = read_json(folder / INDEX)
            self.tokens, self.width = int(index["tokens"]), int(index["width"])
            self._samples: dict[str, str | None] = index["samples"]
            self._clips: dict[str, tuple[str, int]] = index["clips"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError("holds no features", where=folder, fix="run stage=features again") from error
        self._open: dict[str, Any] = {}

    def get(self, sample: str) -> Tensor | None:
        """The features of a sample, float32 [V, q]; None where the sample has no usable clip (it is text-only).

        Raises:
            ArtifactError: the features were made for other samples, or a shard is gone.
        """
        if sample not in self._samples:
            raise ArtifactError(
                f"has no entry for sample {sample!r}", where=self.folder, fix="run stage=features again"
            )
        key = self._samples[sample]
        if key is None:
            return None
        shard, row = self._clips[key]
        return self._slice(shard)[row].float()

    def _slice(self, shard: str) -> Any:
        if shard not in self._open:
            from safetensors import SafetensorError, safe_open

            path = self.folder / SHARDS / shard
            try:
                self._open[shard] = safe_open(path, "pt").get_slice("features")
            except (OSError, SafetensorError) as error:
                raise ArtifactError(f"cannot be read ({error})", where=path, fix="run stage=features again") from error
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to another process


class ShardWriter:
    """Writes a rank's shards, each as soon as CLIPS_PER_SHARD clips are there."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder / SHARDS, rank
        self._waiting: dict[str, Tensor] = {}

    def add(self, key: str, features: Tensor) -> None:
        """Take a clip's features [V, q]."""
        self._waiting[key] = features
        if len(self._waiting) >= CLIPS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what no shard has yet."""
        if self._waiting:
            number = len(list(self.folder.glob(f"{self.rank:03d}-*.safetensors")))
            write_shard(self.folder / f"{self.rank:03d}-{number:05d}.safetensors", self._waiting)
            self._waiting = {}


def write_shard(path: Path, features: Mapping[str, Tensor]) -> None:
    """Write features [V, q] by clip key as one shard; the file appears whole or not at all."""
    import torch
    from safetensors.torch import save_file

    stacked = torch.stack([tensor.to(device="cpu", dtype=torch.float16) for tensor in features.values()])
    with atomic(path) as new:
        save_file({"features": stacked}, new, {"keys": json.dumps(list(features))})


def read_shards(folder: Path) -> dict[str, Place]:
    """The place of each clip in the finished shards, by key."""
    from safetensors import safe_open

    places: dict[str, Place] = {}
    for path in sorted((folder / SHARDS).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            _, tokens, width = file.get_slice("features").get_shape()
            keys = json.loads(file.metadata()["keys"])
        places |= {key: Place(path.name, row, tokens, width) for row, key in enumerate(keys)}
    return places


def index_of(samples: Mapping[str, str | None], places: Mapping[str, Place]) -> dict[str, Any]:
    """The content of `index.json`, from the clip key of each sample and the places of those keys.

    Raises:
        DataError: features of different samples have different sizes.
    """
    clips = {key: places[key] for key in samples.values() if key is not None}
    sizes = {(place.tokens, place.width) for place in clips.values()}
    if len(sizes) != 1:
        listed = " and ".join(str(list(size)) for size in sorted(sizes))
        raise DataError(f"samples have features of different sizes: {listed}", fix="make them all of one size")
    [(tokens, width)] = sizes
    rows = {key: [place.shard, place.row] for key, place in clips.items()}
    return {"tokens": tokens, "width": width, "samples": dict(samples), "clips": rows}
