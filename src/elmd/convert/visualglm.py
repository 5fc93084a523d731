"""VisualGLM-6B's ViT, Q-Former and `glm_proj` -> a folder that VisionEncoder.load reads.

The network is BLIP-2's under other names, in one of two layouts: the hub's repository (`config.json`, names
`image_encoder.…`) or SwissArmyTransformer's folder (`model_config.json`, `latest`, names `mixins.eva.model.…`). The
language model, which both also hold, is left out. Source of names and options: github.com/THUDM/VisualGLM-6B
(model/visualglm.py, model/blip2.py, model_config.json) and github.com/THUDM/SwissArmyTransformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elmd.convert.shards import Source, Written, convert, read_json, refuse_taken, save
from elmd.errors import CheckpointError
from elmd.vision.encoder import VisionEncoder, VisionShape

#: VisualGLM's own projection to its language model, in the format of elmd.models.projector.Projector.load.
PROJECTION = "glm_proj.safetensors"

#: The ViT's last LayerNorm is a plain torch one in the original, outside `layernorm_epsilon`.
_POST_EPSILON = 1e-5

#: Options of the original, with the only values that the classes of BLIP-2 can represent.
_FIXED: dict[str, dict[str, Any]] = {
    "vit": {"layernorm_order": "pre", "use_final_layernorm": False, "in_channels": 3, "pre_len": 1, "post_len": 0},
    "qformer": {"layernorm_order": "post"},
}

_AGAIN = "get the file again, as it was published"
_TOGETHER = "check that the configuration and the weights belong together"
_UNQUANTISED = "convert the model in float16, as it was published"
_ANOTHER = "give VisualGLM-6B's folder, not that of a language model such as ChatGLM-6B"


@dataclass(frozen=True)
class _Layout:
    """One way in which VisualGLM is published.

    Attributes:
        config: name of the file that describes the networks; `vit` and `qformer` are its keys.
        prefix: of the image encoder's tensors.
        language: prefixes of all other tensors: those of the language model.
    """

    config: str
    vit: str
    qformer: str
    prefix: str
    language: tuple[str, ...]


_HUB = _Layout("config.json", "eva_config", "qformer_config", "image_encoder.", ("transformer.", "lm_head."))
_SAT = _Layout("model_config.json", "eva_args", "qformer_args", "mixins.eva.model.", ("transformer.", "mixins."))


@dataclass(frozen=True)
class Converted:
    """What `convert_visualglm` wrote.

    Attributes:
        written: size of the encoder.
        projection: shape of `glm_proj`'s weight, [H, q].
        left_out: how many tensors of the language model were not converted, by the beginning of their names.
    """

    written: Written
    projection: tuple[int, ...]
    left_out: dict[str, int]


def convert_visualglm(source: Path, folder: Path) -> Converted:
    """Convert the image encoder in `source`; the dtype stays the source's.

    Args:
        source: a folder in the hub's layout or in SwissArmyTransformer's.
        folder: for the result: `config.json`, safetensors weights and `glm_proj.safetensors`. It must not exist.

    Raises:
        CheckpointError: `source` is no VisualGLM, is quantised, or is not what its configuration says. Nothing is left
            behind then.
    """
    refuse_taken(folder)
    layout, config = _recognise(source)
    shape = _shape(config, layout, source / layout.config)
    encoder = VisionEncoder.empty(shape, source / layout.config)
    weights = Source(source if layout is _HUB else _sat_file(source))
    left_out = _left_out(weights, layout)
    projection = _projection(weights, layout, encoder.width)
    renamed = renaming(
        layout.prefix,
        shape.vision_config["num_hidden_layers"],
        shape.qformer_config["num_hidden_layers"],
        shape.qformer_config["cross_attention_frequency"],
    )

    def finish(partial: Path) -> None:
        shape.save(partial)
        tensors = {name: tensor for _, shard in weights.shards() for name, tensor in shard.items()}
        save({f"linear.{part}": tensors[name].contiguous() for part, name in projection.items()}, partial / PROJECTION)

    written = convert(
        weights,
        lambda name, tensor: translate(name, tensor, renamed),
        {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()},
        folder,
        finish,
        what="vision encoder",
        keep=lambda name: not _is_language(name, layout) and name not in projection.values(),
    )
    return Converted(written, weights.shapes[projection["weight"]], left_out)


def translate(name: str, tensor: Tensor, renamed: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """What one tensor of the image encoder becomes.

    Args:
        renamed: see `renaming`.

    Raises:
        CheckpointError: the name is unknown, or the tensor is quantised or no whole number of parts.
    """
    if name.endswith("weight_scale") or not tensor.is_floating_point():
        raise CheckpointError(f"{name} is quantised ({tensor.dtype})", fix=_UNQUANTISED)
    new = renamed.get(name)
    if new is None:
        raise CheckpointError(
            f"{name} is no tensor of the image encoder that the configuration describes", fix=_TOGETHER
        )
    if name.endswith("embeddings.weight"):  # tables of vectors there, parameters with a batch axis here
        return {new[0]: tensor[None]}
    if len(tensor) % len(new):
        raise CheckpointError(f"{name} has {len(tensor)} rows, which are not {len(new)} equal parts", fix=_TOGETHER)
    return dict(zip(new, tensor.chunk(len(new)), strict=True))


def renaming(
    prefix: str, vit_layers: int, qformer_layers: int, cross_attention_frequency: int
) -> dict[str, tuple[str, ...]]:
    """Original name -> native names, of which the tensor's rows are equal parts.

    A post-norm layer of the original begins with the norm that in BLIP-2 ends the layer before.
    """
    vit, former = f"{prefix}vit.transformer.", f"{prefix}qformer.transformer."
    table: dict[str, tuple[str, ...]] = {
        f"{vit}word_embeddings.weight": ("vision_model.embeddings.class_embedding",),
        f"{vit}position_embeddings.weight": ("vision_model.embeddings.position_embedding",),
        f"{former}word_embeddings.weight": ("query_tokens",),
    }

    def move(old: str, *new: str) -> None:
        for part in ("weight", "bias"):
            table[f"{old}.{part}"] = tuple(f"{name}.{part}" for name in new)

    move(f"{prefix}vit.mixins.patch_embedding.proj", "vision_model.embeddings.patch_embedding")
    move(f"{prefix}vit.mixins.cls.ln_vision", "vision_model.post_layernorm")
    for i in range(vit_layers):
        old, new = f"{vit}layers.{i}", f"vision_model.encoder.layers.{i}"
        move(f"{old}.input_layernorm", f"{new}.layer_norm1")
        move(f"{old}.post_attention_layernorm", f"{new}.layer_norm2")
        move(f"{old}.attention.query_key_value", f"{new}.self_attn.qkv")
        move(f"{old}.attention.dense", f"{new}.self_attn.projection")
        move(f"{old}.mlp.dense_h_to_4h", f"{new}.mlp.fc1")
        move(f"{old}.mlp.dense_4h_to_h", f"{new}.mlp.fc2")
    move(f"{former}layers.0.input_layernorm", "qformer.layernorm")
    for i in range(qformer_layers):
        old, new = f"{former}layers.{i}", f"qformer.encoder.layer.{i}"
        last = i == qformer_layers - 1
        ends = f"{former}final_layernorm" if last else f"{former}layers.{i + 1}.input_layernorm"
        move(ends, f"{new}.output_query.LayerNorm")
        move(f"{old}.attention.query_key_value", *(f"{new}.attention.attention.{x}" for x in ("query", "key", "value")))
        move(f"{old}.attention.dense", f"{new}.attention.output.dense")
        move(f"{old}.post_attention_layernorm", f"{new}.attention.output.LayerNorm")
        move(f"{old}.mlp.dense_h_to_4h", f"{new}.intermediate_query.dense")
        move(f"{old}.mlp.dense_4h_to_h", f"{new}.output_query.dense")
        if i % cross_attention_frequency == 0:
            cross = f"{new}.crossattention"
            move(f"{old}.cross_attention.query", f"{cross}.attention.query")
            move(f"{old}.cross_attention.key_value", f"{cross}.attention.key", f"{cross}.attention.value")
            move(f"{old}.cross_attention.dense", f"{cross}.output.dense")
            move(f"{old}.post_cross_attention_layernorm", f"{cross}.output.LayerNorm")
    return table


def _recognise(source: Path) -> tuple[_Layout, dict[str, Any]]:
    """The layout of a folder, and its configuration."""
    for layout in (_HUB, _SAT):
        path = source / layout.config
        if not path.is_file():
            continue
        config = read_json(path)
        if isinstance(config.get(layout.vit), dict) and isinstance(config.get(layout.qformer), dict):
            return layout, config
        if isinstance(config.get("vision_config"), dict) and isinstance(config.get("qformer_config"), dict):
            raise CheckpointError(
                "is a BLIP-2 encoder and needs no conversion",
                where=source,
                fix=f"use it as it is: vision.path={source}",
            )
        raise CheckpointError(
            f"has no {layout.vit} and {layout.qformer}: no image encoder belongs to this model",
            where=path,
            fix=_ANOTHER,
        )
    raise CheckpointError(
        f"there is no {_HUB.config} and no {_SAT.config}", where=source, fix="give the folder of VisualGLM-6B"
    )


def _shape(config: Mapping[str, Any], layout: _Layout, where: Path) -> VisionShape:
    """The networks that the original's configuration describes, as BLIP-2's classes name their sizes."""
    vit, former = config[layout.vit], config[layout.qformer]
    for key, part, fixed in ((layout.vit, vit, _FIXED["vit"]), (layout.qformer, former, _FIXED["qformer"])):
        for name, value in fixed.items():
            if part.get(name) != value:
                raise CheckpointError(
                    f"{key}.{name} is {_shown(part, name)}, not {value!r}: BLIP-2's classes cannot hold this network",
                    where=where,
                    fix=_AGAIN,
                )
    sides = vit.get("image_size")
    if not isinstance(sides, list) or len(sides) != 2 or sides[0] != sides[1]:
        raise CheckpointError(
            f"{layout.vit}.image_size is {_shown(vit, 'image_size')}, not two equal sides", where=where, fix=_AGAIN
        )
    vision = {
        **_sizes(vit, layout.vit, where),
        "image_size": sides[0],
        "patch_size": _count(vit, "patch_size", layout.vit, where),
    }
    qformer = _sizes(former, layout.qformer, where)
    qformer["cross_attention_frequency"] = _frequency(former, qformer["num_hidden_layers"], layout.qformer, where)
    return VisionShape(
        vision_config=vision,
        qformer_config=qformer,
        num_query_tokens=_count(config, "image_length", None, where),
        post_layernorm_eps=_POST_EPSILON,
    )


def _sizes(part: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    """The fields that ViT and Q-Former share."""
    hidden = _count(part, "hidden_size", key, where)
    # The default of SwissArmyTransformer, on which the published configuration of the Q-Former relies.
    inner = 4 * hidden if part.get("inner_hidden_size") is None else _count(part, "inner_hidden_size", key, where)
    epsilon = part.get("layernorm_epsilon")
    if not isinstance(epsilon, float) or epsilon <= 0:
        raise CheckpointError(
            f"{key}.layernorm_epsilon is {_shown(part, 'layernorm_epsilon')}", where=where, fix=_AGAIN
        )
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": _count(part, "num_layers", key, where),
        "num_attention_heads": _count(part, "num_attention_heads", key, where),
        "layer_norm_eps": epsilon,
    }


def _count(part: Mapping[str, Any], name: str, key: str | None, where: Path) -> int:
    """A positive number of the configuration."""
    value = part.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        full = f"{key}.{name}" if key else name
        raise CheckpointError(f"{full} is {_shown(part, name)}, not a positive number", where=where, fix=_AGAIN)
    return value


def _shown(part: Mapping[str, Any], name: str) -> str:
    return repr(part[name]) if name in part else "missing"


def _frequency(former: Mapping[str, Any], layers: int, key: str, where: Path) -> int:
    """k where every k-th layer, from the first on, has cross attention."""
    given = former.get("is_decoder")
    cross = [given] * layers if isinstance(given, bool) else given
    if not isinstance(cross, list) or len(cross) != layers or not all(isinstance(x, bool) for x in cross):
        raise CheckpointError(
            f"{key}.is_decoder is {_shown(former, 'is_decoder')}, not true or false for each of {layers} layers",
            where=where,
            fix=_AGAIN,
        )
    frequency = next((i for i in range(1, layers) if cross[i]), layers)
    if cross != [i % frequency == 0 for i in range(layers)]:
        listed = ", ".join(str(i) for i in range(layers) if cross[i]) or "no layer"
        raise CheckpointError(
            f"{key}.is_decoder puts cross attention into {listed} of {layers} layers, not into every k-th from layer 0 "
            "on: BLIP-2's classes cannot hold this network",
            where=where,
            fix=_AGAIN,
        )
    return frequency


def _sat_file(source: Path) -> Path:
    """The weights of SwissArmyTransformer's folder: the iteration that `latest` names, of a single rank."""
    latest = source / "latest"
    if not latest.is_file():
        raise CheckpointError("is missing", where=latest, fix="give the whole folder of SwissArmyTransformer")
    folder = source / latest.read_text(encoding="utf-8").strip()
    ranks = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(ranks) != 1:
        content = "no mp_rank_00_model_states.pt" if not ranks else f"the parts of {len(ranks)} model-parallel ranks"
        raise CheckpointError(
            f"holds {content}", where=folder, fix="give a checkpoint of model parallel size 1, as it was published"
        )
    return ranks[0]


