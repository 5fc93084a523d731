"""Eq. 2-4 against the paper's equations written as loops, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from elmd.losses import emotion_loss, retriever_loss, separation_loss

SEEDS = range(4)
TAU = 0.5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sim(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def slow_emotion_loss(e: Tensor, labels: list[int]) -> tuple[float, int]:
    anchors, skipped = [], 0
    for i in range(len(e)):
        others = [k for k in range(len(e)) if k != i]  # n_e = positives + negatives
        positives = [k for k in others if labels[k] == labels[i]]
        if not positives:
            skipped += 1
            continue
        below = sum(math.exp(sim(e[i], e[k]) / TAU) for k in others)
        terms = [-math.log(math.exp(sim(e[i], e[p]) / TAU) / below) for p in positives]
        anchors.append(sum(terms) / len(terms))
    return (sum(anchors) / len(anchors) if anchors else 0.0), skipped


def slow_pair_loss(basic: Tensor, other: Tensor) -> float:
    """Eq. 3 of one pair of samples: the sum over the slots of the basic one."""
    total = 0.0
    for j in range(len(basic)):
        below = sum(math.exp(sim(basic[j], other[k]) / TAU) for k in range(len(other)))
        total += -math.log(math.exp(sim(basic[j], other[j]) / TAU) / below)
    return total


def slow_separation_loss(slots: Tensor) -> float:
    """The second term of eq. 4."""
    samples, s = slots.shape[:2]
    pairs = [(i, j) for i in range(samples) for j in range(i + 1, samples)]
    n_e = samples - 1
    assert len(pairs) == (n_e + 1) * n_e / 2
    return sum(slow_pair_loss(slots[i], slots[j]) for i, j in pairs) / (s * len(pairs))


@pytest.mark.parametrize("seed", SEEDS)
def test_emotion_loss_equals_the_loop(seed: int) -> None:
    e = draw(seed, 9, 5)
    labels = [0, 1, 0, 2, 1, 0, 3, 1, 1]  # 2 and 3 stand alone
    expected, skipped = slow_emotion_loss(e, labels)
    found = emotion_loss(e, torch.tensor(labels), TAU)
    assert found.skipped == skipped == 2
    assert float(found.loss) == pytest.approx(expected, rel=1e-12)


def test_emotion_loss_is_of_directions_only() -> None:
    e, labels = draw(0, 6, 5), torch.tensor([0, 0, 1, 1, 2, 2])
    scaled = e * torch.tensor([1.0, 9.0, 0.1, 3.0, 7.0, 0.5], dtype=torch.float64)[:, None]
    assert float(emotion_loss(scaled, labels, TAU).loss) == pytest.approx(float(emotion_loss(e, labels, TAU).loss))


def test_without_any_positive_the_loss_is_zero_and_says_so() -> None:
    e = draw(0, 4, 5).requires_grad_()
    found = emotion_loss(e, torch.arange(4), TAU)
    found.loss.backward()
    assert (found.loss.item(), found.skipped) == (0.0, 4)
    assert torch.equal(e.grad, torch.zeros_like(e))


def test_emotion_loss_gradient_is_finite_and_right() -> None:
    e = draw(1, 6, 3).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda x: emotion_loss(x, labels, TAU).loss, e)


def test_one_positive_draws_a_term_of_the_literal_equation() -> None:
    e, labels = draw(2, 3, 4), torch.tensor([0, 0, 0])
    terms = {}  # (anchor, its positive) -> -log of eq. 2
    for i in range(3):
        below = sum(math.exp(sim(e[i], e[k]) / TAU) for k in range(3) if k != i)
        terms[i] = [-math.log(math.exp(sim(e[i], e[p]) / TAU) / below) for p in range(3) if p != i]
    possible = [(a + b + c) / 3 for a in terms[0] for b in terms[1] for c in terms[2]]
    seen = set()
    for seed in range(60):
        value = float(emotion_loss(e, labels, TAU, torch.Generator().manual_seed(seed)).loss)
        assert any(p == pytest.approx(value, rel=1e-9) for p in possible)
        seen.add(round(value, 9))
    assert seen == {round(p, 9) for p in possible}  # every combination of draws occurs
    again = [float(emotion_loss(e, labels, TAU, torch.Generator().manual_seed(7)).loss) for _ in range(2)]
    assert again[0] == again[1]


def test_one_positive_is_right_on_average_and_never_draws_a_negative() -> None:
    e, labels = draw(3, 8, 4), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    generator = torch.Generator().manual_seed(0)
    drawn = [emotion_loss(e, labels, TAU, generator) for _ in range(600)]
    assert {one.skipped for one in drawn} == {1}
    mean = sum(float(one.loss) for one in drawn) / len(drawn)
    assert mean == pytest.approx(float(emotion_loss(e, labels, TAU).loss), rel=0.02)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("s", [2, 3, 4])
def test_separation_loss_equals_the_loop(seed: int, s: int) -> None:
    slots = draw(seed, 5, s, 6)
    assert float(separation_loss(slots, TAU)) == pytest.approx(slow_separation_loss(slots), rel=1e-12)


def test_the_earlier_sample_is_the_basic_one() -> None:
    slots = draw(0, 2, 3, 6)
    forward, backward = slow_pair_loss(slots[0], slots[1]) / 3, slow_pair_loss(slots[1], slots[0]) / 3
    assert forward != pytest.approx(backward, rel=1e-3)  # eq. 3 is not symmetric, so the choice matters
    assert float(separation_loss(slots, TAU)) == pytest.approx(forward, rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 1, 6), (1, 4, 6)])
def test_nothing_to_tell_apart_costs_nothing(shape: tuple[int, int, int]) -> None:
    slots = draw(0, *shape).requires_grad_()
    loss = separation_loss(slots, TAU)
    loss.backward()
    assert loss.item() == 0.0
    assert float(slots.grad.abs().max()) == 0.0


def test_separation_loss_gradient() -> None:
    assert torch.autograd.gradcheck(lambda x: separation_loss(x, TAU), draw(1, 3, 2, 4).requires_grad_())


@pytest.mark.parametrize(("weight", "other"), [(1.0, 1.0), (0.3, 1.0), (0.0, 1.0), (2.0, 0.0)])
def test_joint_loss_is_eq_4(weight: float, other: float) -> None:
    e, slots, labels = draw(0, 6, 5), draw(1, 6, 4, 5), [0, 0, 1, 1, 1, 2]
    found = retriever_loss(
        e, slots if other else None, torch.tensor(labels), TAU, emotion_weight=weight, separation_weight=other
    )
    expected = weight * slow_emotion_loss(e, labels)[0] + other * slow_separation_loss(slots)
    assert float(found.total) == pytest.approx(expected, rel=1e-12)
    assert found.skipped == (1 if weight else 0)
    assert (float(found.emotion) == 0) == (weight == 0)
    assert (float(found.separation) == 0) == (other == 0)


def test_joint_loss_wants_slots_where_they_count() -> None:
    with pytest.raises(ValueError, match="separation_weight is not 0 but slots is None"):
        retriever_loss(draw(0, 4, 5), None, torch.tensor([0, 0, 1, 1]), TAU)
