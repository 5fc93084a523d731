"""Steps of EERG and REP at their smallest size: every way gives one loss and one gradient, and its facts are told."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import step_eerg as eerg
from benchmarks import step_rep as rep
from benchmarks import ways
from benchmarks.harness import Case, Measured, Unequal, measure
from benchmarks.samples import drawn
from elmd.models.elmd import Elmd

LOOPS = ["elmd", "peft", "p-tuning"]
TRAINERS = ["Trainer, 4 × 1", "Trainer, 1 × 4"]
TRL = ["TRL, 4 × 1", "TRL, 1 × 4"] if importlib.util.find_spec("trl") else []


def drawn_lengths() -> list[Any]:
    return drawn(4)


def measured(case: Case) -> Measured:
    return measure(case, 1)


def facts(found: Any) -> dict[str, Mapping[str, float]]:
    return {timing.way: timing.facts for timing in found.timings}


def test_all_ways_of_eerg_take_the_same_steps() -> None:
    step, epoch, logits = [measured(case) for case in eerg.cases(small=True)]
    assert list(facts(step)) == LOOPS + TRAINERS + TRL
    assert step.apart > 0, "what is compared is rounded"
    tokens = {way: one["tokens, padding included"] for way, one in facts(step).items()}
    assert tokens["elmd"] <= tokens["peft"] < tokens["p-tuning"]
    assert tokens["Trainer, 1 × 4"] < tokens["Trainer, 4 × 1"], "single samples need no padding"
    assert list(facts(epoch)) == ["elmd", *TRAINERS]
    assert epoch.apart > 0, "of any order"
    assert all(one["tokens, padding included"] > 0 for one in facts(epoch).values())
    assert list(facts(logits)) == ["elmd", "peft"]
    assert facts(logits)["elmd"]["peak, MiB"] < facts(logits)["peft"]["peak, MiB"]


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eerg, "trl_is_here", lambda: False)
    case = next(eerg.cases(small=True))
    assert [way.name for way in case.ways] == LOOPS + TRAINERS
    assert "TRL is not installed (pip install -e '.[bench]')" in case.note


def test_lengths_of_a_trainers_batch_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: sorted, [1, 1, 3, 3] makes two batches without spread; of [0, 4, 0, 4] in given order each has 2."""
    monkeypatch.setattr(eerg, "drawn", lambda count: [(10, 0, 0), (20, 0, 0)] * (count // 2))
    task = SimpleNamespace(scale=replace(ways.SCALES["smoke"], batch=2), samples=SimpleNamespace(lengths=[0, 4] * 2))
    for order, spread in (([0, 2, 1, 3], 0), ([0, 1, 2, 3], 2)):
        monkeypatch.setattr(eerg, "get_length_grouped_indices", lambda lengths, rows, order=order: order)
        assert f"Lengths differ by {spread} tokens" in eerg.grouped(task)


@pytest.mark.parametrize(("home", "name"), [("benchmarks.trainers", "Trainer"), ("trl", "SFTTrainer")])
def test_a_trainer_that_moves_positions_is_found_out(home: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of one's own are left as they are."""
    module = pytest.importorskip(home)

    class Moved(getattr(module, name)):  # type: ignore[misc]
        data_collator: Any

        def __init__(self, *args: Any, **others: Any):
            super().__init__(*args, **others)
            collate = self.data_collator
            self.data_collator = lambda items: (batch := collate(items)) | {"position_ids": batch["position_ids"] + 4}

    monkeypatch.setattr(module, name, Moved)
    with pytest.raises(Unequal, match=f"{'TRL' if home == 'trl' else 'Trainer'}, 4 × 1"):
        measured(next(eerg.cases(small=True)))


def test_the_split_of_rep_keeps_less_and_gives_the_same() -> None:
    near, far = [measured(case) for case in rep.cases(small=True)]
    for found in (near, far):
        assert list(facts(found)) == ["elmd", "elmd, no split", "transformers"]
        assert found.apart > 0
        saved = {way: one["saved for backward, MiB"] for way, one in facts(found).items()}
        assert 0 < saved["elmd, no split"] < saved["transformers"]
        assert saved["elmd"] < 0.65 * saved["elmd, no split"]


def test_saved_bytes_by_hand() -> None:
    """exp keeps its result, a product with a weight keeps its input; the weight itself is not counted."""
    scale = ways.SCALES["smoke"]
    llm = ways.language_model(scale, torch.device("cpu"), torch.float32)
    task = ways.Task("rep", llm, scale, ways.Samples(drawn_lengths(), 300, tokens_per_character=0.3), 100)
    x = torch.ones(5, 32, requires_grad=True)

    def parts(_: Any) -> Any:
        yield (x.exp() @ llm.model.layers[0].self_attn.o_proj.weight).sum()
        yield x.exp().sum()

    assert ways.saved_bytes(task, ways.Step("by hand", parts), [0]) == 2 * 4 * x.numel()


def test_peak_bytes_by_hand() -> None:
    def work() -> None:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 21, dtype=torch.uint8)
        del first, second
        torch.empty(1 << 19, dtype=torch.uint8)

    assert ways.peak_bytes(work) == 3 << 20


def test_samples_of_text_alone() -> None:
    samples = ways.Samples(drawn_lengths(), 300, tokens_per_character=0.3, slots=0)
    batch = samples.batch([0, 1])
    assert batch.visual is None
    assert not batch.slots.any()
    scale = ways.SCALES["smoke"]
    llm = ways.language_model(scale, torch.device("cpu"), torch.float32)
    task = ways.Task("eerg", llm, scale, samples, 200)
    assert isinstance(task.model, Elmd)
    assert task.model.projector is None
    assert [p is task.prefix.table.embedding.weight for p in task.trained] == [True]
