"""Algorithm 1, the retriever's folder, the index without leaks, and the stages `erm` and `index`."""

from __future__ import annotations

import json
import shutil
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
from transformers import BertModel

from elmd.config import Config, DataConfig, ErmConfig, Key, Reader, RetrieverConfig
from elmd.data.samples import save_samples
from elmd.errors import ArtifactError, CheckpointError, ConfigError, DataError
from elmd.losses import retriever_loss
from elmd.retrieval import load_retriever, retriever
from elmd.retrieval.index import Index, Queries, demonstrations, load_demonstrations, save_demonstrations
from elmd.retrieval.retriever import Tokens, add_separation, cut_texts, embed, encode, separation_of
from elmd.retrieval.self_separation import SelfSeparation
from elmd.stages import depends
from elmd.stages import erm as erm_stage
from elmd.stages import index as index_stage
from elmd.stages.base import Job
from elmd.stages.erm import Erm, emotion_batches, gather_rows
from elmd.types import Sample
from encoders import WIDTH, make_samples

TEXTS = ["我好开心！", "你今天开心吗", "他难过", "我不生气了，你呢", "害怕", "好的。"]


@pytest.fixture
def trained(bert: Path) -> SentenceTransformer:
    torch.manual_seed(1)
    return add_separation(load_retriever(bert), 4, "mlp")


# --- Algorithm 1 ---------------------------------------------------------------------------------------------------


def slow_self_separation(module: SelfSeparation, e: Tensor) -> Tensor:
    """Algorithm 1 line by line, for one e_u [d]."""
    d, s = module.width, module.slots
    g = d // s
    rows = []
    for i in range(1, s + 1):
        c = torch.zeros(d, dtype=e.dtype)
        for position in range((i - 1) * g + 1, i * g + 1):  # the paper counts from 1
            c[position - 1] = 1
        rows.append(module.rest(module.first(torch.cat([e + c, c]))))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize(("width", "slots"), [(16, 4), (16, 1), (16, 16), (17, 4), (10, 3)])
def test_self_separation_equals_algorithm_1(width: int, slots: int, kind: str) -> None:
    torch.manual_seed(width + slots)
    module = SelfSeparation(width, slots, kind).double()
    e = torch.randn(5, width, dtype=torch.float64)
    expected = torch.stack([slow_self_separation(module, one) for one in e])
    assert module.separate(e).shape == (5, slots, width)
    torch.testing.assert_close(module.separate(e), expected, rtol=1e-12, atol=1e-12)
    assert module.get_embedding_dimension() == slots * width


def test_the_tail_of_an_uneven_width_belongs_to_no_slot() -> None:
    augment = SelfSeparation(10, 3).augment
    assert augment[:, 9:].abs().sum() == 0
    assert augment.sum(dim=1).tolist() == [3, 3, 3]
    assert augment.sum(dim=0).tolist() == [1] * 9 + [0]


def test_self_separation_refuses_what_it_cannot_cut() -> None:
    with pytest.raises(ConfigError, match="9 slots cannot be cut from a width of 8"):
        SelfSeparation(8, 9)
    with pytest.raises(ConfigError, match="unknown kind of self-separation 'cnn'; use mlp or linear"):
        SelfSeparation(8, 2, "cnn")


# --- The retriever's folder ----------------------------------------------------------------------------------------


def test_saved_and_loaded_retriever_is_equal_bit_for_bit(trained: SentenceTransformer, tmp_path: Path) -> None:
    trained.max_seq_length = 9
    trained.save_pretrained(str(tmp_path), create_model_card=False)
    loaded = load_retriever(tmp_path)
    assert loaded.max_seq_length == 9
    before, after = trained.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for key in ("e_u", "E_s"):
        assert torch.equal(encode(trained, TEXTS)[key], encode(loaded, TEXTS)[key])
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}


def test_it_is_an_ordinary_sentence_transformer_whose_encode_gives_the_slots(trained_folder: Path) -> None:
    model = load_retriever(trained_folder)
    keys = encode(model, TEXTS, batch_size=2)
    assert (keys["e_u"].shape, keys["E_s"].shape) == ((6, WIDTH), (6, 4 * WIDTH))
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), keys["E_s"], rtol=1e-5, atol=1e-6)
    separation = separation_of(model)
    assert separation is not None
    torch.testing.assert_close(separation.separate(keys["e_u"]).flatten(1), keys["E_s"])
    assert model.get_embedding_dimension() == 4 * WIDTH


