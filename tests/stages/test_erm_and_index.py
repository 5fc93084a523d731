"""The stages `erm` and `index`: what is learnt, encoded, retrieved, counted and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from elmd.config import Config, DataConfig, ErmConfig, Key, RetrieverConfig
from elmd.data.samples import save_samples
from elmd.engine.stage import Job, Outcome
from elmd.errors import DataError
from elmd.retrieval.demonstrations import demonstrations, load_demonstrations
from elmd.retrieval.index import Index
from elmd.retrieval.strategy import Settings
from elmd.stages import erm as erm_stage
from elmd.stages import index as index_stage
from elmd.types import SPLITS
from encoders import make_samples


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    save_samples(folder / "samples.jsonl", make_samples(tags=True))
    return folder


def config(bert: Path, **erm: Any) -> Config:
    key = Key.e_u if erm.get("separation_weight") == 0 else Key.E_s
    return Config(
        data=DataConfig(name="test", reader="jsonl", path="x"),
        retriever=RetrieverConfig(name="test", path=str(bert), key=key),
        erm=ErmConfig(**{"epochs": 6, "batch_size": 12, "lr": 5e-3, "slots": 2} | erm),
    )


def run_stages(cfg: Config, prepared: Path, folder: Path) -> tuple[Any, Any]:
    accelerator = Accelerator(cpu=True)
    for name in ("erm", "index"):
        (folder / name).mkdir(parents=True)
    erm = erm_stage.run(cfg, Job(folder / "erm", {"prepare": prepared}, accelerator))
    upstream = {"prepare": prepared, "erm": folder / "erm"}
    return erm, index_stage.run(cfg, Job(folder / "index", upstream, accelerator))


class Trained(NamedTuple):
    """Both stages' outcomes and folder, the texts that stage `erm` tokenised, and the rows it encoded to score them."""

    erm: Outcome
    index: Outcome
    folder: Path
    tokenised: list[str]
    encoded: int


@pytest.fixture(scope="module")
def trained(bert: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    tokenised: list[str] = []
    encoded: list[int] = []
    forward, preprocess = Transformer.forward, SentenceTransformer.preprocess

    def counted(self: Transformer, features: Any, **others: Any) -> Any:
        if not self.training:
            encoded.append(len(features["input_ids"]))
        return forward(self, features, **others)

    def noted(self: SentenceTransformer, texts: list[str], **others: Any) -> Any:
        tokenised.extend(texts)
        return preprocess(self, texts, **others)

    cfg, folder, accelerator = config(bert), tmp_path_factory.mktemp("runs"), Accelerator(cpu=True)
    for name in ("erm", "index"):
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "forward", counted)
        patch.setattr(SentenceTransformer, "preprocess", noted)
        erm = erm_stage.run(cfg, Job(folder / "erm", {"prepare": prepared}, accelerator))
    index = index_stage.run(cfg, Job(folder / "index", {"prepare": prepared, "erm": folder / "erm"}, accelerator))
    return Trained(erm, index, folder, tokenised, sum(encoded))


