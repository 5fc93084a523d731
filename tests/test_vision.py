"""The visual encoder against the original's tensors, its folder format, and the pooling of eq. 6-8."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from elmd.data.video import squash
from elmd.errors import CheckpointError
from elmd.models.vision import CLIP_MEAN, CLIP_STD, VisionEncoder, VisionShape, pool


def tiny(seed: int = 0, **changes: object) -> VisionEncoder:
    torch.manual_seed(seed)
    shape = VisionShape(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8, "initializer_range": 0.02,
        },
        qformer_config={
            "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        },
        num_query_tokens=5,
        **changes,
    )  # fmt: skip
    encoder = VisionEncoder(shape)
    for parameter in encoder.parameters():  # not the near-zero initial values, which hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


# ------------------------------------------------------------------------------------------------------ eq. 6-8
@pytest.mark.parametrize(("m", "o", "q"), [(8, 32, 6), (1, 4, 3), (5, 1, 2)])
def test_pooling_is_equations_6_to_8(m: int, o: int, q: int) -> None:
    x = torch.randn(m, o, q, dtype=torch.float64)
    expected = torch.zeros(o + m, q, dtype=torch.float64)
    for channel in range(q):
        for token in range(o):  # V_t comes first: one row per query token, averaged over time
            expected[token, channel] = sum(x[frame, token, channel] for frame in range(m)) / m
        for frame in range(m):  # V_s: one row per frame, averaged over query tokens
            expected[o + frame, channel] = sum(x[frame, token, channel] for token in range(o)) / o
    torch.testing.assert_close(pool(x), expected)


# ------------------------------------------------------------------------------------------------- the original
@pytest.fixture(scope="module")
def original(shared: Path) -> tuple[VisionShape, dict[str, Tensor], dict[str, Tensor]]:
    """VisualGLM's tiny reference: shape, weights under our names, and its golden tensors."""
    folder = shared / "golden" / "visualglm_vision"
    config = json.loads((folder / "config.json").read_text())
    vit, former = config["eva_config"], config["qformer_config"]
    weights = load_file(folder / "model.safetensors")
    shape = VisionShape(
        vision_config={
            "hidden_size": vit["hidden_size"], "intermediate_size": vit["inner_hidden_size"],
            "num_hidden_layers": vit["num_layers"], "num_attention_heads": vit["num_attention_heads"],
            "image_size": vit["image_size"][0], "patch_size": vit["patch_size"],
        },
        qformer_config={
            "hidden_size": former["hidden_size"], "num_hidden_layers": former["num_layers"],
            "intermediate_size": 4 * former["hidden_size"], "num_attention_heads": former["num_attention_heads"],
        },
        num_query_tokens=config["image_length"],
        post_layernorm_eps=1e-5,
    )  # fmt: skip
    return shape, native_names(weights, former["num_layers"]), load_file(folder / "golden.safetensors")


def native_names(weights: dict[str, Tensor], qformer_layers: int) -> dict[str, Tensor]:
    """VisualGLM's names -> ours; its post-norm layers each hold the norm that ends the layer before."""
    vit, former, out = "image_encoder.vit.", "image_encoder.qformer.transformer.", {}

    def move(old: str, *new: str) -> None:
        for part in ("weight", "bias"):
            for name, piece in zip(new, weights[f"{old}.{part}"].chunk(len(new)), strict=True):
                out[f"{name}.{part}"] = piece.contiguous()

    out["vision_model.embeddings.class_embedding"] = weights[f"{vit}transformer.word_embeddings.weight"][None]
    out["vision_model.embeddings.position_embedding"] = weights[f"{vit}transformer.position_embeddings.weight"][None]
    out["query_tokens"] = weights[f"{former}word_embeddings.weight"][None]
    move(f"{vit}mixins.patch_embedding.proj", "vision_model.embeddings.patch_embedding")
    move(f"{vit}mixins.cls.ln_vision", "vision_model.post_layernorm")
    for i in range(sum(k.startswith(f"{vit}transformer.layers.") and k.endswith("dense.weight") for k in weights)):
        old, new = f"{vit}transformer.layers.{i}", f"vision_model.encoder.layers.{i}"
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
        three = [f"{new}.attention.attention.{name}" for name in ("query", "key", "value")]
        move(f"{old}.attention.query_key_value", *three)
        move(f"{old}.attention.dense", f"{new}.attention.output.dense")
        move(f"{old}.post_attention_layernorm", f"{new}.attention.output.LayerNorm")
        move(f"{old}.mlp.dense_h_to_4h", f"{new}.intermediate_query.dense")
        move(f"{old}.mlp.dense_4h_to_h", f"{new}.output_query.dense")
        if f"{old}.cross_attention.query.weight" in weights:
            cross = f"{new}.crossattention"
            move(f"{old}.cross_attention.query", f"{cross}.attention.query")
            move(f"{old}.cross_attention.key_value", f"{cross}.attention.key", f"{cross}.attention.value")
            move(f"{old}.cross_attention.dense", f"{cross}.output.dense")
            move(f"{old}.post_cross_attention_layernorm", f"{cross}.output.LayerNorm")
    return out


