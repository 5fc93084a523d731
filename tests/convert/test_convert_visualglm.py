"""VisualGLM's image encoder, converted: against the original's tensors, a second forward, and broken checkpoints."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import GOLDEN_FILES, ROOT
from elmd.convert.visualglm import PROJECTION, convert_visualglm, renaming, translate
from elmd.errors import CheckpointError
from elmd.models.projector import Projector
from elmd.vision.encoder import CLIP_MEAN, CLIP_STD, VisionEncoder, VisionShape
from visualglm_reference import (
    HUB,
    PUBLIC,
    SAT,
    Sizes,
    config,
    language_shapes,
    random_checkpoint,
    random_weights,
    reference,
    shapes,
    write,
)

SCRIPT = ROOT / "scripts" / "convert_visualglm.py"
GOLDEN_SIZES = Sizes(3, 44, 2, 96, 56, 14, 4, 48, 3, 32, 2, 64)


def layers(encoder: VisionEncoder, pixels: Tensor) -> dict[str, Tensor]:
    """What the encoder makes of pixels, under the reference's keys."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, i=i: seen.update({f"vit_layer_{i}": out}))
        for i, layer in enumerate(encoder.vision_model.encoder.layers)
    ] + [
        layer.output_query.LayerNorm.register_forward_pre_hook(
            lambda _, x, i=i: seen.update({f"qformer_layer_{i}": x[0]})
        )
        for i, layer in enumerate(encoder.qformer.encoder.layer)
    ]
    with torch.no_grad():
        seen["vit_last_hidden_state"] = encoder.vision_model(pixel_values=pixels).last_hidden_state
        seen["qformer_last_hidden_state"] = encoder(pixels)
    for hook in hooks:
        hook.remove()
    return seen


# ------------------------------------------------------------------------------------------------- the original
@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN_FILES / "visualglm_vision" / "golden.safetensors")


@pytest.mark.parametrize("layout", ["hf", "sat"])
def test_parity_with_the_original_in_every_layer(golden: dict[str, Tensor], tmp_path: Path, layout: str) -> None:
    source = GOLDEN_FILES / "visualglm_vision"
    if layout == "sat":  # the same tensors under the prefix that they have there
        weights = {SAT + k.removeprefix(HUB): v for k, v in load_file(source / "model.safetensors").items()}
        settings = json.loads((source / "config.json").read_text())
        settings["eva_args"], settings["qformer_args"] = settings.pop("eva_config"), settings.pop("qformer_config")
        source = tmp_path / "sat"
        write(source, weights, settings, layout="sat")
    done = convert_visualglm(source, tmp_path / "native")
    assert done.left_out == {}
    results = layers(VisionEncoder.load(tmp_path / "native"), golden["pixel_values"])
    projector = Projector.load(tmp_path / "native" / PROJECTION)
    with torch.no_grad():
        results["glm_proj_output"] = projector(results["qformer_last_hidden_state"])
    assert results.keys() == golden.keys() - {"pixel_values"}
    for name, value in results.items():
        assert (value - golden[name]).abs().max() < 1e-5, name


def test_the_second_forward_is_the_original_s(golden: dict[str, Tensor]) -> None:
    weights = load_file(GOLDEN_FILES / "visualglm_vision" / "model.safetensors")
    results = reference({k.removeprefix(HUB): v for k, v in weights.items()}, GOLDEN_SIZES, golden["pixel_values"])
    assert results.keys() == golden.keys() - {"pixel_values"}
    for name, value in results.items():
        assert (value - golden[name]).abs().max() < 1e-5, name
    assert {HUB + name: shape for name, shape in shapes(GOLDEN_SIZES).items()} == {
        k: tuple(v.shape) for k, v in weights.items()
    }


