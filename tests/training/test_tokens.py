"""Training on target tokens: micro-batches, their shapes, the loss, what moves."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from elmd.data.collate import Batch
from elmd.data.encode import Encoder
from elmd.models.llm import load_llm
from elmd.training import checkpoint
from elmd.training.loop import fit
from elmd.training.plan import Plan
from elmd.training.tokens import ElmdObjective, token_loss
from tiny_elmd import PROMPT, SEEN, build, examples


@pytest.mark.parametrize(("name", "prefix", "world"), [("rep", 0, 1), ("eerg", 4, 2)])
def test_the_shapes_of_a_training_are_those_of_its_micro_batches(
    llm, encoder, name: str, prefix: int, world: int
) -> None:
    data, model = examples(encoder, name, samples=SEEN), build(llm, prefix=prefix)
    accelerator = cast(Accelerator, SimpleNamespace(num_processes=world, device=torch.device("cpu")))
    objective = ElmdObjective(model, {}, data, accelerator, batch_size=4, micro_tokens=400, seed=0, evaluate=dict)
    seen = set()
    run = model.loss

    def loss(micro: Batch) -> Tensor:
        seen.add((*micro.ids.shape, micro.keep, micro.free, len(micro.at)))
        return run(micro)

    model.loss = loss  # type: ignore[method-assign]
    batches = [batch for epoch in range(3) for batch in objective.batches(epoch)][:-1]
    for batch in batches:
        for rank in range(world):
            list(objective.losses(batch, rank, world))
    assert len(seen) > 2
    assert objective.shapes(len(batches)) == seen


def test_one_times_eight_equals_eight_times_one(llm, encoder) -> None:
    gradients = []
    for budget in (100_000, 1, 200):
        model, data = build(llm), examples(encoder)
        objective = ElmdObjective(
            model, {"adapter": model.adapter, "projector": model.projector}, data, Accelerator(cpu=True),
            batch_size=8, micro_tokens=budget, seed=0, evaluate=dict,
        )  # fmt: skip
        batch = objective.batches(0)[0]
        losses = list(objective.losses(batch, 0, 1))
        assert len(losses) == {100_000: 1, 1: 8}.get(budget, len(losses))
        for loss, _ in losses:
            (loss / objective.weight(batch)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 1e-5


def test_global_batches_cover_every_sample_once(llm, encoder) -> None:
    model, data = build(llm), examples(encoder)
    objective = ElmdObjective(
        model, {}, data, Accelerator(cpu=True), batch_size=5, micro_tokens=1, seed=0, evaluate=dict
    )
    assert sorted(i for batch in objective.batches(0) for i in batch) == list(range(len(data)))
    assert objective.batches(0) == objective.batches(0)
    assert objective.batches(0) != objective.batches(1)
    assert objective.weight([0, 1]) == len(data.rows[0].target) + len(data.rows[1].target)


def test_token_loss_is_the_mean_over_all_target_tokens(llm, encoder) -> None:
    model, data = build(llm), examples(encoder)
    whole = model.loss(data.batch(range(len(data)))).sum().item() / data.targets(range(len(data)))
    assert token_loss(model, data, 150, Accelerator(cpu=True), "") == pytest.approx(whole, rel=1e-5)
    assert not math.isnan(whole)


def state_hash(module: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_rep_moves_the_projector_and_nothing_else(llm_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_llm(llm_folder)
    encoder = Encoder(tokenizer, PROMPT, 200, 40)
    elmd = build((model, tokenizer), prefix=0)
    before = state_hash(elmd.llm), state_hash(elmd.projector)
    objective = ElmdObjective(
        elmd, {"projector": elmd.projector}, examples(encoder, "rep", samples=SEEN), Accelerator(cpu=True),
        batch_size=4, micro_tokens=300, seed=0, evaluate=lambda: {"score": 0.0},
    )  # fmt: skip
    plan = Plan({"projector": 1e-2}, 3, 0, "score", True, evaluate_every=3, checkpoint_every=3)
    elmd.train()
    fit(objective, plan, tmp_path, Accelerator(cpu=True), "REP")
    checkpoint.load_latest(tmp_path / "checkpoints", objective.modules, torch.optim.AdamW(elmd.projector.parameters()))
    assert state_hash(elmd.llm) == before[0]
    assert state_hash(elmd.projector) != before[1]
    assert all(not p.requires_grad and p.grad is None for p in elmd.llm.parameters())
