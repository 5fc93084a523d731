"""What adapts the frozen language model: a P-Tuning v2 prefix (§3.5), or LoRA as the usual alternative.

PEFT holds the weights (configuration, saving and loading in its adapter format). ELMD runs the base model itself:
PEFT's own forward moves the positions of the prompt by P, the original leaves them at 0, and its `generate` refuses
`inputs_embeds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from elmd.engine.files import read_json
from elmd.errors import CheckpointError


class FixedLayer(DynamicLayer):
    """Keys and values [B, g, P, d] of one layer that no forward changes.

    An ordinary cache grows when a layer runs, so a layer that is run a second time for its gradient (activation
    checkpointing) would see its own tokens twice.
    """

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def fixed(cache: DynamicCache) -> DynamicCache:
    """The same keys and values in layers that stay as they are."""
    copy = DynamicCache()
    copy.layers = []
    layer: Any
    for layer in cache.layers:
        same: Any = FixedLayer()
        same.lazy_initialization(layer.keys, layer.values)
        same.keys, same.values = layer.keys, layer.values
        copy.layers.append(same)
    return copy


class Prefix(nn.Module):
    """P virtual tokens that every layer sees before the prompt: a table [P, layers, 2, KV heads g, head width d].

    Kept in float32. The base model is shared, not owned: it is no submodule, so what trains here is the table alone.
    """

    peft: Any
    table: Any

    def __init__(self, peft: PeftModel, dropout: float = 0.0):
        super().__init__()
        self.table = peft.prompt_encoder[peft.active_adapter].float()
        self.dropout = dropout
        object.__setattr__(self, "peft", peft)

    @classmethod
    def create(cls, llm: PreTrainedModel, length: int, dropout: float) -> Prefix:
        """A new table without reparametrisation, drawn from N(0, 1) as in the original."""
        layers, heads, numbers = prefix_shape(llm.config)
        config = PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length, prefix_projection=False,
            num_layers=layers, num_attention_heads=heads, token_dim=numbers,
        )  # fmt: skip
        return cls(get_peft_model(llm, config), dropout)

    def save(self, folder: Path) -> None:
        """Write the table in PEFT's adapter format (safetensors)."""
        self.peft.save_pretrained(str(folder), safe_serialization=True)

    @property
    def length(self) -> int:
        """P."""
        return self.peft.active_peft_config.num_virtual_tokens

    def cache(self, rows: int) -> DynamicCache:
        """A fresh cache of `rows` copies, with gradient; a model's forward changes the cache that it is given."""
        cache: DynamicCache = self.peft.get_prompt(rows)
        if self.training and self.dropout:
            layer: Any
            for layer in cache.layers:
                layer.keys, layer.values = F.dropout(layer.keys, self.dropout), F.dropout(layer.values, self.dropout)
        return cache


class Lora(nn.Module):
    """Low-rank updates of every linear layer of the decoder, float32; they live inside the base model's layers.

    Not in the paper: what other work adapts a language model with, at the same place in the chain.
    """

    peft: Any
    length = 0

    def __init__(self, peft: PeftModel):
        super().__init__()
        # The base model's own parameters and modules under a second name, so that they train and are saved apart.
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): p for name, p in peft.named_parameters() if p.requires_grad}
        )
        self.dropouts = nn.ModuleList(m for name, m in peft.named_modules() if name.endswith("lora_dropout.default"))
        object.__setattr__(self, "peft", peft)

    @classmethod
    def create(cls, llm: PreTrainedModel, rank: int, alpha: int, dropout: float) -> Lora:
        """New updates, which begin at zero; `llm` is changed in place."""
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"
        )
        return cls(get_peft_model(llm, config))

    def save(self, folder: Path) -> None:
        """Write the updates in PEFT's adapter format (safetensors)."""
        self.peft.save_pretrained(str(folder), safe_serialization=True)

    @property
    def rank(self) -> int:
        rank: int = self.peft.active_peft_config.r
        return rank

    def cache(self, rows: int) -> None:
        """No virtual tokens."""


Adapter = Prefix | Lora


def prefix_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, KV heads g, and g·d of a language model's prefix."""
    shape = config.get_text_config(decoder=True)
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return shape.num_hidden_layers, heads, heads * width


def check_prefix(saved: Mapping[str, Any], config: PreTrainedConfig, folder: Path) -> tuple[int, int, int]:
    """Layers, KV heads and numbers of a saved prefix, which must be those of this language model.

    Args:
        saved: its adapter_config.json.

    Raises:
        CheckpointError: the language model has others.
    """
    shape, needed = (saved["num_layers"], saved["num_attention_heads"], saved["token_dim"]), prefix_shape(config)
    if shape != needed:
        raise CheckpointError(
            f"is a prefix of {shape[0]} layers, {shape[1]} KV heads and {shape[2]} numbers, "
            f"this language model has {needed[0]}, {needed[1]} and {needed[2]}",
            where=folder,
            fix="use the model that it was trained with",
        )
    return needed


def load_adapter(llm: PreTrainedModel, folder: Path, *, trainable: bool = False, dropout: float = 0.0) -> Adapter:
    """An adapter in PEFT's format.

    Args:
        trainable: to train further, not only to use.
        dropout: of a prefix, while it trains.

    Raises:
        CheckpointError: the folder holds no prefix and no LoRA for this model.
    """
    try:
        saved = read_json(folder / "adapter_config.json")
        if saved["peft_type"] == "LORA":
            return Lora(PeftModel.from_pretrained(llm, str(folder), is_trainable=trainable))
        if saved["peft_type"] != "PREFIX_TUNING":
            raise ValueError(saved["peft_type"])
        check_prefix(saved, llm.config, folder)
        prefix = Prefix(PeftModel.from_pretrained(llm, str(folder)))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            "holds no adapter for this language model", where=folder, fix="train it with this llm (stage=eerg)"
        ) from error
    if not trainable:
        return prefix
    copy = Prefix.create(llm, prefix.length, dropout)  # PEFT gives a loaded prefix for use only
    with torch.no_grad():
        copy.table.embedding.weight.copy_(prefix.table.embedding.weight)
    return copy
