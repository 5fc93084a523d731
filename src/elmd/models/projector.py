"""The visual projector, eq. 9: E_v = Linear(V_c)."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elmd.errors import CheckpointError


class Projector(nn.Module):
    """One linear layer from the vision width q to the language model's hidden size H, kept in float32."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear = nn.Linear(width, hidden)

    def forward(self, visual: Tensor) -> Tensor:
        """[…, q] -> […, H]"""
        return self.linear(visual.to(self.linear.weight.dtype))

    def save(self, path: Path) -> None:
        save_file({key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path) -> Projector:
        """A projector with the sizes of the file.

        Raises:
            CheckpointError: the file is no projector.
        """
        try:
            saved = load_file(path)
            hidden, width = saved["linear.weight"].shape
            projector = cls(width, hidden)
            projector.load_state_dict(saved)
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                "is no visual projector", where=path, fix="give the file of one (stage=rep makes it)"
            ) from error
        return projector
