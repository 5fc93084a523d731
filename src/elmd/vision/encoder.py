"""The visual encoder of eq. 5: BLIP-2's ViT and Q-Former, from a folder of weights; and the pooling of eq. 6-8.

VisualGLM's image encoder is the same network (its ViT's last LayerNorm has another epsilon, a value of the config).
Beside it a ResNet, whose vectors of frames the baseline Livebot reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elmd.engine.hub import is_hub_id, snapshot, unfetched
from elmd.errors import CheckpointError, reason

#: Mean and standard deviation of CLIP's training images, which BLIP-2 and VisualGLM normalise with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: The same of ImageNet's, which ResNets are trained on, and the side of their input.
IMAGENET_MEAN, IMAGENET_STD, IMAGENET_SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PARTS = ("vision_model.", "qformer.", "query_tokens")


@dataclass
class VisionShape:
    """`config.json` of a vision checkpoint.

    Attributes:
        vision_config: fields of transformers' Blip2VisionConfig; what is left out has BLIP-2's own value.
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
        new = folder / f"{_CONFIG}.tmp"
        new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        new.replace(folder / _CONFIG)


class VisionEncoder(nn.Module):
    """Frames -> X[m, o, q] (eq. 5). All ViT tokens go to the Q-Former; its pooler is not used.

    The ViT runs in the dtype it is loaded in; the Q-Former and the query tokens stay in float32, as in transformers.
    """

    def __init__(self, shape: VisionShape):
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

        vision = Blip2VisionConfig(**_fields(shape.vision_config))
        fixed = {"encoder_hidden_size": vision.hidden_size, "use_qformer_text_input": False}
        qformer = Blip2QFormerConfig(**{**_fields(shape.qformer_config), **fixed})
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
        return _normalised(frames.to(self.query_tokens.device), self.shape.image_mean, self.shape.image_std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, H, W] -> query outputs [N, o, q], float32."""
        seen = self.vision_model(pixel_values=pixels).last_hidden_state
        queries = self.query_tokens.expand(len(pixels), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and every weight, as they are loaded."""
        return _fingerprint(self, asdict(self.shape))

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (names of transformers' Blip2Model)."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{_WEIGHTS}.tmp"
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, new, {"format": "pt"})
        new.replace(folder / _WEIGHTS)
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
            reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise CheckpointError(
                f"describes no BLIP-2 encoder ({reason})", where=where, fix="get the file again, as it was published"
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
        folder = _fetch(path)
        shape = _read_shape(folder)
        encoder = cls.empty(shape, folder / _CONFIG)
        weights = _read_weights(folder, dtype, device)
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


class FrameEncoder(nn.Module):
    """Frames -> one vector each: a frozen ResNet, averaged over the picture (Livebot's features, Ma et al. 2019).

    Frames are squashed to a square as for eq. 5 (ours), so that nothing at the sides is cut off.
    """

    image_size = IMAGENET_SIZE

    def __init__(self, resnet: Any, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.resnet, self.mean, self.std = resnet, mean, std
        self.requires_grad_(False).eval()

    def pixels(self, frames: Tensor) -> Tensor:
        """As `VisionEncoder.pixels`."""
        return _normalised(frames.to(self.resnet.device), self.mean, self.std)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, H, W] -> vectors [N, q], float32."""
        return self.resnet(pixels.to(self.resnet.dtype)).pooler_output.flatten(1).float()

    def fingerprint(self) -> str:
        """As `VisionEncoder.fingerprint`."""
        config = self.resnet.config
        form = [config.layer_type, config.hidden_act, config.downsample_in_first_stage, config.downsample_in_bottleneck]
        return _fingerprint(self, [list(self.mean), list(self.std), *form])

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> FrameEncoder:
        """The ResNet in a folder of transformers' (with or without a classifier), or of a hub id, frozen.

        Raises:
            CheckpointError: it is no ResNet, a file or a weight is missing, or the hub does not give the files.
        """
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import ResNetConfig, ResNetModel

        folder = _fetch(path)
        config = _read_json(folder / _CONFIG)
        if config.get("model_type") != "resnet":
            raise CheckpointError(
                f"is no ResNet but {config.get('model_type', 'nothing that transformers knows')!r}",
                where=folder / _CONFIG,
                fix="give a folder or hub id such as microsoft/resnet-18",
            )
        try:
            resnet: Any = ResNetModel(ResNetConfig(**_fields(config)))
            found = {key.removeprefix("resnet."): tensor for key, tensor in load_file(folder / _WEIGHTS).items()}
            # The count of batches seen is for training alone, and not every file has it.
            wanted = {key for key in resnet.state_dict() if not key.endswith("num_batches_tracked")}
            if missing := sorted(wanted - found.keys()):
                raise ValueError(f"it lacks {len(missing)} weights, the first is {missing[0]}")
            resnet.load_state_dict({key: found[key] for key in wanted}, strict=False)
        except (OSError, SafetensorError, StrictDataclassError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot be read as a ResNet ({reason(error)})",
                where=folder,
                fix="get it again, in safetensors format",
            ) from error
        preprocessor = folder / _PREPROCESSOR
        normal = _read_json(preprocessor) if preprocessor.is_file() else {}
        mean, std = normal.get("image_mean", IMAGENET_MEAN), normal.get("image_std", IMAGENET_STD)
        return cls(resnet.to(device=device, dtype=dtype), mean, std)


def pool(x: Tensor) -> Tensor:
    """V_c = [V_t ; V_s] (eq. 6-8): X [m, o, q] -> [o + m, q].

    V_t [o, q] is the mean over frames, V_s [m, q] the mean over query tokens; temporal first, no padding.
    """
    return torch.cat([x.mean(dim=0), x.mean(dim=1)])


def _normalised(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] on the frames' device."""
    middle, spread = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (mean, std))
    return (frames.permute(0, 3, 1, 2).float() / 255 - middle) / spread


