"""Decoding in worker processes: a clip on which the decoder hangs or crashes costs that clip only."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from elmd.errors import ClipError, ElmdError
from elmd.types import Clip
from elmd.vision.video import first_line, read_clip

#: Seconds within which a worker process must have started (it imports the decoder, on a loaded machine). Ours.
_START_S = 300.0

ReadClip = Callable[[Clip, int, int, str], np.ndarray]


def spare_cores() -> int:
    """The cores of this machine divided among its processes (LOCAL_WORLD_SIZE), less one each; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)


def decode_clips(
    requests: Iterable[tuple[str, Clip]],
    *,
    frames: int,
    size: int,
    decoder: str,
    workers: int = 2,
    timeout_s: float = 60.0,
    ahead: int = 32,
    read: ReadClip = read_clip,
) -> Generator[tuple[str, np.ndarray | ClipError], None, None]:
    """Decode clips in worker processes; yields (key, frames uint8 [m, size, size, 3] or the error) as they are done.

    A decoder may hang for ever (decord does, holding the GIL) or crash: its worker is then killed and replaced, and
    only that clip is lost. Up to `ahead` clips are decoded in advance while the caller works. The processes end with
    the generator, however it ends.

    Args:
        requests: (key, clip) pairs; keys name the results.
        frames, size, decoder: as for `read_clip`.
        workers: number of processes.
        timeout_s: seconds that one clip may take.
        ahead: decoded clips kept waiting at most.
        read: the function that decodes; a new process must be able to import it.

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
    request: tuple[str, Clip] | None = None  # what it decodes; None while it starts

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


@dataclass
class _Pool:
    """Gives each worker one clip at a time; runs in its own thread, so that a busy caller never delays it."""

    todo: deque[tuple[str, Clip]]
    arguments: tuple[int, int, str]  # of `read`: frames, size, decoder
    size: int
    timeout_s: float
    read: ReadClip
    done: queue.Queue[Any]  # (key, result) pairs; last None, or the error that ended the pool
    stop: threading.Event

    def run(self) -> None:
        workers: list[_Worker] = []
        end: BaseException | None = None
        try:
            workers += [self._start() for _ in range(min(max(1, self.size), len(self.todo)))]
            while workers and not self.stop.is_set():
                for connection in wait([w.connection for w in workers], timeout=self._patience(workers)):
                    self._receive(next(w for w in workers if w.connection is connection), workers)
                for worker in list(workers):
                    # A worker whose answer is waiting, because the caller took its time, is not late.
                    if worker.deadline < time.monotonic() and not worker.connection.poll():
                        self._lose(worker, workers, f"decoding took over {self.timeout_s:g} s and was stopped")
        except BaseException as error:  # the caller's thread raises it
            end = error
        finally:
            for worker in workers:
                worker.kill()
            self._put(end)

    def _patience(self, workers: list[_Worker]) -> float:
        """Seconds until the first deadline; at most 0.2, so that `stop` is noticed soon."""
        return min(0.2, max(0.0, min(w.deadline for w in workers) - time.monotonic()))

    def _put(self, item: Any) -> None:
        while not self.stop.is_set():
            try:
                self.done.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        with theirs:
            # Not multiprocessing's spawn: that would import the caller's main module (hydra, transformers) again.
            process = subprocess.Popen(
                [sys.executable, "-c", f"from elmd.vision.decode import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            )
        ours.send((self.read, self.arguments))
        return _Worker(process, ours, time.monotonic() + _START_S)

    def _receive(self, worker: _Worker, workers: list[_Worker]) -> None:
        """Take a worker's answer and give it the next clip."""
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            return self._crashed(worker, workers)
        if worker.request is not None:
            self._put((worker.request[0], answer))
        elif answer is not None:  # it started, but without the decoder
            raise answer
        if not self.todo:
            worker.kill()
            workers.remove(worker)
            return None
        worker.request = self.todo.popleft()
        worker.deadline = time.monotonic() + self.timeout_s
        try:
            worker.connection.send(worker.request[1])
        except OSError:
            self._crashed(worker, workers)
        return None

    def _crashed(self, worker: _Worker, workers: list[_Worker]) -> None:
        code = worker.process.wait()
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._lose(worker, workers, f"the decoder crashed on the clip ({cause})")

    def _lose(self, worker: _Worker, workers: list[_Worker], what: str) -> None:
        """Give up a worker and its clip; another worker takes its place while there is work."""
        worker.kill()
        workers.remove(worker)
        if worker.request is None:
            raise ElmdError("a process for decoding clips did not start", where="vision.workers")
        if self.todo:
            workers.append(self._start())
        key, clip = worker.request
        self._put((key, ClipError(what, where=clip.path, fix="re-encode it, or raise vision.timeout_s if it is long")))


def serve(descriptor: int) -> None:
    """The body of a worker process: reads clips from the pipe it was given until that closes.

    It first answers None, or why it cannot work; then the frames of each clip, or a ClipError.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a hung worker must not outlive a killed parent
    connection = Connection(descriptor)
    read, arguments = connection.recv()
    decoder = arguments[2]
    try:
        load_quietly(decoder)
    except ImportError as error:
        connection.send(
            ElmdError(
                f"decoder {decoder!r} cannot be loaded ({first_line(error)})",
                where="vision.decoder",
                fix="install what is missing, or choose the other decoder",
            )
        )
        return
    connection.send(None)
    while True:
        try:
            clip = connection.recv()
        except EOFError:
            return
        try:
            answer: np.ndarray | ClipError = read(clip, *arguments)
        except ClipError as error:
            answer = error
        except Exception as error:  # whatever a decoder raises on one clip must not cost the others
            answer = ClipError(f"decoding failed ({first_line(error)})", where=clip.path)
        connection.send(answer)


def load_quietly(decoder: str) -> None:
    """Load the decoder and keep its library from writing to the terminal: causes travel in ClipError."""
    import av

    av.logging.set_level(av.logging.PANIC)
    if decoder == "decord":
        import decord  # without torch, which would cost each worker a second at its start and 200 MB

        decord.logging.set_level(decord.logging.QUIET)