def _is_language(name: str, layout: _Layout) -> bool:
    return name.startswith(layout.language) and not name.startswith(layout.prefix)


def _left_out(weights: Source, layout: _Layout) -> dict[str, int]:
    """How many tensors of the language model there are, by the beginning of their names."""
    names = weights.shapes
    if not any(name.startswith(layout.prefix) for name in names):
        raise CheckpointError(
            f"holds no tensor {layout.prefix}…, only {len(names)} others: no image encoder is in this checkpoint",
            where=weights.path,
            fix=_ANOTHER,
        )
    return {
        start: count
        for start in layout.language
        if (count := sum(name.startswith(start) and _is_language(name, layout) for name in names))
    }


def _projection(weights: Source, layout: _Layout, width: int) -> dict[str, str]:
    """Names of `glm_proj`'s weight [H, q] and bias [H]."""
    names = {part: f"{layout.prefix}glm_proj.{part}" for part in ("weight", "bias")}
    for name in names.values():
        if name not in weights.shapes:
            raise CheckpointError(f"lacks {name}", where=weights.path, fix=_AGAIN)
        if not weights.dtypes[name].is_floating_point:
            raise CheckpointError(f"{name} is quantised ({weights.dtypes[name]})", where=weights.path, fix=_UNQUANTISED)
    weight, bias = (weights.shapes[name] for name in names.values())
    if len(weight) != 2 or weight[1] != width or bias != weight[:1]:
        raise CheckpointError(
            f"glm_proj is {list(weight)} with a bias {list(bias)}, but the Q-Former is {width} wide",
            where=weights.path,
            fix=_TOGETHER,
        )
    return names
