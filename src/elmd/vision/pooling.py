"""Pooling of a clip's visual tokens over time and over space (eq. 6-8)."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(x: Tensor) -> Tensor:
    """V_c = [V_t ; V_s] (eq. 6-8): X [m, o, q] -> [o + m, q].

    V_t [o, q] is the mean over frames, V_s [m, q] the mean over query tokens; temporal first, no padding.
    """
    return torch.cat([x.mean(dim=0), x.mean(dim=1)])
