"""The index of training utterances, and which of them a query may meet (§3.3 end).

N candidates, Q queries. Candidates are training samples only. A query never meets itself or its own dialogue: that
would hand the model the very response it is to write. How candidates are ranked is a strategy (`retrieval.strategy`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elmd.engine.files import atomic, read_json, write_text
from elmd.errors import ArtifactError, DataError
from elmd.retrieval.search import Pairs
from elmd.types import Sample

VECTORS, IDS = "index.safetensors", "ids.json"


@dataclass(frozen=True)
class Queries:
    """What is searched for: vectors [Q, width] of one key, with the sample and the dialogue that each belongs to."""

    vectors: Tensor
    ids: Sequence[str]
    dialogues: Sequence[str]

    @classmethod
    def of(cls, vectors: Tensor, samples: Sequence[Sample]) -> Queries:
        return cls(vectors, [sample.id for sample in samples], [sample.dialogue for sample in samples])


class Admissible(NamedTuple):
    """Candidates [N, width] in fp32 and queries [Q, width] in double, unit rows, and the pairs that must not meet."""

    candidates: Tensor
    queries: Tensor
    excluded: Pairs


@dataclass(frozen=True)
class Index:
    """Candidates in a fixed order, which breaks ties.

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
                f"is not a complete index ({error})", where=folder, fix="make it again: stage=index force=true"
            ) from error
        if any(len(rows) != len(entries) for rows in vectors.values()):
            raise ArtifactError(
                f"{VECTORS} and {IDS} hold different numbers of candidates",
                where=folder,
                fix="make it again: stage=index force=true",
            )
        return index

    def admissible(self, key: str, queries: Queries, k: int, *, allow_same_dialogue: bool = False) -> Admissible:
        """What a search among the candidates that each query may meet takes.

        Args:
            key: which of `vectors`.
            queries: Q queries.
            k: how many candidates each query must have left.
            allow_same_dialogue: lift the exclusion of the query itself and its dialogue; exists to show the leak.

        Raises:
            DataError: fewer than k candidates are left to a query, or a vector is not finite.
        """
        rows = self._rows(key)
        unit = F.normalize(queries.vectors.double(), dim=-1)
        if not (unit.sum() + rows.sum()).isfinite():
            raise DataError("a vector is not finite", where=f"key {key}", fix="train the retriever again: stage=erm")
        nothing = torch.zeros(0, dtype=torch.long)
        excluded = Pairs(nothing, nothing) if allow_same_dialogue else self._excluded(queries)
        left = len(self.ids) - excluded.rows.bincount(minlength=len(queries.ids))  # [Q]
        if (left < k).any():
            worst = int(left.argmin())
            raise DataError(
                f"{k} to be retrieved, but only {int(left[worst])} of {len(self.ids)} training samples are outside "
                "its own dialogue",
                where=f"sample {queries.ids[worst]}",
                fix="train on more dialogues, or lower retriever.k",
            )
        return Admissible(rows, unit, excluded)

    def _excluded(self, queries: Queries) -> Pairs:
        """Each query with itself and with the candidates of its dialogue."""
        row_of = {name: row for row, name in enumerate(self.ids)}
        rows_of: dict[str, list[int]] = {}
        for row, dialogue in enumerate(self.dialogues):
            rows_of.setdefault(dialogue, []).append(row)
        rows, columns = [], []
        for query, (name, dialogue) in enumerate(zip(queries.ids, queries.dialogues, strict=True)):
            own = list(rows_of.get(dialogue, ()))
            if (itself := row_of.get(name)) is not None and self.dialogues[itself] != dialogue:
                own.append(itself)
            rows += [query] * len(own)
            columns += own
        return Pairs(torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long))

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
