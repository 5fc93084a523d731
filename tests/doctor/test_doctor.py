"""The doctor: what is missing or does not go together, how to get it, and how much memory training takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save

from elmd.cli import compose
from elmd.config import Config
from elmd.convert.chatglm2 import CHATGLM2_6B
from elmd.doctor import __main__ as command
from elmd.doctor.checkpoints import agreement, checkpoints, llm_config, loading, projector, visual_shape
from elmd.doctor.findings import Finding
from elmd.doctor.memory import Estimate, estimates
from elmd.errors import ConfigError
from elmd.models.memory import Memory

WEIGHTS = save({"w": torch.zeros(512)})  # only its header is read


def config(*overrides: str, experiment: str = "table2_m3ed", **paths: str | None) -> Config:
    """A configuration whose checkpoints lie at `paths` (llm, vision, retriever); None: not given."""
    cfg = compose([f"experiment={experiment}", "data.path=x", "llm.path=x", "vision.path=x", *overrides])
    for group, path in paths.items():
        getattr(cfg, group).path = path
    return cfg


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value) if isinstance(value, bytes) else path.write_text(json.dumps(value))


def finding(found: Any, what: str) -> Finding:
    (one,) = (one for one in found if one.what.startswith(what))
    return one


@pytest.fixture
def llm(llm_folder: Path, tmp_path: Path) -> Path:
    """A converted model without its weights: of them only the header of a whole file counts."""
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def change(path: Path, **values: Any) -> None:
    write(path, json.loads(path.read_text()) | values)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("chatglm2_6b", r"THUDM/chatglm2-6b to SRC, run python scripts/convert_chatglm2.py SRC DST, then llm.path=DST"),
        ("auto", "give a causal language model's folder"),
    ],
)
def test_a_path_that_is_not_given(name: str, fix: str) -> None:
    found = finding(checkpoints(config(f"llm={name}", llm=None)), "llm")
    assert (found.missing, found.found) == (True, "llm.path is not set")
    assert fix in found.fix


def test_every_known_name_says_where_it_comes_from(tmp_path: Path) -> None:
    for overrides, group in ((["vision=visualglm"], "vision"), (["vision=blip2"], "vision"), (["llm=glm4_9b"], "llm")):
        path = str(tmp_path / "nothing")
        found = finding(checkpoints(config(*overrides, **{group: path})), group)
        assert found.missing
        assert "no such folder; download huggingface.co/" in found.fix, overrides


CHATGLM = {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.X"}} | CHATGLM2_6B
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@pytest.mark.parametrize(
    ("group", "files", "found", "fix"),
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
def test_folders_that_cannot_be_used(tmp_path: Path, group: str, files: dict[str, Any], found: str, fix: str) -> None:
    for name, value in files.items():
        write(tmp_path / "it" / name, value)
    one = finding(checkpoints(config(**{group: str(tmp_path / "it")})), group)
    assert one.missing
    assert found in one.found
    assert fix.format(tmp_path / "it") in one.fix


def test_folders_and_hub_ids_that_can(tmp_path: Path, llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    write(tmp_path / "vision/config.json", {"vision_config": {}, "qformer_config": {}})
    write(tmp_path / "vision/model.safetensors", WEIGHTS)
    write(tmp_path / "retriever/modules.json", [])
    write(tmp_path / "retriever/0_Transformer/model.safetensors", WEIGHTS)
    paths = {"llm": str(llm), "vision": str(tmp_path / "vision"), "retriever": str(tmp_path / "retriever")}
    assert [(f.found, f.fix, f.missing) for f in checkpoints(config(**paths))] == [
        (path, "", False) for path in paths.values()
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub = finding(checkpoints(config(retriever="nobody/nothing")), "retriever")
    assert (hub.found, hub.missing) == ("hub id nobody/nothing", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert finding(checkpoints(config(retriever="nobody/nothing")), "retriever").missing
    assert {f.what for f in checkpoints(config("ablation=no_v"))} == {"llm=chatglm2_6b", "retriever=m3e_base"}
    assert {f.what for f in checkpoints(config("ablation=no_erm"))} == {"llm=chatglm2_6b", "vision=visualglm"}


def test_only_the_encoder_of_a_blip2_model_is_asked_for(tmp_path: Path) -> None:
    files = {"vision_model.a": "model-1.safetensors", "language_model.b": "model-2.safetensors"}
    write(tmp_path / "config.json", {"vision_config": {}, "qformer_config": {}})
    write(tmp_path / "model.safetensors.index.json", {"weight_map": files})
    write(tmp_path / "model-1.safetensors", WEIGHTS)
    assert not finding(checkpoints(config(vision=str(tmp_path))), "vision").missing
    (tmp_path / "model-1.safetensors").rename(tmp_path / "model-2.safetensors")
    assert "lacks 1 of 1 files" in finding(checkpoints(config(vision=str(tmp_path))), "vision").found


def test_an_adapter_is_no_weights(llm: Path) -> None:
    (llm / "adapter").mkdir()
    (llm / "model.safetensors").rename(llm / "adapter/adapter_model.safetensors")
    assert "has no weights" in finding(checkpoints(config(llm=str(llm))), "llm").found


def test_a_good_model_agrees_with_itself(llm: Path) -> None:
    found = {one.what: one for one in agreement(config(llm=str(llm)))}
    assert not [one for one in found.values() if one.missing or one.fix]
    assert set(found) == {"tokenizer", "end of text", "emotion words", "prompt", "longest row", "projector"}
    assert found["end of text"].found.startswith("id 2; padding 0")
    assert "7 distinct" in found["emotion words"].found
    assert "40 of them visual" in found["prompt"].found
    assert found["longest row"].found == "1,152 tokens, the model has 131,072 positions"
    assert found["projector"].found == "40 visual tokens a sample, 768 → 32 numbers each"
    assert "projector" not in {one.what for one in agreement(config("ablation=no_v", llm=str(llm)))}


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
    ("spoil", "what", "found", "fix", "missing"),
    [
        (without_template, "prompt", "has no chat template", "chat model's checkpoint", True),
        (fewer_rows, "tokenizer", "50 rows of embeddings", "of different models", True),
        (another_end, "end of text", "id 2; config.json: [7, 8]", "the tokenizer's", False),
        (another_end_generated, "end of text", "id 2; generation_config.json: 7", "the tokenizer's", False),
        (few_positions, "longest row", "1,152 tokens, the model has 1,151", "lower prompt.max_prompt_tokens", True),
        (no_tokenizer, "tokenizer", "cannot be loaded", "fetch or convert", True),
        (
            no_chinese,
            "emotion words",
            "高兴 惊讶 悲伤 厌恶 愤怒 恐惧 中性 not in the vocabulary",
            "knows Chinese",
            True,
        ),
        (
            another_prefix,
            "prefix in",
            "8 virtual tokens of 28 layers, 2 KV heads, 256",
            "has 2 layers, 2 KV heads, 16",
            True,
        ),
    ],
)
def test_what_does_not_go_together(
    llm: Path, spoil: Callable[[Path], None], what: str, found: str, fix: str, missing: bool
) -> None:
    spoil(llm)
    one = finding(agreement(config(llm=str(llm))), what)
    assert found in one.found
    assert fix in one.fix
    assert one.missing is missing


def test_a_prefix_of_this_model_is_recognised(llm: Path) -> None:
    from transformers import AutoModelForCausalLM

    from elmd.models.adapter import Prefix

    model = AutoModelForCausalLM.from_config(llm_config(config(llm=str(llm)))[0])  # type: ignore[index]
    Prefix.create(model, 8, 0.0).save(llm / "adapter")
    one = finding(agreement(config(llm=str(llm))), "prefix in")
    assert (one.missing, one.found) == (False, "8 virtual tokens of 2 layers, 2 KV heads, 16 numbers")


def test_an_adapter_to_begin_with(llm: Path, tmp_path: Path) -> None:
    cfg = config(f"eerg.adapter_from={tmp_path / 'adapter'}", llm=str(llm))
    one = finding(agreement(cfg), "eerg.adapter_from")
    assert (one.missing, one.fix) == (True, "give an adapter's folder, or leave it out")
    another_prefix(tmp_path)
    one = finding(agreement(cfg), "prefix in")
    assert one.missing
    assert "this language model has 2 layers" in one.fix


def test_a_prompt_that_leaves_no_room(llm: Path) -> None:
    one = finding(agreement(config("prompt.max_prompt_tokens=60", llm=str(llm))), "prompt")
    assert one.missing
    assert "the instruction and 40 video slots alone exceed 60 tokens" in one.found


def test_visual_tokens(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"num_query_tokens": 4, "qformer_config": {"hidden_size": 24}, "vision_config": {}})
    assert visual_shape(config(vision=str(tmp_path))) == (12, 24)
    assert visual_shape(config("vision=precomputed", "vision.shape=[16,512]")) == (24, 512)
    assert visual_shape(config("vision=none")) == (0, 0)


def test_the_public_shape_stands_in_for_a_model_that_is_not_there(llm: Path) -> None:
    for cfg in (config(llm=None), config(llm="/nowhere")):
        known = llm_config(cfg)
        assert known is not None
        assert (known[0].num_hidden_layers, known[0].vocab_size, known[1]) == (28, 65024, False)
    glm4 = llm_config(config("llm=glm4_9b", llm=None))
    assert glm4 is not None
    assert glm4[0].num_hidden_layers == 40
    assert llm_config(config("llm=auto", llm=None)) is None
    assert llm_config(config("llm=tiny", llm="bootstrap")) is None
    own = llm_config(config("llm=auto", llm=str(llm)))
    assert own is not None
    assert (own[0].num_hidden_layers, own[1]) == (2, True)


def test_estimates_of_both_stages(llm: Path) -> None:
    cfg = config(llm=str(llm))
    known = llm_config(cfg)
    assert known is not None
    rep, rep_again, eerg, eerg_again = estimates(cfg, known[0])
    assert [one.stage for one in (rep, rep_again, eerg, eerg_again)] == ["REP", "REP", "EERG", "EERG"]
    assert (eerg.rows, eerg.length) == (3, 1152)
    assert rep.memory.trainables == 16 * 769 * 32
    assert eerg.memory.trainables == 16 * (769 * 32 + 128 * 2 * 2 * 2 * 8)
    assert rep_again.memory.activations < rep.memory.activations < eerg.memory.activations
    assert eerg_again.memory.step < eerg.memory.step
    weights = sum(p.numel() for p in _model(known[0]).parameters()) * 2
    assert eerg.memory.weights == weights
    spread = list(estimates(cfg, known[0], share=4))
    assert spread[2].memory.weights == weights // 4 + 2 * weights // 2
    text_only = list(estimates(config("ablation=no_v", "eerg.adapter=lora", llm=str(llm)), known[0]))
    assert [one.stage for one in text_only] == ["EERG", "EERG"]
    assert text_only[0].memory.trainables == 16 * sum(
        8 * (m.in_features + m.out_features)
        for name, m in _model(known[0]).named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    )


def _model(config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_rows_that_fit() -> None:
    gib = 2**30
    estimate = Estimate("EERG", False, 2, 100, 16, Memory(10 * gib, gib, 3 * gib, gib, 0))
    assert estimate.fits(12.6) == 0
    assert estimate.fits(20.6) == 3  # 0.9 × 20 - 11 = 7 GiB for rows of 2
    assert estimate.fits(100.6) == 39


def run(cfg: Config, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        command.doctor(cfg, Accelerator(cpu=True))
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    return code, " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_nothing_given(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(llm=None, vision=None)
    cfg.data.path = None
    code, told = run(cfg, capsys)
    assert code == 1
    assert "5 things missing" in told  # data, videos, llm, vision, and the retriever, as tests run without the hub
    for word in (
        "RUCM3ED",
        "convert_chatglm2.py",
        "convert_visualglm.py",
        "moka-ai/m3e-base",
        "EERG, checkpointing",
        "141 GB",
        "llm=chatglm2_6b (assumed: the public model's shape)",
    ):
        assert word in told, word


@pytest.fixture
def complete(llm: Path, tmp_path: Path) -> Config:
    """Table 2 with everything in place, as far as the doctor looks."""
    write(tmp_path / "m3ed/annotation.json", {})
    write(tmp_path / "videos/show/1.mp4", b"")
    write(tmp_path / "vision/config.json", {"vision_config": {}, "qformer_config": {}})
    write(tmp_path / "vision/model.safetensors", WEIGHTS)
    write(tmp_path / "m3e/modules.json", [])
    write(tmp_path / "m3e/model.safetensors", WEIGHTS)
    paths = {"llm": str(llm), "vision": str(tmp_path / "vision"), "retriever": str(tmp_path / "m3e")}
    cfg = config(f"runs_dir={tmp_path / 'runs'}", f"data.video_root={tmp_path / 'videos'}", **paths)
    cfg.data.path = str(tmp_path / "m3ed")
    return cfg


def test_everything_there(
    complete: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told = run(complete, capsys)
    assert code == 0, told
    assert "Nothing is missing." in told
    assert "stage eerg not made yet stage=all makes it" in told
    assert "stage generate not made yet python -m elmd.evaluate makes it" in told
    assert "assumed" not in told
    assert "✗" not in told
    monkeypatch.setattr(command, "PATIENCE", 0)  # as if the weights were large
    code, told = run(complete, capsys)
    assert code == 0
    assert "stages not looked at" in told
    assert "checksums" in told


def test_one_thing_gone(complete: Config, capsys: pytest.CaptureFixture[str]) -> None:
    Path(str(complete.data.path), "annotation.json").unlink()
    code, told = run(complete, capsys)
    assert code == 1
    assert "1 thing missing" in told
    assert "not there:" in told


def test_a_model_whose_memory_cannot_be_predicted_is_no_reason_to_stop(
    complete: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from elmd.doctor import memory
    from elmd.errors import CheckpointError

    def refuse(*_: Any, **__: Any) -> None:
        raise CheckpointError("cannot be predicted")

    monkeypatch.setattr(memory, "step_memory", refuse)
    code, told = run(complete, capsys)
    assert code == 0
    assert "cannot be predicted." in told


@pytest.mark.parametrize(
    ("files", "overrides", "found"),
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
    tmp_path: Path, files: list[str], overrides: list[str], found: str | None
) -> None:
    (tmp_path / "videos").mkdir()
    for file in files:
        write(tmp_path / "videos" / file, b"")
    one = finding(command.data(config(f"data.video_root={tmp_path / 'videos'}", *overrides)), "videos")
    assert one.missing is (found is not None)
    assert (found or str(tmp_path)) in one.found


@pytest.mark.parametrize(
    ("shape", "found", "fix"),
    [
        ((32, 768), "768 → 32 numbers", ""),
        ((32, 24), "24 → 32 numbers", "features of 768 are to become 32"),
        ((4096, 768), "768 → 4096 numbers", "features of 768 are to become 32"),
    ],
)
def test_a_projector_to_begin_with(llm: Path, tmp_path: Path, shape: tuple[int, int], found: str, fix: str) -> None:
    write(tmp_path / "vision/config.json", {"vision_config": {}, "qformer_config": {}})
    file = tmp_path / "glm_proj.safetensors"
    write(file, save({"linear.weight": torch.zeros(shape), "linear.bias": torch.zeros(shape[0])}))
    cfg = config(f"rep.projector_from={file}", llm=str(llm), vision=str(tmp_path / "vision"))
    (one,) = projector(cfg)
    assert one.missing is bool(fix)
    assert found in one.found
    assert one.fix.startswith(fix)


@pytest.mark.parametrize(
    ("contents", "found", "fix"),
    [
        (None, "p.safetensors", "no such file"),
        (b"text", "is no visual projector (", "glm_proj.safetensors"),
        (WEIGHTS, "is no visual projector", "glm_proj.safetensors"),
    ],
)
def test_what_is_no_projector(tmp_path: Path, contents: bytes | None, found: str, fix: str) -> None:
    if contents is not None:
        write(tmp_path / "p.safetensors", contents)
    overrides = [f"rep.projector_from={tmp_path / 'p.safetensors'}"]
    (one,) = projector(config(*overrides))
    assert one.missing
    assert found in one.found
    assert fix in one.fix
    assert not list(projector(config("ablation=no_v", *overrides)))


@pytest.mark.parametrize(
    ("override", "what", "found", "fix"),
    [
        ("llm.dtype=int8", "llm.dtype", "'int8' is no floating dtype", "bfloat16"),
        ("vision.dtype=half8", "vision.dtype", "'half8' is no floating dtype", "bfloat16"),
        ("llm.attention=fast", "llm.attention", "fast cannot be used here (", "llm.attention=sdpa"),
        ("llm.attention=flash_attention_2", "llm.attention", "flash_attention_2 cannot be used here (", "its package"),
    ],
)
def test_what_models_cannot_be_loaded_with(
    complete: Config,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    what: str,
    found: str,
    fix: str,
) -> None:
    assert not list(loading(complete))
    if "flash" in override:  # also where it is installed
        from transformers import PreTrainedModel

        def gone(*_: Any, **__: Any) -> None:
            raise ImportError("the package doesn't seem to be installed.")

        monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", gone)
    group, key = what.split(".")
    setattr(getattr(complete, group), key, override.partition("=")[2])
    one = finding(loading(complete), what)
    assert one.missing
    assert found in one.found
    assert fix in one.fix
    code, told = run(complete, capsys)
    assert code == 1
    assert f"✗ {what}" in told
    assert ("EERG, checkpointing" in told) is (what != "llm.dtype"), "the estimate needs no package"


def test_numbers_out_of_range_are_told_at_once(complete: Config) -> None:
    complete.eerg.batch_size = 0
    with pytest.raises(ConfigError, match=r"^eerg\.batch_size: 0 is out of range; use 1 or more\.$"):
        command.doctor(complete, Accelerator(cpu=True))


def test_a_full_disk_is_told(
    complete: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    one = finding(command.machine(complete, Accelerator(cpu=True)), "runs_dir")
    assert not one.missing
    assert "0.5 GiB free" in one.found
    assert "less than 1 GiB" in one.fix