def test_raw_retriever_is_mean_pooling_and_has_no_slots(bert: Path) -> None:
    model = load_retriever(bert, max_tokens=7)
    assert (model.max_seq_length, separation_of(model)) == (7, None)
    keys = encode(model, TEXTS)
    assert list(keys) == ["e_u"]
    tokens = model.tokenizer([TEXTS[0]], return_tensors="pt", truncation=True, max_length=7)
    with torch.no_grad():
        expected = BertModel.from_pretrained(bert).eval()(**tokens).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(keys["e_u"][:1], expected, rtol=1e-5, atol=1e-6)
    assert cut_texts(model, ["好", TEXTS[0], TEXTS[3]]) == 1


def test_encoding_keeps_the_order_and_gives_equal_texts_equal_vectors(trained: SentenceTransformer) -> None:
    keys = encode(trained, [*TEXTS, TEXTS[3]], batch_size=2)
    alone = torch.cat([encode(trained, [text])["e_u"] for text in TEXTS])
    torch.testing.assert_close(keys["e_u"][:-1], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(keys["E_s"][3], keys["E_s"][-1])


def test_a_normalize_module_is_kept_raw_and_left_out_under_self_separation(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Normalize

    plain = load_retriever(bert)
    SentenceTransformer(modules=[*plain, Normalize()]).save_pretrained(str(tmp_path), create_model_card=False)
    raw = load_retriever(tmp_path)
    torch.testing.assert_close(encode(raw, TEXTS)["e_u"].norm(dim=1), torch.ones(len(TEXTS)))
    assert torch.equal(encode(add_separation(raw, 2, "mlp"), TEXTS)["e_u"], encode(plain, TEXTS)["e_u"])


def test_prompts_of_a_checkpoint_are_used(bert: Path, tmp_path: Path) -> None:
    plain = load_retriever(bert)
    SentenceTransformer(modules=list(plain), prompts={"query": "我是"}, default_prompt_name="query").save_pretrained(
        str(tmp_path), create_model_card=False
    )
    loaded = load_retriever(tmp_path)
    torch.testing.assert_close(encode(loaded, ["开心"])["e_u"], encode(plain, ["我是开心"])["e_u"])
    torch.testing.assert_close(torch.tensor(loaded.encode(["开心"])), encode(loaded, ["开心"])["e_u"])


@pytest.mark.parametrize("kind", ["evil.Module", "os.path.Transformer", "sentence_transformers.base.modules.Dense"])
def test_foreign_modules_are_refused_by_name(trained_folder: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "copy"))
    listing = json.loads((folder / "modules.json").read_text())
    listing[2]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match=f"modules.json: module '{kind}' is not one a retriever may have"):
        load_retriever(folder)


