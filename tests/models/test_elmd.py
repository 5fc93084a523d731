"""The model against slow oracles: loss, gradients, saving, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elmd.errors import CheckpointError
from elmd.models.adapter import Prefix
from elmd.models.elmd import Elmd
from elmd.models.llm import load_llm
from elmd.models.projector import Projector
from oracle import slow_loss
from tiny_elmd import SAMPLES, VISUAL, build, examples


@pytest.mark.parametrize("prefix", [0, 4])
def test_loss_equals_the_slow_sum_over_unpadded_samples(llm, encoder, prefix: int) -> None:
    model, data = build(llm, prefix=prefix), examples(encoder)
    everything = list(range(len(data)))
    found = model.loss(data.batch(everything))
    for i in everything:
        slow = slow_loss(model, data.rows[i], VISUAL[SAMPLES[i].id])
        assert found[i].item() == pytest.approx(slow.item(), rel=2e-5)


def test_gradients_of_prefix_and_projector_equal_the_slow_ones(llm, encoder) -> None:
    model, data = build(llm), examples(encoder)
    model.loss(data.batch([0, 1, 4])).sum().backward()
    fast = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for i in (0, 1, 4):
        slow_loss(model, data.rows[i], VISUAL[SAMPLES[i].id]).backward()
    slow = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(fast) == len(slow) == 3  # table, weight, bias: nothing of the language model
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_saved_parts_alone_give_identical_outputs(llm, encoder, tmp_path: Path) -> None:
    model, data = build(llm), examples(encoder, with_target=False)
    model.save(tmp_path)
    files = {p.relative_to(tmp_path).as_posix(): p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()}
    assert {name for name in files if not name.endswith("README.md")} == {
        "projector.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert sum(files.values()) < 20_000, "what trains, not the language model"
    again = Elmd.load(tmp_path, llm[0]).eval()
    batch = data.batch([0, 3, 5])
    assert torch.equal(model(batch, keep=3).logits, again(batch, keep=3).logits)
    with pytest.raises(CheckpointError, match="holds neither a projector nor an adapter"):
        Elmd.load(tmp_path / "nothing", llm[0])


def test_dropout_touches_the_prefix_in_training_only(llm, encoder) -> None:
    torch.manual_seed(0)
    model = Elmd(llm[0], Projector(6, 32), Prefix.create(llm[0], 4, 0.5))
    batch = examples(encoder).batch([0, 1])
    model.eval()
    assert torch.equal(model.loss(batch), model.loss(batch))
    model.train()
    assert not model.llm.training
    assert not torch.equal(model.loss(batch), model.loss(batch))


def test_wrong_widths_are_refused(llm) -> None:
    with pytest.raises(CheckpointError, match="the projector writes 16 numbers, the language model reads 32"):
        Elmd(llm[0], Projector(6, 16))


def test_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be loaded as a language model .*; give llm\.path"):
        load_llm(tmp_path / "nowhere")
