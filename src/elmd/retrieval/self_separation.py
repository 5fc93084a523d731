"""Self-separation (§3.3, Algorithm 1) as a module of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers.base.modules import Module
from torch import Tensor, nn

from elmd.errors import CheckpointError, ConfigError


class SelfSeparation(Module):
    """Cuts a sentence vector e_u [B, d] into a stack of s vectors, E_s [B, s, d] (Algorithm 1).

    Slot i is MLP([e_u + c_i ; c_i]), where c_i has ones at positions (i-1)g … ig-1, g = ⌊d/s⌋, and zeros elsewhere
    (the last d - gs positions are 0 in every c_i). The MLP is shared by the slots. Its first layer W = [W₁ W₂] is
    not given the concatenation: W[e + c ; c] + b = W₁e + ((W₁ + W₂)c + b), so that one product with e serves all
    slots. The two forms agree to rounding; this one costs s times less.

    As a module of a SentenceTransformer it stands last: it puts E_s, flattened to [B, s·d], under
    `sentence_embedding`, so that `encode` returns it, and keeps e_u under `e_u`.

    Args:
        width: d.
        slots: s; 4 in §4.3.
        kind: `mlp`: Linear(2d, d), ReLU, Linear(d, d), then a Linear(d, d) (the module of the work that the paper
            cites for it); `linear`: Linear(2d, d) alone ("constructed by a linear layer").

    Raises:
        ConfigError: s is not in 1 … d, or `kind` is unknown.
    """

    config_keys: list[str] = ["width", "slots", "kind"]  # noqa: RUF012 - the base class declares it so

    def __init__(self, width: int, slots: int = 4, kind: str = "mlp"):
        super().__init__()
        if not 1 <= slots <= width:
            raise ConfigError(f"{slots} slots cannot be cut from a width of {width}", fix=f"use 1 to {width} slots")
        if kind not in ("mlp", "linear"):
            raise ConfigError(f"unknown kind of self-separation {kind!r}", fix="use mlp or linear")
        self.width, self.slots, self.kind = width, slots, kind
        self.first = nn.Linear(2 * width, width)
        if kind == "mlp":
            self.rest = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.Linear(width, width))
        else:
            self.rest = nn.Sequential()
        self.augment: Tensor
        self.register_buffer("augment", augment(width, slots), persistent=False)

    def separate(self, e: Tensor) -> Tensor:
        """E_s [B, s, d] of e_u [B, d]."""
        w1, w2 = self.first.weight.split(self.width, dim=1)
        fixed = self.augment @ (w1 + w2).T + self.first.bias  # [s, d]
        return self.rest((e @ w1.T)[:, None, :] + fixed)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        e = features["sentence_embedding"]
        features["e_u"] = e
        features["sentence_embedding"] = self.separate(e).flatten(1)
        return features

    def get_embedding_dimension(self) -> int:
        """Width of what `encode` returns: s·d."""
        return self.slots * self.width

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write `config.json` and `model.safetensors` into the folder `output_path`."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=True)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> SelfSeparation:  # type: ignore[override]
        """The module as `save` wrote it, from a local folder; other arguments that loaders pass are not needed.

        Raises:
            CheckpointError: the folder is incomplete or its tensors are not those of its own configuration.
        """
        folder = Path(model_name_or_path, subfolder)
        if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
            raise CheckpointError(f"{' and '.join(missing)} missing", where=folder, fix="train the retriever again")
        module = cls(**cls.load_config(model_name_or_path, subfolder=subfolder, local_files_only=True))
        try:
            module.load_state_dict(load_file(folder / "model.safetensors"))
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                "the weights do not fit config.json", where=folder, fix="train the retriever again"
            ) from error
        return module


def augment(width: int, slots: int) -> Tensor:
    """The augment vectors c_1 … c_s of Algorithm 1, [s, d]."""
    g = width // slots
    return torch.cat([torch.eye(slots).repeat_interleave(g, dim=1), torch.zeros(slots, width - g * slots)], dim=1)
