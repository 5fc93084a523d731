"""Grouped keys and values on a CPU: what transformers' own attention gives, for fewer bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, GlmConfig, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from elmd.models.adapter import Prefix
from elmd.models.attention import group_on_cpu, sdpa
from elmd.models.llm import load_llm

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "glm": GlmConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=4),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "one group": Qwen2Config(**SIZES, num_key_value_heads=1),
    "not grouped": LlamaConfig(**SIZES, num_key_value_heads=8),
}


class Module(torch.nn.Module):
    num_key_value_groups = 4


def step(llm: Any, prefix: Prefix | None) -> tuple[list[Tensor], int]:
    """Loss, gradients of inputs and prefix, and bytes kept for the backward pass; padding on both sides."""
    torch.manual_seed(1)
    embeddings = torch.randn(3, 20, 64, requires_grad=True)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :6] = mask[1, -3:] = mask[2, 5:9] = False
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    seen = mask if prefix is None else torch.cat([mask.new_ones(3, prefix.length), mask], 1)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = llm(
            inputs_embeds=embeddings, attention_mask=seen.long(), position_ids=positions,
            past_key_values=None if prefix is None else prefix.cache(3),
        ).logits  # fmt: skip
        loss = F.cross_entropy(logits[mask], torch.arange(int(mask.sum())))
    trained = [embeddings, *([] if prefix is None else prefix.parameters())]
    return [loss.detach(), *torch.autograd.grad(loss, trained)], sum(kept.values())


@pytest.mark.parametrize("virtual", [0, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_transformers(name: str, virtual: int) -> None:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").requires_grad_(False).eval()
    prefix = Prefix.create(llm, virtual, 0.0) if virtual else None
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    wanted, before = step(llm, prefix)
    group_on_cpu()
    found, after = step(llm, prefix)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
    assert len(found) == 2 + (virtual > 0)
    # A single group is broadcast and never written out.
    assert after == before if name in ("not grouped", "one group") else after < 0.97 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, rows, 16, dtype=dtype) for heads, rows in ((8, 7), (2, 12), (2, 12)))
    mask = torch.rand(2, 1, 7, 12) < 0.7
    mask[0, :, 2] = False  # padding sees nothing
    found, wanted = (one(Module(), query, key, value, mask, scaling=0.3)[0] for one in (sdpa, sdpa_attention_forward))
    assert found.shape == (2, 7, 8, 16)
    torch.testing.assert_close(found, wanted)


def test_what_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("elmd.models.attention.sdpa_attention_forward", lambda *args, **kwargs: calls.append(args))

    def tensors(device: str, rows: int, groups: int) -> list[Tensor]:
        return [torch.zeros(1, heads, n, 4, device=device) for heads, n in ((4, rows), (groups, 9), (groups, 9))]

    mask = torch.ones(1, 1, 3, 9, dtype=torch.bool)
    sdpa(Module(), *tensors("cpu", 3, 2), mask)
    sdpa(Module(), *tensors("cpu", 3, 2), mask, softcap=None)
    assert not calls
    sdpa(Module(), *tensors("cpu", 3, 2), None)
    sdpa(Module(), *tensors("cpu", 1, 2), mask[:, :, :1])
    sdpa(Module(), *tensors("cpu", 3, 4), mask)
    sdpa(Module(), *tensors("meta", 3, 2), mask.to("meta"))
    sdpa(Module(), *tensors("cpu", 3, 2), mask, softcap=5.0)
    assert len(calls) == 5


def test_a_loaded_model_has_it_and_saves_no_name_of_ours(llm_folder: Path, tmp_path: Path) -> None:
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    llm, _ = load_llm(llm_folder)
    assert AttentionInterface()["sdpa"] is sdpa
    assert llm.config._attn_implementation == "sdpa"
    llm.save_pretrained(tmp_path)
    saved: PretrainedConfig = llm.config
    assert "attn_implementation" not in json.dumps(saved.to_dict()) + (tmp_path / "config.json").read_text()
