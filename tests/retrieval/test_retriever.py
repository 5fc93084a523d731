"""The retriever's folder and what it makes of texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import BertModel

from elmd.errors import CheckpointError
from elmd.retrieval import load_retriever
from elmd.retrieval.retriever import Tokens, add_separation, cut_texts, encode, separation_of
from encoders import WIDTH

TEXTS = ["我好开心！", "你今天开心吗", "他难过", "我不生气了，你呢", "害怕", "好的。"]


@pytest.fixture
def trained(bert: Path) -> SentenceTransformer:
    torch.manual_seed(1)
    return add_separation(load_retriever(bert), 4, "mlp")


def test_saved_and_loaded_retriever_is_equal_bit_for_bit(trained: SentenceTransformer, tmp_path: Path) -> None:
    trained.max_seq_length = 9
    trained.save_pretrained(str(tmp_path), create_model_card=False)
    loaded = load_retriever(tmp_path)
    assert loaded.max_seq_length == 9
    before, after = trained.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for key in ("e_u", "E_s"):
        assert torch.equal(encode(trained, TEXTS)[key], encode(loaded, TEXTS)[key])
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}


def test_it_is_an_ordinary_sentence_transformer_whose_encode_gives_the_slots(trained_folder: Path) -> None:
    model = load_retriever(trained_folder)
    keys = encode(model, TEXTS, batch_size=2)
    assert (keys["e_u"].shape, keys["E_s"].shape) == ((6, WIDTH), (6, 4 * WIDTH))
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), keys["E_s"], rtol=1e-5, atol=1e-6)
    separation = separation_of(model)
    assert separation is not None
    torch.testing.assert_close(separation.separate(keys["e_u"]).flatten(1), keys["E_s"])
    assert model.get_embedding_dimension() == 4 * WIDTH


def test_raw_retriever_is_mean_pooling_and_has_no_slots(bert: Path) -> None:
    model = load_retriever(bert, max_tokens=7)
    assert (model.max_seq_length, separation_of(model)) == (7, None)
    keys = encode(model, TEXTS)
    assert list(keys) == ["e_u"]
    tokens = model.tokenizer([TEXTS[0]], return_tensors="pt", truncation=True, max_length=7)
    with torch.no_grad():
        expected = BertModel.from_pretrained(bert).eval()(**tokens).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(keys["e_u"][:1], expected, rtol=1e-5, atol=1e-6)
    assert cut_texts(model, ["好", TEXTS[0], TEXTS[3]]) == 1


def test_encoding_keeps_the_order_and_gives_equal_texts_equal_vectors(trained: SentenceTransformer) -> None:
    keys = encode(trained, [*TEXTS, TEXTS[3]], batch_size=2)
    alone = torch.cat([encode(trained, [text])["e_u"] for text in TEXTS])
    torch.testing.assert_close(keys["e_u"][:-1], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(keys["E_s"][3], keys["E_s"][-1])


def test_a_normalize_module_is_kept_raw_and_left_out_under_self_separation(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Normalize

    plain = load_retriever(bert)
    SentenceTransformer(modules=[*plain, Normalize()]).save_pretrained(str(tmp_path), create_model_card=False)
    raw = load_retriever(tmp_path)
    torch.testing.assert_close(encode(raw, TEXTS)["e_u"].norm(dim=1), torch.ones(len(TEXTS)))
    assert torch.equal(encode(add_separation(raw, 2, "mlp"), TEXTS)["e_u"], encode(plain, TEXTS)["e_u"])


def test_prompts_of_a_checkpoint_are_used(bert: Path, tmp_path: Path) -> None:
    plain = load_retriever(bert)
    SentenceTransformer(modules=list(plain), prompts={"query": "我是"}, default_prompt_name="query").save_pretrained(
        str(tmp_path), create_model_card=False
    )
    loaded = load_retriever(tmp_path)
    torch.testing.assert_close(encode(loaded, ["开心"])["e_u"], encode(plain, ["我是开心"])["e_u"])
    torch.testing.assert_close(torch.tensor(loaded.encode(["开心"])), encode(loaded, ["开心"])["e_u"])


@pytest.mark.parametrize("kind", ["evil.Module", "os.path.Transformer", "sentence_transformers.base.modules.Dense"])
def test_foreign_modules_are_refused_by_name(trained_folder: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "copy"))
    listing = json.loads((folder / "modules.json").read_text())
    listing[2]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match=f"modules.json: module '{kind}' is not one a retriever may have"):
        load_retriever(folder)


def test_broken_folders_are_refused_with_their_name(trained_folder: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/nowhere/at all: no such folder; check retriever\.path"):
        load_retriever("/nowhere/at all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: cannot be loaded as a sentence encoder"):
        load_retriever(tmp_path / "empty")
    lost = Path(shutil.copytree(trained_folder, tmp_path / "lost"))
    (lost / "2_SelfSeparation" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2_SelfSeparation: model\.safetensors missing; train"):
        load_retriever(lost)
    narrow = Path(shutil.copytree(trained_folder, tmp_path / "narrow"))
    (narrow / "2_SelfSeparation" / "config.json").write_text('{"width": 8, "slots": 4, "kind": "mlp"}')
    with pytest.raises(CheckpointError, match=r"the weights do not fit config\.json"):
        load_retriever(narrow)
    order = Path(shutil.copytree(trained_folder, tmp_path / "order"))
    listing = json.loads((order / "modules.json").read_text())
    (order / "modules.json").write_text(json.dumps(listing[1:]))
    with pytest.raises(CheckpointError, match="the modules Pooling, SelfSeparation are not those of a retriever"):
        load_retriever(order)
    pickled = Path(shutil.copytree(bert, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="with safetensors weights"):
        load_retriever(pickled)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_group_is_what_the_tokenizer_makes_of_its_texts(trained: SentenceTransformer, side: str) -> None:
    trained.tokenizer.padding_side = side
    tokens = Tokens(trained, TEXTS)
    for members in ([1, 2, 4], [5, 0], [3]):
        batch, expected = tokens.batch(torch.tensor(members)), trained.preprocess([TEXTS[i] for i in members])
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(batch[name], value) if isinstance(value, Tensor) else batch[name] == value
