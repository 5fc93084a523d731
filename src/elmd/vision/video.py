"""Clips to frames: m uniform frames of a span of a video, decoded where a hang or a crash costs one clip only.

The time line of a video comes from its packets (containers lie about frame counts), the pixels from decord or PyAV.
Frames always come from the *first* video stream of the container. decord cannot be told which stream to read (it takes
the "best" one), so a container with several is read by PyAV, as is one that decord cannot handle; where both can read
a video their pixels are equal.
"""

from __future__ import annotations

import ctypes
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from elmd.errors import ClipError, ElmdError
from elmd.types import Clip

#: A span may reach this many seconds beyond the last frame (subtitle times are rough); the excess is cut. Ours.
TOLERANCE_S = 1.0
#: A file whose header promises this many seconds more than its frames cover is truncated. Ours.
TRUNCATED_S = 0.5
#: What counts as a frame in a folder of frames.
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
#: Until a worker process must have said hello (it imports the decoder, on a loaded machine).
_START_S = 300.0

ReadClip = Callable[[Clip, int, int, str], np.ndarray]


# ---------------------------------------------------------------------------------------------------- which frames
def frame_indices(starts: Sequence[float] | np.ndarray, start: float, end: float, frames: int) -> np.ndarray:
    """Indices [m] of the frames on screen at the midpoints of m equal parts of [start, end] (eq. 5's input; ours).

    Args:
        starts: when each frame appears, in seconds, ascending, [n].
        start, end: the span, in seconds.
        frames: m. With fewer frames in the span than m the same rule repeats frames.
    """
    middles = start + (np.arange(frames) + 0.5) / frames * (end - start)
    # A midpoint that falls on a frame's first instant belongs to it, whatever the last float digit says.
    found = np.searchsorted(np.asarray(starts, dtype=np.float64), middles + 1e-6, side="right") - 1
    return np.clip(found, 0, len(starts) - 1)


def squash(image: Any, size: int) -> np.ndarray:
    """A PIL image or uint8 array [H, W, 3] as uint8 [size, size, 3]: both sides stretched, bicubic, by PIL.

    With /255 and mean/std afterwards this is VisualGLM's own preprocessing to the last bit; a decoder's own resize or
    `F.interpolate` is not.
    """
    from PIL import Image

    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


def read_clip(clip: Clip, frames: int, size: int, decoder: str = "decord") -> np.ndarray:
    """The m uniform frames of a clip, uint8 [m, size, size, 3], decoded in this process.

    Args:
        clip: a video file and a span of it, or a folder of frames (all of it; frames in natural order of their names).
        frames: m.
        size: side of the square the frames are squashed to, in pixels.
        decoder: "decord" or "pyav".

    Raises:
        ClipError: naming the file and why it cannot be used.
    """
    path = Path(clip.path)
    if path.is_dir():
        return _read_folder(clip, frames, size)
    line = _time_line(path)
    start, end = _span(clip, line)
    wanted = frame_indices(line.starts, start, end, frames)
    unique, back = np.unique(wanted, return_inverse=True)
    pictures = _decord_frames(path, line, unique) if decoder == "decord" and line.streams == 1 else None
    if pictures is None:
        pictures = _pyav_frames(path, line, unique)
    return np.stack([squash(picture, size) for picture in pictures])[back]


# ------------------------------------------------------------------------------------------------------- the sources
@dataclass(frozen=True)
class _TimeLine:
    """The first video stream of a file: `stamps` [n] in its own ticks, `starts` [n] and ends in seconds from frame 0.

    `end` is where the frames end, `promised` where the header says they do (None: it does not say).
    """

    stream: int
    streams: int
    stamps: list[int]
    starts: np.ndarray
    end: float
    promised: float | None


def _time_line(path: Path) -> _TimeLine:
    import av

    if not path.exists():
        raise ClipError("the clip does not exist", where=path, fix="check data.video_root and data.video_template")
    if not path.is_file():
        raise ClipError("the clip is neither a file nor a folder", where=path)
    if path.stat().st_size == 0:
        raise ClipError("the clip is an empty file", where=path, fix="get the file again")
    try:
        with av.open(str(path)) as container:
            cover = av.stream.Disposition.attached_pic
            videos = [s for s in container.streams.video if not s.disposition & cover]
            if not videos:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise ClipError(f"the file has no video stream, only {kinds}", where=path)
            stream = videos[0]
            index, base = stream.index, stream.time_base  # a closed container's stream has neither
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard and not p.is_corrupt]
            lasts = {p.pts: p.duration or 0 for p in packets if p.pts is not None}
            promised = _promised(container, stream)
    except (av.error.FFmpegError, ValueError) as error:
        raise ClipError(
            f"the file is no video, or is truncated ({_cause(error)})", where=path, fix="get the file again"
        ) from error
    stamps = sorted(lasts)
    if not stamps or base is None:
        raise ClipError("the video has no frames; the file may be truncated", where=path, fix="get the file again")
    starts = np.array([float((stamp - stamps[0]) * base) for stamp in stamps])
    last = float(lasts[stamps[-1]] * base) or (float(np.median(np.diff(starts))) if len(starts) > 1 else 0.04)
    return _TimeLine(index, len(videos), stamps, starts, float(starts[-1]) + last, promised)


