"""Livebot's ResNet: a vector for each frame, equal to the public model's; folders that hold none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from elmd.errors import CheckpointError
from elmd.vision.resnet import ResNetEncoder
from encoders import tiny, write_resnet


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    return write_resnet(tmp_path / "resnet")


def test_a_vector_for_each_frame_is_the_public_model_s(resnet: Path) -> None:
    from transformers import ResNetForImageClassification

    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8))
    encoder = ResNetEncoder.load(resnet)
    public = ResNetForImageClassification.from_pretrained(resnet).eval()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.229, 0.224, 0.225])  # the folder's; ImageNet's
    with torch.no_grad():
        vectors = encoder(encoder.pixels(frames))
        expected = public.resnet(((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2)).last_hidden_state
    assert vectors.shape == (3, 6)
    torch.testing.assert_close(vectors, expected.mean((2, 3)))
    assert not torch.allclose(vectors[0], vectors[1])


def test_folders_that_hold_no_resnet(tmp_path: Path, resnet: Path) -> None:
    tiny().save(tmp_path / "vision")
    with pytest.raises(CheckpointError, match=r"vision/config\.json: is no ResNet but .*such as microsoft/resnet-18"):
        ResNetEncoder.load(tmp_path / "vision")
    with pytest.raises(CheckpointError, match=r"none/config\.json: is missing; .*resnet"):
        ResNetEncoder.load(tmp_path / "none")
    weights = load_file(resnet / "model.safetensors")
    first = next(name for name in sorted(weights) if "running_mean" in name)
    save_file({k: v for k, v in weights.items() if k != first}, resnet / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"cannot be read as a ResNet \(it lacks 1 weights, the first is .*running_mean"
    ):
        ResNetEncoder.load(resnet)
    (resnet / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"resnet: cannot be read as a ResNet \("):
        ResNetEncoder.load(resnet)
