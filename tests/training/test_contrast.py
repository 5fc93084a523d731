"""The ERM as a training task: batches by emotion, eq. 4 over ranks, and a batch in groups of like length."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from elmd.errors import ConfigError
from elmd.losses import retriever_loss
from elmd.retrieval import load_retriever, retriever
from elmd.retrieval.retriever import Tokens, add_separation, embed, encode
from elmd.training import contrast
from elmd.training.contrast import Erm, emotion_batches, gather_rows
from encoders import WIDTH, make_samples
from ranks import run_ranks


@pytest.fixture
def trained(bert: Path) -> SentenceTransformer:
    torch.manual_seed(1)
    return add_separation(load_retriever(bert), 4, "mlp")


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
    splits = {split: [sample for sample in samples if sample.split == split] for split in ("train", "valid")}
    return Erm(model, splits, "valid", **{"batch_size": 9, "seed": 0, "temperature": 0.5} | settings)


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
    monkeypatch.setattr(contrast, "dist", ranks)
    tasks = [make_task(load_retriever(trained_folder)) for _ in range(world)]

    def work(rank: int) -> float:
        ranks.rank.number = rank
        ((loss, _),) = tasks[rank].losses(batch, rank, world)
        loss.backward()
        return loss.item()

    with ThreadPoolExecutor(world) as pool:
        total = sum(pool.map(work, range(world)))
    alone = make_task(load_retriever(trained_folder))
    ((loss, _),) = alone.losses(batch, 0, 1)
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    expected, parts = gradients(alone), [gradients(task) for task in tasks]
    assert len(expected) > 20
    for name, value in expected.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-7, msg=name)


def test_two_processes_have_the_gradient_of_one(trained_folder: Path, tmp_path: Path) -> None:
    task = make_task(load_retriever(trained_folder))

    def work(accelerator: Accelerator) -> None:
        rank, world = accelerator.process_index, accelerator.num_processes
        ((loss, _),) = task.losses(ODD_BATCH, rank, world)
        loss.backward()
        save_file({"loss": loss.detach(), **gradients(task)}, tmp_path / f"{rank}.safetensors")

    assert [code for code, _ in run_ranks(work, 2, tmp_path)] == [0, 0]
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
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


def loss_and_gradients(task: Erm, e_u: Tensor, batch: Sequence[int]) -> dict[str, Tensor]:
    for module in task.modules.values():
        module.zero_grad()
    loss = task.loss(e_u, batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(task)}


@pytest.mark.parametrize("overhead", [0, 20, 10**6])
def test_groups_have_loss_and_gradient_of_one_padded_batch_and_of_one_by_one(
    trained: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, overhead: int
) -> None:
    monkeypatch.setitem(retriever.PASS_TOKENS, "cpu", overhead)
    task = make_task(trained)
    task.texts = [text * (1 + i % 4) for i, text in enumerate(task.texts)]
    tokens = Tokens(trained, task.texts)
    batch = [3, 17, 8, 30, 11, 26, 5, 20, 14]
    texts = [task.texts[i] for i in batch]
    passes = []
    with monkeypatch.context() as patch:
        forward = trained[0].forward
        patch.setattr(trained[0], "forward", lambda f, **k: passes.append(f["input_ids"].shape) or forward(f, **k))
        e_u, run = embed(trained, tokens, texts)
    assert sum(rows * columns for rows, columns in passes) == run
    assert len(passes) == {0: 4, 10**6: 1}.get(overhead, len(passes))
    grouped = loss_and_gradients(task, e_u, batch)
    padded = trained(trained.preprocess(texts))["e_u"]
    alone = torch.cat([trained(trained.preprocess([text]))["e_u"] for text in texts])
    assert len(grouped) > 20
    for other in (padded, alone):
        for name, value in loss_and_gradients(task, other, batch).items():
            torch.testing.assert_close(grouped[name], value, rtol=1e-4, atol=1e-6, msg=name)
