"""ChatGLM2's original checkpoint as `GlmForCausalLM`, with a fast tokenizer; its P-Tuning v2 prefixes as PEFT's.

The architectures are the same; names differ, and the original has query, key and value in one matrix. The result loads
with plain `AutoModelForCausalLM` and `AutoTokenizer`. Measured against the original: equal logits in float32; in half
precision the original also computes rotary angles in half, which we do not copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, TaskType
from torch import Tensor
from transformers import GenerationConfig, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from elmd.convert.shards import Source, Translate, Written, building, convert, read_json, refuse_taken, save
from elmd.convert.tokenizer import chatglm2_tokenizer
from elmd.errors import CheckpointError
from elmd.log import logger
from elmd.models import ADAPTER

#: The settings that decide the shape of ChatGLM2-6B, under the original's names.
CHATGLM2_6B: dict[str, Any] = {
    "model_type": "chatglm", "num_layers": 28, "padded_vocab_size": 65024, "hidden_size": 4096,
    "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32, "multi_query_attention": True,
    "multi_query_group_num": 2, "add_qkv_bias": True, "layernorm_epsilon": 1e-5, "seq_length": 32768,
}  # fmt: skip

#: Settings for which `Glm` has one value only, and the original's default where config.json does not give them.
_FIXED: dict[str, tuple[Any, Any]] = {
    "multi_query_attention": (True, False), "rmsnorm": (True, True), "post_layer_norm": (True, True),
    "add_bias_linear": (False, False), "apply_residual_connection_post_layernorm": (False, False),
    "tie_word_embeddings": (False, False), "original_rope": (True, True), "rope_ratio": (1, 1),
}  # fmt: skip

_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "encoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",  # both have the gate first
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
_QKV = re.compile(r"self_attention\.query_key_value\.(weight|bias)")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_PREFIX = re.compile(r"(?:transformer\.)?prefix_encoder\.(.+)")
#: The parts of a prefix that is the output of a small network.
_NETWORK = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")

_OTHER_MODEL = "give the folder of ChatGLM2-6B, or of a model with its code"


@dataclass(frozen=True)
class Converted:
    """What `convert_chatglm2` wrote: `ids` in the tokenizer (None without one), `prefix` virtual tokens."""

    written: Written
    config: GlmConfig
    ids: int | None
    prefix: int | None


def convert_chatglm2(src: Path, dst: Path, ptuning: Path | None = None) -> Converted:
    """Write `dst` so that `AutoModelForCausalLM` and `AutoTokenizer` load it; weights keep their dtype.

    Args:
        src: folder with config.json, tokenizer.model and the weights, as published.
        dst: folder that does not exist yet, or is empty.
        ptuning: file or folder with the prefix of the original's P-Tuning v2; becomes `dst/adapter/`.

    Raises:
        CheckpointError: something is missing or damaged, or is no ChatGLM2; `dst` exists. Nothing is left on disk.
    """
    refuse_taken(dst)
    if not src.is_dir():
        raise CheckpointError("is not a folder", where=src, fix=_OTHER_MODEL)
    config = native_config(read_json(src / "config.json"), where=src / "config.json")
    _refuse_chatglm3(src)
    tokenizer = _tokenizer(src / "tokenizer.model", config)
    table = None if ptuning is None else prefix_table(ptuning, config)
    source = Source(src)
    for dtype in set(source.dtypes.values()):
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"holds {str(dtype).removeprefix('torch.')} numbers: it is quantised", where=src, fix=_UNQUANTISED
            )
    config.dtype = next((dtype for name, dtype in source.dtypes.items() if _bare(name) in _OUTSIDE), None)

    def finish(folder: Path) -> None:
        config.save_pretrained(folder)
        GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if table is not None:
            (folder / ADAPTER).mkdir()
            _save_prefix(table, config, folder / ADAPTER)

    written = convert(source, translator(config), wanted_shapes(config), dst, finish, what="converting ChatGLM2")
    ids = None if tokenizer is None else len(tokenizer)
    return Converted(written, config, ids, None if table is None else len(table))


def _tokenizer(pieces: Path, config: GlmConfig) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a checkpoint; None where there is none: a user may have it elsewhere."""
    if not pieces.is_file():
        logger.warning("%s is missing: the result will have no tokenizer, and ELMD needs one to train with it", pieces)
        return None
    tokenizer = chatglm2_tokenizer(pieces)
    tokenizer.model_max_length = config.max_position_embeddings
    if len(tokenizer) > config.vocab_size:
        logger.warning(
            "%s has %d ids, but the embedding only %d rows: texts can hold ids that the model does not have",
            pieces, len(tokenizer), config.vocab_size,
        )  # fmt: skip
    return tokenizer


