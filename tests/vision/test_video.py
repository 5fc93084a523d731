"""Which frames, from which stream, by which decoder; every kind of bad clip."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clips
from elmd.errors import ClipError
from elmd.types import Clip
from elmd.vision.video import frame_indices, read_clip


# ------------------------------------------------------------------------------------------------------ which frames
def slow_indices(starts: list[float], start: float, end: float, m: int) -> list[int]:
    """The midpoint rule by the word: the last frame that has appeared by the middle of each of m equal parts."""
    indices = []
    for i in range(m):
        middle = start + (i + 0.5) * (end - start) / m
        shown = [k for k, begin in enumerate(starts) if begin <= middle + 1e-6]
        indices.append(shown[-1] if shown else 0)
    return indices


@pytest.mark.parametrize("seed", range(20))
def test_frame_indices_equal_the_slow_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0.0], np.cumsum(rng.uniform(0.01, 0.2, rng.integers(0, 30)))])
    start = float(rng.uniform(0, starts[-1] + 0.01))
    end = start + float(rng.uniform(0.01, 2))
    m = int(rng.integers(1, 17))
    assert frame_indices(starts, start, end, m).tolist() == slow_indices(starts.tolist(), start, end, m)


def test_frame_indices_of_a_whole_clip_are_midpoints() -> None:
    starts = np.arange(120) / 29.97
    assert frame_indices(starts, 0, 120 / 29.97, 8).tolist() == [7, 22, 37, 52, 67, 82, 97, 112]


def test_fewer_frames_than_asked_for_repeat() -> None:
    assert frame_indices([0.0, 0.1, 0.2], 0, 0.3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert frame_indices([0.0], 0, 0.1, 4).tolist() == [0, 0, 0, 0]


# -------------------------------------------------------------------------------------------------------- real clips
def test_decoders_agree_on_a_real_clip(shared: Path) -> None:
    clip = Clip(str(shared / "data/video/carphone_pristine.mp4"))
    decord, pyav = (read_clip(clip, 8, 224, decoder) for decoder in ("decord", "pyav"))
    assert decord.shape == (8, 224, 224, 3)
    assert decord.dtype == np.uint8
    assert np.array_equal(decord, pyav)
    assert decord.std() > 20, "a picture, not a grey field"


def test_the_first_video_stream_is_read_not_the_best(shared: Path, tmp_path: Path) -> None:
    source = shared / "data/video/nasa_13013.mp4"  # stream 0: 325 frames, 25 fps, 320x180; "best": 390 frames, 480x270
    alone = clips.remux(source, tmp_path / "stream0.mp4")
    for span in ((None, None), (3.0, 5.0)):
        expected = read_clip(Clip(str(alone), *span), 8, 64, "decord")
        for decoder in ("decord", "pyav"):
            assert np.array_equal(read_clip(Clip(str(source), *span), 8, 64, decoder), expected)


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_containers_that_say_nothing_of_their_frames(shared: Path, tmp_path: Path, suffix: str) -> None:
    """mkv and ts promise 0 frames; ts starts at 0.08 s, and decord gives up on its last second."""
    source = shared / "data/video/nasa_13013.mp4"
    path = clips.remux(source, tmp_path / f"clip.{suffix}")
    expected = read_clip(Clip(str(source), 11.0, 13.0), 2, 32, "pyav")
    for decoder in ("decord", "pyav"):
        assert np.array_equal(read_clip(Clip(str(path), 11.0, 13.0), 2, 32, decoder), expected), decoder


# --------------------------------------------------------------------------------------------------- generated clips
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_span_gives_its_own_frames(tmp_path: Path, decoder: str) -> None:
    path = clips.write_video(tmp_path / "a.mp4", 20, fps=10)
    frames = read_clip(Clip(str(path), 0.5, 1.5), 5, 32, decoder)  # midpoints 0.6, 0.8, 1.0, 1.2, 1.4 s
    assert np.abs(frames.mean(axis=(1, 2, 3)) - [60, 80, 100, 120, 140]).max() < 3


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_second_video_stream_is_ignored(tmp_path: Path, decoder: str) -> None:
    path = clips.write_video(tmp_path / "two.mp4", 20, streams=2)
    assert read_clip(Clip(str(path)), 4, 32, decoder).max() < 200, "the other stream is white"


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_one_frame_is_enough(tmp_path: Path, decoder: str) -> None:
    path = clips.write_video(tmp_path / "one.mp4", 1, base=90)
    frames = read_clip(Clip(str(path)), 4, 32, decoder)
    assert frames.shape == (4, 32, 32, 3)
    assert abs(frames.mean() - 90) < 3


def test_the_squash_is_pils_bicubic(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    (tmp_path / "f").mkdir()
    Image.fromarray(image).save(tmp_path / "f/frame_1.png")
    expected = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(read_clip(Clip(str(tmp_path / "f")), 1, 24, "pyav")[0], expected)


def test_a_folder_of_frames_in_natural_order(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("RGB", (20, 10), (i * 20,) * 3).save(tmp_path / f"frame_{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert read_clip(Clip(str(tmp_path)), 4, 8, "pyav")[:, 0, 0, 0].tolist() == [20, 80, 140, 200]
    with pytest.raises(ClipError, match="a folder of frames has no clock; leave out the clip's start and end"):
        read_clip(Clip(str(tmp_path), 0.0, 1.0), 4, 8, "pyav")


# ------------------------------------------------------------------------------------------------------- bad clips
@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    good = clips.write_video(folder / "good.mp4")
    (folder / "empty.mp4").touch()
    clips.cut_half(good, folder / "truncated.mp4")  # its table of contents is at the end, so lost
    with_index_first = clips.remux(good, folder / "faststart.mp4", movflags="faststart")
    clips.cut_half(with_index_first, folder / "truncated_faststart.mp4")
    clips.cut_half(clips.write_video(folder / "long.mkv", 120, size=(128, 96)), folder / "truncated.mkv")
    (folder / "text.mp4").write_text("这不是视频\n" * 100, encoding="utf-8")
    clips.write_audio(folder / "audio.mp4")
    (folder / "no_frames").mkdir()
    (folder / "broken_frames").mkdir()
    (folder / "broken_frames/1.jpg").write_text("no picture")
    os.mkfifo(folder / "fifo.mp4")
    return folder


BAD = [
    ("missing.mp4", None, None, "the clip does not exist; check data.video_root"),
    ("empty.mp4", None, None, "the clip is an empty file"),
    ("truncated.mp4", None, None, "the file is no video, or is truncated"),
    ("truncated_faststart.mp4", None, None, "truncated"),
    ("truncated.mkv", None, None, r"truncated: its header promises 12\.00 s, its frames end at"),
    ("text.mp4", None, None, "the file is no video, or is truncated"),
    ("audio.mp4", None, None, "the file has no video stream, only audio"),
    ("fifo.mp4", None, None, "the clip is neither a file nor a folder"),
    ("no_frames", None, None, "the folder holds no frames"),
    ("broken_frames", None, None, r"1\.jpg: the frame cannot be read"),
    ("good.mp4", 5.0, 6.0, r"the span 5\.00-6\.00 s lies outside the video, which is 2\.00 s long"),
    ("good.mp4", 1.0, 9.0, r"the span 1\.00-9\.00 s lies outside the video, which is 2\.00 s long"),
    ("good.mp4", 1.0, 1.0, r"the span 1\.00-1\.00 s is empty or negative"),
    ("good.mp4", -1.0, 1.0, r"the span -1\.00-1\.00 s is empty or negative"),
]


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize(("name", "start", "end", "message"), BAD, ids=[f"{b[0]}-{b[1]}" for b in BAD])
def test_bad_clips_are_named(bad: Path, name: str, start: float, end: float, message: str, decoder: str) -> None:
    with pytest.raises(ClipError, match=message) as error:
        read_clip(Clip(str(bad / name), start, end), 4, 32, decoder)
    assert name in str(error.value), "the message names the file"


def test_a_span_slightly_too_long_is_cut(bad: Path) -> None:
    long, exact = (read_clip(Clip(str(bad / "good.mp4"), 1.0, end), 4, 32, "decord") for end in (2.9, 2.0))
    assert np.array_equal(long, exact)
