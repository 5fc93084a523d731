"""Whether what is retrieved shares the query's label: emotion-match@k, topic-match@k, MRR. Fractions in [0, 1].

match@k is the mean share of the k nearest candidates that have the query's label (precision at k), so `chance`, the
share of all allowed candidates that have it, is the floor for every k. MRR is the mean of 1 / rank of the first
candidate with that label, 0 where there is none. Equal similarities keep the order of the candidates.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

KS = (1, 5)
CHUNK = 1024  # queries at a time: bounds memory to CHUNK × N


def match_scores(
    similarity: Any,
    query_labels: Sequence[Hashable],
    candidate_labels: Sequence[Hashable],
    query_dialogues: Sequence[Hashable] | None = None,
    candidate_dialogues: Sequence[Hashable] | None = None,
    ks: Sequence[int] = KS,
) -> dict[str, float | int]:
    """match@k, MRR and chance from similarities; candidates of the query's own dialogue are left out.

    Args:
        similarity: [Q, N] array or CPU tensor, larger is nearer, without NaN.
        query_labels, candidate_labels: Q and N labels (emotions, topics, ...).
        query_dialogues, candidate_dialogues: Q and N dialogue ids; None leaves nothing out.

    Returns:
        `match@k` for each k, `mrr`, `chance`, `n` scored queries and `skipped` ones, which have no candidate left.

    Raises:
        ValueError: shapes that do not fit, NaN, or no query with a candidate.
    """
    similarity = np.asarray(similarity)
    shape = (len(query_labels), len(candidate_labels))
    if similarity.shape != shape:
        raise ValueError(f"similarity has shape {similarity.shape}, the labels say {shape}")
    if (query_dialogues is None) != (candidate_dialogues is None):
        raise ValueError("give the dialogues of queries and candidates, or neither")
    labels_q, labels_c = _codes(query_labels, candidate_labels)  # [Q], [N]
    dialogues_q, dialogues_c = _codes(query_dialogues or range(shape[0]), candidate_dialogues or [None] * shape[1])
    totals = dict.fromkeys([*(f"match@{k}" for k in ks), "mrr", "chance"], 0.0)
    scored = 0
    for start in range(0, shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        nearness = np.array(similarity[rows], dtype=np.float64)  # [q, N]
        if np.isnan(nearness).any():
            raise ValueError("similarity holds NaN")
        allowed = dialogues_q[rows, None] != dialogues_c[None, :]  # [q, N]
        match = (labels_q[rows, None] == labels_c[None, :]) & allowed  # [q, N]
        nearness[~allowed] = -np.inf
        left = allowed.sum(axis=1)  # [q]: candidates of each query
        kept = left > 0
        if not kept.any():
            continue
        nearness, match, left = nearness[kept], match[kept], left[kept]
        scored += len(left)
        totals["chance"] += (match.sum(axis=1) / left).sum()
        totals["mrr"] += _reciprocal_ranks(nearness, match).sum()
        hits = _nearest_match(nearness, match, max(ks))  # [q, max k]
        for k in ks:
            totals[f"match@{k}"] += (hits[:, :k].sum(axis=1) / np.minimum(k, left)).sum()
    if not scored:
        raise ValueError("no query has a candidate outside its own dialogue")
    means = {name: float(total / scored) for name, total in totals.items()}
    return means | {"n": scored, "skipped": shape[0] - scored}


def _codes(queries: Sequence[Hashable], candidates: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Integers [Q] and [N] that are equal where the values are."""
    codes: dict[Hashable, int] = {}
    q, c = ([codes.setdefault(value, len(codes)) for value in values] for values in (queries, candidates))
    return np.array(q, dtype=np.int64), np.array(c, dtype=np.int64)


def _reciprocal_ranks(nearness: np.ndarray, match: np.ndarray) -> np.ndarray:
    """1 / rank of each query's first match [Q], 0 without a match: counts what is nearer, without sorting.

    Args:
        nearness: [Q, N], -inf for candidates that are not allowed.
        match: [Q, N].
    """
    rows = np.arange(len(nearness))
    first = np.where(match, nearness, -np.inf).argmax(axis=1)  # [Q]; of equals, the first candidate
    best = nearness[rows, first][:, None]  # [Q, 1]
    earlier = np.arange(nearness.shape[1])[None, :] < first[:, None]  # [Q, N]
    nearer = (nearness > best) | ((nearness == best) & earlier)
    return np.where(match[rows, first], 1 / (1 + nearer.sum(axis=1)), 0.0)


def _nearest_match(nearness: np.ndarray, match: np.ndarray, k: int) -> np.ndarray:
    """Whether each of the k nearest matches [Q, min(k, N)]. k is small: k passes cost less than a sort of N."""
    rest, rows = nearness.copy(), np.arange(len(nearness))
    columns = []
    for _ in range(min(k, nearness.shape[1])):
        nearest = rest.argmax(axis=1)  # [Q]
        columns.append(match[rows, nearest] & (rest[rows, nearest] > -np.inf))
        rest[rows, nearest] = -np.inf
    return np.stack(columns, axis=1)