# ------------------------------------------------------------------------------------------------- other sizes
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (Sizes(), {}),
        (Sizes(layers=1, heads=2, queries=3), {"layout": "sat"}),
        (Sizes(hidden=12, heads=3, inner=48, image=28, patch=4), {"shards": 2}),
        (Sizes(q_layers=6, frequency=3, q_heads=2), {"shards": 3, "file": "bin"}),
        (Sizes(q_layers=3, frequency=1), {"file": "bin"}),
        (Sizes(q_layers=4, frequency=4, q_hidden=32, queries=9), {"layout": "sat"}),
        (Sizes(q_layers=1, frequency=1, layers=4, llm_hidden=8), {}),
    ],
)  # fmt: skip
def test_random_checkpoints_of_other_sizes_agree_with_the_second_forward(
    tmp_path: Path, sizes: Sizes, options: dict[str, Any]
) -> None:
    weights = random_checkpoint(tmp_path / "original", sizes, seed=3, **options)
    done = convert_visualglm(tmp_path / "original", tmp_path / "native")
    encoder = VisionEncoder.load(tmp_path / "native").double()  # exact, so that nothing hides in rounding
    pixels = torch.randn(2, 3, sizes.image, sizes.image, generator=torch.Generator().manual_seed(1)).double()
    expected = reference({name: tensor.double() for name, tensor in weights.items()}, sizes, pixels)
    results = layers(encoder, pixels)
    projector = Projector.load(tmp_path / "native" / PROJECTION).double()
    with torch.no_grad():
        results["glm_proj_output"] = projector(results["qformer_last_hidden_state"])
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert (value - expected[name]).abs().max() < 1e-9, name
    assert done.projection == (sizes.llm_hidden, sizes.q_hidden)
    assert sum(done.left_out.values()) == len(language_shapes(sizes, options.get("layout", "hf")))
    assert done.written.parameters == sum(p.numel() for p in encoder.parameters())
    assert (encoder.tokens, encoder.width, encoder.image_size) == (sizes.queries, sizes.q_hidden, sizes.image)


def test_the_folder_is_complete_and_says_what_the_original_takes_for_granted(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "original", dtype=torch.float16)
    convert_visualglm(tmp_path / "original", tmp_path / "native")
    assert {p.name for p in tmp_path.iterdir()} == {"original", "native"}
    assert {p.name for p in (tmp_path / "native").iterdir()} == {"config.json", "model.safetensors", PROJECTION}
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    assert written["post_layernorm_eps"] == 1e-5
    assert written["image_mean"] == list(CLIP_MEAN)
    assert written["image_std"] == list(CLIP_STD)
    assert written["num_query_tokens"] == 7
    assert written["vision_config"]["layer_norm_eps"] == 1e-6
    assert written["qformer_config"]["layer_norm_eps"] == 1e-12
    stored = load_file(tmp_path / "native" / "model.safetensors") | load_file(tmp_path / "native" / PROJECTION)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}  # the source's
    encoder = VisionEncoder.load(tmp_path / "native", torch.float16)
    assert encoder.vision_model.post_layernorm.eps == 1e-5
    assert encoder.vision_model.post_layernorm.weight.dtype == torch.float16
    assert encoder.query_tokens.dtype == encoder.qformer.layernorm.weight.dtype == torch.float32


def test_both_layouts_give_the_same_folder(tmp_path: Path) -> None:
    for layout in ("hf", "sat"):
        random_checkpoint(tmp_path / layout, layout=layout)
        convert_visualglm(tmp_path / layout, tmp_path / f"{layout}-native")
    for file in ("config.json", "model.safetensors", PROJECTION):
        assert (tmp_path / "hf-native" / file).read_bytes() == (tmp_path / "sat-native" / file).read_bytes(), file


def test_the_public_model_is_covered_name_by_name() -> None:
    """VisualGLM-6B's true sizes, without numbers: every original tensor becomes part of BLIP-2's ViT-g and Q-Former."""
    original = {HUB + name: shape for name, shape in shapes(PUBLIC).items()}
    renamed = renaming(HUB, PUBLIC.layers, PUBLIC.q_layers, PUBLIC.frequency)
    assert renamed.keys() == original.keys() - {f"{HUB}glm_proj.weight", f"{HUB}glm_proj.bias"}
    converted: dict[str, tuple[int, ...]] = {}
    for name in renamed:
        results = translate(name, torch.empty(original[name], device="meta"), renamed)
        assert not converted.keys() & results.keys()
        converted |= {new: tuple(tensor.shape) for new, tensor in results.items()}
    wanted = VisionEncoder.empty(VisionShape(), Path("BLIP-2's own defaults")).state_dict()
    assert converted == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    assert len(renamed) == 669
    sizes = [
        sum(tensor.numel() for name, tensor in wanted.items() if name.startswith("vision_model") is vit)
        for vit in (True, False)
    ]
    assert sizes == [985_952_256, 105_162_240]  # 1.09 billion, beside the 6.2 of the language model