def _promised(container: Any, stream: Any) -> float | None:
    """How long the header says the stream is, in seconds."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if len(container.streams) == 1 and container.duration is not None:
        return container.duration / 1e6
    written = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return int(written[1]) * 3600 + int(written[2]) * 60 + float(written[3]) if written else None


def _span(clip: Clip, line: _TimeLine) -> tuple[float, float]:
    """The span of a clip inside its video, in seconds."""
    start = clip.start or 0.0
    end = clip.end if clip.end is not None else max(line.end, line.promised or 0.0)
    if (clip.end is not None and end <= start) or start < 0:
        raise ClipError(f"the span {start:.2f}-{end:.2f} s is empty or negative", where=clip.path)
    if min(end, line.promised or 0.0) > line.end + TRUNCATED_S:
        raise ClipError(
            f"the video is truncated: its header promises {line.promised:.2f} s, its frames end at {line.end:.2f} s",
            where=clip.path,
            fix="get the file again",
        )
    if start >= line.end or end > line.end + TOLERANCE_S:
        raise ClipError(
            f"the span {start:.2f}-{end:.2f} s lies outside the video, which is {line.end:.2f} s long",
            where=clip.path,
            fix="check the times, or that this is the right video",
        )
    return start, min(end, line.end)


def _decord_frames(path: Path, line: _TimeLine, wanted: np.ndarray) -> list[np.ndarray] | None:
    """Frames [H, W, 3] at native size; None where decord cannot read what PyAV perhaps can."""
    if "decord" not in sys.modules:  # loaded before torch it breaks torch, which a worker never loads
        import torch  # noqa: F401
    import decord

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        # Another count means another idea of the time line, and so other frames.
        batch = reader.get_batch(wanted.tolist()).asnumpy() if len(reader) == len(line.starts) else None
        del reader
    except (decord.DECORDError, RuntimeError, AssertionError):
        return None
    return None if batch is None else list(batch)


def _pyav_frames(path: Path, line: _TimeLine, wanted: np.ndarray) -> list[np.ndarray]:
    """Frames [H, W, 3] at native size."""
    import av

    stamps = [line.stamps[i] for i in wanted]
    cause = "they are missing"
    for seek in (True, False):  # some containers seek past what was asked for
        found: dict[int, np.ndarray] = {}
        try:
            with av.open(str(path)) as container:
                stream: Any = container.streams[line.stream]
                if seek:
                    container.seek(stamps[0], stream=stream)
                frame: Any
                for frame in container.decode(stream):
                    if frame.pts in stamps:
                        found[frame.pts] = frame.to_ndarray(format="rgb24")
                    if frame.pts is not None and frame.pts >= stamps[-1]:
                        break
        except (av.error.FFmpegError, ValueError) as error:
            cause = _cause(error)
        if len(found) == len(stamps):
            return [found[stamp] for stamp in stamps]
    first = next(line.starts[i] for i, stamp in zip(wanted, stamps, strict=True) if stamp not in found)
    raise ClipError(
        f"{len(stamps) - len(found)} of {len(stamps)} frames cannot be decoded ({cause}), the first at {first:.2f} s",
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
            raise ClipError(f"the frame cannot be read ({_cause(error)})", where=names[i]) from error
    return np.stack(pictures)


def frame_files(folder: Path) -> list[Path]:
    """The frames of a folder in natural order: frame_2 before frame_10."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGES), key=order)


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------ worker processes
def decode_clips(
    requests: Iterable[tuple[str, Clip]],
    *,
    frames: int,
    size: int,
    decoder: str = "decord",
    workers: int = 2,
    timeout_s: float = 60.0,
    ahead: int = 32,
    read: ReadClip = read_clip,
) -> Generator[tuple[str, np.ndarray | ClipError], None, None]:
    """Decode clips in worker processes; yields (key, frames uint8 [m, size, size, 3] or why not) as they are done.

    A decoder may hang for ever (decord does, holding the GIL) or crash: the worker is then killed and replaced, and
    the clip alone is lost. Up to `ahead` clips are decoded in advance while the caller works. The processes end with
    the generator, however that comes about.

    Args:
        requests: (key, clip) pairs; keys name the results.
        frames, size, decoder: as for `read_clip`.
        workers: number of processes.
        timeout_s: seconds one clip may take.
        ahead: decoded clips kept waiting at most.
        read: what decodes; a function that a new process can import.

    Raises:
        ElmdError: the workers cannot run at all (the decoder is not installed, say).
    """
    done: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    stop = threading.Event()
    pool = _Pool(deque(requests), (frames, size, decoder), workers, timeout_s, read, done, stop)
    thread = threading.Thread(target=pool.run, name="elmd-decode", daemon=True)
    thread.start()
    try:
        while (item := done.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    task: tuple[str, Clip] | None = None
    ready: bool = False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


@dataclass
class _Pool:
    """Hands one clip at a time to each worker; runs in a thread of its own so that the caller never holds it up."""

    todo: deque[tuple[str, Clip]]
    how: tuple[int, int, str]
    size: int
    timeout_s: float
    read: ReadClip
    done: queue.Queue[Any]
    stop: threading.Event

    def run(self) -> None:
        workers: list[_Worker] = []
        end: BaseException | None = None
        try:
            workers += [self._start() for _ in range(min(max(1, self.size), len(self.todo)))]
            while workers and not self.stop.is_set():
                for connection in wait([w.connection for w in workers], timeout=self._patience(workers)):
                    self._hear(next(w for w in workers if w.connection is connection), workers)
                for worker in list(workers):
                    # A worker that answered while the caller kept us waiting is not late.
                    if worker.deadline < time.monotonic() and not worker.connection.poll():
                        self._late(worker, workers)
        except BaseException as error:  # the caller's thread raises it
            end = error
        finally:
            for worker in workers:
                worker.kill()
            self._put(end)

    def _patience(self, workers: list[_Worker]) -> float:
        return min(0.2, max(0.0, min(w.deadline for w in workers) - time.monotonic()))  # 0.2: notices `stop` soon

    def _put(self, item: Any) -> None:
        while not self.stop.is_set():
            try:
                self.done.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def _start(self) -> _Worker:
        here, there = Pipe()
        with there:
            # Not multiprocessing's spawn: that would import the caller's main module (hydra, transformers) again.
            process = subprocess.Popen(
                [sys.executable, "-c", f"from elmd.vision.video import serve; serve({there.fileno()})"],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            )
        here.send((self.read, self.how))
        return _Worker(process, here, time.monotonic() + _START_S)

    def _hear(self, worker: _Worker, workers: list[_Worker]) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            return self._crashed(worker, workers)
        if kind == "broken":
            raise ElmdError(value, where="vision.decoder", fix="install what is missing, or choose the other decoder")
        if kind == "ready":
            worker.ready = True
        else:
            assert worker.task is not None
            key = worker.task[0]
            worker.task = None
            result = ClipError(value["what"], where=value["where"], fix=value["fix"]) if kind == "bad" else value
            self._put((key, result))
        return self._assign(worker, workers)

    def _assign(self, worker: _Worker, workers: list[_Worker]) -> None:
        if not self.todo:
            worker.kill()
            workers.remove(worker)
            return
        worker.task = self.todo.popleft()
        worker.deadline = time.monotonic() + self.timeout_s
        try:
            worker.connection.send(worker.task[1])
        except OSError:
            self._crashed(worker, workers)

    def _crashed(self, worker: _Worker, workers: list[_Worker]) -> None:
        code = worker.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._lose(worker, workers, f"the decoder crashed on the clip ({how})")

    def _late(self, worker: _Worker, workers: list[_Worker]) -> None:
        self._lose(worker, workers, f"decoding took over {self.timeout_s:g} s and was stopped")

    def _lose(self, worker: _Worker, workers: list[_Worker], what: str) -> None:
        """Give up a worker and the clip it holds; another takes its place while there is work."""
        worker.kill()
        workers.remove(worker)
        if not worker.ready:
            raise ElmdError("a process for decoding clips did not start", where="vision.workers")
        if self.todo:
            workers.append(self._start())
        assert worker.task is not None
        key, clip = worker.task
        self._put((key, ClipError(what, where=clip.path, fix="re-encode it, or raise vision.timeout_s if it is long")))


def serve(descriptor: int) -> None:
    """The body of a worker process: reads clips from the pipe it was given until that closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a hung worker must not outlive a killed parent
    connection = Connection(descriptor)
    read, how = connection.recv()
    try:
        _quiet(how[2])
    except ImportError as error:
        connection.send(("broken", f"decoder {how[2]!r} cannot be loaded ({_cause(error)})"))
        return
    connection.send(("ready", None))
    while True:
        try:
            clip = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("frames", read(clip, *how))
        except ElmdError as error:
            answer = ("bad", {"what": error.what, "where": error.where, "fix": error.fix})
        except Exception as error:  # whatever a decoder throws at one clip must not cost the others
            answer = ("bad", {"what": f"decoding failed ({_cause(error)})", "where": clip.path, "fix": None})
        connection.send(answer)


def _quiet(decoder: str) -> None:
    """Load the decoder and keep its library from writing to the terminal: causes travel in ClipError."""
    import av

    av.logging.set_level(av.logging.PANIC)
    if decoder == "decord":
        import decord  # alone: torch would cost each worker a second of start-up and 200 MB

        decord.logging.set_level(decord.logging.QUIET)
