"""The stand-in for m3e-base: a BERT over characters with mean pooling, as a plain SentenceTransformer."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from tempfile import TemporaryDirectory

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, BertTokenizer

from elmd.retrieval.retriever import Tokens, embed, encode
from elmd.tiny.standins import Standin, Training, hold_out, shuffled
from elmd.training.loop import Positions

#: Pieces of every BERT vocabulary, before the letters.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_retriever(
    twins: Sequence[tuple[str, str]], *, hidden: int, training: Training, batch: int = 64
) -> tuple[SentenceTransformer, dict[str, float]]:
    """A BERT over characters with mean pooling, taught that two turns of one dialogue belong together.

    Args:
        twins: pairs of texts from one dialogue each; one in `HOLD_OUT` is held out.

    Returns:
        the encoder, a plain SentenceTransformer; `twin_match@1`: how often a held-out text's nearest among 64 is its
        twin; `parameters`.
    """
    torch.manual_seed(training.seed)
    letters = sorted({letter for pair in twins for text in pair for letter in text if not letter.isspace()})
    # A letter is a piece on its own and inside a word, so that words and numbers in Latin script are read too.
    inner = [f"##{letter}" for letter in letters if letter.isascii() or letter.isalpha()]
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *letters, *inner])}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=max(1, hidden // 32),
        intermediate_size=2 * hidden, max_position_embeddings=128, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.05,
    )  # fmt: skip
    with TemporaryDirectory() as start:  # Transformer begins from files only
        BertTokenizer(vocab=vocabulary, do_lower_case=False, model_max_length=128).save_pretrained(start)
        BertModel(config).save_pretrained(start)
        encoder = Transformer(start, max_seq_length=128)
    model = SentenceTransformer(
        modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")],
        device=str(training.accelerator.device),
        similarity_fn_name="cosine",
    )
    metrics = Twins(model, twins, hidden, batch, training.seed).train(training, "sentence encoder")
    return model, {**metrics, "parameters": sum(p.numel() for p in model.parameters())}


class Twins(Standin):
    """Learns which two texts are of one dialogue, and to keep a text's letters: a real encoder holds more than topics.

    Batches are positions in the pairs that are not held out.
    """

    metric = "twin_match@1"

    def __init__(self, model: SentenceTransformer, twins: Sequence[tuple[str, str]], width: int, size: int, seed: int):
        self.model, self.size, self.seed = model, size, seed
        # The topic of a long turn shows in its beginning.
        self.held, self.kept = hold_out([(first[:64], second[:64]) for first, second in twins])
        self.tokens = Tokens(model, [text for pair in self.kept for text in pair])
        self.spell = nn.Linear(width, len(model.tokenizer)).to(model.device)
        for name, parameter in model.named_parameters():
            if ".pooler." in name:  # sees no gradient under mean pooling
                parameter.requires_grad_(False)
        self.modules = {"encoder": model, "spell": self.spell}

    def batches(self, epoch: int) -> list[Positions]:
        return shuffled(len(self.kept), self.size, Random(f"retriever-{self.seed}-{epoch}"))

    def loss(self, batch: Positions) -> tuple[Tensor, int]:
        self.model.train()
        texts = [self.kept[i][side] for side in (0, 1) for i in batch]
        e, run = embed(self.model, self.tokens, texts)
        cosine = F.normalize(e, dim=-1)
        scores = cosine[: len(batch)] @ cosine[len(batch) :].T / 0.1
        rows = [self.tokens.row_of[text] for text in texts]
        ids = self.tokens.rows["input_ids"][rows].long().to(e.device)
        held = torch.zeros(len(ids), self.spell.out_features, device=e.device).scatter_(1, ids, 1.0)[:, len(SPECIAL) :]
        letters = -(self.spell(e)[:, len(SPECIAL) :].log_softmax(-1) * held).sum(-1) / held.sum(-1).clamp(min=1)
        return F.cross_entropy(scores, torch.arange(len(batch), device=e.device)) + letters.mean(), run

    def evaluate(self) -> dict[str, float]:
        e = encode(self.model, [text for pair in self.held for text in pair])["e_u"]
        first, second = F.normalize(e, dim=-1).view(-1, 2, e.shape[-1]).unbind(1)
        hits = [
            (a @ b.T).argmax(-1) == torch.arange(len(a)) for a, b in zip(first.split(64), second.split(64), strict=True)
        ]
        return {"twin_match@1": torch.cat(hits).float().mean().item()}
