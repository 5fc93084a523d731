"""Clips to features: which share a key, how many frames the encoder gets, what is kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clips
from clips import sample, write_video
from elmd.errors import CheckpointError, ClipError
from elmd.types import Clip, Sample
from elmd.vision.clips import CANDIDATES, ClipEncoder, Plan
from elmd.vision.encoder import VisionEncoder
from elmd.vision.pooling import pool
from elmd.vision.resnet import ResNetEncoder
from elmd.vision.video import read_clip
from encoders import tiny, write_resnet

FRAMES, TOKENS, WIDTH = 4, 5, 12  # m; o and q of the tiny encoder


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmd.vision.clips.decode_clips", clips.decode_here)


def maker(encoder: VisionEncoder | ResNetEncoder, **changes: Any) -> ClipEncoder:
    arguments = {
        "weights": Path("weights"), "frames": FRAMES, "sampling": "uniform", "decoder": "pyav", "workers": 1,
        "timeout_s": 20.0, "batch_frames": 2 * FRAMES,
    }  # fmt: skip
    return ClipEncoder(encoder=encoder, **{**arguments, **changes})


def features(maker: ClipEncoder, samples: list[Sample]) -> tuple[Plan, dict[str, Tensor | ClipError]]:
    plan = maker.plan(samples)
    return plan, dict(maker.features(plan, sorted(plan.sources)))


def test_each_distinct_clip_is_encoded_once(tmp_path: Path) -> None:
    first, second = (write_video(tmp_path / f"{n}.mp4", base=b) for n, b in (("first", 0), ("second", 40)))
    (tmp_path / "copy.mp4").write_bytes(first.read_bytes())
    samples = [
        sample(1, Clip(str(first))),
        sample(2, Clip(str(second))),
        sample(3, Clip(str(tmp_path / "copy.mp4"))),  # the same content: not again
        sample(4, Clip(str(first), 0.5, 1.5)),  # another span: again
        sample(5),
    ]
    encoder, calls = tiny(), []
    encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    plan, made = features(maker(encoder), samples)
    assert sum(calls) == 3 * FRAMES
    assert max(calls) == 2 * FRAMES, "batch_frames"
    assert len(plan.sources) == 3
    assert plan.keys["d#1"] == plan.keys["d#3"]
    assert plan.keys["d#5"] is None
    for one_sample in samples[:4]:
        frames = torch.from_numpy(read_clip(one_sample.utterance.clip, FRAMES, 32, "pyav"))
        with torch.no_grad():
            expected = pool(encoder(encoder.pixels(frames)))
        result = made[plan.keys[one_sample.id]]
        assert result.dtype == torch.float16
        assert result.shape == (FRAMES + TOKENS, WIDTH)
        torch.testing.assert_close(result.float(), expected, atol=2e-3, rtol=1e-3)


def test_whatever_changes_the_numbers_changes_the_key(tmp_path: Path) -> None:
    samples, encoder = [sample(0, Clip(str(write_video(tmp_path / "a.mp4"))))], tiny()
    makers = [maker(encoder), maker(tiny(seed=1))]
    makers += [maker(encoder, **change) for change in ({"frames": 2}, {"decoder": "decord"}, {"sampling": "random"})]
    assert len({made.plan(samples).keys["d#0"] for made in makers}) == len(makers)
    same = maker(encoder, workers=3, batch_frames=1, timeout_s=1.0, weights=Path("elsewhere"))
    assert same.plan(samples) == makers[0].plan(samples)


def test_a_bad_clip_is_an_error_in_its_place(tmp_path: Path) -> None:
    samples = [sample(0, Clip(str(write_video(tmp_path / "a.mp4")))), sample(1, Clip(str(tmp_path / "gone.mp4")))]
    plan, made = features(maker(tiny()), samples)
    assert isinstance(made[plan.keys["d#0"]], Tensor)
    assert "gone.mp4: the clip does not exist" in str(made[plan.keys["d#1"]])


def test_output_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    encoder = tiny()
    encoder.query_tokens.data[0, 0, 0] = torch.nan
    with pytest.raises(
        CheckpointError, match=r"weights: .*output is not finite on .*a\.mp4; set vision\.dtype=float32"
    ):
        features(maker(encoder), [sample(0, Clip(str(write_video(tmp_path / "a.mp4"))))])


def test_one_frame_is_drawn_by_the_sample_and_not_pooled(tmp_path: Path) -> None:
    clip, encoder, calls = Clip(str(write_video(tmp_path / "a.mp4", 20))), tiny(), []
    encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    random = maker(encoder, frames=1, sampling="random")
    samples = [sample(i, clip) for i in range(12)]
    plan, made = features(random, samples)
    assert sum(calls) == len(samples) == len(plan.sources), "one frame each, though the clip is the same"
    frames = torch.from_numpy(read_clip(clip, CANDIDATES, 32, "pyav"))
    with torch.no_grad():
        candidates = encoder(encoder.pixels(frames))  # X [16, o, q]
    drawn = set()
    for key in plan.keys.values():
        gaps = (candidates - made[key].float()).abs().amax((1, 2))
        assert gaps.min() < 5e-3  # half precision
        drawn.add(int(gaps.argmin()))
    assert len(drawn) > 4, "samples draw differently"
    again_plan, again = features(random, samples[::-1])
    assert again_plan.keys == plan.keys
    assert all(torch.equal(made[key], again[key]) for key in made), "by the id and nothing else"


def test_a_resnet_s_vectors_are_not_pooled(tmp_path: Path) -> None:
    samples = [sample(i, Clip(str(write_video(tmp_path / f"{i}.mp4", base=40 * i)))) for i in range(2)]
    encoder = ResNetEncoder.load(write_resnet(tmp_path / "resnet"))
    plan, made = features(maker(encoder, frames=3), samples)
    for one_sample in samples:
        frames = torch.from_numpy(read_clip(one_sample.utterance.clip, 3, 224, "pyav"))
        with torch.no_grad():
            expected = encoder(encoder.pixels(frames))  # [m, q]
        assert expected.shape == (3, 6)
        torch.testing.assert_close(made[plan.keys[one_sample.id]].float(), expected, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(*made.values())
