"""The search for nearest candidates: equal to a plain double loop, and FAISS with its recall."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elmd.config import Config, DataConfig, RetrieverConfig, Search
from elmd.errors import ConfigError, DataError
from elmd.labels import Emotion
from elmd.retrieval import search as module
from elmd.retrieval.demonstrations import demonstrations
from elmd.retrieval.index import Index, Queries
from elmd.retrieval.search import Neighbours
from elmd.retrieval.strategy import Settings, semantic
from elmd.stages import index as index_stage
from elmd.types import SPLITS, Demonstration, Sample, Utterance


def make_index(vectors: Tensor, dialogues: Sequence[str]) -> Index:
    unit = F.normalize(vectors.double(), dim=-1).float()
    return Index([str(i) for i in range(len(vectors))], dialogues, {"e_u": unit})


def plain(index: Index, queries: Queries, k: int, leak: bool = False) -> Neighbours:
    """A double loop: each cosine in double precision, rounded to fp32, in a stable sort: the first of ties wins."""
    units = F.normalize(queries.vectors.double(), dim=-1)
    candidates = list(zip(index.ids, index.dialogues, index.vectors["e_u"].double(), strict=True))
    positions, similarity = [], []
    for name, dialogue, unit in zip(queries.ids, queries.dialogues, units, strict=True):
        scores = [
            -torch.inf if not leak and (name == other or dialogue == its) else float((unit @ vector).float())
            for other, its, vector in candidates
        ]
        best = sorted(range(len(scores)), key=lambda i, scores=scores: -scores[i])[:k]
        positions.append(best)
        similarity.append([scores[i] for i in best])
    return Neighbours(torch.tensor(positions), torch.tensor(similarity))


def spread(n: int, width: int, draw: torch.Generator) -> Tensor:
    return torch.randn(n, width, generator=draw)


def clustered(n: int, width: int, draw: torch.Generator) -> Tensor:
    """Seven directions and a little noise, as a trained retriever has: all cosines of one emotion are near 1."""
    centres = torch.randn(7, width, generator=draw)
    return centres[torch.randint(7, (n,), generator=draw)] + 1e-3 * torch.randn(n, width, generator=draw)


def one_ulp(n: int, width: int, draw: torch.Generator) -> Tensor:
    """Vectors that fp32 cannot put in order."""
    return torch.randn(1, width, generator=draw) * (1 + 1e-7 * torch.randn(n, width, generator=draw))


def few(n: int, width: int, draw: torch.Generator) -> Tensor:
    """Each vector many times over."""
    return torch.randn(5, width, generator=draw)[torch.randint(5, (n,), generator=draw)]


def repeated(n: int, width: int, draw: torch.Generator) -> Tensor:
    return torch.randn(1, width, generator=draw).repeat(n, 1)


def doubled(n: int, width: int, draw: torch.Generator) -> Tensor:
    half = torch.randn((n + 1) // 2, width, generator=draw)
    return torch.cat([half, half])[:n]


@pytest.mark.parametrize("vectors", [spread, clustered, one_ulp, few, repeated, doubled])
@pytest.mark.parametrize(("n", "width"), [(13, 6), (300, 33)])
def test_search_equals_a_double_loop_in_blocks_of_any_size(
    vectors: Any, n: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = vectors(n, width, torch.Generator().manual_seed(n))
    index = make_index(rows, [f"d{i // 4}" for i in range(n)])
    asked = torch.cat([rows[:20], torch.randn(5, width)])
    names = [*index.ids[:20], "a", "b", "5", "6", "c"]  # "5" is in another dialogue here
    queries = Queries(asked, names[: len(asked)], [f"d{i // 4}" for i in range(len(asked))])
    for leak in (False, True):
        expected = plain(index, queries, 3, leak)
        for k, block, converted in ((3, 1 << 24, 2048), (1, 7 * n, 64), (3, 1, 5)):
            monkeypatch.setattr(module, "_BLOCK", block)
            monkeypatch.setattr(module, "_CONVERTED", converted)
            result = semantic(index, queries, Settings("e_u", k, allow_same_dialogue=leak))
            assert torch.equal(result.positions, expected.positions[:, :k])
            assert torch.equal(result.similarity, expected.similarity[:, :k])


def test_a_vector_that_is_not_finite_is_refused() -> None:
    index = make_index(torch.eye(4), list("abcd"))
    for rows in (torch.full((1, 4), torch.nan), torch.tensor([[torch.inf, 0, 0, 0]])):
        with pytest.raises(DataError, match="key e_u: a vector is not finite"):
            semantic(index, Queries(rows, ["q"], ["q"]), Settings("e_u"))


# --- FAISS ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="FAISS is not installed (pip install -e '.[faiss]')")


@pytest.mark.parametrize(("vectors", "k"), [(spread, 1), (spread, 3), (clustered, 3), (doubled, 3)])
def test_faiss_finds_nearly_all_and_never_the_own_dialogue(vectors: Any, k: int, faiss: Any) -> None:
    rows = vectors(2000, 24, torch.Generator().manual_seed(1))
    dialogues = ["long" if i < 300 else f"d{i // 5}" for i in range(2000)]
    index = make_index(rows, dialogues)
    queries = Queries(rows[100:900], index.ids[100:900], dialogues[100:900])
    result = semantic(index, queries, Settings("e_u", k, approximately=True))
    expected = semantic(index, queries, Settings("e_u", k))
    for i, positions in enumerate(result.positions.tolist()):
        assert queries.dialogues[i] not in {dialogues[p] for p in positions}
        assert len(set(positions)) == k
    same = result.similarity >= expected.similarity[:, -1:]
    assert same.double().mean() > 0.95
    assert torch.equal(result.positions[same.all(1)], expected.positions[same.all(1)]) or vectors is clustered
    cosines = index.similarity("e_u", queries.vectors).gather(1, result.positions)
    torch.testing.assert_close(result.similarity, cosines, rtol=0, atol=1e-7)


def test_where_faiss_leaves_too_few_the_query_is_searched_exactly(faiss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(faiss.IndexHNSWFlat):  # type: ignore[misc]
        def search(self, x: Any, k: int) -> Any:
            distances, labels = super().search(x, k)
            labels[::2] = -1
            return distances, labels

    monkeypatch.setattr(faiss, "IndexHNSWFlat", Blind)
    rows = spread(500, 16, torch.Generator().manual_seed(2))
    index = make_index(rows, [f"d{i // 4}" for i in range(500)])
    queries = Queries(rows[:60], index.ids[:60], index.dialogues[:60])
    result = semantic(index, queries, Settings("e_u", 2, approximately=True))
    expected = semantic(index, queries, Settings("e_u", 2))
    assert torch.equal(result.positions[::2], expected.positions[::2])


def test_without_faiss_asking_for_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = make_index(torch.eye(4), list("abcd"))
    with pytest.raises(ConfigError, match=r"retriever\.search: FAISS is not installed; pip install 'elmd\[faiss\]'"):
        semantic(index, Queries(torch.eye(4), list("abcd"), list("abcd")), Settings("e_u", approximately=True))


def test_auto_is_exact_until_many_and_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = index_stage.approximately
    monkeypatch.setitem(sys.modules, "faiss", None)
    caplog.set_level(logging.WARNING, "elmd")
    assert not chosen(Search.auto, 100_000)
    assert not caplog.records
    assert not chosen(Search.auto, 100_001)
    assert "pip install 'elmd[faiss]'" in caplog.text
    assert not chosen(Search.exact, 10**7)
    with pytest.raises(ConfigError, match="FAISS is not installed"):
        chosen(Search.faiss, 10)
    monkeypatch.setitem(sys.modules, "faiss", module)
    assert chosen(Search.auto, 100_001)
    assert not chosen(Search.auto, 100_000)
    assert chosen(Search.faiss, 10)


def samples_of(count: int) -> list[Sample]:
    """A sample of each dialogue; every fourth is not for training."""
    made = []
    for i in range(count):
        turns = [Utterance(f"{i}:{t}", "AB"[t], f"{i} {t}", Emotion.HAPPY) for t in range(2)]
        split: Any = ("train", "train", "train", "valid" if i % 8 == 3 else "test")[i % 4]
        made.append(Sample(f"{i}#1", f"d{i}", "show", split, (), *turns))
    return made


def test_recall_is_the_share_of_what_is_as_near_as_the_kth(faiss: Any) -> None:
    samples = samples_of(800)
    train = [i for i, sample in enumerate(samples) if sample.split == "train"]
    vectors = spread(800, 8, torch.Generator().manual_seed(3))
    index = Index.build([samples[i] for i in train], {"e_u": vectors[train]})
    candidates = {samples[i].id: samples[i] for i in train}
    settings = Settings("e_u", 2)
    exact, near = (
        demonstrations(index, candidates, samples, vectors, replace(settings, approximately=how))
        for how in (False, True)
    )
    rows = {split: [i for i, sample in enumerate(samples) if sample.split == split] for split in SPLITS}

    def recall(shown: Mapping[str, Sequence[Demonstration]], split: str) -> dict[str, float]:
        how = replace(settings, approximately=True)
        return index_stage.recall(index, samples, vectors, rows[split], shown, how)

    assert recall(exact, "train") == {"recall@2": 1.0, "recall_queries": 333}
    assert recall(exact, "valid") == recall(exact, "test") == {"recall@2": 1.0, "recall_queries": 100}
    wrong = {name: [exact[samples[0].id][1]] * 2 for name in exact}
    assert recall(wrong, "test")["recall@2"] < 1.0
    assert recall(near, "train")["recall@2"] > 0.95


def test_only_a_search_that_was_chosen_is_in_the_fingerprint(tmp_path: Path) -> None:
    cfg = Config(
        data=DataConfig(name="t", reader="jsonl", path="x"),
        retriever=RetrieverConfig(name="t", path=str(tmp_path)),
    )
    assert "retriever.search" not in index_stage.reads(cfg).counted(cfg)
    for search in (Search.exact, Search.faiss):
        cfg.retriever.search = search
        assert index_stage.reads(cfg).counted(cfg)["retriever.search"] == search.value
