"""stage=features: each clip once, resume, bad clips, precomputed arrays; and the store that reads the result."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import clips
from elmd.config import BaselineConfig, BaselineName, Config, Decoder, Sampling, VisionConfig, VisionKind
from elmd.data.samples import save_samples
from elmd.errors import ArtifactError, CheckpointError, ConfigError, DataError
from elmd.labels import Emotion
from elmd.stages import depends
from elmd.stages import features as stage
from elmd.stages.base import Job
from elmd.types import Clip, Sample, Utterance
from elmd.vision.encoder import VisionEncoder
from elmd.vision.pooling import pool
from elmd.vision.resnet import ResNetEncoder
from elmd.vision.store import FeatureStore, index_of, read_shards, write_shard
from elmd.vision.video import read_clip
from encoders import tiny

FRAMES, TOKENS, WIDTH = 4, 5, 12  # m; o and q of the tiny encoder


def sample(number: int, clip: Clip | None = None, features: str | None = None) -> Sample:
    emotion = next(iter(Emotion))
    u = Utterance(f"u{number}", "甲", "你好", emotion, clip=clip, features=features)
    return Sample(f"d#{number}", "d", "s", "train", (), u, Utterance(f"r{number}", "乙", "好", emotion))


@pytest.fixture
def encoder(tmp_path: Path) -> VisionEncoder:
    made = tiny()
    made.save(tmp_path / "vision")
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each call of the encoder got."""
    seen: list[int] = []
    forward = VisionEncoder.forward

    def counted(self: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(VisionEncoder, "forward", counted)
    return seen


def config(tmp_path: Path, **changes: object) -> Config:
    vision = {
        "name": "test", "kind": VisionKind.encoder, "path": str(tmp_path / "vision"), "frames": FRAMES,
        "decoder": Decoder.pyav, "batch_frames": 2 * FRAMES, "workers": 2, "timeout_s": 20.0,
    }  # fmt: skip
    return Config(vision=VisionConfig(**{**vision, **changes}))


def job(tmp_path: Path, samples: list[Sample]) -> Job:
    for name in ("features", "prepare"):
        (tmp_path / name).mkdir(exist_ok=True)
    save_samples(tmp_path / "prepare" / "samples.jsonl", samples)
    return Job(tmp_path / "features", {"prepare": tmp_path / "prepare"}, Accelerator(cpu=True))


# -------------------------------------------------------------------------------------------------------- clips
def test_each_distinct_clip_is_encoded_once(tmp_path: Path, encoder: VisionEncoder, calls: list[int]) -> None:
    one, two = (clips.write_video(tmp_path / f"{n}.mp4", base=b) for n, b in (("one", 0), ("two", 40)))
    (tmp_path / "copy.mp4").write_bytes(one.read_bytes())
    samples = [
        sample(1, Clip(str(one))),
        sample(2, Clip(str(two))),
        sample(3, Clip(str(tmp_path / "copy.mp4"))),  # the same content: not again
        sample(4, Clip(str(one), 0.5, 1.5)),  # another span: again
        sample(5),
    ]
    outcome = stage.run(config(tmp_path), job(tmp_path, samples))
    assert sum(calls) == 3 * FRAMES
    assert max(calls) <= 2 * FRAMES, "batch_frames holds"
    assert outcome.counts == {
        "samples": 5, "samples_without_clip": 1, "samples_lost": 0, "clips": 3, "clips_made": 3,
        "clips_kept_from_before": 0, "clips_failed": 0,
    }  # fmt: skip

    store = FeatureStore(tmp_path / "features")
    assert (store.tokens, store.width) == (FRAMES + TOKENS, WIDTH)
    for one_sample in samples[:4]:
        frames = torch.from_numpy(read_clip(one_sample.utterance.clip, FRAMES, 32, "pyav"))
        with torch.no_grad():
            expected = pool(encoder(encoder.pixels(frames)))
        found = store.get(one_sample.id)
        assert found is not None
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)  # half precision
    assert torch.equal(store.get("d#1"), store.get("d#3"))
    assert not torch.equal(store.get("d#1"), store.get("d#4"))
    assert store.get("d#5") is None
    assert json.loads((tmp_path / "features/failed.json").read_text()) == []
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) == ["failed.json", "index.json", "shards"]


