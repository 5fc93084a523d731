"""The store of features: reads rows, travels to other processes, refuses what does not belong to it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from elmd.errors import ArtifactError, DataError
from elmd.vision.store import FeatureStore, index_of, read_shards, write_shard


def test_the_store_reads_rows_travels_and_refuses_strangers(tmp_path: Path) -> None:
    rows = {name: torch.randn(3, 4) for name in "abc"}
    write_shard(tmp_path / "shards/000-00000.safetensors", {k: rows[k] for k in "ab"})
    write_shard(tmp_path / "shards/000-00001.safetensors", {"c": rows["c"]})
    keys = {"s1": "c", "s2": "a", "s3": None, "s4": "c"}
    (tmp_path / "index.json").write_text(json.dumps(index_of(keys, read_shards(tmp_path))))
    store = FeatureStore(tmp_path)
    for name, key in keys.items():
        features = store.get(name)
        assert features is None if key is None else torch.equal(features, rows[key].half().float())
    travelled = pickle.loads(pickle.dumps(store))  # to a worker process of a data loader
    assert torch.equal(travelled.get("s2"), store.get("s2"))
    with pytest.raises(ArtifactError, match=r"has no entry for sample 's5'; run stage=features again"):
        store.get("s5")
    with pytest.raises(ArtifactError, match="holds no features; run stage=features again"):
        FeatureStore(tmp_path / "elsewhere")
    (tmp_path / "shards/000-00001.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"000-00001\.safetensors: cannot be read"):
        FeatureStore(tmp_path).get("s1")


def test_features_of_two_sizes_make_no_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards/000-00000.safetensors", {"a": torch.zeros(3, 4)})
    write_shard(tmp_path / "shards/000-00001.safetensors", {"b": torch.zeros(5, 4)})
    with pytest.raises(DataError, match=r"different sizes: \[3, 4\] and \[5, 4\]"):
        index_of({"s1": "a", "s2": "b"}, read_shards(tmp_path))
    assert index_of({"s1": "a"}, read_shards(tmp_path))["tokens"] == 3, "what no sample uses does not count"
