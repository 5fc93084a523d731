"""Drawn, animated faces: their geometry, that geometry in words, and real H.264 clips of them.

Part of the tiny world. Seven numbers say what a face does; an emotion only decides which numbers
are likely. So a vision tower can be taught geometry, and a language model words for geometry, without a label.
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from elmd.labels import Emotion

SIZE = 64  # pixels, both ways
FRAMES = 8
FPS = 8

#: What a face does, each in about [-1, 1] with 0 at rest: inner brow ends up (+) or down (-), brows raised or lowered,
#: eyes wide or narrowed, mouth corners up or down, mouth open, mouth wide or pursed, nose wrinkled.
GEOMETRY = ("brow_angle", "brow_height", "eye_open", "mouth_curve", "mouth_open", "mouth_width", "nose")

_TYPICAL: dict[Emotion, tuple[float, ...]] = {
    Emotion.HAPPY: (0.0, 0.3, -0.25, 1.0, 0.2, 0.5, 0.0),
    Emotion.SURPRISE: (0.0, 1.0, 1.0, 0.0, 1.0, -0.5, 0.0),
    Emotion.SAD: (1.0, 0.0, -0.7, -1.0, 0.0, -0.1, 0.0),
    Emotion.DISGUST: (-0.2, -0.3, -0.7, -0.4, 0.0, 0.1, 1.0),
    Emotion.ANGER: (-1.0, -0.7, 0.3, -0.3, 0.0, -0.8, 0.0),
    Emotion.FEAR: (0.9, 0.7, 1.0, -0.2, 0.3, 1.0, 0.0),
    Emotion.NEUTRAL: (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}
_JITTER = 0.1  # standard deviation: wide enough that no two faces are alike, narrow enough that words still fit

#: Words for each part of a face in each state that `_states` tells apart.
WORDS_FOR: dict[str, tuple[str, ...]] = {
    "brows down": ("皱着眉", "眉头紧锁", "眉毛拧成一团", "压低了眉毛"),
    "brows slanted": ("眉梢耷拉着", "眉毛成了八字", "眉尖往上蹙", "愁眉不展"),
    "brows tense": ("眉毛紧张地扬起", "眉毛吊着发颤", "眉心高高揪起", "双眉上提又拧着"),
    "brows up": ("眉毛高高挑起", "扬起双眉", "眉毛抬得老高", "眉毛往上一跳"),
    "brows rest": ("眉毛舒展", "眉毛平平的", "眉间没有皱纹", "眉头放松"),
    "eyes wide": ("睁大了眼睛", "瞪圆双眼", "眼睛瞪得溜圆", "两眼圆睁"),
    "eyes narrow": ("眯着眼睛", "眼睛半闭", "垂下眼皮", "眼睛只剩一条缝"),
    "eyes rest": ("目光平平", "眼睛照常睁着", "眼神平稳", "眼睛不大不小"),
    "nose wrinkled": ("皱起鼻子", "鼻梁起了皱", "耸着鼻子", "鼻子缩成一团"),
    "mouth round": ("嘴张得圆圆的", "张大了嘴", "嘴巴成了圆圈", "下巴都掉了"),
    "mouth up": ("嘴角上扬", "咧嘴笑着", "嘴角往上翘", "嘴弯成月牙"),
    "mouth down": ("嘴角下垂", "瘪着嘴", "嘴角往下撇", "嘴弯成倒月牙"),
    "mouth stretched": ("嘴向两边扯开", "嘴唇绷成长条", "嘴角往两侧拉", "嘴咧得又扁又长"),
    "mouth pursed": ("嘴唇紧抿", "咬紧了嘴", "嘴缩成一点", "嘴闭得死死的"),
    "mouth rest": ("嘴唇自然合着", "嘴巴平直", "嘴上没有表情", "嘴轻轻闭着"),
}


def geometry(emotion: Emotion, draw: Random) -> np.ndarray:
    """One face's apex, [7] in the order of `GEOMETRY`: what is typical of the emotion, with its own deviation."""
    return np.array([value + draw.gauss(0, _JITTER) for value in _TYPICAL[emotion]], dtype=np.float32)


def _states(face: np.ndarray) -> list[str]:
    angle, height, eyes, curve, opened, width, nose = (float(x) for x in face)
    if angle < -0.5:
        brows = "brows down"
    elif angle > 0.5:
        brows = "brows tense" if height > 0.35 else "brows slanted"
    else:
        brows = "brows up" if height > 0.6 else "brows rest"
    lids = "eyes wide" if eyes > 0.6 else "eyes narrow" if eyes < -0.5 else "eyes rest"
    if opened > 0.6:
        mouth = "mouth round"
    elif curve > 0.5:
        mouth = "mouth up"
    elif curve < -0.7:
        mouth = "mouth down"
    elif abs(width) > 0.5:
        mouth = "mouth stretched" if width > 0 else "mouth pursed"
    else:
        mouth = "mouth rest"
    return [brows, lids, mouth] + ["nose wrinkled"] * (nose > 0.5)