def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, encoder: VisionEncoder, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "CLIPS_PER_SHARD", 2)
    paths = [clips.write_video(tmp_path / f"{i}.mp4", 8, base=20 * i) for i in range(5)]
    samples = [sample(i, Clip(str(path))) for i, path in enumerate(paths)]
    work = job(tmp_path, samples)
    write = stage.write_shard

    def killed(path: Path, features: dict[str, torch.Tensor]) -> None:
        if path.name == "000-00001.safetensors":
            raise KeyboardInterrupt
        write(path, features)

    monkeypatch.setattr(stage, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(config(tmp_path), work)
    assert not (tmp_path / "features/index.json").exists()
    kept = (tmp_path / "features/shards/000-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "features/shards/000-00001.safetensors.tmp").write_text("half a shard")
    (tmp_path / "features/rank-1.json").write_text('{"stale": "of an earlier attempt with two ranks"}')

    calls.clear()
    monkeypatch.setattr(stage, "write_shard", write)
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


def test_other_frames_or_weights_are_other_clips(tmp_path: Path, encoder: VisionEncoder, calls: list[int]) -> None:
    work = job(tmp_path, [sample(0, Clip(str(clips.write_video(tmp_path / "a.mp4"))))])
    stage.run(config(tmp_path), work)
    tiny(seed=1).save(tmp_path / "vision")
    stage.run(config(tmp_path), work)
    stage.run(config(tmp_path, frames=2), work)
    assert calls == [FRAMES, FRAMES, 2]
    assert FeatureStore(tmp_path / "features").tokens == 2 + TOKENS


def test_a_bad_clip_costs_one_clip(
    tmp_path: Path, encoder: VisionEncoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
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


def test_more_bad_clips_than_good_stop_the_run(tmp_path: Path, encoder: VisionEncoder) -> None:
    good = Clip(str(clips.write_video(tmp_path / "good.mp4")))
    samples = [sample(0, good), *(sample(i, Clip(str(tmp_path / f"gone{i}.mp4"))) for i in (1, 2))]
    with pytest.raises(
        DataError, match=r"failed\.json: 2 of 3 clips cannot be used; the first: .*gone\d\.mp4: the clip"
    ):
        stage.run(config(tmp_path), job(tmp_path, samples))
    assert not (tmp_path / "features/index.json").exists()


def test_no_clip_at_all_is_said(tmp_path: Path, encoder: VisionEncoder) -> None:
    with pytest.raises(DataError, match=r"samples\.jsonl: no sample has a clip; .*or set vision=none"):
        stage.run(config(tmp_path), job(tmp_path, [sample(0)]))
    with pytest.raises(ConfigError, match="vision=none has no features"):
        stage.run(config(tmp_path, kind=VisionKind.none), job(tmp_path, [sample(0)]))


def test_output_that_is_not_finite_is_refused(tmp_path: Path, encoder: VisionEncoder) -> None:
    encoder.query_tokens.data[0, 0, 0] = torch.nan
    encoder.save(tmp_path / "vision")
    work = job(tmp_path, [sample(0, Clip(str(clips.write_video(tmp_path / "a.mp4"))))])
    with pytest.raises(CheckpointError, match=r"output is not finite on .*a\.mp4; set vision\.dtype=float32"):
        stage.run(config(tmp_path), work)


RANKS = """
import sys
from pathlib import Path
from accelerate import Accelerator
from elmd.stages import features as stage
from elmd.stages.base import Job
from test_features import config
root = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
stage.run(config(root, workers=1), Job(root / "two", {"prepare": root / "prepare"}, accelerator))
"""


@pytest.mark.slow
def test_two_ranks_share_the_clips(tmp_path: Path, encoder: VisionEncoder) -> None:
    paths = [clips.write_video(tmp_path / f"{i}.mp4", 8, base=20 * i) for i in range(5)]
    (tmp_path / "bad.mp4").write_text("no video")
    samples = [sample(i, Clip(str(path))) for i, path in enumerate([*paths, tmp_path / "bad.mp4"])]
    stage.run(config(tmp_path), job(tmp_path, samples))
    (tmp_path / "two").mkdir()
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, str(tmp_path / "ranks.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert {p.name[:3] for p in (tmp_path / "two/shards").iterdir()} == {"000", "001"}
    one, two = FeatureStore(tmp_path / "features"), FeatureStore(tmp_path / "two")
    for s in samples[:5]:
        torch.testing.assert_close(one.get(s.id), two.get(s.id), atol=2e-3, rtol=1e-3)
    assert two.get("d#5") is None
    assert [lost["samples"] for lost in json.loads((tmp_path / "two/failed.json").read_text())] == [["d#5"]]


def test_the_shared_clips_become_features(tmp_path: Path, encoder: VisionEncoder, shared: Path) -> None:
    folder = shared / "data" / "video"
    samples = [sample(0, Clip(str(folder / "carphone_pristine.mp4"))), sample(1, Clip(str(folder / "nasa_13013.mp4")))]
    stage.run(config(tmp_path, decoder=Decoder.decord), job(tmp_path, samples))
    store = FeatureStore(tmp_path / "features")
    assert store.get("d#0").shape == store.get("d#1").shape == (FRAMES + TOKENS, WIDTH)


# ------------------------------------------------------------------------------------------- one random frame
def drawn(tmp_path: Path, **changes: object) -> Config:
    return config(tmp_path, frames=1, sampling=Sampling.random, **changes)


def test_one_frame_is_drawn_by_the_sample_and_not_pooled(
    tmp_path: Path, encoder: VisionEncoder, calls: list[int]
) -> None:
    clip = Clip(str(clips.write_video(tmp_path / "a.mp4", 20)))
    samples = [sample(i, clip) for i in range(12)]
    outcome = stage.run(drawn(tmp_path), job(tmp_path, samples))
    assert sum(calls) == len(samples), "one frame each, though the clip is the same"
    assert outcome.counts["clips"] == len(samples)

    store = FeatureStore(tmp_path / "features")
    assert (store.tokens, store.width) == (TOKENS, WIDTH)
    frames = torch.from_numpy(read_clip(clip, stage.CANDIDATES, 32, "pyav"))
    with torch.no_grad():
        candidates = encoder(encoder.pixels(frames))  # X [16, o, q]
    seen = set()
    for one in samples:
        found = store.get(one.id)
        gaps = (candidates - found).abs().amax((1, 2))
        assert gaps.min() < 5e-3  # half precision
        seen.add(int(gaps.argmin()))
    assert len(seen) > 4, "samples draw differently"

    (tmp_path / "again").mkdir()
    work = job(tmp_path, samples[::-1])
    stage.run(drawn(tmp_path), Job(tmp_path / "again", work.upstream, work.accelerator))
    again = FeatureStore(tmp_path / "again")
    assert all(torch.equal(store.get(one.id), again.get(one.id)) for one in samples), "by the id and nothing else"


def test_features_depend_on_how_frames_are_chosen(tmp_path: Path) -> None:
    uniform, random = (depends.features(cfg) for cfg in (config(tmp_path, frames=1), drawn(tmp_path)))
    assert uniform.config["sampling"] == "uniform"
    assert {k for k in uniform.config if uniform.config[k] != random.config[k]} == {"sampling"}


# ---------------------------------------------------------------------------------------------------- ResNet
@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A random ResNet with a classifier, as published ones have."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(shape).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "resnet")
    (tmp_path / "resnet/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "do_resize": true}')
    return tmp_path / "resnet"


def livebot(tmp_path: Path, resnet: Path) -> Config:
    cfg = config(tmp_path, kind=VisionKind.resnet, path="not read", frames=3)
    cfg.baseline = BaselineConfig(name=BaselineName.livebot, resnet=str(resnet))
    return cfg


def test_a_resnet_gives_a_vector_for_each_frame(tmp_path: Path, resnet: Path) -> None:
    from transformers import ResNetForImageClassification

    samples = [sample(i, Clip(str(clips.write_video(tmp_path / f"{i}.mp4", base=40 * i)))) for i in range(2)]
    stage.run(livebot(tmp_path, resnet), job(tmp_path, samples))
    store = FeatureStore(tmp_path / "features")
    assert (store.tokens, store.width) == (3, 6)
    public = ResNetForImageClassification.from_pretrained(resnet).eval()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.229, 0.224, 0.225])
    for one in samples:
        frames = torch.from_numpy(read_clip(one.utterance.clip, 3, 224, "pyav"))
        pixels = ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            expected = public.resnet(pixels).last_hidden_state.mean((2, 3))
        torch.testing.assert_close(store.get(one.id), expected, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(store.get("d#0"), store.get("d#1"))
    assert depends.features(livebot(tmp_path, resnet)).files == {"vision": resnet}


def test_folders_that_hold_no_resnet(tmp_path: Path, resnet: Path, encoder: VisionEncoder) -> None:
    with pytest.raises(CheckpointError, match=r"vision/config\.json: is no ResNet but .*such as microsoft/resnet-18"):
        ResNetEncoder.load(tmp_path / "vision")
    with pytest.raises(CheckpointError, match=r"none/config\.json: is missing; .*resnet"):
        ResNetEncoder.load(tmp_path / "none")
    weights = load_file(resnet / "model.safetensors")
    first = next(name for name in sorted(weights) if "running_mean" in name)
    save_file({k: v for k, v in weights.items() if k != first}, resnet / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"cannot be read as a ResNet \(it lacks 1 weights, the first is .*running_mean"
    ):
        ResNetEncoder.load(resnet)
    (resnet / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"resnet: cannot be read as a ResNet \("):
        ResNetEncoder.load(resnet)


# --------------------------------------------------------------------------------------------------- precomputed
def arrays(tmp_path: Path, *shapes: tuple[int, ...]) -> list[Sample]:
    rng, samples = np.random.default_rng(0), []
    for i, shape in enumerate(shapes):
        np.save(tmp_path / f"{i}.npy", rng.normal(size=shape).astype(np.float32))
        samples.append(sample(i, features=str(tmp_path / f"{i}.npy")))
    return samples


def precomputed(tmp_path: Path, **changes: object) -> Config:
    return config(tmp_path, kind=VisionKind.precomputed, path=None, **changes)


def test_precomputed_frames_are_pooled(tmp_path: Path) -> None:
    samples = [*arrays(tmp_path, (3, 4, 6), (3, 4, 6)), sample(9)]
    outcome = stage.run(precomputed(tmp_path, shape=[4, 6]), job(tmp_path, samples))
    store = FeatureStore(tmp_path / "features")
    assert (store.tokens, store.width) == (3 + 4, 6)
    for i in range(2):
        expected = pool(torch.from_numpy(np.load(tmp_path / f"{i}.npy")))
        torch.testing.assert_close(store.get(f"d#{i}"), expected, atol=2e-3, rtol=1e-3)
    assert store.get("d#9") is None
    assert outcome.counts["samples_without_clip"] == 1


def test_precomputed_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    stage.run(precomputed(tmp_path), job(tmp_path, arrays(tmp_path, (3, 6), (3, 6))))
    expected = torch.from_numpy(np.load(tmp_path / "1.npy")).half().float()
    assert torch.equal(FeatureStore(tmp_path / "features").get("d#1"), expected)


def test_precomputed_arrays_that_cannot_be_used(tmp_path: Path) -> None:
    def fails(samples: list[Sample], message: str, **changes: object) -> None:
        with pytest.raises(DataError, match=message):
            stage.run(precomputed(tmp_path, **changes), job(tmp_path, samples))
        assert not (tmp_path / "features/index.json").exists()

    fails(
        arrays(tmp_path, (3, 6), (4, 6)), r"1\.npy: the array is \[4, 6\], but the first one \(.*0\.npy\) is \[3, 6\]"
    )
    fails(arrays(tmp_path, (3, 4, 6), (7, 6)), r"1\.npy: the array is \[7, 6\], but the first one")
    fails(arrays(tmp_path, (3, 6)), r"0\.npy: the array is \[3, 6\], but vision\.shape is \[4, 6\]", shape=[4, 6])
    fails(arrays(tmp_path, (6,)), r"0\.npy: is not an array of numbers \[m, o, q\] or \[n, q\]")
    fails([sample(0, features=str(tmp_path / "gone.npy"))], r"gone\.npy: the array does not exist")
    (tmp_path / "0.npy").write_text("1 2 3")
    fails([sample(0, features=str(tmp_path / "0.npy"))], r"0\.npy: is not a \.npy array")
    np.save(tmp_path / "0.npy", np.array([[1.0, np.nan]]))
    fails([sample(0, features=str(tmp_path / "0.npy"))], r"0\.npy: the array has values that are not finite")
    np.save(tmp_path / "0.npy", np.array([{"a": 1}], dtype=object))
    fails([sample(0, features=str(tmp_path / "0.npy"))], r"0\.npy: is not a \.npy array .*Python objects")
    fails([sample(0)], "no sample has features")


# ----------------------------------------------------------------------------------------------------------- store
def test_the_store_reads_rows_travels_and_refuses_strangers(tmp_path: Path) -> None:
    rows = {name: torch.randn(3, 4) for name in "abc"}
    write_shard(tmp_path / "shards/000-00000.safetensors", {k: rows[k] for k in "ab"})
    write_shard(tmp_path / "shards/000-00001.safetensors", {"c": rows["c"]})
    owned = {"s1": "c", "s2": "a", "s3": None, "s4": "c"}
    (tmp_path / "index.json").write_text(json.dumps(index_of(owned, read_shards(tmp_path))))
    store = FeatureStore(tmp_path)
    for name, key in owned.items():
        found = store.get(name)
        assert found is None if key is None else torch.equal(found, rows[key].half().float())
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


def test_each_process_decodes_on_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert stage.spare_cores() == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert stage.spare_cores() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert stage.spare_cores() == 1
