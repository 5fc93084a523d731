"""Worker processes: those that hang, crash or raise cost a clip each; none outlives its parent."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import clips
from elmd.errors import ClipError, ElmdError
from elmd.types import Clip
from elmd.vision.decode import decode_clips, spare_cores
from elmd.vision.video import read_clip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(str(clips.write_video(tmp_path_factory.mktemp("clips") / "good.mp4")), 0.5, 1.5)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + 30
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, "the worker did not start"
        time.sleep(0.05)
    return int(path.read_text())


def test_workers_lose_only_the_clips_that_misbehave(good: Clip, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    names = ["hang", "good0", "good1", "good2", "crash", "throw", "text", "good3", "good4", "good5"]
    requests = [(name, good if name.startswith("good") else Clip(str(tmp_path / f"{name}.mp4"))) for name in names]
    begun = time.monotonic()
    results = dict(
        decode_clips(
            requests, frames=4, size=32, decoder="pyav", workers=2, timeout_s=3, read=clips.misbehaving, ahead=2
        )
    )
    assert time.monotonic() - begun < 20
    assert results.keys() == set(names)
    expected = read_clip(good, 4, 32, "pyav")
    for i in range(6):
        assert np.array_equal(results[f"good{i}"], expected)
    assert "hang.mp4: decoding took over 3 s and was stopped" in str(results["hang"])
    assert "crash.mp4: the decoder crashed on the clip (signal SIGSEGV)" in str(results["crash"])
    assert "throw.mp4: decoding failed (ZeroDivisionError: a bug in a codec)" in str(results["throw"])
    assert "text.mp4: the file is no video, or is truncated" in str(results["text"])
    assert all(isinstance(results[key], ClipError) for key in ("hang", "crash", "throw", "text"))
    assert not alive(int((tmp_path / "hang.pid").read_text())), "the hung worker was killed"


def test_decord_in_workers_equals_decord_here(good: Clip) -> None:
    [(key, frames)] = decode_clips([("a", good)], frames=4, size=32, decoder="decord", workers=3)
    assert key == "a"
    assert np.array_equal(frames, read_clip(good, 4, 32, "decord"))


def hanging(tmp_path: Path, *before: tuple[str, Clip]) -> tuple[list[tuple[str, Clip]], dict[str, object]]:
    """Arguments of `decode_clips` for one worker, which hangs in the end."""
    options = {"frames": 2, "size": 16, "decoder": "pyav", "workers": 1, "timeout_s": 600, "read": clips.misbehaving}
    return [*before, ("hang", Clip(str(tmp_path / "hang.mp4")))], options


def test_leaving_early_ends_the_processes(good: Clip, tmp_path: Path) -> None:
    requests, options = hanging(tmp_path, ("good", good))
    decoding = decode_clips(requests, **options)
    assert next(decoding)[0] == "good"
    pid = wait_for_pid(tmp_path / "hang.pid")
    assert alive(pid)
    decoding.close()
    assert not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_a_hung_worker_does_not_outlive_a_killed_run(tmp_path: Path) -> None:
    requests, options = hanging(tmp_path)
    parent = os.fork()
    if not parent:
        try:
            list(decode_clips(requests, **options))
        finally:
            os._exit(1)
    pid = wait_for_pid(tmp_path / "hang.pid")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_no_clips_need_no_workers() -> None:
    assert list(decode_clips([], frames=4, size=32, decoder="pyav")) == []


def test_a_decoder_that_is_not_installed_stops_the_run(
    good: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decord.py").write_text("raise ImportError('no decord here')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ElmdError, match=r"vision\.decoder: decoder 'decord' cannot be loaded \(ImportError: no decord here\); install"
    ):
        list(decode_clips([("a", good)], frames=2, size=16, decoder="decord"))


def test_each_process_decodes_on_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert spare_cores() == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert spare_cores() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert spare_cores() == 1
