"""The stand-in for VisualGLM's ViT and Q-Former: BLIP-2's classes, taught to tell the geometry of drawn faces."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elmd.tiny.faces import GEOMETRY, SIZE, Actor
from elmd.tiny.standins import Standin, Training, shuffled
from elmd.training.loop import Positions
from elmd.vision.encoder import VisionEncoder, VisionShape

#: Values a face may take while the tower learns, whatever they would express; see `GEOMETRY`.
_RANGES = {"mouth_open": (-0.2, 1.2), "nose": (-0.2, 1.2)}


def any_face(draw: Random) -> np.ndarray:
    """A face of no emotion in particular: each number apart, at rest or anywhere in its range."""
    return np.array(
        [0.0 if draw.random() < 0.25 else draw.uniform(*_RANGES.get(name, (-1.2, 1.2))) for name in GEOMETRY],
        dtype=np.float32,
    )


class Portraits:
    """Frames of new people with any face: `frames` uint8 [N, 64, 64, 3] and their geometry `faces` [N, 7]."""

    def __init__(self, count: int, draw: Random):
        faces = [any_face(draw) for _ in range(count)]
        sway = [(draw.uniform(-1.2, 1.2), draw.uniform(-0.6, 0.6)) for _ in range(count)]
        frames = np.stack([Actor(draw).draw(face, shift) for face, shift in zip(faces, sway, strict=True)])
        self.frames, self.faces = torch.from_numpy(frames), torch.from_numpy(np.stack(faces))


class Reader(nn.Module):
    """Reads geometry off the query outputs [N, o, q]: query i tells number i alone, so each looks at its own part."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(GEOMETRY), width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(GEOMETRY)))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, : len(GEOMETRY)] * self.weight).sum(-1) + self.bias


def train_vision(
    *, hidden: int, training: Training, batch: int = 48, count: int = 4800
) -> tuple[VisionEncoder, dict[str, float]]:
    """A BLIP-2 vision tower and Q-Former with a query per number of `GEOMETRY`, trained to tell that number.

    Args:
        count: of the portraits that it learns from, each about three times.

    Returns:
        the encoder, and `geometry_r2` on people it has not seen, `parameters`.
    """
    torch.manual_seed(training.seed)
    shape = VisionShape(
        vision_config={
            "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": SIZE, "patch_size": 16, "initializer_range": hidden**-0.5,
        },
        qformer_config={
            "vocab_size": 2, "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 2 * hidden, "cross_attention_frequency": 1, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 8, "initializer_range": hidden**-0.5,
        },
        num_query_tokens=len(GEOMETRY) + 1,
    )  # fmt: skip
    encoder = VisionEncoder(shape)
    with torch.no_grad():  # as strong as what the patches hold, or attention finds no place in so few steps
        encoder.vision_model.embeddings.position_embedding.normal_()
    device = training.accelerator.device
    portraits = Portraits(count, Random(f"vision-{training.seed}"))
    geometry = Geometry(encoder.to(device), Reader(hidden).to(device), portraits, batch, training.seed)
    metrics = geometry.train(training, "vision tower")
    return encoder, {**metrics, "parameters": sum(p.numel() for p in encoder.parameters())}


class Geometry(Standin):
    """Learns to read the geometry off a frame; batches are positions in portraits that are drawn once."""

    metric = "geometry_r2"

    def __init__(self, encoder: VisionEncoder, reader: Reader, portraits: Portraits, size: int, seed: int):
        self.encoder, self.reader, self.portraits, self.size, self.seed = encoder, reader, portraits, size, seed
        self.held = Portraits(256, Random(f"vision-held-{seed}"))
        self.modules = {"encoder": encoder, "reader": reader}

    def batches(self, epoch: int) -> list[Positions]:
        return shuffled(len(self.portraits.faces), self.size, Random(f"vision-{self.seed}-{epoch}"))

    def loss(self, batch: Positions) -> tuple[Tensor, int]:
        self.encoder.train()
        at = torch.tensor(batch)
        read = self.reader(self.encoder(self.encoder.pixels(self.portraits.frames[at])))
        return F.mse_loss(read, self.portraits.faces[at].to(read.device)), len(batch)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.encoder.eval()
        read = self.reader(self.encoder(self.encoder.pixels(self.held.frames))).cpu()
        r2 = 1 - ((read - self.held.faces) ** 2).mean(0) / self.held.faces.var(0, unbiased=False)
        return {"geometry_r2": r2.mean().item()}
