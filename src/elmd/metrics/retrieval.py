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
    sims = np.asarray(similarity)
    shape = (len(query_labels), len(candidate_labels))
    if sims.shape != shape:
        raise ValueError(f"similarity has shape {sims.shape}, the labels say {shape}")
    if (query_dialogues is None) != (candidate_dialogues is None):
        raise ValueError("give the dialogues of queries and candidates, or neither")
    labels_q, labels_c = _codes(query_labels, candidate_labels)
    own_q, own_c = _codes(query_dialogues or [], candidate_dialogues or [])
    totals = dict.fromkeys([*(f"match@{k}" for k in ks), "mrr", "chance"], 0.0)
    n = 0
    for at in range(0, shape[0], CHUNK):
        rows = slice(at, at + CHUNK)
        sim = np.array(sims[rows], dtype=np.float64)
        if np.isnan(sim).any():
            raise ValueError("similarity holds NaN")
        allowed = own_q[rows, None] != own_c[None, :] if query_dialogues is not None else np.ones(sim.shape, bool)
        left = allowed.any(axis=1)
        sim, allowed = sim[left], allowed[left]
        match = (labels_q[rows, None][left] == labels_c[None, :]) & allowed
        sim[~allowed] = -np.inf
        if not len(sim):
            continue
        n += len(sim)
        totals["chance"] += (match.sum(axis=1) / allowed.sum(axis=1)).sum()
        totals["mrr"] += _reciprocal_ranks(sim, match, allowed).sum()
        hits = _nearest_match(sim, match, max(ks))  # [rows, max k]
        for k in ks:
            totals[f"match@{k}"] += (hits[:, :k].sum(axis=1) / np.minimum(k, allowed.sum(axis=1))).sum()
    if not n:
        raise ValueError("no query has a candidate outside its own dialogue")
    return {name: float(total / n) for name, total in totals.items()} | {"n": n, "skipped": shape[0] - n}


def _codes(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Integers that are equal where the values are."""
    codes: dict[Hashable, int] = {}
    one, two = ([codes.setdefault(value, len(codes)) for value in values] for values in (first, second))
    return np.array(one, dtype=np.int64), np.array(two, dtype=np.int64)


def _reciprocal_ranks(sim: np.ndarray, match: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """[Q]: 1 / rank of the first match by counting what lies before it, without sorting."""
    rows = np.arange(len(sim))
    first = np.where(match, sim, -np.inf).argmax(axis=1)  # of equals, the first candidate
    best = sim[rows, first][:, None]
    earlier = np.arange(sim.shape[1])[None, :] < first[:, None]
    before = ((sim > best) | ((sim == best) & earlier)) & allowed
    return np.where(match[rows, first], 1 / (1 + before.sum(axis=1)), 0.0)


def _nearest_match(sim: np.ndarray, match: np.ndarray, k: int) -> np.ndarray:
    """[Q, min(k, N)]: whether each of the k nearest matches. k is small: k passes beat a sort of N."""
    rest, rows = sim.copy(), np.arange(len(sim))
    columns = []
    for _ in range(min(k, sim.shape[1])):
        nearest = rest.argmax(axis=1)
        columns.append(match[rows, nearest] & (rest[rows, nearest] > -np.inf))
        rest[rows, nearest] = -np.inf
    return np.stack(columns, axis=1)