def test_broken_folders_are_refused_with_their_name(trained_folder: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/nowhere/at all: no such folder; check retriever\.path"):
        load_retriever("/nowhere/at all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: cannot be loaded as a sentence encoder"):
        load_retriever(tmp_path / "empty")
    lost = Path(shutil.copytree(trained_folder, tmp_path / "lost"))
    (lost / "2_SelfSeparation" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2_SelfSeparation: model\.safetensors missing; train"):
        load_retriever(lost)
    narrow = Path(shutil.copytree(trained_folder, tmp_path / "narrow"))
    (narrow / "2_SelfSeparation" / "config.json").write_text('{"width": 8, "slots": 4, "kind": "mlp"}')
    with pytest.raises(CheckpointError, match=r"the weights do not fit config\.json"):
        load_retriever(narrow)
    order = Path(shutil.copytree(trained_folder, tmp_path / "order"))
    listing = json.loads((order / "modules.json").read_text())
    (order / "modules.json").write_text(json.dumps(listing[1:]))
    with pytest.raises(CheckpointError, match="the modules Pooling, SelfSeparation are not those of a retriever"):
        load_retriever(order)
    pickled = Path(shutil.copytree(bert, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="with safetensors weights"):
        load_retriever(pickled)


# --- The index -----------------------------------------------------------------------------------------------------


def slow_search(vectors: Tensor, train: list[Sample], query: Tensor, sample: Sample, k: int) -> list[int]:
    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))

    allowed = [i for i, one in enumerate(train) if one.dialogue != sample.dialogue]
    return sorted(allowed, key=lambda i: -cosine(vectors[i], query))[:k]


@pytest.fixture(scope="module")
def indexed() -> tuple[list[Sample], list[Sample], Tensor, Index]:
    samples = make_samples()
    train = [sample for sample in samples if sample.split == "train"]
    vectors = torch.randn(len(samples), 6, generator=torch.Generator().manual_seed(0))
    return samples, train, vectors, Index.build(train, {"e_u": vectors[: len(train)]})


def test_search_equals_the_loop_and_never_meets_the_own_dialogue(indexed: Any) -> None:
    samples, train, vectors, index = indexed
    found = index.search("e_u", Queries.of(vectors, samples), 3)
    for i, sample in enumerate(samples):
        assert found.positions[i].tolist() == slow_search(vectors[: len(train)], train, vectors[i], sample, 3)
        assert sample.dialogue not in {train[p].dialogue for p in found.positions[i].tolist()}
    assert (found.similarity.diff(dim=1) <= 0).all()


def test_with_the_own_dialogue_allowed_each_training_sample_finds_itself(indexed: Any) -> None:
    samples, train, vectors, index = indexed
    found = index.search("e_u", Queries.of(vectors, samples), 1, allow_same_dialogue=True)
    assert found.positions[: len(train), 0].tolist() == list(range(len(train)))
    torch.testing.assert_close(found.similarity[: len(train), 0], torch.ones(len(train)))


def test_a_sample_is_excluded_by_its_id_even_under_another_dialogue(indexed: Any) -> None:
    _, train, vectors, index = indexed
    found = index.search("e_u", Queries(vectors[:1], [train[0].id], ["another"]), 1)
    assert found.positions.item() != 0


def test_ties_go_to_the_first_candidate(indexed: Any) -> None:
    _, train, _, _ = indexed
    row = torch.randn(1, 33, generator=torch.Generator().manual_seed(1))
    index = Index.build(train, {"e_u": row.repeat(len(train), 1)})
    found = index.search("e_u", Queries(row, ["q"], [train[0].dialogue]), 5)
    assert found.positions[0].tolist() == [4, 5, 6, 7, 8]  # the first dialogue has four samples


def test_no_candidate_left_is_an_error_that_names_the_sample(indexed: Any) -> None:
    samples, train, vectors, _ = indexed
    alone = Index.build(train[:4], {"e_u": vectors[:4]})
    with pytest.raises(DataError, match="sample d0#1: 1 to be retrieved, but only 0 of 4 training samples are outside"):
        alone.search("e_u", Queries.of(vectors[:1], samples[:1]), 1)
    with pytest.raises(DataError, match="no key 'E_s', only e_u"):
        alone.search("E_s", Queries.of(vectors[:1], samples[:1]), 1)


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
    with pytest.raises(ArtifactError, match="is no whole index"):
        Index.load(tmp_path)


def test_demonstrations_survive_the_file(indexed: Any, tmp_path: Path) -> None:
    samples, train, vectors, index = indexed
    candidates = {sample.id: sample for sample in train}
    found = demonstrations(index, candidates, samples, vectors, key="e_u", k=2)
    assert list(found) == [sample.id for sample in samples]
    one = found[samples[0].id][0]
    assert one.response == candidates[one.source].response.text
    assert one.emotion == candidates[one.source].response.emotion
    assert one.utterance == candidates[one.source].utterance.text
    path = tmp_path / "demonstrations.jsonl"
    save_demonstrations(path, found)
    assert load_demonstrations(path) == found
    path.write_text(path.read_text(encoding="utf-8") + '{"sample": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=rf"demonstrations.jsonl:{2 * len(samples) + 1}: not a demonstration \("):
        load_demonstrations(path)
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read \(No such file or directory\); run stage=index"):
        load_demonstrations(tmp_path / "none.jsonl")


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
    found = demonstrations(index, train, samples, vectors, key="e_u", k=2)
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
    assert depends.erm(cfg).files == {"retriever": bert}
    assert list(depends.erm(cfg).upstream) == ["prepare"]
    assert "checkpoint_every" not in depends.erm(cfg).config["erm"]
    cfg.retriever.path = "bootstrap"
    assert depends.erm(cfg).files == {}
    assert list(depends.erm(cfg).upstream) == ["prepare", "bootstrap/retriever"]
    assert list(depends.index(cfg).upstream) == ["prepare", "erm"]
    assert depends.index(cfg).seed is None


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
