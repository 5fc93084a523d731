"""A user's own arrays: pooled or as they are, and those that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clips import sample
from elmd.errors import DataError
from elmd.types import Sample
from elmd.vision.arrays import ArrayReader
from elmd.vision.pooling import pool


def arrays(folder: Path, *shapes: tuple[int, ...]) -> list[Sample]:
    """A sample for each array of random numbers."""
    rng, samples = np.random.default_rng(0), []
    for i, shape in enumerate(shapes):
        np.save(folder / f"{i}.npy", rng.normal(size=shape).astype(np.float32))
        samples.append(sample(i, features=str(folder / f"{i}.npy")))
    return samples


def read(samples: list[Sample], shape: Sequence[int] | None = None) -> dict[str, Tensor | None]:
    """Features by sample."""
    reader = ArrayReader(shape)
    plan = reader.plan(samples)
    made = dict(reader.features(plan, sorted(plan.sources)))
    assert made.keys() == plan.sources.keys()
    return {name: None if key is None else made[key] for name, key in plan.keys.items()}


def test_arrays_of_frames_are_pooled(tmp_path: Path) -> None:
    features = read([*arrays(tmp_path, (3, 4, 6), (3, 4, 6)), sample(9)], [4, 6])
    for i in range(2):
        expected = pool(torch.from_numpy(np.load(tmp_path / f"{i}.npy")))
        assert expected.shape == (3 + 4, 6)
        assert torch.equal(features[f"d#{i}"], expected.half())
    assert features["d#9"] is None


def test_arrays_of_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    features = read(arrays(tmp_path, (3, 6), (3, 6)))
    assert torch.equal(features["d#1"], torch.from_numpy(np.load(tmp_path / "1.npy")).half())


def test_equal_files_are_read_once(tmp_path: Path) -> None:
    samples = arrays(tmp_path, (3, 6))
    (tmp_path / "copy.npy").write_bytes((tmp_path / "0.npy").read_bytes())
    plan = ArrayReader(None).plan([*samples, sample(1, features=str(tmp_path / "copy.npy"))])
    assert [Path(source.path).name for source in plan.sources.values()] == ["0.npy"]
    assert plan.keys["d#0"] == plan.keys["d#1"]


def test_arrays_that_cannot_be_used(tmp_path: Path) -> None:
    def fails(samples: list[Sample], message: str, shape: Sequence[int] | None = None) -> None:
        with pytest.raises(DataError, match=message):
            read(samples, shape)

    fails(
        arrays(tmp_path, (3, 6), (4, 6)), r"1\.npy: the array is \[4, 6\], but the first one \(.*0\.npy\) is \[3, 6\]"
    )
    fails(arrays(tmp_path, (3, 4, 6), (7, 6)), r"1\.npy: the array is \[7, 6\], but the first one")
    fails(arrays(tmp_path, (3, 6)), r"0\.npy: the array is \[3, 6\], but vision\.shape is \[4, 6\]", [4, 6])
    fails(arrays(tmp_path, (6,)), r"0\.npy: is not an array of numbers \[m, o, q\] or \[n, q\]")
    fails([sample(0, features=str(tmp_path / "gone.npy"))], r"gone\.npy: the array does not exist")
    (tmp_path / "0.npy").write_text("1 2 3")
    fails([sample(0, features=str(tmp_path / "0.npy"))], r"0\.npy: is not a \.npy array")
    np.save(tmp_path / "0.npy", np.array([[1.0, np.nan]]))
    fails([sample(0, features=str(tmp_path / "0.npy"))], r"0\.npy: the array has values that are not finite")
    np.save(tmp_path / "0.npy", np.array([{"a": 1}], dtype=object))
    fails([sample(0, features=str(tmp_path / "0.npy"))], r"0\.npy: is not a \.npy array .*Python objects")