def _fingerprint(encoder: nn.Module, about: Any) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    """Fields that shape the network: a public config.json also holds its dtype, its name and the like."""
    drop = {"model_type", "dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path"}
    return {key: value for key, value in config.items() if key not in drop}


def _fetch(path: str | Path) -> Path:
    """The folder itself, or a hub id's snapshot in the hub's cache, with what the encoder needs of it."""
    folder, name = Path(path), str(path)
    if not is_hub_id(name):
        return folder
    few = [_CONFIG, _PREPROCESSOR, _INDEX]
    fix = "check vision.path (of a ResNet: baseline.resnet) and the connection, or download it and give its folder"
    shards = _shards(snapshot(name, few, fix))
    folder = snapshot(name, [*few, *shards], fix)
    # Without a connection the hub's client may answer with what an interrupted download left.
    if lacking := [file for file in (_CONFIG, *shards) if not (folder / file).is_file()]:
        raise unfetched(name, f"it lacks {lacking[0]}", fix)
    return folder


def _read_shape(folder: Path) -> VisionShape:
    config = _read_json(folder / _CONFIG)
    if not isinstance(config.get("vision_config"), dict) or not isinstance(config.get("qformer_config"), dict):
        raise CheckpointError(
            "has no vision_config and qformer_config",
            where=folder / _CONFIG,
            fix="give a BLIP-2 model's folder as it is, or convert VisualGLM's with scripts/convert_visualglm.py",
        )
    preprocessor = folder / _PREPROCESSOR
    normal = {**(_read_json(preprocessor) if preprocessor.is_file() else {}), **config}
    return VisionShape(
        vision_config=config["vision_config"],
        qformer_config=config["qformer_config"],
        num_query_tokens=config.get("num_query_tokens", 32),
        image_mean=normal.get("image_mean", CLIP_MEAN),
        image_std=normal.get("image_std", CLIP_STD),
        post_layernorm_eps=config.get("post_layernorm_eps"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            "the vision checkpoint lacks this file",
            where=path,
            fix="check vision.path in the configuration (of a ResNet: baseline.resnet)",
        ) from error
    except ValueError as error:
        raise CheckpointError(f"is not JSON ({error})", where=path, fix="get the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=path, fix="get the file again")
    return value


def _shards(folder: Path) -> list[str]:
    """The files that hold the encoder's weights, by the index where there is one."""
    index = folder / _INDEX
    if not index.is_file():
        return [_WEIGHTS]
    shards: dict[str, str] = _read_json(index).get("weight_map", {})
    return sorted({shard for name, shard in shards.items() if name.startswith(_PARTS)})


def _read_weights(folder: Path, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """The towers' tensors alone, each cast as it is read, so that no second copy of the model is held."""
    from safetensors import SafetensorError, safe_open

    weights: dict[str, Tensor] = {}
    for name in _shards(folder):
        try:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    if key.startswith(_PARTS):
                        kept = dtype if key.startswith("vision_model.") else torch.float32
                        weights[key] = file.get_tensor(key).to(device=device, dtype=kept)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot be read ({error})", where=folder / name, fix="get the file again, in safetensors format"
            ) from error
    return weights
