"""Sentence vectors of utterances before and after ERM, laid out in the plane by t-SNE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elmd.labels import EMOTIONS
from elmd.types import Sample

#: Utterances in a picture; more would hide each other and cost seconds per hundred.
LIMIT = 600

Places = dict[str, list[tuple[float, float]]]


def clouds(erm: Path, raw: Path, samples: Sequence[Sample], *, max_tokens: int, seed: int = 0) -> dict[str, Places]:
    """Places [2] of the utterances u of `samples`, by picture and then by the emotion of u.

    The pictures are e_u of the raw encoder, e_u after ERM, and E_s where the retriever has self-separation. Each is
    laid out by itself (cosine distances, start from PCA, seeded): places in different pictures cannot be compared.

    Args:
        erm: folder of the trained retriever. raw: folder of the encoder that ERM began with.
        samples: at most `LIMIT` of them are drawn with `seed`.
    """
    from sklearn.manifold import TSNE

    from elmd.log import progress
    from elmd.retrieval.retriever import encode, load_retriever

    order = np.random.default_rng(seed).permutation(len(samples))[:LIMIT]
    some = [samples[i] for i in sorted(order)]
    texts = [sample.utterance.text for sample in some]
    before, after = (encode(load_retriever(path, max_tokens=max_tokens), texts) for path in (raw, erm))
    vectors = {"e_u, raw encoder": before["e_u"], "e_u after ERM": after["e_u"]}
    if "E_s" in after:
        vectors["E_s after ERM"] = after["E_s"]
    clouds: dict[str, Places] = {}
    for name, rows in progress(vectors.items(), "t-SNE", total=len(vectors), unit="picture"):
        perplexity = min(30.0, (len(some) - 1) / 3)
        plane = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(rows.numpy())
        clouds[name] = {
            emotion.value: [(float(x), float(y)) for (x, y), sample in zip(plane, some, strict=True)
                            if sample.utterance.emotion == emotion]
            for emotion in EMOTIONS
        }  # fmt: skip
    return clouds
