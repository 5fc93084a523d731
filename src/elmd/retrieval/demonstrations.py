"""Demonstrations R: the responses of the retrieved training samples, and the file they are kept in (§3.3 end)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from elmd.engine.files import read_lines, write_lines
from elmd.labels import Emotion
from elmd.retrieval.index import Index, Queries
from elmd.retrieval.strategy import STRATEGIES, Settings
from elmd.types import Demonstration, Sample

DEMONSTRATIONS = "demonstrations.jsonl"


def demonstrations(
    index: Index, candidates: Mapping[str, Sample], samples: Sequence[Sample], vectors: Tensor, settings: Settings
) -> dict[str, list[Demonstration]]:
    """The k demonstrations R of each sample: responses r' of the best u' by the strategy of `settings`, best first.

    Args:
        candidates: the indexed samples, by id.
        samples: Q samples of any split.
        vectors: of their utterances [Q, width], by the key of `settings`.
    """
    neighbours = STRATEGIES[settings.strategy](index, Queries.of(vectors, samples), settings)
    result: dict[str, list[Demonstration]] = {}
    for sample, positions, cosines in zip(
        samples, neighbours.positions.tolist(), neighbours.similarity.tolist(), strict=True
    ):
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
            for source, cosine in zip(sources, cosines, strict=True)
        ]
    return result


def save_demonstrations(path: Path, by_sample: Mapping[str, Sequence[Demonstration]]) -> None:
    """Write one demonstration a line, in the order of samples, best first."""
    write_lines(path, (asdict(shown) for ranked in by_sample.values() for shown in ranked))


def load_demonstrations(path: Path) -> dict[str, list[Demonstration]]:
    """Demonstrations by sample id, best first.

    Raises:
        DataError: the file cannot be read, or a line is not a demonstration; the line is named.
    """
    result: dict[str, list[Demonstration]] = {}
    for shown in read_lines(path, _demonstration, "demonstration", fix="run stage=index"):
        result.setdefault(shown.sample, []).append(shown)
    return result


def _demonstration(record: dict[str, Any]) -> Demonstration:
    return Demonstration(**{**record, "emotion": Emotion(record["emotion"])})
