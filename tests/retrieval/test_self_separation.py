"""Self-separation against Algorithm 1, line by line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elmd.errors import ConfigError
from elmd.retrieval.self_separation import SelfSeparation


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
    expected = torch.stack([slow_self_separation(module, row) for row in e])
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
