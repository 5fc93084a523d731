"""ChatGLM2 in plain tensor arithmetic, and random checkpoints in its original layout: what the converter is held to.

`logits` is written from the architecture alone and shares nothing with transformers; test_golden.py holds it to
the tensors of the original code.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from elmd.convert.tokenizer import CONTROL, train_pieces

#: Settings of a config.json of the original that all checkpoints share.
FIXED = {
    "_name_or_path": "random", "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False,
    "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "layernorm_epsilon": 1e-5, "multi_query_attention": True,
    "original_rope": True, "post_layer_norm": True, "rmsnorm": True, "seq_length": 512, "use_cache": True,
    "transformers_version": "4.27.1", "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

PTUNING = "ptuning"


def logits(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    prefix: Tensor | None = None,
    angles: torch.dtype = torch.float32,
) -> Tensor:
    """Logits [B, L, vocabulary] in float32 from weights in the original's layout.

    Args:
        ids: [B, L].
        mask: [B, L], what is no padding.
        positions: [B, L]; 0, 1, 2 … if None.
        prefix: the table [P, layers · 2 · KV heads · head width]; every token sees it, it has no positions.
        angles: dtype in which rotary angles are computed; the original takes the model's own.
    """
    w = {name.removeprefix("transformer."): value.float() for name, value in weights.items()}
    heads, groups, width = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    rows, length = ids.shape
    mask = torch.ones_like(ids) if mask is None else mask
    positions = torch.arange(length).expand(rows, -1) if positions is None else positions
    seen = torch.ones(length, length).tril().bool() & mask.bool()[:, None, :]  # [B, L, L]

    half = width // 2  # the first half of each head turns, neighbours in pairs; the second half stays
    speed = 1 / 10000 ** (torch.arange(0, half, 2).to(angles) / half)
    angle = (positions[..., None].to(angles) * speed).float()
    turns = torch.polar(torch.ones_like(angle), angle)[:, :, None, :]  # [B, L, 1, half / 2]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x[..., :half].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([torch.view_as_real(pairs * turns).flatten(-2), x[..., half:]], -1)

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return scale * x / (x.square().mean(-1, keepdim=True) + config["layernorm_epsilon"]).sqrt()

    if prefix is not None:
        virtual = prefix.float().view(-1, config["num_layers"], 2, groups, width)
        seen = torch.cat([torch.ones(rows, length, len(prefix), dtype=torch.bool), seen], -1)

    x = w["embedding.word_embeddings.weight"][ids]
    for i in range(config["num_layers"]):
        at = f"encoder.layers.{i}."
        h = norm(x, w[at + "input_layernorm.weight"])
        qkv = h @ w[at + "self_attention.query_key_value.weight"].T + w[at + "self_attention.query_key_value.bias"]
        q, k, v = (
            part.unflatten(-1, (-1, width)) for part in qkv.split([n * width for n in (heads, groups, groups)], -1)
        )
        q, k = turned(q), turned(k)
        if prefix is not None:
            k = torch.cat([virtual[:, i, 0].expand(rows, -1, -1, -1), k], 1)
            v = torch.cat([virtual[:, i, 1].expand(rows, -1, -1, -1), v], 1)
        q = q.unflatten(2, (groups, heads // groups))  # neighbouring heads share keys and values
        scores = torch.einsum("blgnd,bmgd->bgnlm", q, k) / math.sqrt(width)
        scores = scores.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
        mixed = torch.einsum("bgnlm,bmgd->blgnd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ w[at + "self_attention.dense.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = (h @ w[at + "mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w[at + "mlp.dense_4h_to_h.weight"].T
    return norm(x, w["encoder.final_layernorm.weight"]) @ w["output_layer.weight"].T


def random_checkpoint(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    ffn: int = 96,
    pieces: int = 400,
    rows: int | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    format: str = "safetensors",
    prefix: int | None = None,
    projected: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write a checkpoint of random weights as ChatGLM2's own code and repository have it: weights in one or more
    shards with their index, config.json and a trained tokenizer.model.

    Args:
        pieces: of the tokenizer; 5 control ids come on top.
        rows: of the embedding; as many as ids, rounded up to a multiple of 8, if None.
        format: `safetensors` or `bin`.
        prefix: virtual tokens of a P-Tuning v2 prefix, written to `ptuning/pytorch_model.bin` in the folder.
        projected: whether the prefix goes through a network.

    Returns:
        configuration and weights, those of the prefix too.
    """
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    rows = rows or -(-(pieces + len(CONTROL)) // 8) * 8
    config = FIXED | {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "multi_query_group_num": groups,
        "kv_channels": width, "ffn_hidden_size": ffn, "padded_vocab_size": rows,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip

    def matrix(out: int, into: int) -> Tensor:
        return torch.empty(out, into, dtype=dtype).normal_(0, into**-0.5, generator=draw)

    def scale() -> Tensor:
        return torch.empty(hidden, dtype=dtype).normal_(1, 0.1, generator=draw)

    weights = {
        "embedding.word_embeddings.weight": matrix(rows, hidden) * hidden**0.5,
        "rotary_pos_emb.inv_freq": (10000 ** -(torch.arange(0, width // 2, 2) / (width // 2))).to(dtype),
    }
    qkv = (heads + 2 * groups) * width
    for i in range(layers):
        at = f"encoder.layers.{i}."
        weights[at + "input_layernorm.weight"] = scale()
        weights[at + "self_attention.query_key_value.weight"] = matrix(qkv, hidden)
        weights[at + "self_attention.query_key_value.bias"] = matrix(qkv, 25).sum(-1) / 10
        weights[at + "self_attention.dense.weight"] = matrix(hidden, heads * width)
        weights[at + "post_attention_layernorm.weight"] = scale()
        weights[at + "mlp.dense_h_to_4h.weight"] = matrix(2 * ffn, hidden)
        weights[at + "mlp.dense_4h_to_h.weight"] = matrix(hidden, ffn)
    weights["encoder.final_layernorm.weight"] = scale()
    weights["output_layer.weight"] = matrix(rows, hidden) * 2
    weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    write_shards(folder, weights, shards, format)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.model").write_bytes(train_pieces(_text(), pieces))

    if prefix is not None:
        size = layers * 2 * groups * width
        table = {"embedding.weight": torch.randn(prefix, size, generator=draw)}
        if projected:
            table |= {
                "trans.0.weight": torch.randn(hidden, size, generator=draw) * size**-0.5,
                "trans.0.bias": torch.randn(hidden, generator=draw),
                "trans.2.weight": torch.randn(size, hidden, generator=draw) * hidden**-0.5,
                "trans.2.bias": torch.randn(size, generator=draw),
            }
        tuned = {f"transformer.prefix_encoder.{name}": tensor for name, tensor in table.items()}
        (folder / PTUNING).mkdir()
        torch.save(tuned, folder / PTUNING / "pytorch_model.bin")
        weights |= tuned
    return config, weights


def write_shards(folder: Path, weights: dict[str, Tensor], count: int, format: str) -> None:
    """Files named as on the hub, tensors in order and about equal bytes in each, with an index if there are several."""
    stem, ending = ("model", ".safetensors") if format == "safetensors" else ("pytorch_model", ".bin")
    total = sum(tensor.nbytes for tensor in weights.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    written = 0
    for name, tensor in weights.items():
        parts[min(written * count // total, count - 1)][name] = tensor
        written += tensor.nbytes
    names = [f"{stem}{ending}" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}{ending}" for i in range(count)]
    for name, part in zip(names, parts, strict=True):
        assert part, "more shards than tensors of that size fill"
        if format == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    if count > 1:
        places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))


def _text() -> list[str]:
    draw = random.Random(0)
    words = [
        *"今天我们去公园玩好不别管我太了明见怎么会这样对起都是错，。！？：\n",
        "高兴",
        "惊讶",
        "悲伤",
        "hello",
        "world",
        "[Round 1]",
        "问：",
        "答：",
    ]
    return ["".join(draw.choices(words, k=10)) for _ in range(400)]
