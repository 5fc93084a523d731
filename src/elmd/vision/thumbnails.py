"""Small JPEGs of clips, for pages that people look at."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from elmd.errors import ClipError
from elmd.log import logger
from elmd.types import Clip
from elmd.vision.decode import decode_clips
from elmd.vision.video import frame_files, read_clip, video_streams

#: JPEG quality: faces stay readable at about 10 kB for 320 × 180. Ours.
QUALITY = 80


def thumbnails(
    clips: Mapping[str, Clip], *, frames: int = 4, height: int = 96, workers: int = 2
) -> dict[str, list[bytes]]:
    """JPEGs of uniform frames per key; a clip that cannot be decoded has an empty list, and is counted in the log.

    The frames are those that a model with m = `frames` sees, in their own aspect ratio (that of the first, where a
    folder's frames differ), made smaller to `height` and never larger. They carry no name, time or other metadata.

    Args:
        clips: what to show, by any key.
        frames: JPEGs per clip.
        height: of each JPEG, in pixels.
        workers: number of decoding processes.

    Raises:
        ElmdError: the decoder cannot run at all.
    """
    made: dict[str, list[bytes]] = {key: [] for key in clips}
    failed: list[ClipError] = []
    # PyAV is there on every machine, and its pixels are equal to decord's.
    decoding = decode_clips(
        clips.items(), frames=frames, size=height, decoder="pyav", workers=workers, read=read_thumbnails
    )
    with closing(decoding):
        for key, result in decoding:
            if isinstance(result, ClipError):
                failed.append(result)
            else:
                made[key] = [_jpeg(frame) for frame in result]
    if failed:
        logger.warning("%d of %d clips cannot be shown, the first: %s", len(failed), len(clips), failed[0])
    return made


def read_thumbnails(clip: Clip, frames: int, height: int, decoder: str) -> np.ndarray:
    """The uniform frames of a clip, uint8 [frames, h, w, 3] with h = `height`, or the clip's own where that is less.

    Raises:
        ClipError: naming the file and why it cannot be used.
    """
    from PIL import Image

    # `read_clip` raises the usual errors; the squares it gives are stretched back.
    square = read_clip(clip, frames, 2 * height, decoder)
    wide, tall = _shape(Path(clip.path))
    shape = (max(1, round(wide * min(1.0, height / tall))), min(height, tall))
    return np.stack([np.asarray(Image.fromarray(frame).resize(shape, Image.Resampling.BICUBIC)) for frame in square])


def _shape(path: Path) -> tuple[int, int]:
    """Width and height in which a clip is meant to be seen, in square pixels."""
    from PIL import Image

    if path.is_dir():
        with Image.open(frame_files(path)[0]) as image:
            return image.size
    import av

    with av.open(str(path)) as container:
        stream = video_streams(container)[0]
        pixel = stream.sample_aspect_ratio or 1  # width : height of a pixel, where the file says
        return max(1, round(stream.width * pixel)), stream.height


def _jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=QUALITY, optimize=True)
    return out.getvalue()
