"""The visual encoder against the original's tensors, its folder format, and the pooling of eq. 6-8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import GOLDEN_FILES
from elmd.convert.visualglm import convert_visualglm
from elmd.errors import CheckpointError
from elmd.vision.encoder import CLIP_MEAN, CLIP_STD, VisionEncoder
from elmd.vision.pooling import pool
from elmd.vision.video import squash
from encoders import tiny


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
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """VisualGLM's tiny reference: its encoder, converted, and its golden tensors."""
    folder = GOLDEN_FILES / "visualglm_vision"
    native = tmp_path_factory.mktemp("visualglm") / "native"
    convert_visualglm(folder, native)
    return native, load_file(folder / "golden.safetensors")


def test_parity_with_visualglm_through_a_saved_folder(original: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    native, golden = original
    VisionEncoder.load(native).save(tmp_path)
    encoder = VisionEncoder.load(tmp_path)
    with torch.no_grad():
        patches = encoder.vision_model(pixel_values=golden["pixel_values"]).last_hidden_state
        queries = encoder(golden["pixel_values"])
    assert (patches - golden["vit_last_hidden_state"]).abs().max() < 1e-5
    assert (queries - golden["qformer_last_hidden_state"]).abs().max() < 1e-5


def test_the_wrong_epsilon_would_show(original: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    native, golden = original
    for file in native.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((native / "config.json").read_text())
    del config["post_layernorm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        patches = VisionEncoder.load(tmp_path).vision_model(pixel_values=golden["pixel_values"]).last_hidden_state
    assert (patches - golden["vit_last_hidden_state"]).abs().max() > 1e-5


# ------------------------------------------------------------------------------------------------- preprocessing
def test_pixels_are_pil_bicubic_then_normalised_per_channel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = tiny().pixels(torch.from_numpy(squash(image, 32).copy())[None])
    assert pixels.shape == (1, 3, 32, 32)
    for channel in range(3):
        expected = (resized[..., channel] / 255 - np.float32(CLIP_MEAN[channel])) / np.float32(CLIP_STD[channel])
        assert np.abs(pixels[0, channel].numpy() - expected).max() < 1e-6


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


def test_folders_that_hold_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none/config\.json: is missing; check vision"):
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


# ------------------------------------------------------------------------------------------------- public BLIP-2
def public_blip2(folder: Path, ours: VisionEncoder) -> tuple[torch.nn.Module, set[str]]:
    """A BLIP-2 model as transformers writes it, in shards; and the shards that hold the encoder."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

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
    public.save_pretrained(folder, max_shard_size="8KB")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "do_resize": true}')
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return public, {shard for name, shard in names.items() if not name.startswith("language")}


def test_a_public_blip2_folder_loads_its_towers(tmp_path: Path) -> None:
    """Sharded, with a language model that must be neither read nor missed."""
    ours = tiny()
    public, towers = public_blip2(tmp_path, ours)
    language = {path for path in tmp_path.glob("model-*") if path.name not in towers}
    assert language
    for shard in language:
        shard.unlink()

    loaded, pixels = VisionEncoder.load(tmp_path), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), ours(pixels))
        expected = public.get_image_features(pixels).qformer_outputs.last_hidden_state
        torch.testing.assert_close(loaded(pixels), expected)
    assert list(loaded.shape.image_mean) == [0.5, 0.5, 0.5]
    assert list(loaded.shape.image_std) == list(CLIP_STD)


def test_a_blip2_for_retrieval_has_more_and_is_read_too(tmp_path: Path) -> None:
    """blip2-itm-vit-g: the Q-Former's text half, two projections and no language model."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    ours = tiny()
    former = {**ours.shape.qformer_config, "use_qformer_text_input": True, "vocab_size": 20}
    config = Blip2Config(vision_config=ours.shape.vision_config, qformer_config=former, num_query_tokens=5)
    public = Blip2ForImageTextRetrieval(config)
    public.load_state_dict(ours.state_dict(), strict=False)
    public.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "embeddings.word_embeddings.weight" in names
    assert "qformer.encoder.layer.0.intermediate.dense.weight" in names
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(VisionEncoder.load(tmp_path)(pixels), ours(pixels))


def test_configurations_and_weights_of_older_transformers(tmp_path: Path) -> None:
    """Every default of a PretrainedConfig spelt out, weights in half precision."""
    ours = tiny()
    ours.save(tmp_path)
    spelt = {
        "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
        "chunk_size_feed_forward": 0, "decoder_start_token_id": None, "finetuning_task": None, "is_decoder": False,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "num_beams": 1,
        "pruned_heads": {}, "return_dict": True, "tf_legacy_loss": False, "tie_word_embeddings": True,
        "torch_dtype": None, "torchscript": False, "transformers_version": "4.27.0.dev0", "use_bfloat16": False,
        "dropout": 0.0, "initializer_factor": 1.0, "num_channels": 3, "projection_dim": 512,
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] |= {**spelt, "model_type": "blip_2_vision_model"}
    config["qformer_config"] |= {**spelt, "model_type": "blip_2_qformer", "classifier_dropout": None}
    config |= {"model_type": "blip-2", "text_config": {"model_type": "opt"}, "use_decoder_only_language_model": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    half = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file({**half, "language_projection.weight": torch.zeros(4, 12)}, tmp_path / "model.safetensors")
    loaded = VisionEncoder.load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.query_tokens, half["query_tokens"].float())


def test_a_configuration_of_the_wrong_type_is_told_in_one_sentence(tmp_path: Path) -> None:
    tiny().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_size"] = "wide"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config\.json: describes no BLIP-2 encoder \(.*hidden_size.*\); get the"
    ):
        VisionEncoder.load(tmp_path)


# ------------------------------------------------------------------------------------------------- hub ids
def test_of_a_hub_repository_only_the_encoder_s_files_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, hub, cache = tiny(), tmp_path / "hub", tmp_path / "cache"
    _, towers = public_blip2(hub, ours)

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "Salesforce/blip2-tiny"
        cache.mkdir(exist_ok=True)
        for file in hub.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded, pixels = VisionEncoder.load("Salesforce/blip2-tiny"), torch.randn(1, 3, 32, 32)
    few = {"config.json", "preprocessor_config.json", "model.safetensors.index.json"}
    assert {file.name for file in cache.iterdir()} == few | towers
    assert len(towers) < len(list(hub.glob("model-*")))
    with torch.no_grad():
        assert torch.equal(loaded(pixels), ours(pixels))


def test_without_a_connection_the_hub_s_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError,
        match=r"^some/encoder: is no folder, and as a hub id it cannot be had \(.*\); check vision\.path",
    ) as error:
        VisionEncoder.load("some/encoder")
    assert "\n" not in str(error.value)

    snapshot = tmp_path / "models--some--encoder" / "snapshots" / "0123"
    tiny().save(snapshot)
    refs = tmp_path / "models--some--encoder" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    assert VisionEncoder.load("some/encoder").fingerprint() == tiny().fingerprint()

    (snapshot / "model.safetensors").unlink()  # an interrupted download
    with pytest.raises(
        CheckpointError, match=r"^some/encoder: .* cannot be had \(it lacks model\.safetensors\); check"
    ):
        VisionEncoder.load("some/encoder")


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save(tmp_path / "runs" / "vision")
    assert VisionEncoder.load("runs/vision").tokens == 5
