"""ELMD's own forward, prefix and generation against tensors of ChatGLM2's original code, where those are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from elmd.data.collate import IGNORED, Batch
from elmd.models.elmd import Elmd
from elmd.models.inference import greedy
from elmd.models.llm import freeze
from elmd.models.prefix import Prefix

RENAMED = {
    "transformer.": "", "encoder.final_layernorm": "model.norm", "encoder.": "model.", "output_layer": "lm_head",
    "embedding.word_embeddings": "model.embed_tokens", "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden/chatglm2/golden.safetensors")


@pytest.fixture(scope="module")
def llm(shared: Path) -> GlmForCausalLM:
    folder = shared / "golden/chatglm2"
    config = json.loads((folder / "config.json").read_text())
    heads, groups, width = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=config["padded_vocab_size"], hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"], num_hidden_layers=config["num_layers"],
            num_attention_heads=heads, num_key_value_heads=groups, head_dim=width, attention_bias=True,
            rms_norm_eps=config["layernorm_epsilon"], tie_word_embeddings=False, pad_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            for letter, part in zip("qkv", value.split([heads * width, groups * width, groups * width]), strict=True):
                weights[name.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")] = part
        elif "rotary" not in name:
            weights[name] = value
    model.load_state_dict(weights)
    return freeze(model)


@pytest.fixture
def elmd(llm: GlmForCausalLM, shared: Path) -> Elmd:
    (table,) = load_file(shared / "golden/chatglm2/prefix_encoder.safetensors").values()
    prefix = Prefix.create(llm, len(table), dropout=0.0)
    with torch.no_grad():
        prefix.table.embedding.weight.copy_(table)
    return Elmd(llm, None, prefix).eval()


def batch(ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Batch:
    mask = torch.ones_like(ids) if mask is None else mask
    labels = torch.full_like(ids, IGNORED) if labels is None else labels
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(ids, torch.zeros_like(ids).bool(), mask.bool(), positions, labels, None, ids.shape[1] - 1)


@pytest.mark.parametrize("prefixed", [False, True])
def test_logits(llm, elmd: Elmd, golden: dict[str, Tensor], prefixed: bool) -> None:
    model, name = (elmd, "prefix.") if prefixed else (Elmd(llm), "")
    whole = model(batch(golden["full.input_ids"]), keep=14).logits
    assert (whole - golden[f"{name}full.logits"]).abs().max() < 3e-5
    mask = golden["pad.attention_mask"]
    padded = model(batch(golden["pad.input_ids"], mask), keep=14).logits
    difference = (padded - golden[f"{name}pad.logits"]).abs().amax(-1)
    assert difference[mask.bool()].max() < 3e-5, "left padding, real tokens"


def test_loss_and_gradient_of_the_prefix(elmd: Elmd, golden: dict[str, Tensor]) -> None:
    labels = golden["full.labels"].clone()
    counted = (labels[:, 1:] != IGNORED).sum()
    labels[:, 0] = IGNORED  # the first token has nothing before it that would tell it
    loss = elmd.loss(batch(golden["full.input_ids"], labels=labels)).sum() / counted
    assert loss.item() == pytest.approx(golden["prefix.full.loss"].item(), abs=3e-5)
    loss.backward()
    gradient = elmd.prefix.table.embedding.weight.grad
    assert (gradient - golden["prefix.full.grad"]).abs().max() < 3e-5


@pytest.mark.parametrize("prefixed", [False, True])
def test_greedy_ids(llm, elmd: Elmd, golden: dict[str, Tensor], prefixed: bool) -> None:
    model, name = (elmd, "prefix.") if prefixed else (Elmd(llm), "")
    for case, prompt in (
        ("gen1", batch(golden["gen1.input_ids"])),
        ("genpad", batch(golden["pad.input_ids"], golden["pad.attention_mask"])),
    ):
        sequences = golden[f"{name}{case}.sequences"][:, 14:].tolist()
        expected = [row[: row.index(2)] if 2 in row else row for row in sequences]
        assert model.generate(prompt, greedy, eos=2, max_new_tokens=16) == expected
