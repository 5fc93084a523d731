"""Visual features on disk: V_c of each distinct clip once, in half precision, and which sample has which.

A folder holds `index.json` and `shards/*.safetensors`. A shard has one tensor `features` [n, V, q] (float16) and, in
its metadata, the keys of its n clips; so shards can be read before the index exists, which is how an interrupted run
goes on. Shards are memory-mapped: a row is read from disk when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmd.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
SHARDS = "shards"


class FeatureStore:
    """Reads a folder of features.

    Attributes:
        tokens: V = o + m, visual tokens per sample.
        width: q.

    Raises:
        ArtifactError: the folder holds no complete features.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.tokens, self.width = int(index["tokens"]), int(index["width"])
            self._samples: dict[str, str | None] = index["samples"]
            self._clips: dict[str, tuple[str, int]] = index["clips"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError("holds no features", where=folder, fix="run stage=features again") from error
        self._open: dict[str, Any] = {}

    def get(self, sample: str) -> Tensor | None:
        """V_c of a sample, float32 [V, q]; None where the sample has no usable clip (it is text-only).

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


def write_shard(path: Path, features: Mapping[str, Tensor]) -> None:
    """Write V_c [V, q] by clip key as one shard; the file appears whole or not at all."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    stacked = torch.stack([tensor.to(device="cpu", dtype=torch.float16) for tensor in features.values()])
    save_file({"features": stacked}, new, {"keys": json.dumps(list(features))})
    new.replace(path)


def read_shards(folder: Path) -> tuple[dict[str, tuple[str, int]], tuple[int, int] | None]:
    """What the finished shards hold: {clip key: (shard, row)}, and (V, q), None where there are no shards."""
    from safetensors import safe_open

    where: dict[str, tuple[str, int]] = {}
    size: tuple[int, int] | None = None
    for path in sorted((folder / SHARDS).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            _, *shape = file.get_slice("features").get_shape()
            size = (shape[0], shape[1])
            where |= {key: (path.name, row) for row, key in enumerate(json.loads(file.metadata()["keys"]))}
    return where, size


def index_of(
    samples: Mapping[str, str | None], where: Mapping[str, Sequence[Any]], size: tuple[int, int]
) -> dict[str, Any]:
    """The content of `index.json`: clip keys by sample id, places of those keys, and (V, q)."""
    used = {key for key in samples.values() if key is not None}
    clips = {key: list(place) for key, place in where.items() if key in used}
    return {"tokens": size[0], "width": size[1], "samples": dict(samples), "clips": clips}
