"""The losses of the Emotional Retrieval Module (§3.3, eq. 2-4) as pure functions on bare tensors.

B samples of a batch, d sentence width, s slots. `sim` of the paper is the cosine, τ the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class EmotionLoss(NamedTuple):
    """Eq. 2 of a batch: the mean over its anchors, and how many anchors had no positive and were left out."""

    loss: Tensor
    skipped: int


class RetrieverLoss(NamedTuple):
    """Eq. 4 of a batch (`total`) and its two parts before weighting; a part of weight 0 is not computed and is 0."""

    total: Tensor
    emotion: Tensor
    separation: Tensor
    skipped: int


def emotion_loss(
    embeddings: Tensor, labels: Tensor, temperature: float, one_positive: Generator | None = None
) -> EmotionLoss:
    """Pull samples of one emotion together and push the others away: L_e (eq. 2).

    The cross-entropy of finding a same-emotion sample (positive) among all other samples of the batch, which are
    the n_e = B - 1 positives and negatives of an anchor; the anchor itself is no candidate. -log is averaged over
    the positives of each anchor (ours; the equation names one), then over the anchors that have one. Elsewhere it
    is known as the supervised contrastive loss; with one positive per anchor it is InfoNCE.

    Args:
        embeddings: e_u [B, d]; need not be normalised.
        labels: [B], integers.
        temperature: τ.
        one_positive: the literal equation: one positive per anchor, drawn uniformly from this (CPU) generator.

    Returns:
        The loss (0 with zero gradient where no anchor has a positive) and the number of anchors left out.
    """
    e = F.normalize(embeddings, dim=-1)
    itself = torch.eye(len(e), dtype=torch.bool, device=e.device)
    similarity = (e @ e.T / temperature).masked_fill(itself, -torch.inf)  # [B, B]
    positive = (labels[:, None] == labels[None, :]) & ~itself
    anchors = positive.any(dim=1)
    skipped = len(e) - int(anchors.sum())
    if skipped == len(e):
        return EmotionLoss(embeddings.sum() * 0, skipped)
    positive = positive[anchors]
    # The anchor's own entry is -inf and never a positive: filled, so that 0 x inf cannot enter the sum.
    log_p = similarity[anchors].log_softmax(dim=1).masked_fill(~positive, 0)  # [anchors, B]
    if one_positive is not None:
        drawn = torch.multinomial(positive.double().cpu(), 1, generator=one_positive).to(e.device)
        return EmotionLoss(-log_p.gather(1, drawn).mean(), skipped)
    return EmotionLoss(-(log_p.sum(dim=1) / positive.sum(dim=1)).mean(), skipped)


def separation_loss(slots: Tensor, temperature: float) -> Tensor:
    """Make slot j of one sample recognisable among the slots of another: L_c, mean over pairs and slots (eq. 3, 4).

    All n_s = B(B-1)/2 pairs of the batch take part. Eq. 3 is not symmetric: its candidates are the slots of one of
    the two samples only, and the paper does not say which sample is the "basic one". Here it is the one that comes
    first in the batch; batches are shuffled, so each is basic as often as not.

    Args:
        slots: E_s [B, s, d]; need not be normalised.
        temperature: τ.

    Returns:
        1 / (s n_s) Σ L_c; 0 for s = 1, where nothing is to be told apart, and for B = 1, which has no pair.
    """
    samples, s, _ = slots.shape
    if samples < 2:
        return slots.sum() * 0
    h = F.normalize(slots, dim=-1).flatten(0, 1)  # [B s, d]
    similarity = (h @ h.T / temperature).view(samples, s, samples, s)  # slot j of a, slot k of b
    log_p = similarity.log_softmax(dim=-1).diagonal(dim1=1, dim2=3)  # [a, b, s]: k = j
    first, second = torch.triu_indices(samples, samples, offset=1, device=h.device)
    return -log_p[first, second].mean()


def retriever_loss(
    embeddings: Tensor,
    slots: Tensor | None,
    labels: Tensor,
    temperature: float,
    *,
    emotion_weight: float = 1.0,
    separation_weight: float = 1.0,
    one_positive: Generator | None = None,
) -> RetrieverLoss:
    """The joint objective of the retriever: L_r = λ L_e + mean L_c (eq. 4).

    Args:
        embeddings: e_u [B, d].
        slots: E_s [B, s, d]; None where `separation_weight` is 0.
        labels: emotions [B], integers.
        temperature: τ of both losses.
        emotion_weight: λ; 0 is Table 3's "w/o ERT".
        separation_weight: 1 in the paper; 0 is Table 3's "w/o SSC".
        one_positive: see `emotion_loss`.
    """
    emotion, skipped = EmotionLoss(embeddings.sum() * 0, 0)
    separation = embeddings.sum() * 0
    if emotion_weight:
        emotion, skipped = emotion_loss(embeddings, labels, temperature, one_positive)
    if separation_weight:
        if slots is None:
            raise ValueError("separation_weight is not 0 but slots is None")
        separation = separation_loss(slots, temperature)
    return RetrieverLoss(emotion_weight * emotion + separation_weight * separation, emotion, separation, skipped)
