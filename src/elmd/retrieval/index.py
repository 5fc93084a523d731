"""The index of training utterances, search without leaks, and the demonstrations it yields (§3.3 end).

N candidates, Q queries. Candidates are training samples only. A query never meets itself or its own dialogue: that
would hand the model the very response it is to write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elmd.engine.files import atomic, read_json, read_lines, write_lines, write_text
from elmd.errors import ArtifactError, DataError
from elmd.labels import Emotion
from elmd.retrieval.search import Neighbours, Pairs, nearest, nearly_nearest
from elmd.types import Demonstration, Sample

VECTORS, IDS, DEMONSTRATIONS = "index.safetensors", "ids.json", "demonstrations.jsonl"


@dataclass(frozen=True)
class Queries:
    """What is searched for: vectors [Q, width] of one key, with the sample and dialogue each belongs to."""

    vectors: Tensor
    ids: Sequence[str]
    dialogues: Sequence[str]

    @classmethod
    def of(cls, vectors: Tensor, samples: Sequence[Sample]) -> Queries:
        return cls(vectors, [sample.id for sample in samples], [sample.dialogue for sample in samples])


@dataclass(frozen=True)
class Index:
    """Candidates in a fixed order.

    Cosines are those of double precision, rounded to fp32, so they do not depend on how queries fall into blocks, and
    equal vectors tie exactly; of ties the candidate that stands first wins.

    Attributes:
        ids, dialogues: of the candidate samples [N].
        vectors: unit rows [N, width] in fp32, by key (`e_u`, `E_s`).
    """

    ids: Sequence[str]
    dialogues: Sequence[str]
    vectors: Mapping[str, Tensor]

    @classmethod
    def build(cls, samples: Sequence[Sample], keys: Mapping[str, Tensor]) -> Index:
        """Index `samples`, whose utterances have the vectors `keys` [N, width] (see `retriever.encode`)."""
        unit = {key: F.normalize(vectors.double(), dim=-1).float() for key, vectors in keys.items()}
        return cls([sample.id for sample in samples], [sample.dialogue for sample in samples], unit)

    def save(self, folder: Path) -> None:
        """Write `index.safetensors` and `ids.json`."""
        with atomic(folder / VECTORS) as new:
            save_file({key: vectors.contiguous() for key, vectors in self.vectors.items()}, new)
        entries = [{"id": i, "dialogue": d} for i, d in zip(self.ids, self.dialogues, strict=True)]
        write_text(folder / IDS, json.dumps(entries, ensure_ascii=False, indent=0) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Index:
        """An index as `save` wrote it.

        Raises:
            ArtifactError: a file is missing, unreadable, or does not fit the other.
        """
        try:
            vectors = load_file(folder / VECTORS)
            entries = read_json(folder / IDS)
            index = cls([entry["id"] for entry in entries], [entry["dialogue"] for entry in entries], vectors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"is no whole index ({error})", where=folder, fix="make it again: stage=index force=true"
            ) from error
        if any(len(rows) != len(entries) for rows in vectors.values()):
            raise ArtifactError(
                f"{VECTORS} and {IDS} hold different numbers of candidates",
                where=folder,
                fix="make it again: stage=index force=true",
            )
        return index

    def search(
        self, key: str, queries: Queries, k: int, *, allow_same_dialogue: bool = False, approximately: bool = False
    ) -> Neighbours:
        """The k nearest candidates of each query by cosine (§3.3 end).

        Args:
            key: which of `vectors`.
            queries: Q queries.
            k: how many.
            allow_same_dialogue: lift the exclusion of the query itself and its dialogue; exists to show the leak.
            approximately: by FAISS, which may miss some (see `nearest.nearly_nearest`).

        Raises:
            DataError: fewer than k candidates are left to a query, or a vector is not finite.
            ConfigError: `approximately`, and FAISS is not installed.
        """
        rows = self._rows(key)
        unit = F.normalize(queries.vectors.double(), dim=-1)
        if not (unit.sum() + rows.sum()).isfinite():
            raise DataError("a vector is not finite", where=f"key {key}", fix="train the retriever again: stage=erm")
        excluded = self._excluded(queries)
        if allow_same_dialogue:
            excluded = Pairs(*(column[:0] for column in excluded))
        left = len(self.ids) - excluded.rows.bincount(minlength=len(queries.ids))
        if (left < k).any():
            worst = int(left.argmin())
            raise DataError(
                f"{k} to be retrieved, but only {int(left[worst])} of {len(self.ids)} training samples are outside "
                "its own dialogue",
                where=f"sample {queries.ids[worst]}",
                fix="train on more dialogues, or lower retriever.k",
            )
        return (nearly_nearest if approximately else nearest)(rows, unit, excluded, k)

    def _excluded(self, queries: Queries) -> Pairs:
        """Each query with itself and with the candidates of its dialogue."""
        numbers = {name: i for i, name in enumerate(dict.fromkeys([*self.dialogues, *queries.dialogues]))}
        place = {name: i for i, name in enumerate(self.ids)}
        dialogues = torch.tensor([numbers[name] for name in self.dialogues])
        own = torch.tensor([numbers[name] for name in queries.dialogues])
        itself = torch.tensor([place.get(name, -1) for name in queries.ids])
        # Candidates by dialogue: those of dialogue n are the `sizes[n]` from `starts[n]` on.
        by_dialogue, sizes = dialogues.argsort(stable=True), dialogues.bincount(minlength=len(numbers))
        starts = sizes.cumsum(0) - sizes
        rows = torch.arange(len(own)).repeat_interleave(sizes[own])
        nth = torch.arange(len(rows)) - (sizes[own].cumsum(0) - sizes[own])[rows]
        columns = by_dialogue[starts[own][rows] + nth]
        elsewhere = ((itself >= 0) & (dialogues[itself] != own)).nonzero()[:, 0]
        rows, columns = torch.cat([rows, elsewhere]), torch.cat([columns, itself[elsewhere]])
        order = rows.argsort(stable=True)
        return Pairs(rows[order], columns[order])

    def similarity(self, key: str, vectors: Tensor) -> Tensor:
        """Cosines [Q, N] in fp32 of the vectors [Q, width] with every candidate; nothing is excluded.

        Raises:
            DataError: the index does not hold this key.
        """
        return (F.normalize(vectors.double(), dim=-1) @ self._rows(key).double().T).float()

    def _rows(self, key: str) -> Tensor:
        if key not in self.vectors:
            raise DataError(
                f"the index has no key {key!r}, only {', '.join(sorted(self.vectors))}",
                where="retriever.key",
                fix="choose one of these, or train a retriever with self-separation",
            )
        return self.vectors[key]


def demonstrations(
    index: Index,
    candidates: Mapping[str, Sample],
    samples: Sequence[Sample],
    vectors: Tensor,
    *,
    key: str,
    k: int,
    allow_same_dialogue: bool = False,
    approximately: bool = False,
) -> dict[str, list[Demonstration]]:
    """The demonstration(s) R of each sample: responses r' of the nearest u', nearest first (§3.3 end).

    Args:
        candidates: the indexed samples, by id.
        samples: Q samples of any split.
        vectors: of their utterances [Q, width].
        key, k, allow_same_dialogue, approximately: see `Index.search`.
    """
    found = index.search(
        key, Queries.of(vectors, samples), k, allow_same_dialogue=allow_same_dialogue, approximately=approximately
    )
    result: dict[str, list[Demonstration]] = {}
    for sample, positions, similarity in zip(samples, found.positions.tolist(), found.similarity.tolist(), strict=True):
        sources = [candidates[index.ids[position]] for position in positions]
        result[sample.id] = [
            Demonstration(
                sample=sample.id,
                source=source.id,
                utterance=source.utterance.text,
                response=source.response.text,
                emotion=source.response.emotion,
                similarity=cosine,
            )
            for source, cosine in zip(sources, similarity, strict=True)
        ]
    return result


def save_demonstrations(path: Path, found: Mapping[str, Sequence[Demonstration]]) -> None:
    """Write one demonstration a line, in the order of samples, nearest first."""
    write_lines(path, (asdict(one) for several in found.values() for one in several))


def load_demonstrations(path: Path) -> dict[str, list[Demonstration]]:
    """Demonstrations by sample id, nearest first.

    Raises:
        DataError: naming the line that is no demonstration.
    """
    result: dict[str, list[Demonstration]] = {}
    for demonstration in read_lines(path, _demonstration, "demonstration", fix="run stage=index"):
        result.setdefault(demonstration.sample, []).append(demonstration)
    return result


def _demonstration(record: dict[str, Any]) -> Demonstration:
    return Demonstration(**{**record, "emotion": Emotion(record["emotion"])})
