"""What must hold before hours are spent: the rules of a configuration, and the files that it names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from elmd.checks import CHECKS, Inspection, Seen, preflight, results
from elmd.checks.agreement import visual_shape
from elmd.cli import compose
from elmd.config import Config
from elmd.convert.chatglm2 import CHATGLM2_6B
from elmd.convert.tokenizer import chatglm2_tokenizer, train_pieces
from elmd.errors import CheckpointError, ConfigError, ElmdError
from elmd.models.llm import load_llm

WEIGHTS = save({"w": torch.zeros(512)})  # only its header is read

#: What a chain that has nothing of these yet will run.
LAST_STAGES = ("index", "rep", "eerg")


def config(*overrides: str, experiment: str = "table2_m3ed", **paths: str | None) -> Config:
    """A configuration whose checkpoints lie at `paths` (llm, vision, retriever); None: not given."""
    cfg = compose([f"experiment={experiment}", "data.path=x", "llm.path=x", "vision.path=x", *overrides])
    for group, path in paths.items():
        getattr(cfg, group).path = path
    return cfg


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value) if isinstance(value, bytes) else path.write_text(json.dumps(value))


def change(path: Path, **values: Any) -> None:
    write(path, json.loads(path.read_text()) | values)


def everything(cfg: Config) -> dict[str, Seen | ElmdError | None]:
    """The result of every check that applies, by name."""
    return {check.name: result for check, result in results(CHECKS, Inspection(cfg))}


def passed(cfg: Config, name: str) -> Seen:
    seen = everything(cfg)[name]
    assert isinstance(seen, Seen), seen
    return seen


def refused(cfg: Config, name: str) -> ElmdError:
    error = everything(cfg)[name]
    assert isinstance(error, ElmdError), error
    return error


#: Checks that open the language model's tokenizer.
AGREE = ("tokenizer", "end of text", "emotion words", "prompt", "longest row", "visual tokens")


@pytest.fixture
def llm(llm_folder: Path, tmp_path: Path) -> Path:
    """A converted model without its weights: of them only the header of a whole file counts."""
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def test_every_check_has_a_name_of_its_own_and_stands_after_what_it_needs() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for at, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:at]), check.name


def test_a_configuration_is_checked_without_the_libraries_that_take_seconds_to_import() -> None:
    code = "import sys, elmd.cli; elmd.cli.compose([]); print(*{'torch', 'transformers'} & set(sys.modules))"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# --------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(
    ("group", "name", "fix"),
    [
        ("llm", "chatglm2_6b", "THUDM/chatglm2-6b to SRC, run python scripts/convert_chatglm2.py SRC DST, then llm.p"),
        ("llm", "auto", "give a causal language model's folder"),
        ("vision", "visualglm", "download huggingface.co/THUDM/visualglm-6b"),
        ("vision", "blip2", "download huggingface.co/Salesforce/blip2-opt-2.7b"),
        ("llm", "glm4_9b", "download huggingface.co/THUDM/glm-4-9b-chat-hf"),
    ],
)
def test_a_checkpoint_that_is_not_there(group: str, name: str, fix: str, tmp_path: Path) -> None:
    error = refused(config(f"{group}={name}", **{group: None}), f"{group}.path")
    assert f"{group}={name} names no checkpoint" in error.what
    assert fix in str(error.fix)
    error = refused(config(f"{group}={name}", **{group: str(tmp_path / "nothing")}), group)
    assert error.what == "no such folder"
    assert fix in str(error.fix)


CHATGLM = {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.X"}} | CHATGLM2_6B
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@pytest.mark.parametrize(
    ("group", "files", "what", "fix"),
    [
        (
            "llm",
            {"config.json": CHATGLM},
            "ChatGLM2 as published, not converted",
            "convert_chatglm2.py {0} {0}-converted, then llm.path={0}-converted",
        ),
        ("llm", {"config.json": CHATGLM | {"rmsnorm": False}}, "rmsnorm", "ChatGLM2-6B"),
        (
            "llm",
            {"config.json": {"model_type": "chatglm", "eva_config": {}}},
            "VisualGLM, whose language",
            "THUDM/chatglm2-6b",
        ),
        ("llm", {"config.json": {"model_type": "baichuan"}}, "no model_type 'baichuan'", "without remote code"),
        ("llm", {"config.json": {"model_type": "glm"}}, "has no weights", "convert_chatglm2"),
        ("llm", {"config.json": {"model_type": "glm"}, "a.bin": WEIGHTS}, "are .bin files", "safetensors"),
        ("llm", {"config.json": b"{", "model.safetensors": WEIGHTS}, "config.json cannot be read", "convert_chatglm2"),
        ("llm", {"model.safetensors": WEIGHTS}, "config.json is not there", "convert_chatglm2"),
        (
            "llm",
            {"config.json": {"model_type": "glm"}, "model.safetensors": b"version https://git-lfs"},
            "git's pointer",
            "git lfs pull",
        ),
        (
            "llm",
            {
                "config.json": {"model_type": "glm"},
                "model.safetensors.index.json": INDEX,
                "model-2.safetensors": WEIGHTS,
            },
            "lacks 1 of 2 files of weights, the first is model-1",
            "fetch",
        ),
        (
            "llm",
            {"config.json": {"model_type": "glm"}, "model.safetensors": WEIGHTS[:-1]},
            "model.safetensors: is damaged or cut short (",
            "fetch this file again",
        ),
        (
            "llm",
            {"config.json": {"model_type": "glm"}, "model.safetensors": b"\xff" * 2048},
            "model.safetensors: is damaged or cut short (",
            "fetch this file again",
        ),
        ("retriever", {"modules.json": [], "0/model.safetensors": WEIGHTS[:-1]}, "cut short (", "fetch this file"),
        (
            "vision",
            {"config.json": {"model_type": "chatglm", "eva_config": {}}},
            "VisualGLM as published",
            "convert_visualglm.py {0} {0}-vision, then vision.path={0}-vision",
        ),
        ("vision", {"model_config.json": {}}, "VisualGLM as published", "convert_visualglm.py {0} {0}-vision"),
        ("vision", {"config.json": CHATGLM}, "no image encoder", "THUDM/visualglm-6b"),
        (
            "vision",
            {"config.json": {"model_type": "clip"}, "model.safetensors": WEIGHTS},
            "no vision_config",
            "visualglm",
        ),
        ("retriever", {"modules.json": []}, "has no weights", "moka-ai/m3e-base"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, group: str, files: dict[str, Any], what: str, fix: str) -> None:
    for name, value in files.items():
        write(tmp_path / "it" / name, value)
    error = refused(config(**{group: str(tmp_path / "it")}), group)
    assert what in str(error)
    assert fix.format(tmp_path / "it") in str(error.fix)


def test_folders_and_hub_ids_that_can(tmp_path: Path, llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    write(tmp_path / "vision/config.json", {"vision_config": {}, "qformer_config": {}})
    write(tmp_path / "vision/model.safetensors", WEIGHTS)
    write(tmp_path / "retriever/modules.json", [])
    write(tmp_path / "retriever/0_Transformer/model.safetensors", WEIGHTS)
    paths = {"llm": str(llm), "vision": str(tmp_path / "vision"), "retriever": str(tmp_path / "retriever")}
    all_there = everything(config(**paths))
    names = {"llm": "chatglm2_6b", "vision": "visualglm", "retriever": "m3e_base"}
    assert {group: all_there[group] for group in paths} == {
        group: Seen(f"{names[group]}: {path}") for group, path in paths.items()
    }
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert passed(config(retriever="nobody/nothing"), "retriever").text == "m3e_base: hub id nobody/nothing"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in str(refused(config(retriever="nobody/nothing"), "retriever"))
    groups = {"llm", "vision", "resnet", "retriever"}
    assert everything(config("ablation=no_v")).keys() & groups == {"llm", "retriever"}
    assert everything(config("ablation=no_erm")).keys() & groups == {"llm", "vision"}


def test_only_the_encoder_of_a_blip2_model_is_asked_for(tmp_path: Path) -> None:
    files = {"vision_model.a": "model-1.safetensors", "language_model.b": "model-2.safetensors"}
    write(tmp_path / "config.json", {"vision_config": {}, "qformer_config": {}})
    write(tmp_path / "model.safetensors.index.json", {"weight_map": files})
    write(tmp_path / "model-1.safetensors", WEIGHTS)
    passed(config(vision=str(tmp_path)), "vision")
    (tmp_path / "model-1.safetensors").rename(tmp_path / "model-2.safetensors")
    assert "lacks 1 of 1 files" in str(refused(config(vision=str(tmp_path)), "vision"))


def test_an_adapter_is_no_weights(llm: Path) -> None:
    (llm / "adapter").mkdir()
    (llm / "model.safetensors").rename(llm / "adapter/adapter_model.safetensors")
    assert "has no weights" in str(refused(config(llm=str(llm)), "llm"))


# ---------------------------------------------------------------------------------------------------------- agreement
def test_a_good_model_agrees_with_itself(llm: Path) -> None:
    seen: Any = everything(config(llm=str(llm)))
    assert not [name for name in AGREE if isinstance(seen[name], ElmdError) or seen[name].advice]
    assert seen["end of text"].text == "id 2; padding 0"
    assert "7 distinct" in seen["emotion words"].text
    assert "40 of them visual" in seen["prompt"].text
    assert seen["longest row"].text == "1,152 tokens, the model has 131,072 positions"
    assert seen["visual tokens"].text == "40 a sample, 768 → 32 numbers each"
    assert "visual tokens" not in everything(config("ablation=no_v", llm=str(llm)))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def fewer_rows(folder: Path) -> None:
    change(folder / "config.json", vocab_size=50)


def another_end(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=[7, 8])


def another_end_generated(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=7)


def few_positions(folder: Path) -> None:
    change(folder / "config.json", max_position_embeddings=1151)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_chinese(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "A": 2}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    no_tokenizer(folder)
    tokenizer.save_pretrained(folder)


def another_prefix(folder: Path) -> None:
    saved = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8, "num_layers": 28, "num_attention_heads": 2}
    write(folder / "adapter/adapter_config.json", saved | {"token_dim": 256})


@pytest.mark.parametrize(
    ("spoil", "name", "what", "fix"),
    [
        (without_template, "prompt", "has no chat template", "chat model's checkpoint"),
        (fewer_rows, "tokenizer", "its embedding 50 rows", "of different models"),
        (few_positions, "longest row", "1,152 tokens, the model has 1,151", "lower llm.max_prompt_tokens"),
        (no_tokenizer, "tokenizer", "has no tokenizer that AutoTokenizer loads", "fetch its tokenizer's files"),
        (no_chinese, "emotion words", "高兴 惊讶 悲伤 厌恶 愤怒 恐惧 中性 not in the vocabulary", "knows Chinese"),
        (
            another_prefix,
            "llm's adapter",
            "a prefix of 28 layers, 2 KV heads and 256 numbers, this language model has 2, 2 and 16",
            "use the model that it was trained with",
        ),
    ],
)
def test_what_does_not_go_together(llm: Path, spoil: Callable[[Path], None], name: str, what: str, fix: str) -> None:
    spoil(llm)
    error = refused(config(llm=str(llm)), name)
    assert what in str(error)
    assert fix in str(error.fix)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (another_end, "id 2; config.json: [7, 8]; padding 0"),
        (another_end_generated, "id 2; generation_config.json: 7; padding 0"),
    ],
)
def test_another_end_of_text_is_no_fault(llm: Path, spoil: Callable[[Path], None], text: str) -> None:
    spoil(llm)
    assert passed(config(llm=str(llm)), "end of text") == Seen(text, "targets will end in the tokenizer's")


def test_a_prefix_of_this_model_is_recognised(llm: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from elmd.models.adapter import Prefix

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llm))
    Prefix.create(model, 8, 0.0).save(llm / "adapter")
    seen = passed(config(llm=str(llm)), "llm's adapter")
    assert seen.text == f"{llm / 'adapter'}: 8 virtual tokens of 2 layers, 2 KV heads, 16 numbers"


def test_an_adapter_to_begin_with(llm: Path, tmp_path: Path) -> None:
    cfg = config(f"eerg.adapter_from={tmp_path / 'adapter'}", llm=str(llm))
    assert refused(cfg, "eerg.adapter_from").fix == "give an adapter's folder, or leave it out"
    another_prefix(tmp_path)
    assert "this language model has 2, 2 and 16" in str(refused(cfg, "eerg.adapter_from"))


def test_a_prompt_that_leaves_no_room(llm: Path) -> None:
    error = refused(config("llm.max_prompt_tokens=60", llm=str(llm)), "prompt")
    assert "the instruction and 40 video slots alone exceed 60 tokens" in str(error)


def test_visual_tokens(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"num_query_tokens": 4, "qformer_config": {"hidden_size": 24}, "vision_config": {}})
    assert visual_shape(config(vision=str(tmp_path))) == (12, 24)
    assert visual_shape(config("vision=precomputed", "vision.shape=[16,512]")) == (24, 512)
    assert visual_shape(config("vision=none")) == (0, 0)
    assert visual_shape(config("vision=tiny", vision="bootstrap")) == (4, 64)  # those of its frames at least


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ((32, 768), None),
        ((32, 24), "takes 24 numbers to 32, and features of 768 are to become 32"),
        ((4096, 768), "takes 768 numbers to 4096, and features of 768 are to become 32"),
    ],
)
def test_a_projector_to_begin_with(llm: Path, tmp_path: Path, shape: tuple[int, int], what: str | None) -> None:
    write(tmp_path / "vision/config.json", {"vision_config": {}, "qformer_config": {}})
    file = tmp_path / "glm_proj.safetensors"
    write(file, save({"linear.weight": torch.zeros(shape), "linear.bias": torch.zeros(shape[0])}))
    cfg = config(f"rep.projector_from={file}", llm=str(llm), vision=str(tmp_path / "vision"))
    if what is None:
        assert passed(cfg, "rep.projector_from").text == f"{file}: 768 → 32 numbers"
    else:
        assert refused(cfg, "rep.projector_from").what == what


@pytest.mark.parametrize(
    ("contents", "what", "fix"),
    [
        (None, "p.safetensors", "correct the path"),
        (b"text", "is no visual projector: it is damaged or cut short (", "glm_proj.safetensors"),
        (WEIGHTS, "is no visual projector", "glm_proj.safetensors"),
    ],
)
def test_what_is_no_projector(tmp_path: Path, contents: bytes | None, what: str, fix: str) -> None:
    if contents is not None:
        write(tmp_path / "p.safetensors", contents)
    overrides = [f"rep.projector_from={tmp_path / 'p.safetensors'}"]
    error = refused(config(*overrides), "rep.projector_from")
    assert what in error.what
    assert fix in str(error.fix)
    assert "rep.projector_from" not in everything(config("ablation=no_v", *overrides))


@pytest.mark.parametrize(
    ("override", "name", "what", "fix"),
    [
        ("llm.dtype=int8", "llm.dtype", "'int8' is no floating dtype", "bfloat16"),
        ("vision.dtype=half8", "vision.dtype", "'half8' is no floating dtype", "bfloat16"),
        ("llm.attention=fast", "llm.attention", "there is no attention 'fast'", "sdpa"),
        ("llm.attention=flash_attention_2", "attention", "'flash_attention_2' cannot be used here (", "its package"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_what_models_cannot_be_loaded_with(
    llm: Path, monkeypatch: pytest.MonkeyPatch, override: str, name: str, what: str, fix: str, there: bool
) -> None:
    cfg = config(llm=str(llm) if there else None)
    assert not isinstance(everything(cfg)[name], ElmdError)
    if "flash" in override:  # also where it is installed
        from transformers import PreTrainedModel

        def absent(*_: Any, **__: Any) -> None:
            raise ImportError("the package doesn't seem to be installed.")

        monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", absent)
    key, _, value = override.partition("=")
    group, _, field = key.partition(".")
    setattr(getattr(cfg, group), field, value)
    error = refused(cfg, name)
    assert what in error.what
    assert fix in str(error.fix)


# ---------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize(
    ("files", "overrides", "what"),
    [
        (["a/1.mp4"], [], None),
        (["a/notes.txt"], [], "holds no .mp4 file"),
        ([], [], "holds no .mp4 file"),
        (["a/1.mp4"], ["data.video_template='{show}/{dialogue}.mkv'"], "holds no .mkv file"),
        (["a/1/0001.JPG"], ["data.video_template='{show}/{dialogue}'"], None),
        (["a/1.mp4"], ["data.video_template='{show}/{dialogue}'"], "holds no frames"),
        (["a/notes.txt"], ["vision=none", "data.on_missing_clip=text_only"], None),
        (["a/notes.txt"], ["vision=none"], "holds no .mp4 file"),
    ],
)
def test_a_folder_of_videos_holds_some(
    tmp_path: Path, files: list[str], overrides: list[str], what: str | None
) -> None:
    (tmp_path / "videos").mkdir()
    for file in files:
        write(tmp_path / "videos" / file, b"")
    cfg = config(f"data.video_root={tmp_path / 'videos'}", *overrides)
    if what is None:
        assert passed(cfg, "videos").text == str(tmp_path / "videos")
    else:
        error = refused(cfg, "videos")
        assert (error.where, error.what) == (str(tmp_path / "videos"), what)


# ----------------------------------------------------------------------------------------------------------- preflight
def test_a_language_model_is_looked_at_before_the_long_stages(llm_folder: Path, tmp_path: Path) -> None:
    """stage=all would come to it after the retriever's training and all clips."""

    def refusal(*choices: str, change: Callable[[Path], object] | None = None) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(llm_folder, folder)
        if change:
            change(folder)
        cfg = compose(["llm=auto", f"llm.path={folder}", *choices])
        with pytest.raises(ElmdError) as caught:
            preflight(cfg, LAST_STAGES)
        return str(caught.value)

    preflight(compose(["llm=auto", f"llm.path={llm_folder}"]), LAST_STAGES)
    preflight(compose([]), LAST_STAGES)  # the stand-in is still to be made

    def other_tokenizer(folder: Path) -> None:
        chatglm2_tokenizer(train_pieces(["今天我们去公园玩，好不好？"] * 50, 275)).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))

    def no_tokenizer(folder: Path) -> None:
        for path in folder.glob("*token*"):
            path.unlink()

    def published(folder: Path) -> None:
        write(folder / "config.json", CHATGLM)

    def without_template(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()

    assert "its tokenizer has ids up to" in refusal(change=other_tokenizer)
    assert "has no tokenizer that AutoTokenizer loads" in refusal(change=no_tokenizer)
    assert "ChatGLM2 as published" in refusal(change=published)
    assert "has no chat template" in refusal(change=without_template)
    assert "cannot be used here" in refusal("llm.attention=flash_attention_2")
    assert "exceed 12 tokens" in refusal("llm.max_prompt_tokens=12")
    assert "is no visual projector" in refusal(f"rep.projector_from={llm_folder}/model.safetensors")


@pytest.mark.parametrize("key", ["llm.dtype", "vision.dtype"])
def test_a_wrong_dtype_is_refused_with_the_command_line(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: 'int8' is no floating dtype; choose from auto, float32, bfloat16"):
        compose([f"{key}=int8"])


def test_a_search_that_is_not_installed_is_told_before_there_is_anything_to_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    preflight(compose(["retriever.search=auto"]), LAST_STAGES)
    with pytest.raises(ConfigError, match="FAISS is not installed"):
        preflight(compose(["retriever.search=faiss"]), LAST_STAGES)
    preflight(compose(["retriever.search=faiss"]), ["rep", "eerg"])


def test_a_truncated_shard_is_no_bug(llm_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llm_folder, tmp_path / "llm")
    with (tmp_path / "llm" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"cannot be loaded as a language model .* in whole safetensors files"):
        load_llm(tmp_path / "llm")
