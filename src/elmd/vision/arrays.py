"""A user's own arrays of visual tokens as features (vision=precomputed)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elmd.engine.files import digest
from elmd.errors import DataError
from elmd.log import progress
from elmd.types import Clip, Sample
from elmd.vision.clips import Plan, make_plan
from elmd.vision.pooling import pool


class ArrayReader:
    """Makes features from `.npy` files; a key stands for a file's content.

    An array [m, o, q] is pooled (eq. 6-8); one of [n, q] is taken as it is.

    Args:
        shape: the last two sizes that every array must have; None: those of the first.
    """

    def __init__(self, shape: Sequence[int] | None):
        self.shape = list(shape) if shape is not None else None

    def plan(self, samples: Iterable[Sample]) -> Plan:
        """Which arrays these samples need; reads the content of every distinct file."""

        def source(sample: Sample) -> Clip | None:
            path = sample.utterance.features
            return Clip(path) if path is not None else None

        def key(_: Sample, __: Clip, content: str) -> str:
            return digest(["precomputed", content])

        return make_plan(samples, source, key, "looking at features")

    def features(self, plan: Plan, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(key, features [V, q] in float16) of these keys of `plan`.

        Raises:
            DataError: an array is missing, is not finite, or has another shape than the first: none are left out.
        """
        first = Path(next(iter(plan.sources.values())).path)
        shape = self._read(first).shape  # the same on every rank
        for key in progress(keys, "features", unit="array"):
            path = Path(plan.sources[key].path)
            array = self._read(path)
            if array.shape != shape:
                raise DataError(
                    f"the array is {list(array.shape)}, but the first one ({first}) is {list(shape)}",
                    where=path,
                    fix="give every utterance an array of the same shape",
                )
            tokens = torch.from_numpy(np.array(array, dtype=np.float32))
            tokens = (pool(tokens) if tokens.dim() == 3 else tokens).half()
            if not tokens.isfinite().all():
                raise DataError(
                    "the array has values that are not finite, or too large for half precision (65504)",
                    where=path,
                    fix="check how it was made",
                )
            yield key, tokens

    def _read(self, path: Path) -> np.ndarray:
        """An array [m, o, q] or [n, q], memory-mapped."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError("the array does not exist", where=path, fix="check the paths in the data") from error
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"is not a .npy array ({error})", where=path, fix="write it with numpy.save") from error
        numbers = isinstance(array, np.ndarray) and array.dtype.kind in "fiu"
        if not numbers or array.ndim not in (2, 3) or not array.size:
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