def test_parity_with_visualglm_through_a_saved_folder(
    original: tuple[VisionShape, dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    shape, weights, golden = original
    encoder = VisionEncoder(shape)
    encoder.load_state_dict(weights)
    encoder.save(tmp_path)
    encoder = VisionEncoder.load(tmp_path)
    with torch.no_grad():
        seen = encoder.vision_model(pixel_values=golden["pixel_values"]).last_hidden_state
        found = encoder(golden["pixel_values"])
    assert (seen - golden["vit_last_hidden_state"]).abs().max() < 1e-5
    assert (found - golden["qformer_last_hidden_state"]).abs().max() < 1e-5


def test_the_wrong_epsilon_would_show(
    original: tuple[VisionShape, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    shape, weights, golden = original
    encoder = VisionEncoder(VisionShape(shape.vision_config, shape.qformer_config, shape.num_query_tokens))
    encoder.load_state_dict(weights)
    with torch.no_grad():
        seen = encoder.vision_model(pixel_values=golden["pixel_values"]).last_hidden_state
    assert (seen - golden["vit_last_hidden_state"]).abs().max() > 1e-5


# ------------------------------------------------------------------------------------------------- preprocessing
def test_pixels_are_pil_bicubic_then_normalised_per_channel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)
    found = tiny().pixels(torch.from_numpy(squash(image, 32).copy())[None])
    assert found.shape == (1, 3, 32, 32)
    for channel in range(3):
        expected = (resized[..., channel] / 255 - np.float32(CLIP_MEAN[channel])) / np.float32(CLIP_STD[channel])
        assert np.abs(found[0, channel].numpy() - expected).max() < 1e-6


# ------------------------------------------------------------------------------------------------- folders
def test_saved_and_loaded_encoders_are_equal(tmp_path: Path) -> None:
    encoder = tiny(post_layernorm_eps=3e-4, image_mean=(0.1, 0.2, 0.3))
    encoder.save(tmp_path)
    again = VisionEncoder.load(tmp_path)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        x = again(pixels)
        assert torch.equal(x, encoder(pixels))
    assert x.shape == (3, 5, 12) == (3, again.tokens, again.width)
    assert again.vision_model.post_layernorm.eps == 3e-4
    assert list(again.shape.image_mean) == [0.1, 0.2, 0.3]
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert again.fingerprint() == VisionEncoder.load(tmp_path).fingerprint()
    assert again.fingerprint() != tiny(seed=1).fingerprint()


def test_frames_do_not_see_each_other_and_every_token_counts(tmp_path: Path) -> None:
    encoder, pixels = tiny(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        together = encoder(pixels)
        alone = torch.cat([encoder(frame[None]) for frame in pixels])
        changed = pixels.clone()
        changed[0, :, -1, -1] += 1  # a corner of the last patch
        torch.testing.assert_close(together, alone)
        assert not torch.allclose(encoder(changed)[0], together[0])


def test_half_precision_keeps_the_qformer_in_float32(tmp_path: Path) -> None:
    tiny().save(tmp_path)
    encoder = VisionEncoder.load(tmp_path, torch.bfloat16)
    assert encoder.vision_model.post_layernorm.weight.dtype == torch.bfloat16
    assert encoder.qformer.layernorm.weight.dtype == encoder.query_tokens.dtype == torch.float32
    with torch.no_grad():
        rough, exact = encoder(torch.ones(1, 3, 32, 32)), VisionEncoder.load(tmp_path)(torch.ones(1, 3, 32, 32))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.1)


def test_a_public_blip2_folder_loads_its_towers(tmp_path: Path) -> None:
    """Written by transformers itself, sharded, with a language model that must be neither read nor missed."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    ours = tiny()
    text = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=ours.shape.vision_config, qformer_config=ours.shape.qformer_config, text_config=text,
        num_query_tokens=5,
    )  # fmt: skip
    public = Blip2ForConditionalGeneration(config).eval()
    public.load_state_dict(ours.state_dict(), strict=False)
    public.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "do_resize": true}')
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    towers = {shard for name, shard in names.items() if not name.startswith("language")}
    for shard in set(names.values()) - towers:
        (tmp_path / shard).unlink()  # only the language model's

    loaded, pixels = VisionEncoder.load(tmp_path), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), ours(pixels))
        expected = public.get_image_features(pixels).qformer_outputs.last_hidden_state
        torch.testing.assert_close(loaded(pixels), expected)
    assert list(loaded.shape.image_mean) == [0.5, 0.5, 0.5]
    assert list(loaded.shape.image_std) == list(CLIP_STD)


def test_folders_that_hold_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"none/config\.json: the vision checkpoint lacks this file; check vision"
    ):
        VisionEncoder.load(tmp_path / "none")

    tiny().save(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    save_file({k: v for k, v in weights.items() if k != "query_tokens"}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 of the encoder's \d+ weights, the first is query_tokens"):
        VisionEncoder.load(tmp_path)

    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_query_tokens": 7}))
    with pytest.raises(CheckpointError, match=r"query_tokens is \[1, 5, 12\], but config\.json makes it \[1, 7, 12\]"):
        VisionEncoder.load(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match=r"config\.json: has no vision_config and qformer_config"):
        VisionEncoder.load(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        VisionEncoder.load(tmp_path)
