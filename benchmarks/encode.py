"""Utterances to vectors: ELMD's encode against sentence-transformers' and against batches without sorting."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

from benchmarks.harness import Case, Way
from elmd.config import ErmConfig, RetrieverConfig
from elmd.retrieval.retriever import add_separation, encode, load_retriever

#: Every fortieth quantile of the characters of CPED's utterances (valid split, 2 699 samples).
UTTERANCES = [
    1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 10, 11, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 23, 24, 26, 27, 29, 31, 34, 37,
    40, 45, 49, 55, 62, 71, 87, 110, 228,
]  # fmt: skip
#: m3e-base has 21 128 tokens; CPED's utterances use about this many of them.
CHARACTERS = [chr(0x4E00 + i) for i in range(4000)]


def drawn_texts(count: int) -> list[str]:
    """Random characters, as many as real utterances have; the same texts each time."""
    draw = random.Random(0)
    texts = []
    for _ in range(count):
        at, rest = divmod(draw.random() * (len(UTTERANCES) - 1), 1)
        low, high = UTTERANCES[int(at) : int(at) + 2]
        texts.append("".join(draw.choices(CHARACTERS, k=round(low + rest * (high - low)))))
    return texts


def about(texts: list[str]) -> str:
    """The lengths of `texts`, in words."""
    lengths = [len(text) for text in texts]
    return f"{len(texts)} texts of CPED's lengths, {statistics.mean(lengths):.0f} characters on average"


def retriever(width: int, layers: int, *, dropout: float) -> SentenceTransformer:
    """A BERT of m3e-base's kind, smaller and with random weights, its tokenizer, and self-separation on top."""
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
        torch.manual_seed(0)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS]
        Path(name, "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        BertTokenizerFast(vocab=str(Path(name, "vocab.txt")), model_max_length=512).save_pretrained(name)
        config = BertConfig(
            vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
            intermediate_size=4 * width, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        BertModel(config).save_pretrained(name)
        model = load_retriever(name, max_tokens=RetrieverConfig.max_tokens)
        return add_separation(model, ErmConfig.slots, ErmConfig.separation.value)


def cases(small: bool) -> Iterator[Case]:
    width, layers, count = (32, 1, 12) if small else (256, 4, 512)
    model, texts = retriever(width, layers, dropout=0.1).eval(), drawn_texts(count)

    def ours() -> Tensor:
        return encode(model, texts)["E_s"]

    def theirs() -> Tensor:
        return model.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    def in_given_order(size: int) -> Tensor:
        with torch.inference_mode():
            batches = [texts[i : i + size] for i in range(0, len(texts), size)]
            return torch.cat([model(model.preprocess(batch))["sentence_embedding"] for batch in batches])

    yield Case(
        "Utterances to vectors E_s",
        f"BERT of {width} × {layers}, {about(texts)}",
        [
            Way("elmd", ours),
            Way("sentence-transformers, encode", theirs),
            Way("batches of 32 in given order", lambda: in_given_order(32)),
            Way("one by one", lambda: in_given_order(1)),
        ],
        tolerance=1e-5,
        per=count,
        unit="utterances",
        note="sentence-transformers sorts by length, too, and pads batches of 32; elmd cuts batches of 128 where "
        "padding costs more than another pass.",
    )
