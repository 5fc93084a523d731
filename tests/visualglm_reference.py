"""VisualGLM's image encoder in plain torch, from its architecture, and random checkpoints in its original layouts.

Nothing here is shared with the converter: names, shapes and the forward are written down a second time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

HUB, SAT = "image_encoder.", "mixins.eva.model."


@dataclass(frozen=True)
class Sizes:
    """Of the networks; the defaults are small, odd, and equal to nothing public."""

    layers: int = 3  # of the ViT
    hidden: int = 20
    heads: int = 5
    inner: int = 28
    image: int = 18
    patch: int = 6
    q_layers: int = 5  # of the Q-Former
    q_hidden: int = 24
    q_heads: int = 4
    queries: int = 7
    frequency: int = 2  # cross attention in every k-th layer, from the first on
    llm_hidden: int = 16
    llm_layers: int = 2


#: model_config.json of github.com/THUDM/VisualGLM-6B.
PUBLIC = Sizes(39, 1408, 16, 6144, 224, 14, 12, 768, 12, 32, 2, 4096, 28)


def config(sizes: Sizes, layout: str = "hf") -> dict[str, Any]:
    """The configuration file in the original's words."""
    vit = {
        "num_layers": sizes.layers, "hidden_size": sizes.hidden, "num_attention_heads": sizes.heads, "vocab_size": 1,
        "layernorm_order": "pre", "model_parallel_size": 1,
        "max_sequence_length": (sizes.image // sizes.patch) ** 2 + 1,
        "inner_hidden_size": sizes.inner, "use_final_layernorm": False, "layernorm_epsilon": 1e-6,
        "image_size": [sizes.image, sizes.image], "pre_len": 1, "post_len": 0, "in_channels": 3, "num_classes": 0,
        "patch_size": sizes.patch,
    }  # fmt: skip
    former = {
        "num_layers": sizes.q_layers, "hidden_size": sizes.q_hidden, "num_attention_heads": sizes.q_heads,
        "vocab_size": sizes.queries, "layernorm_order": "post", "model_parallel_size": 1, "max_sequence_length": 0,
        "is_decoder": [i % sizes.frequency == 0 for i in range(sizes.q_layers)],
        "cross_attn_hidden_size": sizes.hidden, "layernorm_epsilon": 1e-12,
    }  # fmt: skip
    common = {"num_layers": sizes.llm_layers, "hidden_size": sizes.llm_hidden, "image_length": sizes.queries}
    if layout == "hf":
        return {"model_type": "chatglm", **common, "eva_config": vit, "qformer_config": former}
    return {"model_class": "VisualGLMModel", **common, "eva_args": vit, "qformer_args": former}


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Tensors of the image encoder, without the layout's prefix."""
    table: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        table.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def dense(name: str, into: int, out: int) -> None:
        table.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def layer(name: str, width: int, inner: int, cross: int | None) -> None:
        norm(f"{name}.input_layernorm", width)
        dense(f"{name}.attention.query_key_value", width, 3 * width)
        dense(f"{name}.attention.dense", width, width)
        norm(f"{name}.post_attention_layernorm", width)
        if cross is not None:
            dense(f"{name}.cross_attention.query", width, width)
            dense(f"{name}.cross_attention.key_value", cross, 2 * width)
            dense(f"{name}.cross_attention.dense", width, width)
            norm(f"{name}.post_cross_attention_layernorm", width)
        dense(f"{name}.mlp.dense_h_to_4h", width, inner)
        dense(f"{name}.mlp.dense_4h_to_h", inner, width)

    hidden, q = sizes.hidden, sizes.q_hidden
    table["vit.transformer.word_embeddings.weight"] = (1, hidden)
    table["vit.transformer.position_embeddings.weight"] = ((sizes.image // sizes.patch) ** 2 + 1, hidden)
    for i in range(sizes.layers):
        layer(f"vit.transformer.layers.{i}", hidden, sizes.inner, None)
    table["vit.mixins.patch_embedding.proj.weight"] = (hidden, 3, sizes.patch, sizes.patch)
    table["vit.mixins.patch_embedding.proj.bias"] = (hidden,)
    norm("vit.mixins.cls.ln_vision", hidden)
    table["qformer.transformer.word_embeddings.weight"] = (sizes.queries, q)
    for i in range(sizes.q_layers):
        layer(f"qformer.transformer.layers.{i}", q, 4 * q, hidden if i % sizes.frequency == 0 else None)
    norm("qformer.transformer.final_layernorm", q)
    dense("glm_proj", q, sizes.llm_hidden)
    return table


def language_shapes(sizes: Sizes, layout: str = "hf") -> dict[str, tuple[int, ...]]:
    """Some of the language model's tensors, under the names that they have in that layout."""
    width, table = sizes.llm_hidden, {"transformer.word_embeddings.weight": (11, sizes.llm_hidden)}
    for i in range(sizes.llm_layers):
        name = f"transformer.layers.{i}"
        table |= {f"{name}.attention.query_key_value.weight": (3 * width, width)}
        table |= {f"{name}.input_layernorm.bias": (width,)}
    if layout == "hf":
        return {**table, "transformer.layers.0.attention.rotary_emb.inv_freq": (4,), "lm_head.weight": (11, width)}
    table |= {"transformer.position_embeddings.weight": (9, width), "mixins.chatglm-attn.rotary_emb.inv_freq": (4,)}
    return {**table, "mixins.chatglm-final.lm_head.weight": (11, width)}


def random_weights(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Numbers large enough that a swapped or forgotten tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.3 + (name.endswith("norm.weight") * 1.0)).to(dtype)
        for name, shape in shapes(sizes).items()
    }


def random_checkpoint(
    folder: Path, sizes: Sizes | None = None, *, layout: str = "hf", shards: int = 1, file: str = "safetensors",
    seed: int = 0, dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """Write VisualGLM in one of its original layouts, with random weights.

    Args:
        layout: `hf` (the hub's repository) or `sat` (SwissArmyTransformer's folder: always one .pt file).
        file: `safetensors` or `bin`, for the hub's.

    Returns:
        The image encoder's tensors, without the layout's prefix.
    """
    sizes = sizes or Sizes()
    weights = random_weights(sizes, seed, dtype)
    prefix = HUB if layout == "hf" else SAT
    whole = {name: torch.zeros(shape, dtype=dtype) for name, shape in language_shapes(sizes, layout).items()}
    whole |= {prefix + name: tensor for name, tensor in weights.items()}
    write(folder, whole, config(sizes, layout), layout=layout, shards=shards, file=file)
    return weights


def write(
    folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], *, layout: str = "hf", shards: int = 1,
    file: str = "safetensors",
) -> None:  # fmt: skip
    """Write configuration and tensors, under full names, in an original layout."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "sat":
        (folder / "model_config.json").write_text(json.dumps(settings))
        (folder / "latest").write_text("1")
        (folder / "1").mkdir()
        torch.save({"module": tensors, "iteration": 1}, folder / "1" / "mp_rank_00_model_states.pt")
        return
    (folder / "config.json").write_text(json.dumps(settings))
    stem = {"safetensors": "model", "bin": "pytorch_model"}[file]
    names = list(tensors)
    files = {
        f"{stem}-{i + 1:05d}-of-{shards:05d}.{file}" if shards > 1 else f"{stem}.{file}": names[i::shards]
        for i in range(shards)
    }
    for name, held in files.items():
        part = {key: tensors[key] for key in held}
        if file == "safetensors":
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)
    if shards > 1:
        places = {key: name for name, held in files.items() for key in held}
        (folder / f"{stem}.{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def reference(weights: dict[str, Tensor], sizes: Sizes, pixels: Tensor) -> dict[str, Tensor]:
    """Every layer's output for pixels [N, 3, S, S]; as in the original, a Q-Former layer's is before its last norm."""
    w, out = weights, {}

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
        scores = split[0] @ split[1].transpose(-1, -2) * split[0].shape[-1] ** -0.5
        return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(-2)

    def self_attention(x: Tensor, name: str, heads: int) -> Tensor:
        return dense(attend(*dense(x, f"{name}.query_key_value").chunk(3, -1), heads), f"{name}.dense")

    def mlp(x: Tensor, name: str) -> Tensor:
        return dense(gelu(dense(x, f"{name}.dense_h_to_4h")), f"{name}.dense_4h_to_h")

    patches = conv2d(
        pixels, w["vit.mixins.patch_embedding.proj.weight"], w["vit.mixins.patch_embedding.proj.bias"], sizes.patch
    )
    first = w["vit.transformer.word_embeddings.weight"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + w["vit.transformer.position_embeddings.weight"]
    for i in range(sizes.layers):
        name = f"vit.transformer.layers.{i}"
        x = x + self_attention(norm(x, f"{name}.input_layernorm", 1e-6), f"{name}.attention", sizes.heads)
        x = x + mlp(norm(x, f"{name}.post_attention_layernorm", 1e-6), f"{name}.mlp")
        out[f"vit_layer_{i}"] = x
    seen = out["vit_last_hidden_state"] = norm(x, "vit.mixins.cls.ln_vision", 1e-5)

    x = w["qformer.transformer.word_embeddings.weight"].expand(len(pixels), -1, -1)
    for i in range(sizes.q_layers):
        name = f"qformer.transformer.layers.{i}"
        x = norm(x, f"{name}.input_layernorm", 1e-12)
        x = norm(x + self_attention(x, f"{name}.attention", sizes.q_heads), f"{name}.post_attention_layernorm", 1e-12)
        if i % sizes.frequency == 0:
            cross = f"{name}.cross_attention"
            key, value = dense(seen, f"{cross}.key_value").chunk(2, -1)
            attended = dense(attend(dense(x, f"{cross}.query"), key, value, sizes.q_heads), f"{cross}.dense")
            x = norm(x + attended, f"{name}.post_cross_attention_layernorm", 1e-12)
        x = x + mlp(x, f"{name}.mlp")
        out[f"qformer_layer_{i}"] = x
    out["qformer_last_hidden_state"] = norm(x, "qformer.transformer.final_layernorm", 1e-12)
    out["glm_proj_output"] = dense(out["qformer_last_hidden_state"], "glm_proj")
    return out
