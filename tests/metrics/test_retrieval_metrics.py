"""Emotion match of retrieval against a slow loop."""

from __future__ import annotations

import random

import numpy as np
import pytest

from elmd.metrics.retrieval import match_scores


def slow_match(
    sim: np.ndarray, lq: list[str], lc: list[str], dq: list[int], dc: list[int], k: int
) -> tuple[float, ...]:
    at_k, reciprocal, chance = [], [], []
    for q in range(len(lq)):
        order = [c for c in sorted(range(len(lc)), key=lambda c: -sim[q, c]) if dc[c] != dq[q]]
        if not order:
            continue
        hits = [lc[c] == lq[q] for c in order]
        at_k.append(sum(hits[:k]) / min(k, len(hits)))
        reciprocal.append(next((1 / (i + 1) for i, hit in enumerate(hits) if hit), 0.0))
        chance.append(sum(hits) / len(hits))
    return float(np.mean(at_k)), float(np.mean(reciprocal)), float(np.mean(chance))


@pytest.mark.parametrize("ties", [False, True])
def test_match_scores_equal_slow_loop(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmd.metrics.retrieval.CHUNK", 7)
    rng = random.Random(3)
    queries, candidates = 40, 25
    lq, lc = rng.choices("abcd", k=queries), rng.choices("abc", k=candidates)
    dq, dc = ([rng.randrange(5) for _ in range(n)] for n in (queries, candidates))
    sim = np.random.default_rng(0).normal(size=(queries, candidates)).astype(np.float32)
    sim = np.round(sim) if ties else sim
    scores = match_scores(sim, lq, lc, dq, dc, ks=(1, 5, 100))
    for k in (1, 5, 100):
        at_k, mrr, chance = slow_match(sim, lq, lc, dq, dc, k)
        assert scores[f"match@{k}"] == pytest.approx(at_k)
        assert scores["mrr"] == pytest.approx(mrr)
        assert scores["chance"] == pytest.approx(chance)
    assert scores["match@100"] == pytest.approx(scores["chance"])


def test_own_dialogue_is_left_out_and_lonely_queries_are_counted() -> None:
    import torch

    sim = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    assert match_scores(sim, ["a", "a"], ["a", "b"], ks=(1,))["match@1"] == 1.0
    scores = match_scores(sim, ["a", "a"], ["a", "b"], ["d", "e"], ["d", "d"], ks=(1,))
    assert scores == {"match@1": 1.0, "mrr": 1.0, "chance": 0.5, "n": 1, "skipped": 1}
    scores = match_scores(sim, ["a", "a"], ["a", "b"], ["d", "e"], ["d", "f"], ks=(1, 5))
    assert (scores["match@1"], scores["match@5"]) == (0.5, 0.25)  # second query: equal similarities, first wins


@pytest.mark.parametrize(
    ("sim", "dialogues", "message"),
    [
        (np.zeros((1, 3)), {}, r"shape \(1, 3\), the labels say \(1, 2\)"),
        (np.full((1, 2), np.nan), {}, "NaN"),
        (np.zeros((1, 2)), {"query_dialogues": ["d"], "candidate_dialogues": ["d", "d"]}, "outside its own dialogue"),
        (np.zeros((1, 2)), {"query_dialogues": ["d"]}, "or neither"),
    ],
)
def test_match_scores_refuse(sim: np.ndarray, dialogues: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_scores(sim, ["a"], ["a", "b"], **dialogues)
