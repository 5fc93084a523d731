"""The ChatGLM2 converter on random checkpoints: the same numbers as the plain reference, and refusals that say why."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm2_reference import FIXED, PTUNING, logits, random_checkpoint
from conftest import ROOT
from elmd.convert.chatglm2 import CHATGLM2_6B, convert_chatglm2, convert_prefix, native_config, prefix_table
from elmd.data.collate import IGNORED, Batch, places
from elmd.errors import CheckpointError
from elmd.models.adapter import Prefix
from elmd.models.elmd import Elmd
from elmd.models.llm import load_llm

SCRIPT = ROOT / "scripts" / "convert_chatglm2.py"

SIZES = {
    "odd layers": {"layers": 3, "groups": 2},
    "one group": {"layers": 1, "groups": 1, "heads": 6, "hidden": 40, "width": 12},
    "a group for each head": {"layers": 2, "groups": 4, "width": 32, "hidden": 48, "ffn": 20},
}


def padded(rows: int, high: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded ids, mask and positions [rows, 11]."""
    ids = torch.randint(3, high, (rows, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for i in range(rows):
        mask[i, : 3 * i] = 0
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    random_checkpoint(tmp_path / "src", layers=2, shards=2, format="bin", prefix=5)
    return tmp_path / "src"


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_the_reference(tmp_path: Path, sizes: dict[str, int], count: int, format: str) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    config, weights = random_checkpoint(src, **sizes, shards=count, format=format, prefix=5, seed=count)
    result = convert_chatglm2(src, dst, src / PTUNING)
    assert (result.written.files, result.ids, result.prefix) == (count, 405, 5)
    assert not (tmp_path / "dst.partial").exists()

    llm, _ = load_llm(dst)
    ids, mask, positions = padded(3, config["padded_vocab_size"])
    labels = torch.full_like(ids, IGNORED)
    batch = Batch(
        ids, torch.zeros_like(ids).bool(), mask.bool(), positions, labels, None, keep=10, at=places(labels, 10)
    )  # fmt: skip
    table = weights["transformer.prefix_encoder.embedding.weight"]
    for model, prefix in ((Elmd(llm), None), (Elmd.load(dst, llm).eval(), table)):
        ours = model(batch, keep=11).logits
        theirs = logits(weights, config, ids, mask=mask, positions=positions, prefix=prefix)
        assert theirs.std() > 0.3
        assert (ours - theirs)[mask.bool()].abs().max() < 3e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    random_checkpoint(tmp_path / "src", dtype=dtype, layers=1)
    convert_chatglm2(tmp_path / "src", tmp_path / "dst")
    assert {tensor.dtype for tensor in load_file(tmp_path / "dst/model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype="auto").dtype == dtype


def test_what_else_the_folder_holds(checkpoint: Path, tmp_path: Path) -> None:
    convert_chatglm2(checkpoint, tmp_path / "dst")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert tokenizer.model_max_length == FIXED["seq_length"] == model.config.max_position_embeddings
    pieces = SentencePieceProcessor(model_proto=(checkpoint / "tokenizer.model").read_bytes())
    n = pieces.get_piece_size()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert text == "[Round 1]\n\n问：你好\n\n答："
    assert tokenizer(text)["input_ids"] == [n + 1, n + 3, *pieces.encode(text)]
    for typed in ("[gMASK] sop", "</s>", "<unk>eop"):  # control strings in a user's text stay text
        ids = tokenizer(typed)["input_ids"]
        assert max(ids[2:]) < n
        assert not {0, 1, 2} & set(ids)
        assert ids[2:] == pieces.encode(typed)


def test_without_a_tokenizer_the_weights_are_converted_and_that_is_logged(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / "tokenizer.model").unlink()
    with caplog.at_level("WARNING", "elmd"):
        assert convert_chatglm2(checkpoint, tmp_path / "dst").ids is None
    assert "tokenizer.model is missing: the result will have no tokenizer" in caplog.text
    AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert not list((tmp_path / "dst").glob("*token*"))


def test_others_may_read_what_the_umask_lets_them(checkpoint: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        convert_chatglm2(checkpoint, tmp_path / "dst", checkpoint / PTUNING)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "dst").rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys((p.name for p in files), 0o640)


def test_names_without_transformer_in_front(tmp_path: Path) -> None:
    src = tmp_path / "src"
    _, weights = random_checkpoint(src, layers=1)
    convert_chatglm2(src, tmp_path / "with")
    save_file({name.removeprefix("transformer."): value for name, value in weights.items()}, src / "model.safetensors")
    convert_chatglm2(src, tmp_path / "without")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_an_embedding_smaller_than_the_tokenizer_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elmd.log.logger.propagate", True)
    random_checkpoint(tmp_path / "src", layers=1, pieces=400, rows=300)
    convert_chatglm2(tmp_path / "src", tmp_path / "dst")
    assert "405 ids, but the embedding only 300 rows" in caplog.text


# --- prefixes ---


@pytest.mark.parametrize("projected", [False, True])
def test_prefix_is_what_peft_writes(tmp_path: Path, projected: bool) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    _, weights = random_checkpoint(src, layers=3, groups=1, prefix=7, projected=projected)
    convert_chatglm2(src, dst, src / PTUNING)
    llm, _ = load_llm(dst)
    prefix = Prefix.create(llm, 7, 0.0)
    prefix.save(tmp_path / "peft")
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (dst / "adapter", tmp_path / "peft")
    )
    del ours["base_model_name_or_path"], theirs["base_model_name_or_path"]
    assert ours == theirs

    part = {name.rpartition("prefix_encoder.")[2]: tensor for name, tensor in weights.items() if "prefix" in name}
    expected = part["embedding.weight"]
    if projected:
        network = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Tanh(), torch.nn.Linear(64, 96))
        network.load_state_dict({name.removeprefix("trans."): value for name, value in part.items() if "trans" in name})
        expected = network(expected).detach()
    loaded = PeftModel.from_pretrained(load_llm(dst)[0], dst / "adapter").get_prompt(2)
    table = expected.view(7, 3, 2, 1, 16)
    for i, layer in enumerate(loaded.layers):
        for kind, states in enumerate((layer.keys, layer.values)):
            assert (states - table[:, i, kind].transpose(0, 1)).abs().max() < 1e-6


def test_prefix_names_and_places(checkpoint: Path, tmp_path: Path) -> None:
    """A file or a folder, .bin or safetensors, beside other weights, with and without `transformer.` in front."""
    config = native_config(json.loads((checkpoint / "config.json").read_text()))
    expected = prefix_table(checkpoint / PTUNING, config)
    assert torch.equal(prefix_table(checkpoint / PTUNING / "pytorch_model.bin", config), expected)
    file = tmp_path / "model.safetensors"
    save_file({"prefix_encoder.embedding.weight": expected.half(), "transformer.output_layer.weight": expected}, file)
    table = prefix_table(file, config)
    assert table.dtype == torch.float32
    assert torch.equal(table, expected.half().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: {"lm_head.weight": part["embedding.weight"]}, "no whole prefix.*lacks embedding.weight"),
        (lambda part: part | {"trans.0.bias": torch.ones(4)}, r"lacks trans\.0\.weight, trans\.2\.bias"),
        (lambda part: {"embedding.weight": part["embedding.weight"][:, :-1]}, r"\[5, 127\], but \[5, 128\] fits"),
        (
            lambda part: part | {"trans.0.weight": torch.ones(4, 127), "trans.0.bias": torch.ones(4),
                                 "trans.2.weight": torch.ones(128, 4), "trans.2.bias": torch.ones(128)},
            r"trans\.0\.weight is \[4, 127\], but \[4, 128\] fits",
        ),
    ],
)  # fmt: skip
def test_refused_prefixes(checkpoint: Path, tmp_path: Path, change: Callable, message: str) -> None:
    file = checkpoint / PTUNING / "pytorch_model.bin"
    name = "transformer.prefix_encoder."
    parts = change({key.removeprefix(name): value for key, value in torch.load(file, weights_only=True).items()})
    torch.save({name + key if "lm_head" not in key else key: value for key, value in parts.items()}, file)
    with pytest.raises(CheckpointError, match=message):
        convert_chatglm2(checkpoint, tmp_path / "dst", file)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_prefix_of_a_folder_that_was_converted_before(checkpoint: Path, tmp_path: Path) -> None:
    together, apart = tmp_path / "together", tmp_path / "apart"
    convert_chatglm2(checkpoint, together, checkpoint / PTUNING)
    convert_chatglm2(checkpoint, apart)
    with pytest.raises(CheckpointError, match="is no converted ChatGLM2"):
        convert_prefix(checkpoint / PTUNING, checkpoint)
    assert convert_prefix(checkpoint / PTUNING, apart) == 5
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (together / "adapter" / name).read_bytes() == (apart / "adapter" / name).read_bytes()
    with pytest.raises(CheckpointError, match="adapter: exists already"):
        convert_prefix(checkpoint / PTUNING, apart)


