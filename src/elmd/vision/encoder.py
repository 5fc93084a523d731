"""The visual encoder of eq. 5: BLIP-2's ViT and Q-Former, from a folder of weights.

VisualGLM's image encoder is the same network (its ViT's last LayerNorm has another epsilon, a value of the config).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elmd.engine.files import atomic, write_json
from elmd.errors import CheckpointError
from elmd.vision.weights import (
    CONFIG,
    WEIGHTS,
    fetch,
    fingerprint,
    read_json,
    read_preprocessor,
    read_weights,
    shape_fields,
)

#: Mean and standard deviation of CLIP's training images, which BLIP-2 and VisualGLM normalise with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class VisionShape:
    """`config.json` of a vision checkpoint.

    Attributes:
        vision_config: fields of transformers' Blip2VisionConfig; a field left out has BLIP-2's own value.
        qformer_config: fields of transformers' Blip2QFormerConfig.
        num_query_tokens: o.
        image_mean, image_std: of the normalisation, per channel.
        post_layernorm_eps: epsilon of the ViT's last LayerNorm; None: that of its other ones. VisualGLM: 1e-5.
    """

    vision_config: dict[str, Any] = field(default_factory=dict)
    qformer_config: dict[str, Any] = field(default_factory=dict)
    num_query_tokens: int = 32
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD
    post_layernorm_eps: float | None = None

    def save(self, folder: Path) -> None:
        """Write `config.json`."""
        config = {key: value for key, value in asdict(self).items() if value is not None}
        write_json(folder / CONFIG, config)


class VisionEncoder(nn.Module):
    """Frames -> X[m, o, q] (eq. 5). All ViT tokens go to the Q-Former; its pooler is not used.

    The ViT runs in the dtype it is loaded in; the Q-Former and the query tokens stay in float32, as in transformers.
    """

    def __init__(self, shape: VisionShape):
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

        vision = Blip2VisionConfig(**shape_fields(shape.vision_config))
        fixed = {"encoder_hidden_size": vision.hidden_size, "use_qformer_text_input": False}
        qformer = Blip2QFormerConfig(**{**shape_fields(shape.qformer_config), **fixed})
        self.shape = shape
        self.vision_model = Blip2VisionModel(vision)
        if shape.post_layernorm_eps is not None:
            self.vision_model.post_layernorm.eps = shape.post_layernorm_eps
        self.qformer = Blip2QFormerModel(qformer)
        # Random, not transformers' zeros: equal query tokens would stay equal through training.
        self.query_tokens = nn.Parameter(torch.randn(1, shape.num_query_tokens, qformer.hidden_size) * 0.02)
        self.eval()

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        size = self.vision_model.config.image_size
        assert isinstance(size, int)
        return size

    @property
    def tokens(self) -> int:
        """o, query tokens per frame."""
        return self.query_tokens.shape[1]

    @property
    def width(self) -> int:
        """q."""
        return self.query_tokens.shape[2]

    def pixels(self, frames: Tensor) -> Tensor:
        """Squashed frames, uint8 [N, H, W, 3] -> normalised pixels, float32 [N, 3, H, W], on the encoder's device."""
        return normalised(frames.to(self.query_tokens.device), self.shape.image_mean, self.shape.image_std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, H, W] -> query outputs [N, o, q], float32."""
        patches = self.vision_model(pixel_values=pixels).last_hidden_state  # [N, 1 + patches, ViT's width]
        queries = self.query_tokens.expand(len(pixels), -1, -1)  # [N, o, q]
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and every weight, as they are loaded."""
        return fingerprint(self, asdict(self.shape))

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (names of transformers' Blip2Model)."""
        from safetensors.torch import save_file

        with atomic(folder / WEIGHTS) as new:
            save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, new, {"format": "pt"})
        self.shape.save(folder)

    @classmethod
    def empty(cls, shape: VisionShape, where: Path) -> VisionEncoder:
        """An encoder on the meta device: names and shapes without numbers.

        Args:
            where: the file that describes the shape, for the message.

        Raises:
            CheckpointError: there is no such encoder.
        """
        from huggingface_hub.errors import StrictDataclassError

        try:
            with torch.device("meta"):
                return cls(shape)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError, StrictDataclassError) as error:
            cause = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise CheckpointError(
                f"describes no BLIP-2 encoder ({cause})", where=where, fix="get the file again, as it was published"
            ) from error

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> VisionEncoder:
        """The encoder in a folder of ours or of a public BLIP-2 model (sharded or not), frozen and in eval().

        A BLIP-2 folder's language model is neither read nor needed; its mean and std are taken from
        `preprocessor_config.json`.

        Args:
            path: a folder, or a hub id (`Salesforce/blip2-opt-2.7b`): of such a repository only the configuration and
                the files that hold the encoder's weights are downloaded, once.
            dtype: of the ViT.

        Raises:
            CheckpointError: a file or a weight is missing, or has another shape than `config.json` says; or the hub
                does not give the files.
        """
        folder = fetch(path)
        shape = _read_shape(folder)
        encoder = cls.empty(shape, folder / CONFIG)
        weights = read_weights(folder, dtype, device)
        wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
        if missing := sorted(wanted.keys() - weights.keys()):
            raise CheckpointError(
                f"lacks {len(missing)} of the encoder's {len(wanted)} weights, the first is {missing[0]}",
                where=folder,
                fix="use a folder written by ELMD or a BLIP-2 model in safetensors format",
            )
        for name, size in wanted.items():
            if tuple(weights[name].shape) != size:
                raise CheckpointError(
                    f"{name} is {list(weights[name].shape)}, but config.json makes it {list(size)}",
                    where=folder,
                    fix="check that config.json and the weights belong together",
                )
        encoder.load_state_dict({name: weights[name] for name in wanted}, assign=True)
        return encoder.requires_grad_(False).eval()


def normalised(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] on the frames' device."""
    mean_of, std_of = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (mean, std))
    return (frames.permute(0, 3, 1, 2).float() / 255 - mean_of) / std_of


def _read_shape(folder: Path) -> VisionShape:
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("vision_config"), dict) or not isinstance(config.get("qformer_config"), dict):
        raise CheckpointError(
            "has no vision_config and qformer_config",
            where=folder / CONFIG,
            fix="give a BLIP-2 model's folder as it is, or convert VisualGLM's with scripts/convert_visualglm.py",
        )
    normal = {**read_preprocessor(folder), **config}
    return VisionShape(
        vision_config=config["vision_config"],
        qformer_config=config["qformer_config"],
        num_query_tokens=config.get("num_query_tokens", 32),
        image_mean=normal.get("image_mean", CLIP_MEAN),
        image_std=normal.get("image_std", CLIP_STD),
        post_layernorm_eps=config.get("post_layernorm_eps"),
    )
