"""stage=features: what it writes, how it resumes, bad clips, two ranks, and a rank that dies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import clips
from clips import sample
from elmd.config import BaselineConfig, BaselineName, Config, Decoder, Sampling, VisionConfig, VisionKind
from elmd.data.samples import save_samples
from elmd.engine.stage import Job
from elmd.errors import ConfigError, DataError
from elmd.stages import features as stage
from elmd.types import Clip, Sample
from elmd.vision import store as shards
from elmd.vision.encoder import VisionEncoder
from elmd.vision.pooling import pool
from elmd.vision.store import FeatureStore
from elmd.vision.video import read_clip
from encoders import tiny, write_resnet
from ranks import run_ranks

FRAMES, TOKENS, WIDTH = 4, 5, 12  # m; o and q of the tiny encoder


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmd.vision.clips.decode_clips", clips.decode_here)


@pytest.fixture
def encoder(tmp_path: Path) -> VisionEncoder:
    made = tiny()
    made.save(tmp_path / "vision")
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each call of the encoder got."""
    counts: list[int] = []
    forward = VisionEncoder.forward

    def counted(self: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(VisionEncoder, "forward", counted)
    return counts


def config(tmp_path: Path, **changes: object) -> Config:
    vision = {
        "name": "test", "kind": VisionKind.encoder, "path": str(tmp_path / "vision"), "frames": FRAMES,
        "decoder": Decoder.pyav, "batch_frames": 2 * FRAMES, "workers": 1, "timeout_s": 20.0,
    }  # fmt: skip
    return Config(vision=VisionConfig(**{**vision, **changes}))


def job(tmp_path: Path, samples: list[Sample], folder: str = "features") -> Job:
    for name in (folder, "prepare"):
        (tmp_path / name).mkdir(exist_ok=True)
    save_samples(tmp_path / "prepare" / "samples.jsonl", samples)
    return Job(tmp_path / folder, {"prepare": tmp_path / "prepare"}, Accelerator(cpu=True))


def test_features_of_clips_by_worker_processes(tmp_path: Path, encoder: VisionEncoder, calls: list[int]) -> None:
    first, second = (clips.write_video(tmp_path / f"{n}.mp4", base=b) for n, b in (("first", 0), ("second", 40)))
    samples = [sample(1, Clip(str(first))), sample(2, Clip(str(second))), sample(3, Clip(str(first))), sample(4)]
    outcome = stage.run(config(tmp_path), job(tmp_path, samples))
    assert calls == [2 * FRAMES], "batch_frames"
    assert outcome.counts == {
        "samples": 4, "samples_without_clip": 1, "samples_lost": 0, "clips": 2, "clips_made": 2,
        "clips_kept_from_before": 0, "clips_failed": 0,
    }  # fmt: skip
    store = FeatureStore(tmp_path / "features")
    assert (store.tokens, store.width) == (FRAMES + TOKENS, WIDTH)
    for i, path in ((1, first), (2, second), (3, first)):
        frames = torch.from_numpy(read_clip(Clip(str(path)), FRAMES, 32, "pyav"))
        with torch.no_grad():
            expected = pool(encoder(encoder.pixels(frames)))
        features = store.get(f"d#{i}")
        assert features is not None
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, expected, atol=2e-3, rtol=1e-3)  # half precision
    assert store.get("d#4") is None
    assert json.loads((tmp_path / "features/failed.json").read_text()) == []
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) == ["failed.json", "index.json", "shards"]


