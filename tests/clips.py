"""Clips and samples with clips, made for tests; and decoders that misbehave (importable by worker processes)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from elmd.errors import ClipError
from elmd.labels import EMOTIONS
from elmd.types import Clip, Sample, Utterance
from elmd.vision.video import read_clip


def write_video(
    path: Path, frames: int = 20, *, base: int = 0, fps: int = 10, size: tuple[int, int] = (64, 48), streams: int = 1
) -> Path:
    """A video whose frame i is grey level base + 10 i; further streams are white, larger, and of 2 fps more each."""
    with av.open(str(path), "w") as container:
        for number in range(streams):
            stream = container.add_stream("libx264", rate=fps + 2 * number)
            stream.width, stream.height, stream.pix_fmt = size[0] * (number + 1), size[1] * (number + 1), "yuv420p"
            stream.codec_context.thread_count = 1
            stream.time_base = Fraction(1, fps + 2 * number)
        for number, stream in enumerate(container.streams.video):
            for i in range(frames):
                level = 255 if number else min(255, base + 10 * i)
                image = np.full((stream.height, stream.width, 3), level, np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def remux(source: Path, path: Path, **options: str) -> Path:
    """The first video stream of a file in another container, not re-encoded."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
    return path


def cut_half(source: Path, path: Path) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def misbehaving(clip: Clip, frames: int, size: int, decoder: str) -> np.ndarray:
    """Hangs, crashes or throws on clips of those names; decodes others."""
    name = Path(clip.path).stem
    if name.startswith("hang"):
        Path(clip.path).with_suffix(".pid").write_text(str(os.getpid()))
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))  # only SIGKILL ends it, as when the GIL is held
        time.sleep(3600)
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("throw"):
        raise ZeroDivisionError("a bug in a codec")
    return read_clip(clip, frames, size, decoder)


def decode_here(
    requests: Iterable[tuple[str, Clip]], *, frames: int, size: int, decoder: str, **_: object
) -> Iterator[tuple[str, np.ndarray | ClipError]]:
    """`decode_clips` without worker processes, for tests of what is done with the frames."""
    for key, clip in requests:
        try:
            yield key, read_clip(clip, frames, size, decoder)
        except ClipError as error:
            yield key, error


def sample(number: int, clip: Clip | None = None, features: str | None = None) -> Sample:
    """Sample d#<number> with this clip, or with this file of features."""
    utterance = Utterance(f"u{number}", "甲", "你好", EMOTIONS[0], clip=clip, features=features)
    response = Utterance(f"r{number}", "乙", "好", EMOTIONS[0])
    return Sample(f"d#{number}", "d", "s", "train", (), utterance, response)
