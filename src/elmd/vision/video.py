"""Clips to frames: m uniform frames of a span of a video, or of a folder of frames, decoded in this process.

When each frame of a video appears comes from its packets (containers report wrong frame counts), the pixels from decord
or PyAV. Frames always come from the *first* video stream of the container. decord chooses the "best" stream itself, so
a container with more than one is read by PyAV, as is a video that decord cannot read; where both can read a video,
their pixels are equal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elmd.errors import ClipError
from elmd.types import Clip

#: A span may end this many seconds after the last frame (subtitle times are rough); the excess is cut. Ours.
TOLERANCE_S = 1.0
#: A file whose header promises this many seconds more than its frames cover is truncated. Ours.
TRUNCATED_S = 0.5
#: What counts as a frame in a folder of frames.
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


def frame_indices(starts: Sequence[float] | np.ndarray, start: float, end: float, frames: int) -> np.ndarray:
    """Indices [m] of the frames on screen at the midpoints of m equal parts of [start, end] (eq. 5's input; ours).

    Args:
        starts: when each frame appears, in seconds, ascending, [n].
        start, end: the span, in seconds.
        frames: m. With fewer frames in the span than m the same rule repeats frames.
    """
    middles = start + (np.arange(frames) + 0.5) / frames * (end - start)
    # A midpoint at a frame's first instant belongs to that frame, however the last float digit is rounded.
    indices = np.searchsorted(np.asarray(starts, dtype=np.float64), middles + 1e-6, side="right") - 1
    return np.clip(indices, 0, len(starts) - 1)


def squash(image: Any, size: int) -> np.ndarray:
    """A PIL image or uint8 array [H, W, 3] as uint8 [size, size, 3]: both sides stretched, bicubic, by PIL.

    Followed by /255 and mean/std this equals VisualGLM's own preprocessing bit for bit; a decoder's own resize or
    `F.interpolate` does not.
    """
    from PIL import Image

    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


def read_clip(clip: Clip, frames: int, size: int, decoder: str) -> np.ndarray:
    """The m uniform frames of a clip, uint8 [m, size, size, 3].

    Args:
        clip: a video file and a span of it, or a folder of frames (all of it; frames in natural order of their names).
        frames: m.
        size: side in pixels of the square that frames are squashed to.
        decoder: "decord" or "pyav".

    Raises:
        ClipError: naming the file and why it cannot be used.
    """
    path = Path(clip.path)
    if path.is_dir():
        return _read_folder(clip, frames, size)
    stream = _read_stream(path)
    start, end = _span(clip, stream)
    wanted = frame_indices(stream.starts, start, end, frames)
    unique, inverse = np.unique(wanted, return_inverse=True)
    pictures = _decord_frames(path, stream, unique) if decoder == "decord" and stream.streams == 1 else None
    if pictures is None:
        pictures = _pyav_frames(path, stream, unique)
    return np.stack([squash(picture, size) for picture in pictures])[inverse]


@dataclass(frozen=True)
class _Stream:
    """The first video stream of a file, as its packets describe it; times in seconds from its first frame."""

    index: int  # in the container
    streams: int  # video streams in the container
    stamps: list[int]  # [n], in the stream's own time base
    starts: np.ndarray  # [n], when each frame appears
    end: float  # when the last frame ends
    header_end: float | None  # the same by the header; None: it gives no duration


def _read_stream(path: Path) -> _Stream:
    import av

    if not path.exists():
        raise ClipError("the clip does not exist", where=path, fix="check data.video_root and data.video_template")
    if not path.is_file():
        raise ClipError("the clip is neither a file nor a folder", where=path)
    if path.stat().st_size == 0:
        raise ClipError("the clip is an empty file", where=path, fix="get the file again")
    try:
        with av.open(str(path)) as container:
            videos = video_streams(container)
            if not videos:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise ClipError(f"the file has no video stream, only {kinds}", where=path)
            stream = videos[0]
            index, base = stream.index, stream.time_base  # a closed container's stream has neither
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard and not p.is_corrupt]
            durations = {p.pts: p.duration or 0 for p in packets if p.pts is not None}
            header_end = _header_end(container, stream)
    except (av.error.FFmpegError, ValueError) as error:
        raise ClipError(
            f"the file is no video, or is truncated ({first_line(error)})", where=path, fix="get the file again"
        ) from error
    stamps = sorted(durations)
    if not stamps or base is None:
        raise ClipError("the video has no frames; the file may be truncated", where=path, fix="get the file again")
    starts = np.array([float((stamp - stamps[0]) * base) for stamp in stamps])
    last = float(durations[stamps[-1]] * base) or (float(np.median(np.diff(starts))) if len(starts) > 1 else 0.04)
    return _Stream(index, len(videos), stamps, starts, float(starts[-1]) + last, header_end)


def video_streams(container: Any) -> list[Any]:
    """The video streams of an open PyAV container, without cover pictures."""
    import av

    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def _header_end(container: Any, stream: Any) -> float | None:
    """The stream's duration by the header, in seconds."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if len(container.streams) == 1 and container.duration is not None:
        return container.duration / 1e6
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None


def _span(clip: Clip, stream: _Stream) -> tuple[float, float]:
    """The span of a clip inside its video, in seconds."""
    start = clip.start or 0.0
    end = clip.end if clip.end is not None else max(stream.end, stream.header_end or 0.0)
    if (clip.end is not None and end <= start) or start < 0:
        raise ClipError(f"the span {start:.2f}-{end:.2f} s is empty or negative", where=clip.path)
    if min(end, stream.header_end or 0.0) > stream.end + TRUNCATED_S:
        raise ClipError(
            f"the video is truncated: its header promises {stream.header_end:.2f} s, "
            f"its frames end at {stream.end:.2f} s",
            where=clip.path,
            fix="get the file again",
        )
    if start >= stream.end or end > stream.end + TOLERANCE_S:
        raise ClipError(
            f"the span {start:.2f}-{end:.2f} s lies outside the video, which is {stream.end:.2f} s long",
            where=clip.path,
            fix="check the times, or that this is the right video",
        )
    return start, min(end, stream.end)


def _decord_frames(path: Path, stream: _Stream, wanted: np.ndarray) -> list[np.ndarray] | None:
    """Frames [H, W, 3] at native size; None where decord cannot read them (PyAV perhaps can)."""
    if "decord" not in sys.modules:  # loaded before torch, decord breaks torch; a worker never loads torch
        import torch  # noqa: F401
    import decord

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        # With another number of frames, decord's indices mean other frames.
        batch = reader.get_batch(wanted.tolist()).asnumpy() if len(reader) == len(stream.starts) else None
        del reader
    except (decord.DECORDError, RuntimeError, AssertionError):
        return None
    return None if batch is None else list(batch)


def _pyav_frames(path: Path, stream: _Stream, wanted: np.ndarray) -> list[np.ndarray]:
    """Frames [H, W, 3] at native size."""
    import av

    stamps = [stream.stamps[i] for i in wanted]
    cause = "they are missing"
    for seek in (True, False):  # in some containers seeking goes beyond the frame asked for
        frame_at: dict[int, np.ndarray] = {}
        try:
            with av.open(str(path)) as container:
                source: Any = container.streams[stream.index]
                if seek:
                    container.seek(stamps[0], stream=source)
                frame: Any
                for frame in container.decode(source):
                    if frame.pts in stamps:
                        frame_at[frame.pts] = frame.to_ndarray(format="rgb24")
                    if frame.pts is not None and frame.pts >= stamps[-1]:
                        break
        except (av.error.FFmpegError, ValueError) as error:
            cause = first_line(error)
        if len(frame_at) == len(stamps):
            return [frame_at[stamp] for stamp in stamps]
    first = next(stream.starts[i] for i, stamp in zip(wanted, stamps, strict=True) if stamp not in frame_at)
    raise ClipError(
        f"{len(stamps) - len(frame_at)} of {len(stamps)} frames cannot be decoded ({cause}), "
        f"the first at {first:.2f} s",
        where=path,
        fix="get the file again",
    )


def _read_folder(clip: Clip, frames: int, size: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    if clip.start is not None or clip.end is not None:
        raise ClipError("a folder of frames has no clock", where=clip.path, fix="leave out the clip's start and end")
    names = frame_files(Path(clip.path))
    if not names:
        raise ClipError("the folder holds no frames", where=clip.path, fix=f"put {', '.join(sorted(IMAGES))} there")
    pictures = []
    for i in frame_indices(range(len(names)), 0.0, float(len(names)), frames):
        try:
            with Image.open(names[i]) as image:
                pictures.append(squash(image, size))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise ClipError(f"the frame cannot be read ({first_line(error)})", where=names[i]) from error
    return np.stack(pictures)


def frame_files(folder: Path) -> list[Path]:
    """The frames of a folder in natural order: frame_2 before frame_10."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGES), key=order)


def first_line(error: BaseException) -> str:
    """The class and the first line of another library's error, as a part of our sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