# --- configurations ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multi_query_attention": False}, "multi_query_attention is False, where only True can be represented"),
        ({"multi_query_attention": None}, "multi_query_attention is None"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"post_layer_norm": False}, "post_layer_norm is False"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"original_rope": False}, "original_rope is False"),
        ({"rope_ratio": 50}, "rope_ratio is 50.*GLM-4 and the 32k variants"),
        ({"quantization_bit": 4}, "is quantised to 4 bits; convert the half-precision checkpoint"),
        ({"pre_seq_len": 128}, r"checkpoint of P-Tuning v2 \(pre_seq_len 128\); give .* this one to --ptuning"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'chatglm'"),
        ({"model_type": "glm"}, "is a Glm model already; use it as llm.path"),
        ({"position_encoding_2d": True}, "is the first ChatGLM"),
        ({"_name_or_path": "THUDM/chatglm3-6b"}, "is ChatGLM3: the same layers, but prompts made of role tokens"),
        ({"multi_query_group_num": 3}, "4 heads of width 16 in 3 groups do not fit"),
        ({"kv_channels": 18}, "4 heads of width 18 in 2 groups do not fit"),
        ({"kv_channels": 0}, "kv_channels is 0, not a value such as 128"),
        ({"num_layers": "28"}, "num_layers is '28'"),
        ({"layernorm_epsilon": True}, "layernorm_epsilon is True"),
    ],
)
def test_refused_configurations(checkpoint: Path, tmp_path: Path, change: dict, message: str) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=rf"^{path}: .*{message}"):
        convert_chatglm2(checkpoint, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("key", [key for key in CHATGLM2_6B if key not in ("add_qkv_bias", "multi_query_attention")])
def test_missing_keys(key: str) -> None:
    assert native_config(CHATGLM2_6B).num_hidden_layers == 28
    with pytest.raises(CheckpointError, match=key):
        native_config({name: value for name, value in CHATGLM2_6B.items() if name != key})


def test_left_out_settings_have_the_originals_defaults() -> None:
    assert native_config(CHATGLM2_6B).attention_bias is True
    plain = {name: value for name, value in CHATGLM2_6B.items() if name != "add_qkv_bias"}
    assert native_config(plain).attention_bias is False
    with pytest.raises(CheckpointError, match="multi_query_attention is False"):
        native_config({name: value for name, value in CHATGLM2_6B.items() if name != "multi_query_attention"})


def test_chatglm3_is_known_by_its_role_tokens(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}')
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: is ChatGLM3"):
        convert_chatglm2(checkpoint, tmp_path / "dst")


# --- the command line ---


def test_script_as_a_user_runs_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "dst"
    arguments = [SCRIPT, checkpoint, dst, "--ptuning", checkpoint / PTUNING]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    assert out == f"converted: {dst}\n"
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(dst).parameters())
    assert f"{parameters:,}" in err
    assert (dst / "adapter/adapter_model.safetensors").is_file()


def test_script_in_parts_and_its_errors(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elmd.log.setup", lambda: None)
    monkeypatch.delenv("ELMD_DEBUG", raising=False)
    main = runpy.run_path(str(SCRIPT))["main"]
    dst = tmp_path / "dst"
    main([str(checkpoint), str(dst)])
    main([str(dst), "--ptuning", str(checkpoint / PTUNING)])
    assert capsys.readouterr().out == f"converted: {dst}\n" * 2
    assert (dst / "adapter/adapter_model.safetensors").is_file()
    for arguments, code, message in (
        ([checkpoint, dst], 1, f"error: {dst}: exists already; move it away, or give another folder for the result.\n"),
        ([dst], 2, "give SRC and DST, or DST and --ptuning"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (code, "")
        assert message in err
