"""P-Tuning v2: a table of keys and values that every layer sees before the prompt (§3.5).

PEFT holds the table (its configuration, saving and loading in the adapter format). ELMD runs the base model itself:
PEFT's own forward moves the positions of the prompt by P, the original leaves them at 0, and its `generate` refuses
`inputs_embeds`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from elmd.errors import CheckpointError


class Prefix(nn.Module):
    """P virtual tokens: a table [P, layers, 2, KV heads, head width], float32.

    The base model is shared, not owned: it is no submodule, so what trains here is the table alone.
    """

    peft: Any

    def __init__(self, peft: PeftModel, dropout: float = 0.0):
        super().__init__()
        self.table = peft.prompt_encoder[peft.active_adapter].float()
        self.dropout = dropout
        object.__setattr__(self, "peft", peft)

    @classmethod
    def create(cls, llm: PreTrainedModel, length: int, dropout: float) -> Prefix:
        """A new table without reparametrisation, drawn from N(0, 1) as in the original."""
        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length, prefix_projection=False)
        return cls(get_peft_model(llm, config), dropout)

    @classmethod
    def load(cls, llm: PreTrainedModel, folder: Path) -> Prefix:
        """A table saved by `save`, for use without training.

        Raises:
            CheckpointError: the folder holds no adapter for this model.
        """
        try:
            return cls(PeftModel.from_pretrained(llm, str(folder)))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                "holds no prefix for this language model", where=folder, fix="train it with this llm (stage=eerg)"
            ) from error

    def save(self, folder: Path) -> None:
        """Write the table in PEFT's adapter format (safetensors)."""
        self.peft.save_pretrained(str(folder), safe_serialization=True)

    @property
    def length(self) -> int:
        return self.peft.active_peft_config.num_virtual_tokens

    def cache(self, rows: int) -> DynamicCache:
        """A fresh cache of `rows` copies; a model's forward changes the cache that it is given."""
        cache: DynamicCache = self.peft.get_prompt(rows)
        if self.training and self.dropout:
            layer: Any
            for layer in cache.layers:
                layer.keys, layer.values = F.dropout(layer.keys, self.dropout), F.dropout(layer.values, self.dropout)
        return cache