def convert_prefix(ptuning: Path, llm: Path) -> int:
    """Write the prefix of the original's P-Tuning v2 to `adapter/` of a converted folder.

    Returns:
        the number of virtual tokens P.

    Raises:
        CheckpointError: as `convert_chatglm2`; or `llm` is no converted ChatGLM2, or has an adapter.
    """
    if read_json(llm / "config.json").get("model_type") != "glm":
        raise CheckpointError("is no converted ChatGLM2", where=llm, fix="convert the model first, then the prefix")
    refuse_taken(llm / ADAPTER, "move it away, if another prefix is to take its place")
    config = GlmConfig.from_pretrained(llm)
    table = prefix_table(ptuning, config)
    with building(llm / ADAPTER, table.nbytes) as folder:
        _save_prefix(table, config, folder)
    return len(table)


def native_config(original: Mapping[str, Any], *, where: Path | None = None) -> GlmConfig:
    """The configuration of `GlmForCausalLM` for a ChatGLM2 config.json.

    Raises:
        CheckpointError: a key is missing, it is another model, or `Glm` cannot represent a setting.
    """

    def refuse(what: str, fix: str = _OTHER_MODEL) -> CheckpointError:
        return CheckpointError(what, where=where, fix=fix)

    kind = original.get("model_type")
    if kind == "glm":
        raise refuse("is a Glm model already", "use it as llm.path without converting")
    if kind != "chatglm":
        raise refuse(f"model_type is {kind!r}, not 'chatglm'")
    if "eva_config" in original:
        raise refuse("is VisualGLM", "convert its image encoder: python scripts/convert_visualglm.py SRC DST")
    if "position_encoding_2d" in original or "inner_hidden_size" in original:
        raise refuse("is the first ChatGLM (or VisualGLM), whose language model is another architecture")
    if "chatglm3" in str(original.get("_name_or_path", "")).lower():
        raise refuse(_CHATGLM3)
    if original.get("quantization_bit"):
        raise refuse(f"is quantised to {original['quantization_bit']} bits", _UNQUANTISED)
    if original.get("pre_seq_len"):
        raise refuse(
            f"is a checkpoint of P-Tuning v2 (pre_seq_len {original['pre_seq_len']})",
            "give the folder of the model that was tuned as SRC, and this one to --ptuning",
        )
    if missing := [key for key in CHATGLM2_6B if key not in original and key not in (*_FIXED, "add_qkv_bias")]:
        raise refuse(f"lacks {', '.join(missing)}", "download config.json again")
    for key, usual in CHATGLM2_6B.items():
        value = original.get(key, usual)
        number = isinstance(usual, int | float) and not isinstance(usual, bool)
        if type(value) is not type(usual) or (number and value <= 0):
            raise refuse(f"{key} is {value!r}, not a value such as {usual!r}", "download config.json again")
    for key, (value, default) in _FIXED.items():
        if original.get(key, default) != value:
            raise refuse(
                f"{key} is {original.get(key, default)}, where only {value} can be represented"
                + (" (GLM-4 and the 32k variants have other rotary positions)" if key == "rope_ratio" else "")
            )
    heads, groups, width = (original[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    if heads % groups or width % 4:
        raise refuse(
            f"{heads} heads of width {width} in {groups} groups do not fit: heads come in equal groups, "
            "and a quarter of the width is rotated in pairs"
        )
    return GlmConfig(
        vocab_size=original["padded_vocab_size"], hidden_size=original["hidden_size"],
        intermediate_size=original["ffn_hidden_size"], num_hidden_layers=original["num_layers"],
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=width,
        max_position_embeddings=original["seq_length"], rms_norm_eps=original["layernorm_epsilon"],
        attention_bias=original.get("add_qkv_bias", False),
        attention_dropout=original.get("attention_dropout", 0.0), tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        pad_token_id=0, bos_token_id=1, eos_token_id=2, architectures=["GlmForCausalLM"],
    )  # fmt: skip


def wanted_shapes(config: GlmConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of `GlmForCausalLM(config)`."""
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def translator(config: GlmConfig) -> Translate:
    """What each tensor of the original becomes; names with or without the prefix `transformer.`."""
    heads, width = _kv(config)
    q, kv = config.num_attention_heads * width, heads * width

    def translate(name: str, tensor: Tensor) -> dict[str, Tensor]:
        bare = _bare(name)
        if bare in _OUTSIDE:
            return {_OUTSIDE[bare]: tensor}
        if bare == "rotary_pos_emb.inv_freq":
            return {}  # follows from the configuration
        if _PREFIX.fullmatch(name):
            raise CheckpointError(
                f"{name} belongs to P-Tuning v2",
                fix="give the folder of the model that was tuned as SRC, and this one to --ptuning",
            )
        if match := _LAYER.fullmatch(bare):
            layer, rest = f"model.layers.{match[1]}.", match[2]
            if rest in _IN_LAYER:
                return {layer + _IN_LAYER[rest]: tensor}
            if qkv := _QKV.fullmatch(rest):
                if len(tensor) != q + 2 * kv:
                    raise CheckpointError(
                        f"{name} has {len(tensor)} rows, but by the configuration {q} + {kv} + {kv}",
                        fix="the weights belong to another configuration: check config.json",
                    )
                return {
                    f"{layer}self_attn.{letter}_proj.{qkv[1]}": part
                    for letter, part in zip("qkv", tensor.split([q, kv, kv]), strict=True)
                }
        raise CheckpointError(f"{name} is no tensor of ChatGLM2", fix=_OTHER_MODEL)

    return translate


def prefix_table(path: Path, config: GlmConfig) -> Tensor:
    """The table [P, layers · 2 · KV heads · head width], float32, of the original's P-Tuning v2.

    Of a prefix that was trained through a network (`prefix_projection`), the output of the network: the same numbers.

    Raises:
        CheckpointError: there is no prefix, a part is missing, or it belongs to a model of another shape.
    """
    parts = {
        match[1]: tensor.float()
        for _, tensors in Source(path).shards()
        for name, tensor in tensors.items()
        if (match := _PREFIX.fullmatch(name))
    }
    wanted = {"embedding.weight"} if set(parts) <= {"embedding.weight"} else {"embedding.weight", *_NETWORK}
    if set(parts) != wanted:
        lacking = ", ".join(sorted(wanted - set(parts))) or "nothing"
        other = ", ".join(sorted(set(parts) - wanted)) or "nothing"
        raise CheckpointError(
            f"is no whole prefix of P-Tuning v2: lacks {lacking} of prefix_encoder, has {other} besides",
            where=path, fix="give the pytorch_model.bin that ptuning/main.py saved",
        )  # fmt: skip
    table = parts["embedding.weight"]
    layers, (heads, width) = config.num_hidden_layers, _kv(config)
    shapes = {"embedding.weight": [len(table), layers * 2 * heads * width]}
    if len(parts) > 1:
        hidden = parts["trans.0.bias"].numel()
        shapes |= {
            "trans.0.weight": [hidden, shapes["embedding.weight"][1]], "trans.0.bias": [hidden],
            "trans.2.weight": [shapes["embedding.weight"][1], hidden], "trans.2.bias": shapes["embedding.weight"][1:],
        }  # fmt: skip
    for name, shape in shapes.items():
        if list(parts[name].shape) != shape:
            raise CheckpointError(
                f"prefix_encoder.{name} is {list(parts[name].shape)}, but {shape} fits this model "
                f"({layers} layers × 2 × {heads} KV heads × {width})",
                where=path, fix="give the prefix that was trained with this model",
            )  # fmt: skip
    if len(parts) > 1:
        inner = torch.tanh(table @ parts["trans.0.weight"].T + parts["trans.0.bias"])
        table = inner @ parts["trans.2.weight"].T + parts["trans.2.bias"]
    return table.contiguous()


def _save_prefix(table: Tensor, config: GlmConfig, folder: Path) -> None:
    """Write a table in PEFT's adapter format, without loading the language model, as PEFT itself would."""
    heads, width = _kv(config)
    PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, inference_mode=True, prefix_projection=False, num_virtual_tokens=len(table),
        num_layers=config.num_hidden_layers, num_attention_heads=heads, token_dim=heads * width,
        num_transformer_submodules=1, encoder_hidden_size=heads * width,
    ).save_pretrained(str(folder))  # fmt: skip
    save({"prompt_embeddings": table}, folder / "adapter_model.safetensors")


def _kv(config: GlmConfig) -> tuple[int, int]:
    """KV heads and their width; `GlmConfig` may have None there, ours does not."""
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    return config.num_key_value_heads, config.head_dim


def _bare(name: str) -> str:
    return name.removeprefix("transformer.")


_UNQUANTISED = "convert the half-precision checkpoint"
_CHATGLM3 = "is ChatGLM3: the same layers, but prompts made of role tokens (<|user|> …) that ChatGLM2 does not have"


def _refuse_chatglm3(src: Path) -> None:
    """ChatGLM3's config.json may look the same; its tokenizer's files name the role tokens."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenization_chatglm.py"):
        path = src / name
        if path.is_file() and "<|user|>" in path.read_text(encoding="utf-8", errors="replace"):
            raise CheckpointError(_CHATGLM3, where=path, fix=_OTHER_MODEL)
