"""The index without leaks, the strategies that search it, and the file of demonstrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elmd.errors import ArtifactError, DataError
from elmd.retrieval.demonstrations import demonstrations, load_demonstrations, save_demonstrations
from elmd.retrieval.index import Index, Queries
from elmd.retrieval.search import Neighbours, first_largest
from elmd.retrieval.strategy import STRATEGIES, Settings, semantic
from elmd.types import Sample
from encoders import make_samples


@pytest.fixture(scope="module")
def indexed() -> tuple[list[Sample], list[Sample], Tensor, Index]:
    samples = make_samples()
    train = [sample for sample in samples if sample.split == "train"]
    vectors = torch.randn(len(samples), 6, generator=torch.Generator().manual_seed(0))
    return samples, train, vectors, Index.build(train, {"e_u": vectors[: len(train)]})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_meets_the_own_dialogue_nor_returns_one_candidate_twice(indexed: Any, strategy: str) -> None:
    samples, train, vectors, index = indexed
    settings = Settings("e_u", 3, strategy=strategy)
    result = STRATEGIES[strategy](index, Queries.of(vectors, samples), settings)
    assert result.positions.shape == result.similarity.shape == (len(samples), 3)
    for sample, positions in zip(samples, result.positions.tolist(), strict=True):
        assert sample.dialogue not in {train[p].dialogue for p in positions}
        assert len(set(positions)) == 3


def test_a_strategy_of_ones_own_is_one_entry_of_the_table(indexed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, train, vectors, index = indexed

    def first(index: Index, queries: Queries, settings: Settings) -> Neighbours:
        scores = first_largest(-admissible_positions(index, queries, settings), settings.k)
        return Neighbours(scores.positions, -scores.similarity)

    def admissible_positions(index: Index, queries: Queries, settings: Settings) -> Tensor:
        _, units, excluded = index.admissible(settings.key, queries, settings.k)
        positions = torch.arange(len(index.ids), dtype=torch.float32).repeat(len(units), 1)
        positions[excluded.rows, excluded.columns] = torch.inf
        return positions

    monkeypatch.setitem(STRATEGIES, "first", first)
    settings = Settings("e_u", 2, strategy="first")
    shown = demonstrations(index, {sample.id: sample for sample in train}, samples, vectors, settings)
    assert [[r.source for r in ranked] for ranked in shown.values()] == [
        [sample.id for sample in train if sample.dialogue != asked.dialogue][:2] for asked in samples
    ]


def test_with_the_own_dialogue_allowed_each_training_sample_meets_itself(indexed: Any) -> None:
    samples, train, vectors, index = indexed
    result = semantic(index, Queries.of(vectors, samples), Settings("e_u", allow_same_dialogue=True))
    assert result.positions[: len(train), 0].tolist() == list(range(len(train)))
    torch.testing.assert_close(result.similarity[: len(train), 0], torch.ones(len(train)))


def test_a_sample_is_excluded_by_its_id_even_under_another_dialogue(indexed: Any) -> None:
    _, train, vectors, index = indexed
    result = semantic(index, Queries(vectors[:1], [train[0].id], ["another"]), Settings("e_u"))
    assert result.positions.item() != 0


def test_ties_go_to_the_first_candidate(indexed: Any) -> None:
    _, train, _, _ = indexed
    row = torch.randn(1, 33, generator=torch.Generator().manual_seed(1))
    index = Index.build(train, {"e_u": row.repeat(len(train), 1)})
    result = semantic(index, Queries(row, ["q"], [train[0].dialogue]), Settings("e_u", 5))
    assert result.positions[0].tolist() == [4, 5, 6, 7, 8]  # the first dialogue has four samples


def test_no_candidate_left_is_an_error_that_names_the_sample(indexed: Any) -> None:
    samples, train, vectors, _ = indexed
    alone, queries = Index.build(train[:4], {"e_u": vectors[:4]}), Queries.of(vectors[:1], samples[:1])
    with pytest.raises(DataError, match="sample d0#1: 1 to be retrieved, but only 0 of 4 training samples are outside"):
        semantic(alone, queries, Settings("e_u"))
    with pytest.raises(DataError, match="no key 'E_s', only e_u"):
        semantic(alone, queries, Settings("E_s"))


def test_saved_and_loaded_index_is_equal(indexed: Any, tmp_path: Path) -> None:
    _, _, _, index = indexed
    index.save(tmp_path)
    loaded = Index.load(tmp_path)
    assert (loaded.ids, loaded.dialogues) == (index.ids, index.dialogues)
    assert torch.equal(loaded.vectors["e_u"], index.vectors["e_u"])
    assert loaded.vectors["e_u"].dtype == torch.float32
    entries = json.loads((tmp_path / "ids.json").read_text())
    (tmp_path / "ids.json").write_text(json.dumps(entries[:-1]))
    with pytest.raises(ArtifactError, match=r"hold different numbers of candidates; make it again"):
        Index.load(tmp_path)
    (tmp_path / "ids.json").unlink()
    with pytest.raises(ArtifactError, match="is not a complete index"):
        Index.load(tmp_path)


def test_demonstrations_survive_the_file(indexed: Any, tmp_path: Path) -> None:
    samples, train, vectors, index = indexed
    candidates = {sample.id: sample for sample in train}
    shown = demonstrations(index, candidates, samples, vectors, Settings("e_u", 2))
    assert list(shown) == [sample.id for sample in samples]
    first = shown[samples[0].id][0]
    assert first.response == candidates[first.source].response.text
    assert first.emotion == candidates[first.source].response.emotion
    assert first.utterance == candidates[first.source].utterance.text
    path = tmp_path / "demonstrations.jsonl"
    save_demonstrations(path, shown)
    assert load_demonstrations(path) == shown
    path.write_text(path.read_text(encoding="utf-8") + '{"sample": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=rf"demonstrations.jsonl:{2 * len(samples) + 1}: not a demonstration \("):
        load_demonstrations(path)
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read \(No such file or directory\); run stage=index"):
        load_demonstrations(tmp_path / "none.jsonl")
