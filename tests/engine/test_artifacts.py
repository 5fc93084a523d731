"""Fingerprints, finished results and locks of the artifact store."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from elmd.engine.files import digest
from elmd.engine.store import Store, read_manifest
from elmd.errors import ArtifactError, CheckpointError


def test_digest_sees_values_and_not_key_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_store_finishes_sets_aside_and_cleans_up(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    partial = store.partial("erm", "f")
    partial.mkdir(parents=True)
    store.discard_if_empty("erm", "f")
    assert not (tmp_path / "runs").exists(), "nothing half-written is left behind"
    partial.mkdir(parents=True)
    assert not store.finished("erm", "f")
    folder = store.finish("erm", "f", {"stage": "erm"})
    assert store.finished("erm", "f")
    assert not partial.exists()
    assert read_manifest(folder) == {"stage": "erm"}
    aside = store.set_aside("erm", "f")
    assert aside is not None
    assert aside.name == "f.old-1"
    assert store.set_aside("erm", "f") is None
    with pytest.raises(ArtifactError, match="is not a finished result"):
        read_manifest(folder)


def test_content_follows_bytes_not_names_of_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x").write_text("1")
    assert store.content(tmp_path / "a") == store.content(tmp_path / "b")
    (tmp_path / "b" / "sub" / "x").write_text("2")
    assert store.content(tmp_path / "a") != store.content(tmp_path / "b")
    assert store.content(Path("moka-ai/m3e-base")) == {"hub": "moka-ai/m3e-base"}
    with pytest.raises(CheckpointError, match=r"nothing-here: no such file or folder"):
        store.content(tmp_path / "nothing-here")


def test_a_second_job_waits_for_the_lock(tmp_path: Path) -> None:
    store, order = Store(tmp_path / "runs"), []

    def job(name: str, hold: float) -> None:
        with store.lock("erm", "f"):
            order.append(f"{name} in")
            time.sleep(hold)
            order.append(f"{name} out")

    threads = [threading.Thread(target=job, args=(str(i), 0.1)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 8
    assert all(order[i].split()[0] == order[i + 1].split()[0] for i in range(0, 8, 2)), order
    assert not (tmp_path / "runs").exists()
