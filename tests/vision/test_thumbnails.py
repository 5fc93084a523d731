"""Thumbnails: which frames, which shape, and that a bad clip costs itself only."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import clips
from elmd.types import Clip
from elmd.vision.thumbnails import read_thumbnails, thumbnails
from elmd.vision.video import frame_indices


def opened(jpegs: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]


def test_uniform_frames_in_their_own_aspect_ratio(tmp_path: Path) -> None:
    path = clips.write_video(tmp_path / "a.mp4", frames=20, size=(128, 72))
    pictures = opened(thumbnails({"a": Clip(str(path))}, frames=4, height=36, workers=1)["a"])
    assert [picture.size for picture in pictures] == [(64, 36)] * 4
    assert {picture.format for picture in pictures} == {"JPEG"}
    levels = [np.asarray(picture.convert("L")).mean() for picture in pictures]
    wanted = [10 * int(i) for i in frame_indices(np.arange(20) / 10, 0, 2, 4)]
    assert levels == pytest.approx(wanted, abs=6)
    assert not any(picture.getexif() or "comment" in picture.info for picture in pictures)


def test_a_bad_clip_has_no_thumbnails_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = clips.write_video(tmp_path / "good.mp4")
    (broken := tmp_path / "broken.mp4").write_bytes(b"no video" * 50)
    monkeypatch.setattr("elmd.log.logger.propagate", True)
    pictures = thumbnails({"bad": Clip(str(broken)), "good": Clip(str(good))}, frames=2, workers=1)
    assert pictures["bad"] == []
    assert len(pictures["good"]) == 2
    assert "1 of 2 clips cannot be shown" in caplog.text
    assert "broken.mp4" in caplog.text


def test_a_small_clip_is_not_blown_up(tmp_path: Path) -> None:
    path = clips.write_video(tmp_path / "a.mp4", size=(64, 48))
    assert read_thumbnails(Clip(str(path)), 2, 96, "pyav").shape == (2, 48, 64, 3)


def test_oblong_pixels_are_shown_as_meant(tmp_path: Path) -> None:
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    assert read_thumbnails(Clip(str(path)), 1, 32, "pyav").shape == (1, 32, 64, 3)


def test_a_folder_of_frames(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (40, 20), (80 * i, 0, 0)).save(tmp_path / f"frame_{i}.png")
    frames = read_thumbnails(Clip(str(tmp_path)), 3, 10, "pyav")
    assert frames.shape == (3, 10, 20, 3)
    assert frames[:, 5, 10, 0].tolist() == [0, 80, 160]
