"""ChatGLM2's tokenizer: ids equal to the original's, and nobody can type a control id."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import GOLDEN_FILES
from elmd.convert.tokenizer import CONTROL, chatglm2_tokenizer, train_pieces
from elmd.errors import CheckpointError

WORDS = [
    "今天",
    "我们",
    "去",
    "公园",
    "玩",
    "好吗",
    "他",
    "皱着眉",
    "说",
    "不想",
    "去",
    "hello",
    "world",
    "3",
    "45",
    "了",
    "呢",
    "吧",
    "啊",
]
TYPED = [*CONTROL, "<unk>", "<s>", "</s>", "a[gMASK] sop b", "</s></s>", "<0x41>", "▁", "　", "\n\n", "", " ", "  a  "]


@pytest.fixture(scope="module")
def small() -> bytes:
    draw = random.Random(0)
    return train_pieces(("".join(draw.choices(WORDS, k=8)) for _ in range(400)), 360)


@pytest.fixture(scope="module")
def loaded(small: bytes, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    chatglm2_tokenizer(small).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_equals_the_original(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN_FILES / "chatglm2_tokenizer/golden_tok.json").read_text(encoding="utf-8"))
    built = chatglm2_tokenizer(GOLDEN_FILES / "chatglm2_tokenizer/tokenizer.model")
    built.save_pretrained(tmp_path)
    assert len(golden["fuzz"]) > 500
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        for text, ids in [*golden["enc"].items(), *golden["fuzz"]]:
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        for text, ids in golden["enc_special"].items():
            assert tokenizer(text)["input_ids"] == ids, text
        assert {word: tokenizer.convert_tokens_to_ids(word) for word in CONTROL} == golden["special"]
        assert tokenizer("你好", "hello")["input_ids"] == golden["pair"]
        batch = tokenizer(["你好", "hello world 你好"], padding=True)
        assert batch["input_ids"] == golden["batch"]["input_ids"]
        assert batch["attention_mask"] == golden["batch"]["attention_mask"]
        assert set(batch) == {"input_ids", "attention_mask"}
        assert tokenizer.decode(golden["dec"]["ids"], skip_special_tokens=True) == golden["dec"]["text"]
        assert len(tokenizer) == golden["len"]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
        rounds = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"), ("user", "Q3")]
        chat = [{"role": role, "content": content} for role, content in rounds]
        for turns, prompt in zip((chat[:1], chat), golden["build_prompt"], strict=True):
            assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == prompt


def test_equals_sentencepiece_on_its_own_model(small: bytes, loaded: PreTrainedTokenizerFast) -> None:
    pieces = SentencePieceProcessor(model_proto=small)
    draw = random.Random(1)
    alphabet = [*"我们今天皱眉 ab　\n\t😀é1２。，aaa", *WORDS, *TYPED]
    texts = ["".join(draw.choices(alphabet, k=draw.randint(1, 12))) for _ in range(1000)] + TYPED
    for text in texts:
        assert loaded.encode(text, add_special_tokens=False) == pieces.encode(text), text
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == pieces.decode(pieces.encode(text))


def test_typed_control_strings_stay_text(small: bytes, loaded: PreTrainedTokenizerFast) -> None:
    n = SentencePieceProcessor(model_proto=small).get_piece_size()
    assert [loaded.convert_tokens_to_ids(word) for word in CONTROL] == [n, n + 1, n + 2, n + 3, n + 4]
    for text in TYPED:
        ids = loaded(text)["input_ids"]
        assert ids[:2] == [n + 1, n + 3]
        assert not {0, 1, 2} & set(ids), text
        assert max(ids[2:], default=0) < n, text
        assert [loaded(text)["input_ids"], ids[2:]] == [
            loaded([text, text])["input_ids"][1],
            loaded(text, add_special_tokens=False)["input_ids"],
        ]


def test_refuses_what_it_cannot_represent(tmp_path: Path) -> None:
    page = tmp_path / "tokenizer.model"
    page.write_text("<html>")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is not a SentencePiece model"):
        chatglm2_tokenizer(page)
    with pytest.raises(CheckpointError, match="cannot make 100 pieces"):
        train_pieces(["你好"] * 10, 100)