def test_erm_learns_the_emotion(trained: Trained) -> None:
    folder, erm = trained.folder / "erm", trained.erm
    assert {"model", "metrics.jsonl", "curves.png"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    assert [entry["type"].rsplit(".", 1)[1] for entry in json.loads((folder / "model/modules.json").read_text())] == [
        "Transformer", "Pooling", "SelfSeparation",
    ]  # fmt: skip
    matches = erm.metrics["emotion_match"]
    assert set(matches) == {"valid", "test"}
    assert set(matches["test"]) == {"all", "text_shows"}
    assert set(matches["test"]["all"]) == {"raw e_u", "raw E_s", "e_u", "E_s"}
    assert matches["test"]["text_shows"]["e_u"]["n"] == 2
    assert erm.metrics["emotion_match@1"] == matches["valid"]["all"]["E_s"]["match@1"] == 1.0
    assert matches["valid"]["all"]["e_u"]["match@5"] > matches["valid"]["all"]["raw e_u"]["match@5"]
    assert erm.counts["train"] == 40
    assert erm.counts["anchors_without_positive_per_epoch"] == 0


def test_each_text_is_tokenised_once_and_encoded_once_for_given_weights(trained: Trained) -> None:
    texts = {split: {s.utterance.text for s in make_samples() if s.split == split} for split in SPLITS}
    every, selection = set().union(*texts.values()), texts["train"] | texts["valid"]
    assert sorted(trained.tokenised) == sorted(every)
    # All before training, which also serves the evaluation of step 0; train and the selection split in each epoch; all
    # after training, less what the last epoch encoded if its weights are the best.
    epochs = trained.erm.counts["steps"] // trained.erm.counts["batches_per_epoch"]
    last = trained.erm.metrics["best_step"] == trained.erm.counts["steps"]
    after = every - selection if last else every
    assert trained.encoded == len(every) + epochs * len(selection) + len(after)


def test_the_index_leaks_nothing(trained: Trained) -> None:
    stored = Index.load(trained.folder / "index")
    assert set(stored.vectors) == {"e_u", "E_s"}
    samples = make_samples(tags=True)
    assert set(stored.ids) == {sample.id for sample in samples if sample.split == "train"}
    shown = load_demonstrations(trained.folder / "index" / "demonstrations.jsonl")
    dialogue = {sample.id: sample.dialogue for sample in samples}
    assert set(shown) == set(dialogue)
    assert all(dialogue[r.source] != dialogue[name] for name, ranked in shown.items() for r in ranked)
    assert {row["own_dialogue"] for row in trained.index.metrics.values()} == {0.0}
    assert set(trained.index.metrics) == {"train", "valid", "test"}


def test_without_self_separation_only_e_u_is_there(bert: Path, prepared: Path, tmp_path: Path) -> None:
    erm, _ = run_stages(config(bert, separation_weight=0.0, epochs=1), prepared, tmp_path / "runs")
    assert set(erm.metrics["emotion_match"]["valid"]["all"]) == {"raw e_u", "e_u"}
    assert set(Index.load(tmp_path / "runs" / "index").vectors) == {"e_u"}


def test_audit_shows_the_leak_where_it_is_allowed(bert: Path, prepared: Path, trained: Trained, tmp_path: Path) -> None:
    cfg, upstream = config(bert), {"prepare": prepared, "erm": trained.folder / "erm"}
    cfg.retriever.allow_same_dialogue = True
    index = index_stage.run(cfg, Job(tmp_path, upstream, Accelerator(cpu=True)))
    assert index.metrics["train"]["own_dialogue"] == 1.0
    assert index.metrics["train"]["gold_response"] == 1.0
    assert index.metrics["test"]["own_dialogue"] == 0.0  # its dialogue is not in the training split


def test_audit_equals_a_count_over_pairs() -> None:
    samples = make_samples()
    train = {sample.id: sample for sample in samples if sample.split == "train"}
    vectors = torch.randn(len(samples), 4, generator=torch.Generator().manual_seed(0))
    index = Index.build(list(train.values()), {"e_u": vectors[: len(train)]})
    shown = demonstrations(index, train, samples, vectors, Settings("e_u", 2))
    row = index_stage.audit(samples, train, shown)
    chances = {"gold_response_chance": 0.0, "emotion_match_chance": 0.0}
    for sample in samples:
        admissible = [other.response for other in train.values() if other.dialogue != sample.dialogue]
        same_text = sum(response.text == sample.response.text for response in admissible)
        same_emotion = sum(response.emotion == sample.response.emotion for response in admissible)
        chances["gold_response_chance"] += same_text / len(admissible)
        chances["emotion_match_chance"] += same_emotion / len(admissible)
    for name, total in chances.items():
        assert row[name] == pytest.approx(total / len(samples))
    hits = [r.response == sample.response.text for sample in samples for r in shown[sample.id]]
    assert row["gold_response"] == pytest.approx(sum(hits) / len(hits))


def test_stage_fingerprints_name_what_they_depend_on(bert: Path) -> None:
    cfg = config(bert)
    assert erm_stage.reads(cfg).files == {"retriever": bert}
    assert list(erm_stage.reads(cfg).upstream) == ["prepare"]
    assert "erm.checkpoint_every" not in erm_stage.reads(cfg).counted(cfg)
    cfg.retriever.path = "bootstrap"
    assert erm_stage.reads(cfg).files == {}
    assert list(erm_stage.reads(cfg).upstream) == ["prepare", "bootstrap/retriever"]
    assert list(index_stage.reads(cfg).upstream) == ["prepare", "erm"]
    assert "seed" not in index_stage.reads(cfg).keys


def test_a_split_without_samples_is_an_error_that_names_it(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prepare"
    folder.mkdir()
    save_samples(folder / "samples.jsonl", [s for s in make_samples() if s.split != "valid"])
    with pytest.raises(DataError, match="there is no sample in split valid"):
        run_stages(config(bert), folder, tmp_path / "runs")