# ------------------------------------------------------------------------------------------------- the command
def run(monkeypatch: pytest.MonkeyPatch, *arguments: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_visualglm.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_command_says_what_it_wrote_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_checkpoint(tmp_path / "original")
    run(monkeypatch, tmp_path / "original", tmp_path / "native")
    shown = capsys.readouterr()
    assert shown.out == f"converted: {tmp_path / 'native'}\n"
    printed = " ".join(shown.err.replace("│", " ").split())
    assert "left out: transformer.… (language model), tensors 6" in printed
    assert "left out: lm_head.… (language model), tensors 1" in printed
    assert "numbers of glm_proj, in glm_proj.safetensors 16 × 24" in printed
    assert VisionEncoder.load(tmp_path / "native").tokens == 7


def test_the_command_fails_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, tmp_path / "none", tmp_path / "native")
    printed = capsys.readouterr().err.strip()
    assert printed == (
        f"error: {tmp_path / 'none'}: there is no config.json and no model_config.json; "
        "give the folder of VisualGLM-6B."
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- what is refused
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def drop(name: str) -> Change:
    return lambda tensors, _: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors, _: tensors.update({name: tensor})


def setting(key: str, name: str, value: Any) -> Change:
    return lambda _, settings: settings[key].update({name: value})


def without(key: str, name: str | None = None) -> Change:
    return lambda _, settings: (settings if name is None else settings[key]).pop(name or key)


def chatglm(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Its weights, with VisualGLM's configuration."""
    for name in [name for name in tensors if name.startswith(HUB)]:
        del tensors[name]


VIT, FORMER = f"{HUB}vit.transformer.", f"{HUB}qformer.transformer."
REFUSED: dict[str, tuple[Change, str]] = {
    "another model's config": (
        without("eva_config"),
        r"config\.json: has no eva_config and qformer_config: no image enc.*ChatGLM-6B",
    ),
    "no image encoder": (
        chatglm,
        r"holds no tensor image_encoder\.…, only 7 others: no image encoder .*; give VisualGLM-6B's",
    ),
    "no queries": (without("image_length"), r"image_length is missing, not a positive number; get the file again"),
    "no heads": (without("eva_config", "num_attention_heads"), r"eva_config\.num_attention_heads is missing, not"),
    "no Q-Former layers": (
        setting("qformer_config", "num_layers", 0),
        r"qformer_config\.num_layers is 0, not a positive",
    ),
    "no cross attention": (
        without("qformer_config", "is_decoder"),
        r"is_decoder is missing, not true or false for each of 5",
    ),
    "cross attention nowhere": (
        setting("qformer_config", "is_decoder", False),
        r"cross attention into no layer of 5 layers",
    ),
    "irregular": (
        setting("qformer_config", "is_decoder", [True, True, False, True, False]),
        r"qformer_config\.is_decoder puts cross attention into 0, 1, 3 of 5 layers, not into every k-th",
    ),
    "not from the first": (
        setting("qformer_config", "is_decoder", [False, True, False, True, False]),
        r"cross attention into 1, 3 of 5 layers",
    ),
    "fewer than layers": (
        setting("qformer_config", "is_decoder", [True, False]),
        r"\[True, False\], not true or false for",
    ),
    "post norm ViT": (
        setting("eva_config", "layernorm_order", "sandwich"),
        r"layernorm_order is 'sandwich', not 'pre'",
    ),
    "final norm": (without("eva_config", "use_final_layernorm"), r"use_final_layernorm is missing, not False"),
    "oblong": (
        setting("eva_config", "image_size", [18, 24]),
        r"eva_config\.image_size is \[18, 24\], not two equal sides",
    ),
    "no epsilon": (without("qformer_config", "layernorm_epsilon"), r"qformer_config\.layernorm_epsilon is missing"),
    "heads": (
        setting("eva_config", "num_attention_heads", 3),
        r"config\.json: describes no BLIP-2 encoder \(.*divisible",
    ),
    "Q-Former heads": (
        setting("qformer_config", "num_attention_heads", 5),
        r"config\.json: describes no BLIP-2 encoder \(.*multiple",
    ),
    "bad side": (
        setting("eva_config", "image_size", ["a", "a"]),
        r"config\.json: describes no BLIP-2 encoder \(.*image_size",
    ),
    "no prefix": (put("vit.transformer.word_embeddings.weight", torch.zeros(1, 20)), r"vit\.\S+ is no tensor of the"),
    "another image size": (
        setting("eva_config", "image_size", [24, 24]),
        r"position_embeddings\.weight becomes .*position_embedding of shape \[1, 10, 20\], .* \[1, 17, 20\]",
    ),
    "another inner size": (
        setting("eva_config", "inner_hidden_size", 32),
        r"mlp\.fc\d\.\w+ of shape \[.*28.*\], but by the",
    ),
    "more queries": (
        lambda _, settings: settings.update(image_length=9),
        r"query_tokens of shape \[1, 7, 24\], .* \[1, 9, 24\]",
    ),
    "a layer less": (
        setting("eva_config", "num_layers", 2),
        r"vit\.transformer\.layers\.2\.\S+ is no tensor of the image encoder that the configuration describes",
    ),
    "a layer more": (
        setting("eva_config", "num_layers", 4),
        r"holds nothing that becomes vision_model\.encoder\.layers\.3",
    ),
    "less cross attention": (
        setting("qformer_config", "is_decoder", [True] + 4 * [False]),
        r"layers\.2\.cross_attention\.\S+ is no tensor of the image encoder",
    ),
    "more cross attention": (
        setting("qformer_config", "is_decoder", True),
        r"holds nothing that becomes qformer\.encoder\.layer\.1\.crossattention",
    ),
    "lost": (
        drop(f"{VIT}layers.1.attention.query_key_value.bias"),
        r"holds nothing that becomes vision_model\.encoder\.layers\.1\.self_attn\.qkv\.bias",
    ),
    "uneven": (
        put(f"{FORMER}layers.0.attention.query_key_value.bias", torch.zeros(71)),
        r"has 71 rows, which are not 3 equal",
    ),
    "LoRA": (put(f"{HUB}vit.mixins.lora.matrix_A", torch.zeros(2)), r"vit\.mixins\.lora\.matrix_A is no tensor of"),
    "unknown": (
        put("visual.proj", torch.zeros(2)),
        r"model\.safetensors: visual\.proj is no tensor of the image encoder",
    ),
    "int4": (
        put(f"{VIT}layers.0.attention.dense.weight", torch.zeros(20, 10, dtype=torch.int8)),
        r"attention\.dense\.weight is quantised \(torch\.int8\); convert the model in float16",
    ),
    "scales": (put(f"{VIT}layers.0.attention.dense.weight_scale", torch.zeros(20)), r"weight_scale is quantised"),
    "int8 glm_proj": (
        put(f"{HUB}glm_proj.weight", torch.zeros(16, 24, dtype=torch.int8)),
        r"glm_proj\.weight is quantised",
    ),
    "no glm_proj": (drop(f"{HUB}glm_proj.bias"), r"lacks image_encoder\.glm_proj\.bias; get"),
    "another glm_proj": (
        put(f"{HUB}glm_proj.weight", torch.zeros(16, 32)),
        r"glm_proj is \[16, 32\] with a bias \[16\], but the Q-Former is 24 wide",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_visualglm_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    sizes = Sizes()
    tensors = {name: torch.zeros(shape) for name, shape in language_shapes(sizes).items()}
    tensors |= {HUB + name: tensor for name, tensor in random_weights(sizes).items()}
    settings = config(sizes)
    change(tensors, settings)
    write(tmp_path / "original", tensors, settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_visualglm(tmp_path / "original", tmp_path / "native")
    assert str(caught.value).count("\n") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_a_quantised_language_model_is_no_obstacle(tmp_path: Path) -> None:
    sizes = Sizes()
    tensors = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in language_shapes(sizes).items()}
    tensors["transformer.layers.0.mlp.dense_4h_to_h.weight_scale"] = torch.zeros(16)
    tensors |= {HUB + name: tensor for name, tensor in random_weights(sizes).items()}
    write(tmp_path / "original", tensors, {**config(sizes), "quantization_bit": 8})
    assert convert_visualglm(tmp_path / "original", tmp_path / "native").left_out["transformer."] == 7
    assert VisionEncoder.load(tmp_path / "native").tokens == sizes.queries


def test_blip2_folders_need_no_conversion(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "original")
    convert_visualglm(tmp_path / "original", tmp_path / "native")
    with pytest.raises(
        CheckpointError, match=r"native: is a BLIP-2 encoder and needs no conv.*vision\.path=.*native\."
    ):
        convert_visualglm(tmp_path / "native", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_taken_folder_is_not_touched(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "original")
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="native: exists already"):
        convert_visualglm(tmp_path / "original", tmp_path / "native")
    assert [p.name for p in (tmp_path / "native").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "latest").unlink(), r"latest: is missing; give the whole folder"),
        (lambda folder: (folder / "latest").write_text("300"), r"300: holds no mp_rank_00_model_states\.pt; give"),
        (
            lambda folder: (folder / "1" / "mp_rank_01_model_states.pt").touch(),
            r"parts of 2 model-parallel ranks; give",
        ),
        (lambda folder: (folder / "model_config.json").write_text("{}"), r"model_config\.json: has no eva_args and qf"),
    ],
)
def test_sat_folders_that_are_not_whole(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    random_checkpoint(tmp_path / "original", layout="sat")
    change(tmp_path / "original")
    with pytest.raises(CheckpointError, match=message):
        convert_visualglm(tmp_path / "original", tmp_path / "native")
    assert [p.name for p in tmp_path.iterdir()] == ["original"]
