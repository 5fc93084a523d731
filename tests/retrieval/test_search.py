"""The search for nearest candidates: equal to plain double precision in every case, and FAISS with its recall."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elmd.config import Config, DataConfig, Reader, RetrieverConfig, Search
from elmd.errors import ConfigError, DataError
from elmd.labels import Emotion
from elmd.retrieval import search as module
from elmd.retrieval.index import Index, Neighbours, Queries, demonstrations
from elmd.stages import depends
from elmd.stages import index as index_stage
from elmd.types import Sample, Utterance


def make_index(vectors: Tensor, dialogues: Sequence[str]) -> Index:
    unit = F.normalize(vectors.double(), dim=-1).float()
    return Index([str(i) for i in range(len(vectors))], dialogues, {"e_u": unit})


def plain(index: Index, queries: Queries, k: int, leak: bool = False) -> Neighbours:
    """All cosines in double precision, rounded to fp32; k times the first of the largest."""
    scores = (F.normalize(queries.vectors.double(), dim=-1) @ index.vectors["e_u"].double().T).float()
    for row, (name, dialogue) in enumerate(zip(queries.ids, queries.dialogues, strict=True)):
        for column, (other, its) in enumerate(zip(index.ids, index.dialogues, strict=True)):
            if not leak and (name == other or dialogue == its):
                scores[row, column] = -torch.inf
    found = []
    for _ in range(k):
        best = scores.argmax(dim=1, keepdim=True)
        found.append((best, scores.gather(1, best)))
        scores.scatter_(1, best, -torch.inf)
    return Neighbours(*(torch.cat(column, dim=1) for column in zip(*found, strict=True)))


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


def one(n: int, width: int, draw: torch.Generator) -> Tensor:
    return torch.randn(1, width, generator=draw).repeat(n, 1)


def doubled(n: int, width: int, draw: torch.Generator) -> Tensor:
    half = torch.randn((n + 1) // 2, width, generator=draw)
    return torch.cat([half, half])[:n]


@pytest.mark.parametrize("vectors", [spread, clustered, one_ulp, few, one, doubled])
@pytest.mark.parametrize(("n", "width", "most"), [(13, 6, 256), (300, 33, 20), (700, 300, 256)])
@pytest.mark.parametrize("k", [1, 3])
def test_search_is_that_of_double_precision(
    vectors: Any, n: int, width: int, most: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles smaller and larger than there are queries and candidates; `most` lets many rows fall back."""
    for tile in ((512, 2048), (7, 64)):
        monkeypatch.setattr(module, "_QUERIES", tile[0])
        monkeypatch.setattr(module, "_CANDIDATES", tile[1])
        monkeypatch.setattr(module, "_MOST", most)
        monkeypatch.setattr(module, "_PAIRS", 40 * width)
        rows = vectors(n, width, torch.Generator().manual_seed(n))
        index = make_index(rows, [f"d{i // 4}" for i in range(n)])
        asked = torch.cat([rows[:40], torch.randn(5, width)])
        names = [*index.ids[:40], "a", "b", "5", "6", "c"]  # "5" is in another dialogue here
        queries = Queries(asked[: len(names)], names[: len(asked)], [f"d{i // 4}" for i in range(len(asked))])
        for leak in (False, True):
            found = index.search("e_u", queries, k, allow_same_dialogue=leak)
            expected = plain(index, queries, k, leak)
            assert torch.equal(found.positions, expected.positions)
            assert torch.equal(found.similarity, expected.similarity)


def test_what_fp32_leaves_open_and_nothing_else_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    again, slow = module._nearest_of, module._in_double

    def counted(candidates: Tensor, queries: Tensor, pairs: module.Pairs, k: int) -> Neighbours:
        seen.append(len(pairs.rows))
        return again(candidates, queries, pairs, k)

    monkeypatch.setattr(module, "_nearest_of", counted)
    monkeypatch.setattr(module, "_in_double", lambda *_: pytest.fail("nothing ties"))
    draw = torch.Generator().manual_seed(0)
    index = make_index(spread(3000, 32, draw), ["d"] * 3000)
    queries = Queries(spread(100, 32, draw), [f"q{i}" for i in range(100)], ["another"] * 100)
    index.search("e_u", queries, 3)
    assert 300 <= sum(seen) < 600
    rows = []
    monkeypatch.setattr(module, "_in_double", lambda c, q, e, k: rows.append(len(q)) or slow(c, q, e, k))
    index = make_index(one(3000, 32, draw), ["d"] * 3000)
    found = index.search("e_u", queries, 3)
    assert rows == [100]
    assert found.positions.tolist() == [[0, 1, 2]] * 100