def test_a_killed_run_resumes_from_its_shards(
    tmp_path: Path, encoder: VisionEncoder, calls: list[int], no_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CLIPS_PER_SHARD", 2)
    paths = [clips.write_video(tmp_path / f"{i}.mp4", 8, base=20 * i) for i in range(5)]
    samples = [sample(i, Clip(str(path))) for i, path in enumerate(paths)]
    work = job(tmp_path, samples)
    write = shards.write_shard

    def killed(path: Path, features: dict[str, torch.Tensor]) -> None:
        if path.name == "000-00001.safetensors":
            raise KeyboardInterrupt
        write(path, features)

    monkeypatch.setattr(shards, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(config(tmp_path), work)
    assert not (tmp_path / "features/index.json").exists()
    kept = (tmp_path / "features/shards/000-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "features/shards/000-00001.safetensors.tmp").write_text("half a shard")

    calls.clear()
    monkeypatch.setattr(shards, "write_shard", write)
    outcome = stage.run(config(tmp_path), work)
    assert sum(calls) == 3 * FRAMES, "two of five clips were kept"
    assert (tmp_path / "features/shards/000-00000.safetensors").stat().st_mtime_ns == kept
    assert outcome.counts["clips_kept_from_before"] == 2
    assert outcome.counts["clips_made"] == 3
    store = FeatureStore(tmp_path / "features")
    levels = [store.get(s.id) for s in samples]
    assert all(level is not None for level in levels)
    assert len({tuple(level.flatten().tolist()) for level in levels}) == 5

    again = stage.run(config(tmp_path), work)
    assert again.counts["clips_kept_from_before"] == 5


def test_other_frames_or_weights_are_other_clips(
    tmp_path: Path, encoder: VisionEncoder, calls: list[int], no_workers: None
) -> None:
    work = job(tmp_path, [sample(0, Clip(str(clips.write_video(tmp_path / "a.mp4"))))])
    stage.run(config(tmp_path), work)
    tiny(seed=1).save(tmp_path / "vision")
    stage.run(config(tmp_path), work)
    stage.run(config(tmp_path, frames=2), work)
    assert calls == [FRAMES, FRAMES, 2]
    assert FeatureStore(tmp_path / "features").tokens == 2 + TOKENS


def test_a_bad_clip_costs_one_clip(
    tmp_path: Path,
    encoder: VisionEncoder,
    no_workers: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("elmd.log.logger.propagate", True)
    good = clips.write_video(tmp_path / "good.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    samples = [
        sample(0, Clip(str(good))), sample(1, Clip(str(tmp_path / "text.mp4"))),
        sample(2, Clip(str(tmp_path / "text.mp4"))), sample(3, Clip(str(good), 0.0, 1.0)),
    ]  # fmt: skip
    outcome = stage.run(config(tmp_path), job(tmp_path, samples))
    assert outcome.counts["clips_failed"] == 1
    assert outcome.counts["samples_lost"] == 2
    [lost] = json.loads((tmp_path / "features/failed.json").read_text())
    assert lost["clip"] == str(tmp_path / "text.mp4")
    assert lost["samples"] == ["d#1", "d#2"]
    assert "the file is no video, or is truncated" in lost["error"]
    assert "text.mp4: the file is no video" in caplog.text
    store = FeatureStore(tmp_path / "features")
    assert [store.get(s.id) is None for s in samples] == [False, True, True, False]


def test_more_bad_clips_than_good_stop_the_run(tmp_path: Path, encoder: VisionEncoder, no_workers: None) -> None:
    good = Clip(str(clips.write_video(tmp_path / "good.mp4")))
    samples = [sample(0, good), *(sample(i, Clip(str(tmp_path / f"gone{i}.mp4"))) for i in (1, 2))]
    with pytest.raises(
        DataError, match=r"failed\.json: 2 of 3 clips cannot be used; the first: .*gone\d\.mp4: the clip"
    ):
        stage.run(config(tmp_path), job(tmp_path, samples))
    assert not (tmp_path / "features/index.json").exists()


def test_no_clip_at_all_is_an_error(tmp_path: Path, encoder: VisionEncoder) -> None:
    work = job(tmp_path, [sample(0)])
    with pytest.raises(DataError, match=r"samples\.jsonl: no sample has a clip; .*or set vision=none"):
        stage.run(config(tmp_path), work)
    with pytest.raises(DataError, match=r"samples\.jsonl: no sample has features; .*or set vision=none"):
        stage.run(config(tmp_path, kind=VisionKind.precomputed, path=None), work)
    with pytest.raises(ConfigError, match="vision=none has no features"):
        stage.run(config(tmp_path, kind=VisionKind.none), work)


# ---------------------------------------------------------------------------------------------------------- two ranks
def test_two_ranks_share_the_clips(tmp_path: Path, encoder: VisionEncoder, no_workers: None) -> None:
    paths = [clips.write_video(tmp_path / f"{i}.mp4", 8, base=20 * i) for i in range(5)]
    (tmp_path / "bad.mp4").write_text("no video")
    samples = [sample(i, Clip(str(path))) for i, path in enumerate([*paths, tmp_path / "bad.mp4"])]
    stage.run(config(tmp_path), job(tmp_path, samples))
    work = job(tmp_path, samples, "two")

    def on_each_rank(accelerator: Accelerator) -> None:
        assert accelerator.num_processes == 2
        stage.run(config(tmp_path), Job(work.folder, work.upstream, accelerator))

    ends = run_ranks(on_each_rank, 2, tmp_path)
    assert [code for code, _ in ends] == [0, 0], ends
    assert {p.name[:3] for p in (tmp_path / "two/shards").iterdir()} == {"000", "001"}
    single, two = FeatureStore(tmp_path / "features"), FeatureStore(tmp_path / "two")
    for s in samples[:5]:
        torch.testing.assert_close(single.get(s.id), two.get(s.id), atol=2e-3, rtol=1e-3)
    assert two.get("d#5") is None
    assert [lost["samples"] for lost in json.loads((tmp_path / "two/failed.json").read_text())] == [["d#5"]]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["failed.json", "index.json", "shards"]


def test_a_rank_that_dies_ends_the_others(tmp_path: Path, encoder: VisionEncoder, no_workers: None) -> None:
    paths = [clips.write_video(tmp_path / f"{i}.mp4", 8, base=20 * i) for i in range(4)]
    work = job(tmp_path, [sample(i, Clip(str(path))) for i, path in enumerate(paths)])

    def on_each_rank(accelerator: Accelerator) -> None:
        if accelerator.process_index == 1:
            shards.ShardWriter.flush = lambda self: os._exit(9)
        stage.run(config(tmp_path), Job(work.folder, work.upstream, accelerator))

    [(code, log), (killed, _)] = run_ranks(on_each_rank, 2, tmp_path)
    assert killed == 9
    assert code == 1
    assert "error: another process of this run died; " in log
    assert not (tmp_path / "features/index.json").exists()
    outcome = stage.run(config(tmp_path), work)
    assert outcome.counts["clips_kept_from_before"] == 2, "what the other rank made is kept"


# ------------------------------------------------------------------------------------------------- each kind of vision
def test_the_shared_clips_become_features(tmp_path: Path, encoder: VisionEncoder, shared: Path) -> None:
    folder = shared / "data" / "video"
    samples = [sample(0, Clip(str(folder / "carphone_pristine.mp4"))), sample(1, Clip(str(folder / "nasa_13013.mp4")))]
    stage.run(config(tmp_path, decoder=Decoder.decord), job(tmp_path, samples))
    store = FeatureStore(tmp_path / "features")
    assert store.get("d#0").shape == store.get("d#1").shape == (FRAMES + TOKENS, WIDTH)


def test_one_random_frame_per_sample(tmp_path: Path, encoder: VisionEncoder, no_workers: None) -> None:
    clip = Clip(str(clips.write_video(tmp_path / "a.mp4")))
    random = config(tmp_path, frames=1, sampling=Sampling.random)
    outcome = stage.run(random, job(tmp_path, [sample(i, clip) for i in range(3)]))
    assert outcome.counts["clips"] == 3
    store = FeatureStore(tmp_path / "features")
    assert (store.tokens, store.width) == (TOKENS, WIDTH)
    uniform, drawn = (stage.reads(cfg).counted(cfg) for cfg in (config(tmp_path, frames=1), random))
    assert uniform["vision.sampling"] == "uniform"
    assert {key for key in uniform if uniform[key] != drawn[key]} == {"vision.sampling"}


def test_a_resnet_gives_a_vector_for_each_frame(tmp_path: Path, no_workers: None) -> None:
    resnet = write_resnet(tmp_path / "resnet")
    cfg = config(tmp_path, kind=VisionKind.resnet, path="not read", frames=3)
    cfg.baseline = BaselineConfig(name=BaselineName.livebot, resnet=str(resnet))
    stage.run(cfg, job(tmp_path, [sample(0, Clip(str(clips.write_video(tmp_path / "a.mp4"))))]))
    store = FeatureStore(tmp_path / "features")
    assert (store.tokens, store.width) == (3, 6)
    assert stage.reads(cfg).files == {"vision": resnet}


def test_precomputed_arrays(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    np.save(tmp_path / "0.npy", x)
    cfg = config(tmp_path, kind=VisionKind.precomputed, path=None, shape=[4, 6])
    outcome = stage.run(cfg, job(tmp_path, [sample(0, features=str(tmp_path / "0.npy")), sample(1)]))
    assert outcome.counts["samples_without_clip"] == 1
    store = FeatureStore(tmp_path / "features")
    torch.testing.assert_close(store.get("d#0"), pool(torch.from_numpy(x)), atol=2e-3, rtol=1e-3)
    assert store.get("d#1") is None
    np.save(tmp_path / "0.npy", x[0, 0])
    with pytest.raises(DataError, match=r"0\.npy: is not an array of numbers"):
        stage.run(cfg, job(tmp_path, [sample(0, features=str(tmp_path / "0.npy"))], "other"))
    assert not (tmp_path / "other/index.json").exists()
