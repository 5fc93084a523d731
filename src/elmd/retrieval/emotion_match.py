"""How often a retriever finds training utterances of the query's emotion, at any point of its training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from elmd.metrics.retrieval import match_scores
from elmd.retrieval.index import Index
from elmd.retrieval.retriever import Tokens, encode
from elmd.types import Sample

#: By subset of the queries and by key: `match@1`, `match@5`, `mrr`, `chance`, `n`, `skipped`.
Scores = dict[str, dict[str, dict[str, float]]]


class EmotionMatch:
    """Scores of the utterances of a split against those of the training split.

    All texts are tokenised once, and each is encoded once for given weights: vectors are kept until the weights
    change.

    Args:
        model: the retriever; its weights may change between calls.
        splits: samples by split, `train` among them.
    """

    def __init__(self, model: SentenceTransformer, splits: Mapping[str, Sequence[Sample]]):
        self.model, self.splits = model, splits
        self.tokens = Tokens(model, [sample.utterance.text for part in splits.values() for sample in part])
        self._weights = ""
        self._row_of: dict[str, int] = {}  # of the texts encoded with these weights
        self._keys: dict[str, Tensor] = {}  # their vectors [texts, width], by key

    def scores(self, split: str) -> Scores:
        """Emotion-match@1/5, MRR and chance of the split's utterances; candidates of their own dialogue are left out.

        Returns:
            By subset (`all`, and each tag that utterances carry) and key (`e_u`, and `E_s` where the model has it).
        """
        if (weights := _digest(self.model)) != self._weights:
            self._weights, self._row_of, self._keys = weights, {}, {}
        train, queries = self.splits["train"], self.splits[split]
        index = Index.build(train, self._vectors(train))
        tags = sorted({tag for sample in queries for tag in sample.utterance.tags})
        subsets = {"all": list(range(len(queries)))} | {
            tag: [i for i, sample in enumerate(queries) if tag in sample.utterance.tags] for tag in tags
        }
        result: Scores = {subset: {} for subset in subsets}
        for key, rows in self._vectors(queries).items():
            similarity = index.similarity(key, rows)  # [queries, train]
            for subset, members in subsets.items():
                result[subset][key] = match_scores(
                    similarity[members],
                    [queries[i].utterance.emotion for i in members],
                    [sample.utterance.emotion for sample in train],
                    [queries[i].dialogue for i in members],
                    [sample.dialogue for sample in train],
                )
        return result

    def _vectors(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Vectors of the samples' utterances [len(samples), width], by key."""
        texts = [sample.utterance.text for sample in samples]
        if new := [text for text in dict.fromkeys(texts) if text not in self._row_of]:
            keys = encode(self.model, new, tokens=self.tokens)
            self._row_of |= {text: len(self._row_of) + i for i, text in enumerate(new)}
            self._keys = {key: torch.cat([self._keys.get(key, rows[:0]), rows]) for key, rows in keys.items()}
        rows = torch.tensor([self._row_of[text] for text in texts])
        return {key: vectors[rows] for key, vectors in self._keys.items()}


def _digest(model: SentenceTransformer) -> str:
    """SHA-256 of the weights."""
    total = hashlib.sha256()
    for tensor in model.state_dict().values():
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