def test_the_bound_of_fp32_holds_for_widths_that_are_used() -> None:
    draw = torch.Generator().manual_seed(0)
    for width in (6, 128, 512, 3072):
        a, b = (F.normalize(torch.rand(64, width, generator=draw).double(), dim=-1) for _ in range(2))
        b = b.float().double()
        out = torch.empty(64, 64)
        module._product(a.float(), b.float(), out=out)
        terms = min(width, module._TERMS)
        assert (out.double() - a @ b.T).abs().max() <= (terms + -(-width // terms) + 8) * 2**-24


def test_a_vector_that_is_not_finite_is_refused() -> None:
    index = make_index(torch.eye(4), list("abcd"))
    for rows in (torch.full((1, 4), torch.nan), torch.tensor([[torch.inf, 0, 0, 0]])):
        with pytest.raises(DataError, match="key e_u: a vector is not finite"):
            index.search("e_u", Queries(rows, ["q"], ["q"]), 1)


# --- FAISS ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="FAISS is not installed (pip install -e '.[faiss]')")


@pytest.mark.parametrize("vectors", [spread, clustered, doubled])
@pytest.mark.parametrize("k", [1, 3])
def test_faiss_finds_nearly_all_and_never_the_own_dialogue(vectors: Any, k: int, faiss: Any) -> None:
    rows = vectors(2000, 24, torch.Generator().manual_seed(1))
    dialogues = ["long" if i < 300 else f"d{i // 5}" for i in range(2000)]
    index = make_index(rows, dialogues)
    queries = Queries(rows[100:900], index.ids[100:900], dialogues[100:900])
    found = index.search("e_u", queries, k, approximately=True)
    expected = plain(index, queries, k)
    for i, positions in enumerate(found.positions.tolist()):
        assert queries.dialogues[i] not in {dialogues[p] for p in positions}
        assert len(set(positions)) == k
    same = found.similarity >= expected.similarity[:, -1:]
    assert same.double().mean() > 0.95
    assert torch.equal(found.positions[same.all(1)], expected.positions[same.all(1)]) or vectors is clustered
    told = index.similarity("e_u", queries.vectors).gather(1, found.positions)
    torch.testing.assert_close(found.similarity, told, rtol=0, atol=1e-7)


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
    found, expected = index.search("e_u", queries, 2, approximately=True), plain(index, queries, 2)
    assert torch.equal(found.positions[::2], expected.positions[::2])


def test_without_faiss_asking_for_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = make_index(torch.eye(4), list("abcd"))
    with pytest.raises(ConfigError, match=r"retriever\.search: FAISS is not installed; pip install 'elmd\[faiss\]'"):
        index.search("e_u", Queries(torch.eye(4), list("abcd"), list("abcd")), 1, approximately=True)


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
    exact, near = (
        demonstrations(index, candidates, samples, vectors, key="e_u", k=2, approximately=how) for how in (False, True)
    )
    assert index_stage.recall(index, samples, vectors, exact, key="e_u", k=2) == {
        "train": {"recall@2": 1.0, "recall_queries": 333},
        "valid": {"recall@2": 1.0, "recall_queries": 100},
        "test": {"recall@2": 1.0, "recall_queries": 100},
    }
    wrong = {name: [exact[samples[0].id][1]] * 2 for name in exact}
    assert index_stage.recall(index, samples, vectors, wrong, key="e_u", k=2)["test"]["recall@2"] < 1.0
    assert index_stage.recall(index, samples, vectors, near, key="e_u", k=2)["train"]["recall@2"] > 0.95


def test_only_a_search_that_was_chosen_is_in_the_fingerprint(tmp_path: Path) -> None:
    cfg = Config(
        data=DataConfig(name="t", reader=Reader.jsonl, path="x"),
        retriever=RetrieverConfig(name="t", path=str(tmp_path)),
    )
    assert set(depends.index(cfg).config) == {"k", "key", "allow_same_dialogue"}
    for search in (Search.exact, Search.faiss):
        cfg.retriever.search = search
        assert depends.index(cfg).config["search"] == search.value
