"""A ResNet's vector of each frame, which the baseline Livebot reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elmd.errors import CheckpointError, reason
from elmd.vision.encoder import normalised
from elmd.vision.weights import CONFIG, WEIGHTS, fetch, fingerprint, read_json, read_preprocessor, shape_fields

#: Mean and standard deviation of ImageNet, which ResNets are trained on, and the side of their input in pixels.
IMAGENET_MEAN, IMAGENET_STD, IMAGENET_SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224


class ResNetEncoder(nn.Module):
    """Frames -> a vector each: a frozen ResNet, averaged over the picture (Livebot's features, Ma et al. 2019).

    Frames are squashed to a square as for eq. 5 (ours), so that nothing at the sides is cut off.
    """

    image_size = IMAGENET_SIZE

    def __init__(self, resnet: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.resnet, self.mean, self.std = resnet, mean, std
        self.requires_grad_(False).eval()

    def pixels(self, frames: Tensor) -> Tensor:
        """As `VisionEncoder.pixels`."""
        return normalised(frames.to(self.resnet.device), self.mean, self.std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, H, W] -> vectors [N, q], float32."""
        return self.resnet(pixels.to(self.resnet.dtype)).pooler_output.flatten(1).float()

    def fingerprint(self) -> str:
        """As `VisionEncoder.fingerprint`."""
        config = self.resnet.config
        form = [config.layer_type, config.hidden_act, config.downsample_in_first_stage, config.downsample_in_bottleneck]
        return fingerprint(self, [list(self.mean), list(self.std), *form])

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> ResNetEncoder:
        """The ResNet in a folder of transformers' (with or without a classifier), or of a hub id, frozen.

        Raises:
            CheckpointError: it is no ResNet, a file or a weight is missing, or the hub does not give the files.
        """
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import ResNetConfig, ResNetModel

        folder = fetch(path)
        config = read_json(folder / CONFIG)
        if config.get("model_type") != "resnet":
            raise CheckpointError(
                f"is no ResNet but {config.get('model_type', 'nothing that transformers knows')!r}",
                where=folder / CONFIG,
                fix="give a folder or hub id such as microsoft/resnet-18",
            )
        try:
            resnet: Any = ResNetModel(ResNetConfig(**shape_fields(config)))
            weights = {key.removeprefix("resnet."): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
            # num_batches_tracked is for training alone, and not every file has it.
            wanted = {key for key in resnet.state_dict() if not key.endswith("num_batches_tracked")}
            if missing := sorted(wanted - weights.keys()):
                raise ValueError(f"it lacks {len(missing)} weights, the first is {missing[0]}")
            resnet.load_state_dict({key: weights[key] for key in wanted}, strict=False)
        except (OSError, SafetensorError, StrictDataclassError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot be read as a ResNet ({reason(error)})",
                where=folder,
                fix="get it again, in safetensors format",
            ) from error
        preprocessor = read_preprocessor(folder)
        mean, std = preprocessor.get("image_mean", IMAGENET_MEAN), preprocessor.get("image_std", IMAGENET_STD)
        return cls(resnet.to(device=device, dtype=dtype), mean, std)
