"""Algorithm 1, the retriever's folder, the index without leaks, and the stages `erm` and `index`."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from elmd.config import Config, DataConfig, ErmConfig, Key, Reader, RetrieverConfig
from elmd.data.samples import save_samples
from elmd.engine.stage import Job
from elmd.errors import ConfigError, DataError
from elmd.losses import retriever_loss
from elmd.retrieval import load_retriever, retriever
from elmd.retrieval.demonstrations import demonstrations, load_demonstrations
from elmd.retrieval.index import Index
from elmd.retrieval.retriever import Tokens, add_separation, embed, encode
from elmd.retrieval.strategy import Settings
from elmd.stages import erm as erm_stage
from elmd.stages import index as index_stage
from elmd.stages.erm import Erm, emotion_batches, gather_rows
from encoders import WIDTH, make_samples

TEXTS = ["我好开心！", "你今天开心吗", "他难过", "我不生气了，你呢", "害怕", "好的。"]


@pytest.fixture
def trained(bert: Path) -> SentenceTransformer:
    torch.manual_seed(1)
    return add_separation(load_retriever(bert), 4, "mlp")


# --- Batches and gathering -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[40, 3, 2, 1], [64], [7, 9, 5, 3, 31, 45], [1, 1], [150, 99, 2], [33], [21, 21, 21]])
@pytest.mark.parametrize("size", [4, 8, 32])
def test_batches_hold_each_sample_once_and_a_positive_for_each_anchor(sizes: list[int], size: int) -> None:
    labels = [label for label, count in enumerate(sizes) for _ in range(count)]
    for epoch in range(3):
        batches = emotion_batches(labels, size, 0, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(len(labels)))
        assert max(map(len, batches)) <= size
        assert max(map(len, batches)) - min(map(len, batches)) <= 3
        for batch in batches:
            counted = Counter(labels[i] for i in batch)
            assert all(count > 1 or sizes[label] == 1 for label, count in counted.items())


def test_batches_are_full_where_pairs_allow_it() -> None:
    assert {len(batch) for batch in emotion_batches([0] * 64 + [1] * 64, 32, 0, 0)} == {32}


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    labels = [i % 3 for i in range(50)]
    assert emotion_batches(labels, 8, 0, 1) == emotion_batches(labels, 8, 0, 1)
    assert emotion_batches(labels, 8, 0, 1) != emotion_batches(labels, 8, 0, 2)
    assert emotion_batches(labels, 8, 0, 1) != emotion_batches(labels, 8, 1, 1)
    with pytest.raises(ConfigError, match=r"erm\.batch_size: a batch of 3 has no room"):
        emotion_batches(labels, 3, 0, 0)


def make_task(model: SentenceTransformer, **settings: Any) -> Erm:
    samples = make_samples()
    train = [sample for sample in samples if sample.split == "train"]
    valid = [sample for sample in samples if sample.split == "valid"]
    return Erm(model, train, valid, **{"batch_size": 9, "seed": 0, "temperature": 0.5} | settings)


def gradients(task: Erm) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": parameter.grad.clone()
        for name, module in task.modules.items()
        for key, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def test_task_loss_is_eq_4_of_the_batch(trained: SentenceTransformer) -> None:
    task = make_task(trained, emotion_weight=0.7)
    batch = task.batches(0)[0]
    ((loss, tokens),) = task.losses(batch, 0, 1)
    keys = encode(trained, [task.texts[i] for i in batch])
    expected = retriever_loss(
        keys["e_u"], keys["E_s"].view(len(batch), 4, WIDTH), torch.tensor([task.labels[i] for i in batch]), 0.5,
        emotion_weight=0.7,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.total, rtol=1e-5, atol=1e-6)
    assert tokens > len(batch)
    loss.backward()
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients(task).items() if "key.bias" not in name)


def test_ablations_train_what_they_should(bert: Path) -> None:
    without_ssc = make_task(load_retriever(bert), separation_weight=0.0)
    assert list(without_ssc.modules) == ["encoder"]
    without_ert = make_task(add_separation(load_retriever(bert), 4, "mlp"), emotion_weight=0.0)
    assert list(without_ert.modules) == ["encoder", "separation"]
    for task in (without_ssc, without_ert):
        ((loss, _),) = task.losses(task.batches(0)[0], 0, 1)
        loss.backward()
        assert gradients(task)["encoder.model.embeddings.word_embeddings.weight"].abs().sum() > 0


def test_one_positive_draws_alike_each_time_it_meets_a_batch(trained: SentenceTransformer) -> None:
    task = make_task(trained, one_positive=True)
    first, second = ([loss.item() for loss, _ in task.losses(task.batches(0)[0], 0, 1)] for _ in range(2))
    assert first == second


ODD_BATCH = (0, 7, 3, 21, 12, 30, 9)  # shares of different size


def _rank(rank: int, world: int, port: int, folder: str, retriever: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
    assert torch.distributed.get_world_size() == world
    task = make_task(load_retriever(retriever))
    total = 0.0
    for loss, _ in task.losses(ODD_BATCH, rank, world):
        loss.backward()
        total += loss.item()
    save_file({"loss": torch.tensor(total), **gradients(task)}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


class FakeRanks:
    """Collectives of `torch.distributed` between threads, so that ranks can be tried without processes."""

    def __init__(self, world: int):
        self.barrier, self.rank, self.sent = threading.Barrier(world), threading.local(), [torch.empty(0)] * world

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self.sent[self.rank.number] = tensor.clone()
        self.barrier.wait(20)
        received = list(self.sent)
        self.barrier.wait(20)
        return received

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        for part, value in zip(parts, self._exchange(tensor), strict=True):
            part.copy_(value)

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(sum(self._exchange(tensor)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "batch"), [(2, ODD_BATCH), (3, ODD_BATCH), (3, ODD_BATCH[:2])])
def test_ranks_together_have_the_gradient_of_one(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, world: int, batch: tuple[int, ...]
) -> None:
    ranks = FakeRanks(world)
    monkeypatch.setattr(erm_stage, "dist", ranks)
    tasks = [make_task(load_retriever(trained_folder)) for _ in range(world)]

    def work(rank: int) -> float:
        ranks.rank.number = rank
        ((loss, _),) = tasks[rank].losses(batch, rank, world)
        loss.backward()
        return loss.item()

    with ThreadPoolExecutor(world) as pool:
        total = sum(pool.map(work, range(world)))
    one = make_task(load_retriever(trained_folder))
    ((loss, _),) = one.losses(batch, 0, 1)
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    expected, parts = gradients(one), [gradients(task) for task in tasks]
    assert len(expected) > 20
    for name, value in expected.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(trained_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (2, port, str(tmp_path), str(trained_folder)), nprocs=2)
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    task = make_task(load_retriever(trained_folder))
    ((loss, _),) = task.losses(ODD_BATCH, 0, 1)
    loss.backward()
    assert sum(part["loss"].item() for part in parts) == pytest.approx(loss.item(), rel=1e-6)
    expected = gradients(task)
    assert len(expected) > 20
    for name, value in expected.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_gathering_in_one_process_changes_nothing() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows, [3], 0) is rows


# --- Stages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "prepare"
    folder.mkdir()
    save_samples(folder / "samples.jsonl", make_samples(tags=True))
    return folder


def config(bert: Path, **erm: Any) -> Config:
    key = Key.e_u if erm.get("separation_weight") == 0 else Key.E_s
    return Config(
        data=DataConfig(name="test", reader=Reader.jsonl, path="x"),
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


def test_erm_learns_the_emotion_and_the_index_leaks_nothing(bert: Path, prepared: Path, tmp_path: Path) -> None:
    cfg = config(bert)
    erm, index = run_stages(cfg, prepared, tmp_path / "runs")
    folder = tmp_path / "runs" / "erm"
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

    stored = Index.load(tmp_path / "runs" / "index")
    assert set(stored.vectors) == {"e_u", "E_s"}
    samples = make_samples(tags=True)
    assert set(stored.ids) == {sample.id for sample in samples if sample.split == "train"}
    found = load_demonstrations(tmp_path / "runs" / "index" / "demonstrations.jsonl")
    dialogue = {sample.id: sample.dialogue for sample in samples}
    assert set(found) == set(dialogue)
    assert all(dialogue[one.source] != dialogue[name] for name, several in found.items() for one in several)
    assert {row["own_dialogue"] for row in index.metrics.values()} == {0.0}
    assert set(index.metrics) == {"train", "valid", "test"}


def test_without_self_separation_only_e_u_is_there(bert: Path, prepared: Path, tmp_path: Path) -> None:
    erm, _ = run_stages(config(bert, separation_weight=0.0, epochs=1), prepared, tmp_path / "runs")
    assert set(erm.metrics["emotion_match"]["valid"]["all"]) == {"raw e_u", "e_u"}
    assert set(Index.load(tmp_path / "runs" / "index").vectors) == {"e_u"}


def test_audit_shows_the_leak_where_it_is_allowed(bert: Path, prepared: Path, tmp_path: Path) -> None:
    cfg = config(bert, epochs=0)
    cfg.retriever.allow_same_dialogue = True
    _, index = run_stages(cfg, prepared, tmp_path / "runs")
    assert index.metrics["train"]["own_dialogue"] == 1.0
    assert index.metrics["train"]["gold_response"] == 1.0
    assert index.metrics["test"]["own_dialogue"] == 0.0  # its dialogue is not in the training split


def test_audit_equals_a_count_over_pairs() -> None:
    samples = make_samples()
    train = {sample.id: sample for sample in samples if sample.split == "train"}
    vectors = torch.randn(len(samples), 4, generator=torch.Generator().manual_seed(0))
    index = Index.build(list(train.values()), {"e_u": vectors[: len(train)]})
    found = demonstrations(index, train, samples, vectors, Settings("e_u", 2))
    row = index_stage.audit(samples, train, found)
    chances = {"gold_response_chance": 0.0, "emotion_match_chance": 0.0}
    for sample in samples:
        admissible = [one for one in train.values() if one.dialogue != sample.dialogue]
        chances["gold_response_chance"] += sum(one.response.text == sample.response.text for one in admissible) / len(
            admissible
        )
        chances["emotion_match_chance"] += sum(
            one.response.emotion == sample.response.emotion for one in admissible
        ) / len(admissible)
    for name, total in chances.items():
        assert row[name] == pytest.approx(total / len(samples))
    hits = [one.response == sample.response.text for sample in samples for one in found[sample.id]]
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


# --- A batch in groups of like length ------------------------------------------------------------------------------


def loss_and_gradients(task: Erm, e_u: Tensor, batch: Sequence[int]) -> dict[str, Tensor]:
    for module in task.modules.values():
        module.zero_grad()
    loss = task.loss(e_u, batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(task)}


@pytest.mark.parametrize("overhead", [0, 1, 20, 10**6])
def test_groups_have_loss_and_gradient_of_one_padded_batch_and_of_one_by_one(
    trained: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, overhead: int
) -> None:
    monkeypatch.setitem(retriever.PASS_TOKENS, "cpu", overhead)
    task = make_task(trained)
    task.texts = [text * (1 + i % 4) for i, text in enumerate(task.texts)]
    task.tokens = Tokens(trained, task.texts)
    batch = [3, 17, 8, 30, 11, 26, 5, 20, 14]
    texts = [task.texts[i] for i in batch]
    passes = []
    with monkeypatch.context() as patch:
        forward = trained[0].forward
        patch.setattr(trained[0], "forward", lambda f, **k: passes.append(f["input_ids"].shape) or forward(f, **k))
        e_u, run = embed(trained, task.tokens, batch)
    assert sum(rows * columns for rows, columns in passes) == run
    assert len(passes) == {0: 4, 10**6: 1}.get(overhead, len(passes))
    found = loss_and_gradients(task, e_u, batch)
    padded = trained(trained.preprocess(texts))["e_u"]
    alone = torch.cat([trained(trained.preprocess([text]))["e_u"] for text in texts])
    assert len(found) > 20
    for other in (padded, alone):
        for name, value in loss_and_gradients(task, other, batch).items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_group_is_what_the_tokenizer_makes_of_its_texts(trained: SentenceTransformer, side: str) -> None:
    trained.tokenizer.padding_side = side
    tokens = Tokens(trained, TEXTS)
    for members in ([1, 2, 4], [5, 0], [3]):
        batch, expected = tokens.batch(torch.tensor(members)), trained.preprocess([TEXTS[i] for i in members])
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(batch[name], value) if isinstance(value, Tensor) else batch[name] == value


def test_training_texts_are_tokenised_once(trained: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(trained)
    monkeypatch.setattr(type(trained), "preprocess", lambda *_, **__: pytest.fail("tokenised again"))
    for batch in task.batches(0):
        ((_, tokens),) = task.losses(batch, 0, 1)
        assert tokens >= sum(len(task.texts[i]) + 2 for i in batch)