def describe(face: np.ndarray, draw: Random) -> list[str]:
    """The face in words, part by part, in drawn order and wording: `["嘴角上扬", "眉毛舒展", …]`."""
    parts = [draw.choice(WORDS_FOR[state]) for state in _states(face)]
    draw.shuffle(parts)
    return parts


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(int(max(0, min(255, c * factor))) for c in colour)  # type: ignore[return-value]


class Actor:
    """One person's looks, which say nothing about what the face does: skin, hair, size, place, background."""

    def __init__(self, draw: Random):
        tone = draw.uniform(0.75, 1.0)
        self.skin = (int(250 * tone), int(210 * tone - draw.uniform(0, 15)), int(175 * tone - draw.uniform(0, 25)))
        self.hair = _shade((70, 50, 40), draw.uniform(0.3, 1.6))
        self.wall = tuple(draw.randint(60, 220) for _ in range(3))
        self.coat = tuple(draw.randint(40, 230) for _ in range(3))
        self.long_hair = draw.random() < 0.5
        self.scale = draw.uniform(0.9, 1.05)
        self.centre = (draw.uniform(-2.5, 2.5), draw.uniform(-2, 2))
        self.lips = _shade((190, 70, 70), draw.uniform(0.7, 1.1))

    def draw(self, face: np.ndarray, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
        """One frame, [64, 64, 3] uint8, drawn at twice the size and halved for smooth edges.

        Args:
            face: [7] as `GEOMETRY`.
            shift: of the head, in pixels.
        """
        angle, height, eyes, curve, opened, width, nose = (float(x) for x in face)
        image = Image.new("RGB", (2 * SIZE, 2 * SIZE), self.wall)
        pen = ImageDraw.Draw(image)
        k = 2 * self.scale
        cx, cy = 2 * (SIZE / 2 + self.centre[0] + shift[0]), 2 * (SIZE / 2 + self.centre[1] + shift[1])

        def oval(x: float, y: float, rx: float, ry: float, fill: tuple[int, ...]) -> None:
            pen.ellipse([cx + k * (x - rx), cy + k * (y - ry), cx + k * (x + rx), cy + k * (y + ry)], fill=fill)

        def line(points: list[tuple[float, float]], fill: tuple[int, ...], thick: float) -> None:
            pen.line([(cx + k * x, cy + k * y) for x, y in points], fill=fill, width=round(k * thick), joint="curve")

        oval(0, 38, 26, 16, self.coat)
        oval(0, -4, 25, 27 if self.long_hair else 24, self.hair)
        oval(0, 2, 21, 25, self.skin)
        for side in (-1, 1):
            x, open_ = side * 9, 2.6 + 2.2 * eyes
            oval(x, -3, 4.6, max(0.6, open_), (250, 250, 250))
            oval(x, -3, 1.9, max(0.5, min(1.9, open_)), (25, 25, 25))
            lift, tilt = -10.5 - 3.2 * height, 3.0 * angle
            line([(x - side * 5, lift - tilt), (x + side * 5, lift + tilt)], _shade(self.hair, 0.6), 1.8)
            if nose > 0.15:
                line([(side * 2, 2), (side * 6, 2 + 4 * nose)], _shade(self.skin, 0.5), 2.0 * nose)
        line([(0, 0), (-1.5, 6 - 2 * nose), (1.5, 6 - 2 * nose)], _shade(self.skin, 0.75), 1.2)
        reach, gap = 7.5 + 4 * width, 5.0 * max(0.0, opened)
        steps = np.linspace(-1, 1, 9)
        corner = [(reach * s, 14 + 4.0 * curve * (0.5 - s * s)) for s in steps]
        if gap > 0.5:
            upper = [(cx + k * x, cy + k * (y - gap * math.sqrt(1 - (x / reach) ** 2 + 1e-6))) for x, y in corner]
            lower = [(cx + k * x, cy + k * (y + gap * math.sqrt(1 - (x / reach) ** 2 + 1e-6))) for x, y in corner]
            pen.polygon(upper + lower[::-1], fill=(70, 20, 25))
            pen.line(upper + lower[::-1] + upper[:1], fill=self.lips, width=round(k * 1.4))
        else:
            line(corner, self.lips, 2.0)
        return np.asarray(image.reduce(2))

    def act(self, face: np.ndarray, draw: Random) -> np.ndarray:
        """A clip, [8, 64, 64, 3] uint8: the face goes from a hint to its apex while the head sways."""
        start, phase, sway = draw.uniform(0.4, 0.7), draw.uniform(0, 2 * math.pi), draw.uniform(0.3, 1.2)
        frames = []
        for i in range(FRAMES):
            strength = start + (1 - start) * min(1.0, i / (0.5 * FRAMES))
            turn = phase + 2 * math.pi * i / FRAMES
            frames.append(self.draw(strength * face, (sway * math.sin(turn), 0.5 * sway * math.cos(turn))))
        return np.stack(frames)


def write_clip(frames: np.ndarray, path: Path) -> None:
    """Encode [n, h, w, 3] uint8 frames as H.264 in mp4; equal frames give equal bytes.

    For that, one thread and no look-ahead (`zerolatency`): with it, x264 gave other bytes for a clip in three.
    """
    import av

    settings = {"crf": "18", "preset": "veryfast", "tune": "zerolatency", "threads": "1"}
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=settings)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
